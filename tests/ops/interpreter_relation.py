"""The Triton kernels of relation on the CPU, interpreted. Run by test_relation_triton.py with TRITON_INTERPRET=1."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

import kdfast
from kdfast import backends
from kdfast.ops import relation
from kdfast.ops.relation import products, rows, tiles, triton_kernels
from samples import SAMPLES
from support import assert_parity

assert triton_kernels.triton.knobs.runtime.interpret, "TRITON_INTERPRET=1 must be set before triton is imported"

FUNCTIONS = {
    "crd_loss": lambda student, teacher, labels, temperature=0.1, alignment_weight=1.0, normalize=False: relation.crd(
        student, teacher, labels, temperature, alignment_weight, normalize
    ),
    "pkt_loss": lambda student, teacher, eps=1e-7: relation.pkt(student, teacher, eps),
    "similarity_preserving_loss": relation.similarity_preserving,
    "kernel_alignment_loss": lambda student, teacher, centered=False: relation.kernel_alignment(
        student, teacher, centered
    ),
}
OPTIONS = {"crd_loss": {"normalize": True, "temperature": 0.5}, "kernel_alignment_loss": {"centered": True}}


@pytest.fixture(autouse=True)
def triton_steps(monkeypatch) -> None:
    """The drivers on CPU tensors, with Triton's panels of 12 rows in tiles of (4, 8), which ``first`` may divide."""
    monkeypatch.setattr(backends, "on_gpu", lambda tensor: True)
    monkeypatch.setitem(tiles.MOST, "cpu", 12)
    monkeypatch.setitem(tiles.ALIGNED, "cpu", tiles.ALIGNED["cuda"])
    monkeypatch.setattr(rows, "PANEL_ROWS", 16)
    monkeypatch.setattr(products, "SEEN_AT_ONCE", 16)
    for name, size in (("ROWS", 4), ("COLUMNS", 8), ("BLOCK", 8), ("TURNS", 3)):
        monkeypatch.setattr(triton_kernels, name, size)


@pytest.fixture(params=["features", "rows"])
def form(request, monkeypatch) -> None:
    monkeypatch.setattr(products, "FEW_ROWS", 0 if request.param == "features" else 2**31)
    monkeypatch.setattr(products, "double_cost", lambda device: 0.0)


@pytest.fixture(autouse=True)
def no_warnings():
    with np.errstate(all="ignore"):  # what lies beyond the end is masked afterwards
        yield


def call(name: str, **arguments) -> torch.Tensor:
    return FUNCTIONS[name](**arguments)


def reference_of(name: str):
    return getattr(kdfast.reference, name)


def inputs(name: str, n: int, seed: int, width: int = 6) -> dict[str, torch.Tensor]:
    return SAMPLES[name].inputs(torch.Generator().manual_seed(seed), (n,), width)


def in_float32(name: str, n: int, width: int = 6) -> dict[str, torch.Tensor]:
    made = inputs(name, n, 0, width)
    return {k: v.float() if v.is_floating_point() else v for k, v in made.items()}


@pytest.mark.parametrize("n", [1, 3, 12, 17, 40])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_value_and_gradient_keep_the_rule(name, n, form):
    for seed, dtype in enumerate((torch.float32, torch.bfloat16, torch.float16)):
        options = OPTIONS.get(name, {}) if seed % 2 == 0 else {}
        made = inputs(name, n, seed, (6, 8, 21)[seed])
        assert_parity(name, made, options, dtype, function=lambda **kw: call(name, **kw), seed=seed)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_without_a_gradient_the_loss_is_the_same(name, form):
    made = in_float32(name, 33)
    quiet = call(name, **made)
    made["student"].requires_grad_()
    assert torch.equal(call(name, **made).detach(), quiet) and not quiet.requires_grad


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_student_near_its_teacher_keeps_its_digits(name, form):
    """Loss and gradient are small differences of what the kernels sum up."""
    made = in_float32(name, 40)
    made["teacher"] = made["student"] + 1e-3 * torch.randn(40, 6, generator=torch.Generator().manual_seed(1))
    if name == "crd_loss":
        made["labels"] = torch.zeros(40, dtype=torch.int64)
    reference, results = reference_of(name), []
    for function, dtype in ((FUNCTIONS[name], torch.float32), (reference, torch.float32), (reference, torch.float64)):
        cast = {k: v.to(dtype) if v.is_floating_point() else v for k, v in made.items()}
        student = cast.pop("student").requires_grad_()
        loss = function(student, **cast, **OPTIONS.get(name, {}))
        results.append((loss.detach().double(), torch.autograd.grad(loss, student)[0].double()))
    for fast, plain, truth in zip(*results, strict=True):
        own, error = (plain - truth).abs().max(), (fast - truth).abs().max()
        # As in test_relation.py, of fewer rows.
        assert error <= 2 * own + 2e-5 * truth.abs().max(), (float(error), float(own), float(truth.abs().max()))


