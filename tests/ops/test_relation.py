"""What is particular to crd, pkt, similarity_preserving and alignment: panels, the two forms, scales, memory."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from peak_memory import peak_memory
from torch import Tensor

import kdfast
from kdfast import backends
from kdfast.ops.relation import cpu_steps, products, rows, tiles
from samples import SAMPLES
from support import DTYPES, HALF, LAYOUTS, assert_parity

pytestmark = pytest.mark.skipif(backends.extension_problem() is not None, reason="the extension is not built")

PAIRS = ("crd_loss", "pkt_loss", "similarity_preserving_loss")
FUNCTIONS = (*PAIRS, "kernel_alignment_loss")
FORMS = {"rows": math.inf, "features": 0.0}  # what an operation in float64 is said to cost
# Panels have 16 rows here, tasks 128 columns, vectors up to 16: below, at and above each.
COUNTS = (1, 2, 15, 16, 17, 33, 129, 150)


@pytest.fixture(params=FORMS)
def form(request, monkeypatch) -> str:
    monkeypatch.setattr(products, "double_cost", lambda device: FORMS[request.param])
    return request.param


@pytest.fixture(params=["stored", "scaled later"])
def unit(request, monkeypatch) -> str:
    monkeypatch.setattr(cpu_steps, "STORED_BYTES", 2**40 if request.param == "stored" else 0)
    return request.param


@pytest.fixture(autouse=True)
def small_panels(monkeypatch) -> None:
    monkeypatch.setitem(tiles.MOST, "cpu", 16)
    monkeypatch.setattr(rows, "PANEL_ROWS", 16)
    monkeypatch.setattr(products, "SEEN_AT_ONCE", 16)


def features(n: int, d: int, e: int, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "student": torch.randn(n, d, generator=generator, dtype=torch.float64),
        "teacher": torch.randn(n, e, generator=generator, dtype=torch.float64),
    }


def arguments(name: str, n: int, d: int = 6, e: int = 9, seed: int = 0) -> dict[str, Tensor]:
    labels = torch.randint(3, (n,), generator=torch.Generator().manual_seed(seed))
    return {**features(n, d, e, seed), **({"labels": labels} if name == "crd_loss" else {})}


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("level", backends.cpu_levels())
def test_every_instruction_set_agrees_with_the_reference(level, name, form, unit):
    with backends.use_cpu_level(level):
        for seed in range(16):
            inputs = arguments(name, COUNTS[seed % len(COUNTS)], seed=seed)
            generator = torch.Generator().manual_seed(seed)
            options = SAMPLES[name].draw(generator, inputs["student"].shape[:1], 6)
            layout = list(LAYOUTS)[seed % len(LAYOUTS)]
            assert_parity(name, inputs, options, DTYPES[seed // 4], layout=layout, seed=seed)


@pytest.mark.parametrize("columns", [1, 17, 1100])  # a lane, a tail, more than one stretch of sums
@pytest.mark.parametrize("level", backends.cpu_levels())
def test_rows_of_similarities_with_norms_that_move_that_are_clamped_and_that_are_zero(level, columns):
    generator = torch.Generator().manual_seed(columns)
    a, b = (torch.randn(5, columns, dtype=torch.float64, generator=generator) for _ in range(2))
    a[1] *= 1e-14 / columns
    b[2] *= 1e-14 / columns
    a[3], b[4] = 0, 0
    a.requires_grad_()
    units = [x / x.norm(dim=1, keepdim=True).clamp(min=1e-12) for x in (a, b)]
    distances = (units[0] - units[1]).square().sum(dim=1)
    (gradient,) = torch.autograd.grad(distances.sum(), a)
    gradient[3] = 0  # as the reference has it
    for dtype in (torch.float64, torch.float32):
        given = a.detach().to(dtype)
        written = b.to(dtype, copy=True)
        with backends.use_cpu_level(level):
            found = torch.ops.kdfast.similarity_rows(given, written, True)
        tolerance = 1e-11 if dtype == torch.float64 else 1e-4
        torch.testing.assert_close(found, distances.detach(), rtol=tolerance, atol=tolerance)
        scale = gradient.abs().amax(dim=1, keepdim=True).clamp(min=1)
        torch.testing.assert_close(2 * written.double() / scale, gradient / scale, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_default_panels_and_forms(name, monkeypatch):
    """Nothing patched, at sizes on either side of the switch between the forms."""
    monkeypatch.undo()
    for n, d in ((600, 8), (300, 150)):
        assert_parity(name, arguments(name, n, d, d + 3), {}, torch.float32)


@pytest.mark.parametrize("name", PAIRS)
def test_panels_as_on_a_gpu(name, form, monkeypatch):
    """Fewer rows the further down, and whole rows in float64."""
    for sizes, size in (
        (tiles.PANEL_BYTES, 4 * 3000),
        (tiles.FEWEST, 1),
        (tiles.MOST, 2**31),
        (tiles.GROWING, True),
        (rows.FLOAT64_BYTES, 2**20),
    ):
        monkeypatch.setitem(sizes, "cpu", size)
    panels = list(tiles.similarity_panels(torch.empty(150, 6)))
    assert panels == [(0, 54), (54, 88), (88, 114), (114, 136), (136, 150)]
    assert_parity(name, arguments(name, 150), {}, torch.float32)


@pytest.mark.parametrize("weight", [0.0, 1.0, 30.0])
def test_the_weight_of_crd(weight, form):
    assert_parity("crd_loss", arguments("crd_loss", 40), {"alignment_weight": weight}, torch.float32)


def test_labels_may_be_any_integers():
    inputs = arguments("crd_loss", 40)
    renamed = torch.tensor([2**40, -(2**40), -1])[inputs["labels"]]
    inputs = {k: v.float() if v.is_floating_point() else v for k, v in inputs.items()}
    assert kdfast.crd_loss(**inputs) == kdfast.crd_loss(inputs["student"], inputs["teacher"], renamed)


def test_far_similarities_neither_overflow_nor_vanish(form):
    """softplus is 1e4 on one side and exp(-30) on the other."""
    inputs = arguments("crd_loss", 20, 1, 1)
    for size, labels in ((1e3, inputs["labels"]), (1.7, torch.zeros(20, dtype=torch.int64))):
        inputs["student"] = torch.full((20, 1), math.sqrt(size), dtype=torch.float64)
        options = {"alignment_weight": 0.0}
        assert_parity("crd_loss", {**inputs, "labels": labels}, options, torch.float32)
    student = inputs["student"].float()
    labels = torch.zeros(20, dtype=torch.int64)
    loss = kdfast.crd_loss(student, student, labels, temperature=0.05, alignment_weight=0.0)
    assert loss.item() == pytest.approx(math.log1p(math.exp(-34)), rel=1e-4, abs=0)


def imitation(n: int, d: int, noise: float) -> dict[str, Tensor]:
    """Features after a ReLU, and a student that has nearly learned them."""
    teacher = features(n, d, d)["teacher"].relu()
    return {"student": teacher + noise * features(n, d, d, seed=1)["student"], "teacher": teacher}


@pytest.mark.parametrize("name", ["pkt_loss", "similarity_preserving_loss", "kernel_alignment_loss", "crd_loss"])
def test_a_student_near_its_teacher_keeps_its_digits(name, form):
    """Loss and gradient are small differences; their error is held to their own size, not to that of their terms."""
    inputs: dict[str, Tensor] = {k: v.float() for k, v in imitation(400, 10, 1e-3).items()}
    options: dict[str, object] = {}
    if name == "crd_loss":
        options = {"labels": torch.zeros(400, dtype=torch.int64)}
    results = {}
    for key, function, dtype in (
        ("truth", getattr(kdfast.reference, name), torch.float64),
        ("plain", getattr(kdfast.reference, name), torch.float32),
        ("fast", getattr(kdfast, name), torch.float32),
    ):
        student = inputs["student"].to(dtype, copy=True).requires_grad_()
        loss = function(student, inputs["teacher"].to(dtype), **options)
        loss.backward()
        results[key] = loss.detach().double(), student.grad.double()
    for i in range(2):
        truth, plain, fast = (results[key][i] for key in ("truth", "plain", "fast"))
        own, error = (plain - truth).abs().max(), (fast - truth).abs().max()
        # PyTorch's own error is one draw; 2e-5 of the result's size is about what rounding leaves of 1e-3 differences.
        assert error <= 2 * own + 2e-5 * truth.abs().max(), (float(error), float(own), float(truth.abs().max()))


SCALES = {
    "tiny": lambda x: x * 1e-22,
    "huge": lambda x: x * 1e15,
    "mixed": lambda x: x * torch.tensor([1e-22, 1.0, 1e15] * 10, dtype=x.dtype)[:, None],
    "mixed, none small": lambda x: x * torch.tensor([1.0, 1e8, 1e15] * 10, dtype=x.dtype)[:, None],
}
# An eps of 1e-7 in pkt's norms is larger than any small row.
SCALED = [("crd_loss", {"normalize": True}, scale) for scale in SCALES]
SCALED += [("pkt_loss", {}, scale) for scale in ("huge", "mixed, none small")]


@pytest.mark.parametrize(("name", "options", "scale"), SCALED)
def test_rows_of_any_size_become_unit_rows(name, options, scale, unit):
    inputs = arguments(name, 30)
    for side in ("student", "teacher"):
        inputs[side] = SCALES[scale](inputs[side])
    rounded = {k: v.float() if v.is_floating_point() else v for k, v in inputs.items()}
    values = []
    for function, dtype in ((getattr(kdfast, name), torch.float32), (getattr(kdfast.reference, name), torch.float64)):
        cast = {k: v.to(dtype) if v.is_floating_point() else v for k, v in rounded.items()}
        student = cast.pop("student").clone().requires_grad_()
        loss = function(student, **cast, **options)
        loss.backward()
        values.append(
            (loss.detach().double(), student.grad.double() * rounded["student"].double().norm(dim=1)[:, None])
        )
    (fast, fast_grad), (truth, true_grad) = values
    torch.testing.assert_close(fast, truth, rtol=2e-6, atol=0)
    torch.testing.assert_close(fast_grad, true_grad, rtol=1e-4, atol=1e-5 * float(true_grad.abs().max()))


@pytest.mark.parametrize("name", FUNCTIONS)
def test_zero_rows_get_the_references_gradient(name, form, unit):
    """0 where rows are normalised. Other rows' similarities to a zero row do change with it."""
    inputs = {k: v.float() if v.is_floating_point() else v for k, v in arguments(name, 40).items()}
    inputs["student"][3] = inputs["teacher"][5] = 0
    options = {"normalize": True} if name == "crd_loss" else {}
    student, grads = inputs.pop("student").requires_grad_(), []
    for module in (kdfast, kdfast.reference):
        loss = getattr(module, name)(student, **inputs, **options)
        grads.append(torch.autograd.grad(loss, student)[0])
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-5 * float(grads[1].abs().max()))
    if name in ("crd_loss", "pkt_loss"):
        assert (grads[0][3] == 0).all()


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_nan_is_not_hidden(name, form, unit):
    for side in ("student", "teacher"):
        inputs = {k: v.float() if v.is_floating_point() else v for k, v in arguments(name, 40).items()}
        inputs[side][7, 2] = math.nan
        assert getattr(kdfast, name)(**inputs).isnan(), side


