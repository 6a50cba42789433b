"""What is particular to the kl and topk_kl kernels: instruction sets, threads, layouts, long rows, the backward."""

from __future__ import annotations

import math
import mmap

import pytest
import torch

import kdfast
from kdfast import backends
from kdfast.ops import kl, topk_kl
from samples import SAMPLES, stored_teacher
from support import DTYPES, LAYOUTS, assert_parity, sample_inputs

pytestmark = pytest.mark.skipif(backends.extension_problem() is not None, reason="the extension is not built")

DIRECTIONS = ("forward", "reverse")
# The block of the kernel is 2048 classes; vectors are up to 16 floats: below, at and just above each.
WIDTHS = (1, 2, 15, 16, 17, 100, 2047, 2048, 2049, 6000)


def pair(*shape: int, scale: float = 3.0, seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(shape, generator=generator, dtype=torch.float64) * scale
        for name in ("student_logits", "teacher_logits")
    }


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("level", backends.cpu_levels())
def test_every_instruction_set_agrees_with_the_reference(level, direction, dtype):
    with backends.use_cpu_level(level):
        for seed, width in enumerate(WIDTHS):
            options = {"direction": direction, "temperature": 2.0}
            assert_parity("kl_divergence", pair(3, width, seed=seed), options, dtype, seed=seed)


FUNCTIONS = (
    "kl_divergence",
    "js_divergence",
    "kd_loss",
    "dkd_loss",
    "standardized_kl_divergence",
    "topk_kl_divergence",
)