@pytest.mark.parametrize("scale", [1e-22, 1e15])
def test_rows_of_any_size_become_unit_rows(scale):
    student, teacher = (torch.randn(9, 11, generator=torch.Generator().manual_seed(i)) * scale for i in range(2))
    s, t = triton_kernels.unit_rows(student, teacher, 1e-30)
    for x, unit in ((student, s.x), (teacher, t.x)):
        torch.testing.assert_close(unit.double(), torch.nn.functional.normalize(x.double(), dim=1, eps=1e-30))


def test_the_sums_of_pkt_are_those_of_the_unit_rows():
    """In float64, in which what rounding adds to the probabilities is known exactly."""
    n, (student, teacher) = 21, (torch.randn(21, d, generator=torch.Generator().manual_seed(d)) for d in (11, 18))
    s, t, sums = triton_kernels.pkt_rows(student, teacher, 1e-7)
    inverse_s, inverse_t = (2 / (n + x @ x.sum(dim=0)) for x in (s.x.double(), t.x.double()))
    rounded_s, rounded_t = (rounded[:n] for rounded in sums.rounded)
    torch.testing.assert_close(sums.summed, s.x.double().sum(dim=0), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(sums.inverse[:n], inverse_s, rtol=1e-12, atol=0)
    assert torch.equal(rounded_s, inverse_s.float()) and torch.equal(rounded_t, inverse_t.float())
    excess = rounded_s.double() / inverse_s - rounded_t.double() / inverse_t
    torch.testing.assert_close(sums.excess, excess, rtol=0, atol=1e-13)
    assert (sums.along[:n] == 0).all()


@pytest.mark.parametrize("name", FUNCTIONS)
def test_zero_rows_and_rows_below_eps_get_the_references_gradient(name, form):
    made = in_float32(name, 20)
    made["student"][3] = made["teacher"][5] = 0
    made["student"][6] *= 1e-14
    student, grads = made.pop("student").requires_grad_(), []
    options = OPTIONS.get(name, {})
    for function in (FUNCTIONS[name], reference_of(name)):
        grads.append(torch.autograd.grad(function(student, **made, **options), student)[0])
    for rows_of in (slice(0, 3), slice(3, 6), slice(6, 7), slice(7, 20)):
        ours, theirs = (grad[rows_of] for grad in grads)
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4 * float(theirs.abs().max()))


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_side_of_zeros(name, form):
    for side in ("student", "teacher"):
        made = in_float32(name, 20)
        made[side].zero_()
        made["student"].requires_grad_()
        losses = [function(**made) for function in (FUNCTIONS[name], reference_of(name))]
        grads = [torch.autograd.grad(loss, made["student"])[0] for loss in losses]
        torch.testing.assert_close(*losses)
        torch.testing.assert_close(*grads)


def test_softplus_keeps_its_digits_far_from_zero():
    student = torch.full((20, 1), math.sqrt(1.7))
    labels = torch.zeros(20, dtype=torch.int64)
    loss = relation.crd(student, student, labels, 0.05, 0.0, False)
    assert loss.item() == pytest.approx(math.log1p(math.exp(-34)), rel=1e-4, abs=0)
    loss = relation.crd(1e3 * student, student, labels.index_fill(0, torch.tensor([3]), 1), 0.05, 0.0, False)
    assert loss.item() == pytest.approx(34e6 * 38 / 400, rel=1e-5)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_no_rows_and_no_features_give_what_the_reference_gives(name):
    for n, width in ((0, 4), (5, 0)):
        made = {"student": torch.zeros(n, width, requires_grad=True), "teacher": torch.zeros(n, width)}
        made |= {"labels": torch.zeros(n, dtype=torch.int64)} if name == "crd_loss" else {}
        losses = [function(**made, **OPTIONS.get(name, {})) for function in (FUNCTIONS[name], reference_of(name))]
        torch.testing.assert_close(*losses)
        assert torch.autograd.grad(losses[0], made["student"])[0].shape == (n, width)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_nan_is_not_hidden(name, form):
    for side in ("student", "teacher"):
        made = in_float32(name, 20)
        made[side][7, 2] = math.nan
        assert call(name, **made).isnan(), side


def test_a_nan_reaches_the_gradient_of_unit_rows():
    made = in_float32("pkt_loss", 20)
    made["student"][7, 2] = math.nan
    student = made.pop("student").requires_grad_()
    assert torch.autograd.grad(call("pkt_loss", student=student, **made), student)[0].isnan().all()