@pytest.mark.parametrize("name", FUNCTIONS)
def test_no_rows_and_no_features_give_what_the_reference_gives(name):
    for n, d in ((0, 4), (5, 0)):
        inputs = {k: v.float() if v.is_floating_point() else v for k, v in arguments(name, n, d, d).items()}
        student = inputs.pop("student").requires_grad_()
        loss = getattr(kdfast, name)(student, **inputs)
        loss.backward()
        torch.testing.assert_close(loss.detach(), getattr(kdfast.reference, name)(student.detach(), **inputs))
        assert student.grad.shape == (n, d)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_autocast_changes_no_bit(name, form):
    inputs = {k: v.float() if v.is_floating_point() else v for k, v in arguments(name, 40).items()}
    student = inputs.pop("student")
    results = []
    for enabled in (False, True):
        leaf = student.clone().requires_grad_()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            loss = getattr(kdfast, name)(leaf, **inputs)
        loss.backward()
        results.append((loss.detach(), leaf.grad))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_two_runs_give_the_same_bits(name, threads, form):
    inputs = {k: v.float() if v.is_floating_point() else v for k, v in arguments(name, 300).items()}
    student, before = inputs.pop("student"), torch.get_num_threads()
    results = []
    try:
        torch.set_num_threads(threads)
        for _ in range(2):
            leaf = student.clone().requires_grad_()
            loss = getattr(kdfast, name)(leaf, **inputs)
            loss.backward()
            results.append((loss.detach(), leaf.grad))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("name", FUNCTIONS)