@pytest.mark.parametrize("level", backends.cpu_levels())
@pytest.mark.parametrize("name", FUNCTIONS)
def test_every_function_keeps_the_rule_at_every_instruction_set(name, level):
    """Options, masks, weights, reductions and layouts drawn at random, widths around vectors and blocks."""
    with backends.use_cpu_level(level):
        for seed in range(24):
            leading = SAMPLES[name].leading[seed % len(SAMPLES[name].leading)]
            width = [w for w in WIDTHS if w > 1 or 1 in SAMPLES[name].widths][seed % 9]
            inputs, options = sample_inputs(name, seed, leading, width)
            layout = list(LAYOUTS)[seed % len(LAYOUTS)]
            assert_parity(name, inputs, options, DTYPES[seed // 6], layout=layout, seed=seed)


@pytest.mark.parametrize("level", backends.cpu_levels())
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", [*kl.KINDS, "hard"])
def test_rows_of_one_thread_have_the_bits_of_each_alone(kind, dtype, level):
    """Up to eight short rows are one piece of work, with gaps where rows are masked; nothing is left of rows before."""
    options = kl.Options(
        temperature=2.0,
        kind=kl.KINDS.get(kind, kl.KINDS["forward"]),
        scale=4.0,
        beta=0.3,
        ce_weight=0.5 if kind == "hard" else 0.0,
        label_smoothing=0.1,
        reduction=kl.REDUCTIONS["none"],
    )
    with backends.use_cpu_level(level):
        for seed, width in enumerate((2, 15, 16, 100, 700, 1300, 2047, 4100)):
            inputs = pair(21, width + 3, seed=seed)
            student, teacher = (logits.to(dtype)[:, :width] for logits in inputs.values())
            generator = torch.Generator().manual_seed(seed)
            mask = torch.rand(21, generator=generator) > 0.2
            labels = torch.randint(width, (21,), generator=generator) if kind in ("dkd", "hard") else None
            weight = torch.rand(21, generator=generator, dtype=torch.float64)

            def run(rows, student=student, teacher=teacher, labels=labels, weight=weight, mask=mask):
                arguments = (None if x is None else x[rows] for x in (teacher, labels, mask, weight))
                return torch.ops.kdfast.kl.default(student[rows], *arguments, *options, True)

            together = run(slice(None))
            alone = [run(slice(row, row + 1)) for row in range(21)]
            for result, rows in zip(together, zip(*alone, strict=True), strict=True):
                assert torch.equal(result, torch.cat(rows))
                assert result.isfinite().all() and not result[~mask].any() and result[mask].any()


@pytest.mark.parametrize("width", [32000, 151936, 201088, 262144])
def test_long_vocabularies(width):
    assert_parity("kl_divergence", pair(2, width), {"temperature": 1.5}, torch.float32)


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("rows", [1, 3])
def test_a_row_shared_by_threads_has_the_bits_of_a_row_of_one_thread(rows, direction):
    inputs = {k: v.float() for k, v in pair(rows, 200_000).items()}
    results = []
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 3, 4):
            torch.set_num_threads(count)
            student = inputs["student_logits"].clone().requires_grad_()
            loss = kdfast.kl_divergence(student, inputs["teacher_logits"], direction=direction)
            loss.backward()
            results.append((loss.detach(), student.grad))
    finally:
        torch.set_num_threads(threads)
    for loss, grad in results[1:]:
        assert torch.equal(loss, results[0][0])
        assert torch.equal(grad, results[0][1])


def spread(rows: torch.Tensor) -> torch.Tensor:
    """A copy whose last row begins beyond 2^31 elements, in memory that nothing touches between the rows."""
    stride = 2**31 // (len(rows) - 1) + 64
    size = ((len(rows) - 1) * stride + rows.shape[1]) * rows.element_size()
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return torch.frombuffer(memory, dtype=rows.dtype).as_strided(rows.shape, (stride, 1)).copy_(rows)


def test_rows_beyond_2_31_elements():
    near = [x.bfloat16() for x in pair(5, 300).values()]
    far = [spread(x) for x in near]
    results = []
    for student, teacher in (near, far):
        loss = kdfast.kl_divergence(student.requires_grad_(), teacher, 2.0)
        results.append((loss.detach(), *torch.autograd.grad(loss, student)))
    for got, expected in zip(results[1], results[0], strict=True):
        assert torch.equal(got, expected)


def test_any_layout_in_memory():
    """The memory between the rows holds NaN in these layouts, and is neither read nor written."""
    inputs = pair(2, 4, 50)
    for layout in ("shifted", "transposed", "classes_strided"):
        assert_parity("kl_divergence", inputs, {}, torch.float32, layout=layout)


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_masked_rows_are_never_read(direction):
    inputs = {k: v.float() for k, v in pair(4, 33).items()}
    mask = torch.tensor([True, False, True, False])
    for tensor in inputs.values():
        tensor[~mask] = math.nan
    student = inputs["student_logits"].requires_grad_()
    loss = kdfast.kl_divergence(student, inputs["teacher_logits"], mask=mask, direction=direction)
    loss.backward()
    assert math.isfinite(loss.item())
    assert student.grad.isfinite().all()
    assert (student.grad[~mask] == 0).all()


def test_all_rows_masked_gives_zero():
    inputs = {k: v.float() for k, v in pair(4, 33).items()}
    student = inputs["student_logits"].requires_grad_()
    for reduction in ("sum", "mean", "batchmean"):
        loss = kdfast.kl_divergence(
            student, inputs["teacher_logits"], mask=torch.zeros(4, dtype=torch.bool), reduction=reduction
        )
        loss.backward()
        assert loss.item() == 0
    assert (student.grad == 0).all()


def test_a_nan_stays_in_its_row():
    inputs = {k: v.float() for k, v in pair(3, 100).items()}
    inputs["student_logits"][1, 7] = math.nan
    student = inputs["student_logits"].requires_grad_()
    rows = kdfast.kl_divergence(student, inputs["teacher_logits"], reduction="none")
    rows.sum().backward()
    assert rows.isnan().tolist() == [False, True, False]
    assert student.grad.isnan().any(dim=1).tolist() == [False, True, False]
    assert student.grad[1].isnan().all()


# classes at -inf: of the student, of the teacher; the last of all stays
ABSENT = {
    "both sides": ([0, 1], [0, 1]),
    "teacher only": ([], [0, 3]),
    "teacher, whole blocks": ([], list(range(2048))),
    "both, whole blocks": (list(range(2048)), list(range(2048))),
    "both, all but the last": (list(range(4999)), list(range(4999))),
    "teacher, all but the last": ([], list(range(4999))),
    "student only": ([0, 3], []),
    "student, all but the last": (list(range(4999)), []),
}
DIVERGENCES = {
    "forward": ("kl_divergence", {"temperature": 3.0}),
    "reverse": ("kl_divergence", {"temperature": 3.0, "direction": "reverse"}),
    "js": ("js_divergence", {"beta": 0.3, "temperature": 3.0}),
    "kd": ("kd_loss", {"temperature": 3.0}),
    "dkd": ("dkd_loss", {"temperature": 3.0, "alpha": 1.0, "beta": 8.0}),
}


@pytest.mark.parametrize("level", backends.cpu_levels())
@pytest.mark.parametrize("name", DIVERGENCES)
@pytest.mark.parametrize("case", ABSENT)
def test_classes_without_mass(case, name, level):
    """They add nothing where the first distribution has none, and where the second alone has none the loss is inf."""
    function, options = DIVERGENCES[name]
    for seed, width in enumerate((5, 5000)):
        inputs = pair(3, width, seed=seed)
        for side, classes in zip(inputs, ABSENT[case], strict=True):
            inputs[side][:, [c for c in classes if c < width - 1]] = -math.inf
        if name in ("kd", "dkd"):
            inputs["labels"] = torch.full((3,), width - 1)
        reference = getattr(kdfast.reference, function)(**inputs, **options)
        with backends.use_cpu_level(level):
            if reference.isfinite():
                assert_parity(function, inputs, options, torch.float32, seed=seed)
            student = inputs.pop("student_logits").float().requires_grad_()
            teacher = inputs.pop("teacher_logits").float()
            loss = getattr(kdfast, function)(student, teacher, **inputs, **options)
        loss.backward()
        assert not loss.isnan()
        assert loss.isinf() == reference.isinf()
        if loss.isfinite() or name != "reverse":
            assert student.grad.isfinite().all()


@pytest.mark.parametrize("level", backends.cpu_levels())
def test_a_divergence_of_weight_0_is_left_out_where_it_is_infinite(level):
    student, teacher = (x.float() for x in pair(3, 40).values())
    student[:, 3] = -math.inf
    labels = torch.tensor([1, 2, 39])
    results = []
    with backends.use_cpu_level(level):
        for loss in (kdfast.kd_loss, kdfast.reference.kd_loss):
            leaf = student.clone().requires_grad_()
            value = loss(leaf, teacher, labels, alpha=0.0)
            results.append((value, *torch.autograd.grad(value, leaf)))
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("labelled", [True, False])
def test_a_teacher_of_weight_0_may_be_anything(labelled):
    """But for its argmax, where that is the label: PyTorch's is that of a NaN."""
    student, teacher = (x.float() for x in pair(4, 40).values())
    teacher[0], teacher[1, 7], teacher[2] = -math.inf, math.nan, math.nan
    labels = torch.tensor([1, 2, 39, 0]) if labelled else None
    results = []
    for loss in (kdfast.kd_loss, kdfast.reference.kd_loss):
        leaf = student.clone().requires_grad_()
        value = loss(leaf, teacher, labels, alpha=0.0, ignore_index=7)
        results.append((value, *torch.autograd.grad(value, leaf)))
    torch.testing.assert_close(*results)
    assert results[0][1].isfinite().all()


def test_teacher_mass_where_the_student_has_none_is_infinite():
    inputs = {k: v.float() for k, v in pair(2, 40).items()}
    inputs["student_logits"][0, 3] = -math.inf
    student = inputs["student_logits"].requires_grad_()
    rows = kdfast.kl_divergence(student, inputs["teacher_logits"], reduction="none")
    rows.sum().backward()
    assert rows.isinf().tolist() == [True, False]
    assert student.grad.isfinite().all()


def test_nearly_equal_bfloat16_logits_are_widened_before_they_are_subtracted():
    inputs = pair(4, 1000, scale=20.0)
    inputs["teacher_logits"] = inputs["student_logits"] * (1 + 2**-8)
    for direction in DIRECTIONS:
        assert_parity("kl_divergence", inputs, {"direction": direction}, torch.bfloat16)


@pytest.mark.parametrize("reduction", ["batchmean", "none"])
def test_a_loss_scale_reaches_float16_gradients_before_they_are_rounded(reduction):
    """Without the scale the gradients of this batch are below the smallest float16."""
    inputs = {k: v.half() for k, v in pair(64, 1000, scale=0.1).items()}
    scale = 2.0**16
    grads = {}
    for function in (kdfast.kl_divergence, kdfast.reference.kl_divergence):
        student = inputs["student_logits"].clone().requires_grad_()
        loss = function(student, inputs["teacher_logits"], reduction=reduction)
        (loss.mean() * scale).backward()
        grads[function] = student.grad
    fast, plain = grads.values()
    torch.testing.assert_close(fast, plain)
    assert (fast != 0).float().mean() > 0.99


def test_a_confident_wrong_student_keeps_dkd_finite():
    """A gap of 200 between the label and the rest: 1 - p is 0 in float32, its logarithm must still be -200."""
    for gap in (200.0, -200.0):
        inputs = pair(3, 40)
        inputs["labels"] = torch.tensor([0, 5, 39])
        inputs["student_logits"][torch.arange(3), inputs["labels"]] -= gap
        options = {"temperature": 1.0, "alpha": 1.0, "beta": 8.0}
        assert_parity("dkd_loss", inputs, options, torch.float32)
        loss = kdfast.dkd_loss(**{k: v.float() if v.is_floating_point() else v for k, v in inputs.items()}, **options)
        assert math.isfinite(loss.item())


def test_two_classes_have_no_other_classes_to_compare():
    inputs = {k: v.float() for k, v in pair(4, 2).items()}
    labels = torch.tensor([0, 1, 0, 1])
    student = inputs["student_logits"].requires_grad_()
    loss = kdfast.dkd_loss(student, inputs["teacher_logits"], labels, alpha=0.0, beta=8.0)
    loss.backward()
    assert loss.item() == 0
    assert (student.grad == 0).all()


def test_a_stored_teacher_with_all_its_mass_in_the_top_k():
    student = torch.randn(2, 50, generator=torch.Generator().manual_seed(0))
    values = torch.tensor([[0.0, -math.inf, -math.inf]] * 2)  # one class holds everything
    indices = torch.tensor([[7, 1, 2]] * 2)
    for tail in ("drop", "bucket", "renormalize"):
        leaf = student.clone().requires_grad_()
        loss = kdfast.topk_kl_divergence(leaf, values, indices, values="logprobs", tail=tail)
        loss.backward()
        assert math.isfinite(loss.item())
        assert leaf.grad.isfinite().all()
        inputs = {"student_logits": student.double(), "teacher_values": values.double(), "teacher_indices": indices}
        assert_parity("topk_kl_divergence", inputs, {"values": "logprobs", "tail": tail}, torch.float32)


@pytest.mark.parametrize("level", backends.cpu_levels())
@pytest.mark.parametrize("temperature", [0.5, 3.0])
@pytest.mark.parametrize(
    ("values", "tail"), [("logits", "drop"), ("logits", "renormalize"), ("logprobs", "renormalize")]
)
def test_student_and_stored_teacher_have_the_temperature(values, tail, temperature, level):
    generator = torch.Generator().manual_seed(5)
    inputs = stored_teacher(generator, (4,), 5000, k=7)
    options = {"values": values, "tail": tail, "temperature": temperature}
    with backends.use_cpu_level(level):
        for seed, dtype in enumerate(DTYPES):
            assert_parity("topk_kl_divergence", inputs, options, dtype, seed=seed)


def test_renormalized_tails_never_read_the_other_classes():
    student = torch.full((2, 50), math.nan)
    indices = torch.tensor([[3, 9], [0, 49]])
    student.scatter_(1, indices, torch.tensor([[0.5, -1.0], [2.0, 2.5]]))
    student.requires_grad_()
    loss = kdfast.topk_kl_divergence(student, torch.randn(2, 2), indices, tail="renormalize")
    loss.backward()
    assert math.isfinite(loss.item())
    assert (student.grad != 0).sum() == 4
    assert student.grad.isfinite().all()


@pytest.mark.parametrize("level", backends.cpu_levels())
def test_a_student_without_mass_on_the_listed_classes(level):
    student = torch.tensor([[-math.inf, 0.0, 1.0], [-math.inf, 2.0, -math.inf], [0.5, 0.0, 1.0]])
    indices = torch.tensor([[0, -100], [2, 0], [1, 0]])
    results = []
    with backends.use_cpu_level(level):
        for loss in (kdfast.topk_kl_divergence, kdfast.reference.topk_kl_divergence):
            leaf = student.clone().requires_grad_()
            rows = loss(leaf, torch.zeros(3, 2), indices, tail="renormalize", reduction="none")
            results.append((rows, *torch.autograd.grad(rows.sum(), leaf)))
    torch.testing.assert_close(*results)
    assert results[0][0].tolist()[:2] == [math.inf, math.inf]


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
def test_both_index_types_and_padding(dtype):
    inputs = {
        "student_logits": pair(2, 30)["student_logits"],
        "teacher_values": torch.tensor([[-0.3, -2.0, -5.0], [-0.1, -math.inf, 7.0]], dtype=torch.float64),
        "teacher_indices": torch.tensor([[4, 29, 0], [11, 2, -100]], dtype=dtype),
    }
    for tail in ("drop", "bucket", "renormalize"):
        assert_parity("topk_kl_divergence", inputs, {"values": "logprobs", "tail": tail}, torch.float32)


def test_labels_none_take_the_first_of_the_teachers_largest():
    inputs = {k: v.float() for k, v in pair(3, 5000).items()}
    inputs["teacher_logits"][0, [17, 4000]] = 50.0
    expected = kdfast.kd_loss(**inputs, labels=inputs["teacher_logits"].argmax(-1))
    assert kdfast.kd_loss(**inputs).item() == expected.item()


def test_ignored_labels_count_in_neither_term():
    inputs = {k: v.float() for k, v in pair(4, 33).items()}
    labels = torch.tensor([1, -100, 3, -100])
    kept = kdfast.kd_loss(*(v[::2] for v in inputs.values()), labels[::2])
    for tensor in inputs.values():
        tensor[1::2] = math.nan
    student = inputs["student_logits"].requires_grad_()
    loss = kdfast.kd_loss(student, inputs["teacher_logits"], labels)
    loss.backward()
    torch.testing.assert_close(loss, kept)
    assert (student.grad[1::2] == 0).all()


def test_js_is_finite_where_entries_underflow_on_both_sides():
    inputs = {k: torch.zeros(2, 4096) for k in ("student_logits", "teacher_logits")}
    for k, column in zip(inputs, (0, 1), strict=True):
        inputs[k][:, column] = 1e4  # every other class underflows, the two disagree
    for beta in (0.1, 0.5, 0.9):
        assert_parity("js_divergence", {k: v.double() for k, v in inputs.items()}, {"beta": beta}, torch.float32)
    student = inputs["student_logits"].requires_grad_()
    loss = kdfast.js_divergence(student, inputs["teacher_logits"])
    loss.backward()
    assert loss.item() == pytest.approx(math.log(2))
    assert student.grad.isfinite().all()


INPLACE = ("kl_divergence", "js_divergence", "kd_loss")


@pytest.mark.parametrize("upstream", [1.0, -2.5])
@pytest.mark.parametrize("name", INPLACE)
def test_inplace_backward_gives_the_same_gradient_in_the_logits_storage(name, upstream):
    inputs = {k: v.float() for k, v in pair(4, 3000).items()}
    expected = inputs["student_logits"].clone().requires_grad_()
    loss = getattr(kdfast, name)(expected, inputs["teacher_logits"])
    (loss * upstream).backward()

    base = inputs["student_logits"].clone().requires_grad_()
    logits = base * 1.0
    inplace = getattr(kdfast, name)(logits, inputs["teacher_logits"], inplace_backward=True)
    assert inplace.item() == loss.item()
    assert logits._version == 1
    (inplace * upstream).backward()
    torch.testing.assert_close(base.grad, expected.grad)
    torch.testing.assert_close(logits.detach(), expected.grad)  # the storage holds the gradient


@pytest.mark.parametrize("reduction", ["batchmean", "none"])
@pytest.mark.parametrize("name", INPLACE)
def test_inplace_backward_compiled(name, reduction):
    base, teacher = (x.float() for x in pair(4, 3000).values())
    base.requires_grad_()

    def loss(base: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
        return getattr(kdfast, name)(base * 1.0, teacher, reduction=reduction, inplace_backward=True)

    torch._dynamo.reset()
    results = []
    for function in (loss, torch.compile(loss, backend="aot_eager", fullgraph=True)):
        value = function(base, teacher)
        results.append((value, *torch.autograd.grad(value, base, torch.full_like(value, -2.5))))
    torch.testing.assert_close(*results)

    logits = base * 1.0
    value = torch.compile(getattr(kdfast, name), backend="aot_eager", fullgraph=True)(
        logits, teacher, inplace_backward=True
    )
    value.backward(retain_graph=True)
    torch.testing.assert_close(logits.detach(), base.grad)
    with pytest.raises(RuntimeError):
        value.backward()


def test_inplace_backward_with_one_value_a_row():
    inputs = {k: v.float() for k, v in pair(4, 30).items()}
    upstream = torch.tensor([1.0, 0.0, -3.0, 0.5])
    grads = []
    for inplace in (False, True):
        base = inputs["student_logits"].clone().requires_grad_()
        rows = kdfast.kl_divergence(base * 1.0, inputs["teacher_logits"], reduction="none", inplace_backward=inplace)
        rows.backward(upstream)
        grads.append(base.grad)
    torch.testing.assert_close(*grads)


def test_inplace_backward_can_be_used_once():
    base = torch.randn(2, 5, requires_grad=True)
    loss = kdfast.kl_divergence(base * 1.0, torch.randn(2, 5), inplace_backward=True)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="a second backward needs inplace_backward=False"):
        loss.backward()


def test_inplace_backward_tells_whoever_else_saved_the_logits():
    base = torch.randn(2, 5, requires_grad=True)
    logits = base * 1.0
    other = logits.square().sum()
    loss = kdfast.kl_divergence(logits, torch.randn(2, 5), inplace_backward=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        (loss + other).backward()


@pytest.mark.parametrize("later", [lambda x, t: x.sum(), kdfast.js_divergence], ids=["PyTorch", "kdfast"])
def test_inplace_backward_tells_whoever_uses_the_logits_afterwards(later):
    base, teacher = torch.randn(2, 5, requires_grad=True), torch.randn(2, 5)
    logits = base * 1.0
    loss = kdfast.kl_divergence(logits, teacher, inplace_backward=True)
    with pytest.raises(RuntimeError, match="compute everything else from the logits before"):
        (loss + later(logits, teacher)).backward()
    with pytest.raises(RuntimeError, match="compute everything else from the logits before"):
        later(logits, teacher).backward()


def test_inplace_backward_of_logits_that_are_looked_at():
    base, teacher = torch.randn(2, 5, requires_grad=True), torch.randn(2, 5)
    (expected,) = torch.autograd.grad(kdfast.kl_divergence(base, teacher), base)
    retained, hooked, viewed, leaf = base * 1.0, base * 1.0, (base * 1.0).view(2, 1, 5), base.detach().requires_grad_()
    retained.retain_grad()
    seen = []
    hooked.register_hook(seen.append)
    for logits in (retained, hooked, viewed, leaf):
        loss = kdfast.kl_divergence(logits, teacher.view(logits.shape), inplace_backward=True)
        logits.detach().argmax()  # nothing that autograd records
        loss.backward()
    for grad in (retained.grad, seen[0], leaf.grad):
        torch.testing.assert_close(grad, expected)
    torch.testing.assert_close(base.grad, 3 * expected)  # a leaf of its own is not behind it


@pytest.mark.parametrize("name", ["kl_divergence", "js_divergence", "kd_loss"])
def test_inplace_backward_refuses_a_teacher_it_would_overwrite(name):
    base = torch.randn(5, 7, requires_grad=True)
    logits = base * 1.0
    with pytest.raises(ValueError, match="shares a part of its memory with student_logits"):
        getattr(kdfast, name)(logits[1:], logits[:-1].detach(), inplace_backward=True)
    for student, teacher in ((logits[:2], logits[2:4].detach()), (logits, logits.detach())):  # apart, and the same
        expected = getattr(kdfast, name)(student.detach().clone(), teacher.clone())
        assert getattr(kdfast, name)(student, teacher, inplace_backward=True).item() == expected.item()


def test_inplace_backward_leaves_the_logits_alone_where_no_gradient_is_recorded():
    student, teacher = torch.randn(2, 5, requires_grad=True) * 1.0, torch.randn(2, 5)
    before = student.detach().clone()
    for context in (torch.no_grad, torch.inference_mode):
        with context():
            loss = kdfast.kl_divergence(student, teacher, inplace_backward=True)
        assert not loss.requires_grad
        assert torch.equal(student, before)


def test_double_backward_is_refused():
    inputs = pair(2, 5)
    student = inputs["student_logits"].requires_grad_()
    loss = kdfast.kl_divergence(student, inputs["teacher_logits"])
    (grad,) = torch.autograd.grad(loss, student, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiated once"):
        grad.sum().backward()


@pytest.mark.parametrize("level", backends.cpu_levels())
def test_classes_masked_by_a_large_number_are_masked(level):
    """A whole block of them has probability 0 in the row, though not among its own; the teacher excludes it."""
    for masked in (-1e4, torch.finfo(torch.float32).min):
        inputs = pair(3, 4096)
        inputs["student_logits"][:, 2048:] = masked
        inputs["teacher_logits"][:, 2048:] = -math.inf
        with backends.use_cpu_level(level):
            for name in ("forward", "reverse", "js"):
                function, options = DIVERGENCES[name]
                assert_parity(function, inputs, options, torch.float32)


@pytest.mark.parametrize("level", backends.cpu_levels())
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_equal_logits_have_no_standardized_gradient(dtype, level):
    teacher = pair(2, 5000)["teacher_logits"].to(dtype)
    for value in (0.0, 0.1, 5666.667):
        student = torch.full_like(teacher, value).requires_grad_()
        with backends.use_cpu_level(level):
            loss = kdfast.standardized_kl_divergence(student, teacher)
            loss.backward()
        torch.testing.assert_close(loss, kdfast.reference.standardized_kl_divergence(student, teacher))
        assert (student.grad == 0).all()


@pytest.mark.parametrize("shape", [(0, 5), (2, 0, 7), (2, 0, 0, 7), (3, 1)])
@pytest.mark.parametrize("layout", ["contiguous", "classes_strided", "transposed"])
def test_no_rows_and_one_class_give_zero(layout, shape):
    student = LAYOUTS[layout](torch.randn(shape)).requires_grad_()
    loss = kdfast.kl_divergence(student, LAYOUTS[layout](torch.randn(shape)))
    loss.backward()
    assert loss.item() == 0
    assert (student.grad == 0).all()


def test_without_a_gradient_none_is_written():
    inputs = {k: v.float() for k, v in pair(2, 5).items()}
    loss, grad = torch.ops.kdfast.kl(*inputs.values(), None, None, None, *kl.Options(1.0, 0, 1.0), False)
    assert grad.numel() == 0
    assert kdfast.kl_divergence(*inputs.values()).item() == loss.item()


def test_the_ops_pass_opcheck():
    student, teacher = (v.float() for v in pair(3, 7).values())
    mask, labels = torch.tensor([True, False, True]), torch.tensor([0, -100, 6])
    for kind in kl.KINDS:
        for reduction in ("none", "batchmean"):
            options = kl.Options(2.0, kl.KINDS[kind], 4.0, reduction=kl.REDUCTIONS[reduction])
            arguments = (teacher, labels if kind == "dkd" else None, mask, None, *options)
            for needs_grad in (True, False):
                torch.library.opcheck(torch.ops.kdfast.kl.default, (student, *arguments, needs_grad))
            torch.library.opcheck(torch.ops.kdfast.kl_.default, (student.clone(), *arguments))
    values, indices = teacher.topk(2)
    for tail in topk_kl.TAILS.values():
        options = topk_kl.Options(1.0, tail, False)
        arguments = (student, values, indices, mask, None, *options, True)
        torch.library.opcheck(torch.ops.kdfast.topk_kl.default, arguments)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("reduction", ["batchmean", "none"])
def test_compiles_without_a_graph_break(dtype, reduction):
    inputs = {k: v.to(dtype) for k, v in pair(4, 33).items()}

    def step(student, teacher):
        return (kdfast.kl_divergence(student * 1.0, teacher, 2.0, reduction=reduction) * 3.0).sum()

    compiled = torch.compile(step, fullgraph=True)
    grads = []
    for function in (step, compiled):
        student = inputs["student_logits"].clone().requires_grad_()
        function(student, inputs["teacher_logits"]).backward()
        grads.append(student.grad)
    torch.testing.assert_close(grads[0], grads[1])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("alpha", [None, 0.0, 0.4, 1.0])
@pytest.mark.parametrize(
    "divergence, beta", [("forward", 0.5), ("reverse", 0.5), ("js", 0.0), ("js", 0.3), ("js", 1.0)]
)
def test_two_last_layers(divergence, beta, alpha, dtype):
    """Every way to put the divergence and the cross-entropy together, with and without rows that do not count."""
    generator = torch.Generator().manual_seed(0)
    rows, classes = (3, 4), 9
    shapes = {"student": 5, "teacher": 6}
    inputs = {f"{side}_hidden": torch.randn(*rows, width, generator=generator) for side, width in shapes.items()}
    inputs |= {f"{side}_weight": torch.randn(classes, width, generator=generator) for side, width in shapes.items()}
    inputs |= {f"{side}_bias": torch.randn(classes, generator=generator) for side in shapes}
    options = {"divergence": divergence, "beta": beta, "temperature": 2.0}
    if alpha is not None:
        labels = torch.randint(classes, rows, generator=generator)
        labels[0, 1] = -1
        options |= {"labels": labels, "alpha": alpha, "ignore_index": -1}
    for smoothing, reduction in ((0.0, "batchmean"), (0.1, "none"), (0.1, "sum")):
        for some in ({}, {"mask": torch.rand(rows, generator=generator) < 0.7, "row_weight": torch.rand(rows)}):
            chosen = {**options, **some, "label_smoothing": smoothing, "reduction": reduction}
            assert_parity("linear_kl_divergence", {k: v.double() for k, v in inputs.items()}, chosen, dtype)


def test_a_teacher_of_no_weight_is_not_looked_at():
    student, weight, nan = torch.randn(2, 3, requires_grad=True), torch.randn(5, 3), torch.full((2, 3), math.nan)
    labels = torch.tensor([0, 4])
    for divergence in ("forward", "reverse", "js"):
        loss = kdfast.linear_kl_divergence(
            student, weight, nan, weight, labels=labels, alpha=0.0, divergence=divergence
        )
        (grad,) = torch.autograd.grad(loss, student)
        assert loss.isfinite() and grad.isfinite().all()