def test_double_backward_is_refused(name):
    inputs = arguments(name, 6)
    student = inputs.pop("student").requires_grad_()
    (grad,) = torch.autograd.grad(getattr(kdfast, name)(student, **inputs), student, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiated once"):
        grad.sum().backward()


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_loss_scale_reaches_float16_gradients_before_they_are_rounded(name):
    """Without the scale most of these gradients are below the smallest float16."""
    inputs = {k: v.half() if v.is_floating_point() else v for k, v in arguments(name, 200).items()}
    student, grads = inputs.pop("student"), []
    for function, dtype in ((getattr(kdfast, name), torch.float16), (getattr(kdfast.reference, name), torch.float64)):
        leaf = student.to(dtype, copy=True).requires_grad_()
        cast = {k: v.to(dtype) if v.is_floating_point() else v for k, v in inputs.items()}
        (function(leaf, **cast) * 2.0**8).backward()
        grads.append(leaf.grad.double())
    torch.testing.assert_close(*grads, rtol=2e-3, atol=1e-7)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_half_gradients_have_the_students_dtype_and_none_is_made_where_none_is_asked_for(name):
    inputs = arguments(name, 20)
    for dtype in HALF:
        cast = {k: v.to(dtype) if v.is_floating_point() else v for k, v in inputs.items()}
        quiet = getattr(kdfast, name)(**cast)
        cast["student"].requires_grad_()
        loss = getattr(kdfast, name)(**cast)
        loss.backward()
        assert cast["student"].grad.dtype == dtype and loss.item() == quiet.item() and not quiet.requires_grad


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peak memory is counted on Linux")
@pytest.mark.parametrize("name", FUNCTIONS)
def test_memory_is_a_small_part_of_the_n_by_n_matrix(name):
    n = 8192
    assert peak_memory(name, n, 32) < 0.05 * 4 * n * n
