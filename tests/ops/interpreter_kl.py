"""The Triton kernels of kl on the CPU, interpreted. Run by test_kl_triton.py in a process with TRITON_INTERPRET=1."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from triton.runtime.interpreter import InterpreterBuilder

from kdfast import reference
from kdfast.ops.kl import triton_kernels
from kdfast.ops.kl.triton_kernels import KINDS, REDUCTIONS, Tiling
from kdfast.ops.rows import rows_of
from support import HALF, LAYOUTS, assert_within_rule

assert triton_kernels.triton.knobs.runtime.interpret, "TRITON_INTERPRET=1 must be set before triton is imported"

# Small tiles, so that short rows reach every path: rows of 40 classes are one tile, or three tiles of 4 lanes of 4.
TILINGS = {
    "several rows a program": Tiling(True, 4, 64, 1),
    "one row a program": Tiling(True, 1, 64, 1),
    "several tiles a row": Tiling(False, 4, 4, 1),
}
CLASSES, ROWS = 40, 5
DTYPES = (torch.float32, torch.bfloat16, torch.float16)

# id -> launcher's options, and the same loss by the reference
Loss = Callable[..., Tensor]
VARIANTS: dict[str, tuple[dict[str, Any], Loss]] = {
    "forward": (
        {"kind": KINDS["forward"], "temperature": 2.0, "scale": 4.0},
        lambda s, t, labels, **o: reference.kl_divergence(s, t, 2.0, **o),
    ),
    "reverse": (
        {"kind": KINDS["reverse"], "temperature": 3.0, "scale": 9.0},
        lambda s, t, labels, **o: reference.kl_divergence(s, t, 3.0, direction="reverse", **o),
    ),
    "js": (
        {"kind": KINDS["js"], "temperature": 1.5, "scale": 1.0, "beta": 0.3},
        lambda s, t, labels, **o: reference.js_divergence(s, t, 0.3, 1.5, **o),
    ),
    "standardized": (
        {"kind": KINDS["standardized"], "temperature": 2.0, "scale": 4.0},
        lambda s, t, labels, **o: reference.standardized_kl_divergence(s, t, 2.0, **o),
    ),
    "dkd": (
        {"kind": KINDS["dkd"], "temperature": 2.0, "scale": 4.0, "alpha": 0.7, "beta": 3.0, "labelled": True},
        lambda s, t, labels, **o: reference.dkd_loss(s, t, labels, alpha=0.7, beta=3.0, temperature=2.0),
    ),
}
for temperature, smoothing, labelled in product((1.0, 2.0, 3.0, 4.0), (0.0, 0.1), (True, False)):
    VARIANTS[f"hard, T={temperature}, smoothing={smoothing}, {'labels' if labelled else 'argmax'}"] = (
        {
            "kind": KINDS["forward"],
            "temperature": temperature,
            "scale": 0.6 * temperature**2,
            "ce_weight": 0.4,
            "label_smoothing": smoothing,
            "labelled": labelled,
        },
        lambda s, t, labels, temperature=temperature, smoothing=smoothing, labelled=labelled, **o: reference.kd_loss(
            s, t, labels if labelled else None, temperature=temperature, alpha=0.6, label_smoothing=smoothing, **o
        ),
    )
PLAIN = [name for name in VARIANTS if not name.startswith("hard")]
REPRESENTATIVE = [*PLAIN, "hard, T=4.0, smoothing=0.1, labels", "hard, T=3.0, smoothing=0.1, argmax"]
WITH_ROW_OPTIONS = [name for name in PLAIN if name != "dkd"]

tiling = pytest.mark.parametrize("tiling", TILINGS)


def pair(*shape: int, scale: float = 3.0, seed: int = 0, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    student, teacher = (torch.randn(shape, generator=generator, dtype=torch.float64) * scale for _ in range(2))
    return student.to(dtype), teacher.to(dtype)


def some_labels(*shape: int, classes: int = CLASSES) -> Tensor:
    return torch.randint(classes, shape, generator=torch.Generator().manual_seed(7))


def launch(
    monkeypatch: pytest.MonkeyPatch,
    tiling: str,
    variant: str,
    student: Tensor,
    teacher: Tensor,
    *,
    labels: Tensor | None = None,
    mask: Tensor | None = None,
    row_weight: Tensor | None = None,
    reduction: str = "batchmean",
    needs_grad: bool = True,
    inplace: bool = False,
    **changed: Any,
) -> tuple[Tensor, Tensor]:
    options = {"alpha": 1.0, "beta": 0.5, "ce_weight": 0.0, "label_smoothing": 0.0, "ignore_index": -100}
    options |= VARIANTS[variant][0] | changed
    if options.pop("labelled", False) and labels is None:
        labels = some_labels(*student.shape[:-1], classes=student.shape[-1])
    monkeypatch.setattr(triton_kernels, "tiling", lambda *arguments: TILINGS[tiling])
    arguments = (teacher, labels, mask, row_weight)
    numbers = [
        options[name]
        for name in ["temperature", "kind", "scale", "alpha", "beta", "ce_weight", "label_smoothing", "ignore_index"]
    ]
    with np.errstate(all="ignore"):  # infinities meet in rows that are masked afterwards
        if inplace:
            return triton_kernels.kl_(student, *arguments, *numbers, REDUCTIONS[reduction]), student
        return triton_kernels.kl(student, *arguments, *numbers, REDUCTIONS[reduction], needs_grad)


def by_reference(loss: Loss, student: Tensor, *arguments: Any, **options: Any) -> tuple[Tensor, Tensor]:
    leaf = student.detach().clone().requires_grad_()
    value = loss(leaf, *arguments, **options)
    value.sum().backward()
    return value.detach(), leaf.grad


def check(
    monkeypatch: pytest.MonkeyPatch,
    tiling: str,
    variant: str,
    student: Tensor,
    teacher: Tensor,
    *,
    labels: Tensor | None = None,
    terms: float = 0.0,
    **options: Any,
) -> None:
    """Value and gradient of the launcher keep the rule of tests/support.py.

    ``terms``: the size of the terms a gradient is the difference of, where it may vanish.
    """
    settings, loss = VARIANTS[variant]
    if settings.get("labelled") and labels is None:
        labels = some_labels(*student.shape[:-1], classes=student.shape[-1])
    before = student.clone(), teacher.clone()
    fast = launch(monkeypatch, tiling, variant, student, teacher, labels=labels, **options)
    assert torch.equal(student, before[0]) and torch.equal(teacher, before[1])
    truth = by_reference(loss, student.double(), teacher.double(), labels, **options)
    plain = by_reference(loss, student, teacher, labels, **options)
    assert fast[0].dtype == torch.float32 and fast[1].dtype == student.dtype and fast[1].is_contiguous()
    floor = settings["temperature"] ** 2
    assert_within_rule("value", fast[0], plain[0], truth[0], student.dtype, student.numel(), floor=floor)
    stored = student.dtype  # the interpreter rounds to bfloat16 towards 0, which the rule has room for
    assert_within_rule("gradient", fast[1], plain[1], truth[1], stored, student.numel(), terms, stored)


def test_every_compile_time_combination_is_among_the_variants():
    def constants(kind: int, temperature: float, ce_weight: float, label_smoothing: float) -> tuple[Any, ...]:
        tile = TILINGS["one row a program"]
        chosen, _ = triton_kernels.options_of(kind, temperature, ce_weight, label_smoothing, tile, nvidia=False)
        return chosen["KIND"], chosen["HARD"], chosen["POWER"], chosen["SMOOTH"]

    reachable = {
        constants(*options) for options in product(KINDS.values(), (1.0, 2.0, 3.0, 4.0, 8.0), (0.0, 0.4), (0.0, 0.1))
    }
    tested = {
        constants(o["kind"], o["temperature"], o.get("ce_weight", 0.0), o.get("label_smoothing", 0.0))
        for o, _ in VARIANTS.values()
    }
    assert reachable == tested


@tiling
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_agrees_with_the_reference(monkeypatch, variant, tiling):
    check(monkeypatch, tiling, variant, *pair(ROWS, CLASSES))


@tiling
@pytest.mark.parametrize("dtype", [dtype for dtype in DTYPES if dtype in HALF], ids=str)
@pytest.mark.parametrize("variant", REPRESENTATIVE)
def test_half_types(monkeypatch, variant, dtype, tiling):
    check(monkeypatch, tiling, variant, *pair(2, CLASSES, dtype=dtype))


@tiling
@pytest.mark.parametrize("variant", PLAIN)
def test_nearly_equal_bfloat16_logits_are_widened_before_they_are_subtracted(monkeypatch, variant, tiling):
    student, _ = pair(2, CLASSES, scale=20.0)
    teacher = (student * (1 + 2**-8)).bfloat16()
    check(monkeypatch, tiling, variant, student.bfloat16(), teacher)


@tiling
@pytest.mark.parametrize("variant", PLAIN)
def test_without_a_gradient_the_loss_is_the_same(monkeypatch, variant, tiling):
    inputs = pair(2, CLASSES)
    loss, grad = launch(monkeypatch, tiling, variant, *inputs, needs_grad=False)
    assert grad.shape == (0,)
    assert torch.equal(loss, launch(monkeypatch, tiling, variant, *inputs)[0])


@tiling
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("variant", WITH_ROW_OPTIONS)
def test_reductions_mask_and_weights(monkeypatch, variant, reduction, tiling):
    inputs = pair(2, 3, CLASSES)
    mask = torch.tensor([[True, False, True], [False, False, True]])
    weight = torch.rand(2, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) + 0.5
    check(monkeypatch, tiling, variant, *inputs, mask=mask, row_weight=weight, reduction=reduction)
    check(monkeypatch, tiling, variant, *inputs, row_weight=weight.float(), reduction=reduction)


@tiling
@pytest.mark.parametrize("reduction", ["none", "sum", "batchmean"])
def test_ignored_labels_count_in_neither_term(monkeypatch, reduction, tiling):
    labels = torch.tensor([3, -100, 0, -100, 39])
    variant = "hard, T=4.0, smoothing=0.0, labels"
    check(monkeypatch, tiling, variant, *pair(ROWS, CLASSES), labels=labels, reduction=reduction)


@tiling
def test_labels_without_cross_entropy_still_drop_rows(monkeypatch, tiling):
    student, teacher = pair(3, CLASSES)
    labels = torch.tensor([1, 5, 2])
    loss, grad = launch(monkeypatch, tiling, "forward", student, teacher, labels=labels, ignore_index=5)
    kept, kept_grad = launch(monkeypatch, tiling, "forward", student[[0, 2]], teacher[[0, 2]])
    torch.testing.assert_close(loss, kept)
    torch.testing.assert_close(grad[[0, 2]], kept_grad)
    assert (grad[1] == 0).all()


@tiling
def test_a_divergence_of_weight_0_is_left_out_where_it_is_infinite(monkeypatch, tiling):
    student, teacher = pair(2, CLASSES)
    student[0, 3] = -math.inf
    variant = "hard, T=2.0, smoothing=0.0, labels"
    labels = torch.tensor([1, 2])
    loss, grad = launch(monkeypatch, tiling, variant, student, teacher, labels=labels, scale=0.0, ce_weight=1.0)
    expected = by_reference(lambda s: torch.nn.functional.cross_entropy(s, labels), student)
    torch.testing.assert_close((loss, grad), expected)


@tiling
@pytest.mark.parametrize("variant", REPRESENTATIVE)
def test_rows_that_do_not_count_are_not_read(monkeypatch, variant, tiling):
    student, teacher = pair(4, CLASSES)
    mask = torch.tensor([True, False, True, False])
    width = CLASSES * student.element_size()
    forbidden = [x.data_ptr() + row * width for x in (student, teacher) for row in (1, 3)]
    load = InterpreterBuilder.create_masked_load

    def watched(self: Any, pointers: Any, present: Any, *rest: Any) -> Any:
        addresses = np.broadcast_to(pointers.data, present.data.shape)[present.data].astype(np.int64)
        assert not any(((addresses >= begin) & (addresses < begin + width)).any() for begin in forbidden)
        return load(self, pointers, present, *rest)

    monkeypatch.setattr(InterpreterBuilder, "create_masked_load", watched)
    student[~mask] = math.nan
    teacher[~mask] = math.nan
    for reduction in ("none", "batchmean"):
        loss, grad = launch(monkeypatch, tiling, variant, student, teacher, mask=mask, reduction=reduction)
        assert loss.isfinite().all() and grad.isfinite().all()
        assert (grad[~mask] == 0).all() and (grad[mask] != 0).any()
        assert reduction == "batchmean" or (loss[~mask] == 0).all()
        alone, _ = launch(
            monkeypatch, tiling, variant, student, teacher, mask=mask, reduction=reduction, needs_grad=False
        )
        assert torch.equal(alone, loss)


@tiling
def test_no_row_left_is_zero(monkeypatch, tiling):
    for reduction in ("sum", "mean", "batchmean"):
        none = torch.zeros(3, dtype=torch.bool)
        loss, grad = launch(monkeypatch, tiling, "forward", *pair(3, CLASSES), mask=none, reduction=reduction)
        assert loss.item() == 0 and (grad == 0).all()


@pytest.mark.parametrize("shape", [(0, 5), (2, 0, 5)])
def test_no_rows_are_zero(monkeypatch, shape):
    loss, grad = launch(monkeypatch, "one row a program", "js", *pair(*shape))
    assert loss.item() == 0 and grad.shape == shape


@tiling
@pytest.mark.parametrize("variant", PLAIN)
def test_a_nan_stays_in_its_row(monkeypatch, variant, tiling):
    for side in (0, 1):
        inputs = pair(3, CLASSES)
        inputs[side][1, 7] = math.nan
        loss, grad = launch(monkeypatch, tiling, variant, *inputs, reduction="none")
        assert loss.isnan().tolist() == [False, True, False]
        assert grad[1].isnan().any() and not grad[[0, 2]].isnan().any()


@tiling
def test_a_teacher_of_nan_has_no_argmax_and_reads_nothing_out_of_bounds(monkeypatch, tiling):
    student, teacher = pair(2, CLASSES)
    teacher[0] = math.nan
    loss, _ = launch(monkeypatch, tiling, "hard, T=2.0, smoothing=0.0, argmax", student, teacher, reduction="none")
    assert loss.isnan().tolist() == [True, False]


@tiling
@pytest.mark.parametrize("label", [-1, CLASSES, 2**40])
def test_a_label_that_is_no_class_makes_its_row_nan(monkeypatch, label, tiling):
    labels = torch.tensor([1, label])
    for variant in ("dkd", "hard, T=2.0, smoothing=0.1, labels"):
        loss, _ = launch(monkeypatch, tiling, variant, *pair(2, CLASSES), labels=labels, reduction="none")
        assert loss.isnan().tolist() == [False, True]


@tiling
def test_the_first_of_equal_classes_is_the_teachers_choice(monkeypatch, tiling):
    student, teacher = pair(3, CLASSES)
    for row, classes in enumerate(([5, 6], [3, 39], [0, 17, 18])):
        teacher[row, classes] = 20.0
    check(monkeypatch, tiling, "hard, T=2.0, smoothing=0.0, argmax", student, teacher)


# classes at -inf: of the student, of the teacher
ABSENT = {
    "one class of both": ([3], [3]),
    "teacher only": ([], [0, 3]),
    "teacher, whole tiles": ([], list(range(17))),
    "both, whole tiles": (list(range(17)), list(range(17))),
    "both, all but the last": (list(range(39)), list(range(39))),
}


@tiling
@pytest.mark.parametrize("case", ABSENT)
@pytest.mark.parametrize("variant", ["forward", "js", "dkd", "hard, T=3.0, smoothing=0.0, labels"])
def test_classes_without_mass_add_nothing(monkeypatch, variant, case, tiling):
    student, teacher = pair(3, CLASSES)
    labels = torch.tensor([39, 39, 39])
    student[:, ABSENT[case][0]] = -math.inf
    teacher[:, ABSENT[case][1]] = -math.inf
    check(
        monkeypatch, tiling, variant, student, teacher, labels=labels if VARIANTS[variant][0].get("labelled") else None
    )


@tiling
@pytest.mark.parametrize("case", ["one class of both", "both, whole tiles", "both, all but the last"])
def test_reverse_classes_without_mass_add_nothing(monkeypatch, case, tiling):
    student, teacher = pair(3, CLASSES)
    student[:, ABSENT[case][0]] = -math.inf
    teacher[:, ABSENT[case][1]] = -math.inf
    for other in (teacher, pair(3, CLASSES)[1]):  # one class left: the gradient p_s (log(p_s / p_t) - KL) vanishes
        check(monkeypatch, tiling, "reverse", student, other, terms=10.0)


@tiling
def test_js_is_finite_where_one_side_has_no_mass(monkeypatch, tiling):
    for side in (0, 1):
        inputs = pair(3, CLASSES)
        inputs[side][:, [0, 3, *range(16, 33)]] = -math.inf
        check(monkeypatch, tiling, "js", *inputs)


@tiling
@pytest.mark.parametrize("absent", [0, 20])
def test_smoothing_over_a_class_the_student_excludes_is_infinite(monkeypatch, absent, tiling):
    student, teacher = pair(2, CLASSES)
    student[0, absent] = -math.inf
    teacher[:, absent] = -math.inf
    labels = torch.tensor([5, 6])
    variant = "hard, T=3.0, smoothing=0.1, labels"
    check(monkeypatch, tiling, variant, student, teacher, labels=labels, reduction="none")


@tiling
@pytest.mark.parametrize("variant", ["forward", "dkd"])
def test_teacher_mass_where_the_student_has_none_is_infinite(monkeypatch, variant, tiling):
    student, teacher = pair(2, CLASSES)
    student[0, 3] = -math.inf
    teacher[0, 30] = 300.0  # the tile of class 3 is brought to a maximum where its infinite sum counts nothing
    teacher[1, 30] = 300.0
    labels = torch.tensor([8, 8])
    for gap in (0.0, 280.0):
        teacher[:, 30] -= gap
        loss, grad = launch(monkeypatch, tiling, variant, student, teacher, labels=labels, reduction="none")
        assert not loss.isnan().any() and grad.isfinite().all()
    assert loss.isinf().tolist() == [True, False]


@tiling
@pytest.mark.parametrize("variant", ["forward", "reverse", "js"])
def test_extreme_logits_and_temperatures(monkeypatch, variant, tiling):
    for temperature, scale in ((0.05, 1e4), (100.0, 3.0), (0.05, 3.0)):
        student, teacher = pair(3, CLASSES, scale=scale)
        loss, grad = launch(monkeypatch, tiling, variant, student, teacher, temperature=temperature, scale=1.0)
        options = {"direction": variant} if variant != "js" else {"beta": 0.3}
        function = reference.js_divergence if variant == "js" else reference.kl_divergence
        if variant != "js":
            options["scale_by_temperature"] = False

        def of(s: Tensor, t: Tensor, function=function, temperature=temperature, options=options) -> Tensor:
            return function(s, t, temperature=temperature, **options)

        truth = by_reference(of, student.double(), teacher.double())
        plain = by_reference(of, student, teacher)
        assert_within_rule("value", loss, plain[0], truth[0], torch.float32, student.numel(), floor=1.0)
        # With all mass in one class the gradient vanishes, as the difference of two equal logarithms.
        logarithm = 2 * scale / temperature if variant == "reverse" else 1.0
        terms = logarithm / temperature / len(student)
        assert_within_rule("gradient", grad, plain[1], truth[1], torch.float32, student.numel(), terms)


@tiling
@pytest.mark.parametrize("variant", REPRESENTATIVE)
def test_an_offset_of_the_logits_costs_no_more_digits_than_in_pytorch(monkeypatch, variant, tiling):
    student, teacher = pair(2, CLASSES)
    check(monkeypatch, tiling, variant, student + 1000.0, teacher - 1000.0)


@tiling
@pytest.mark.parametrize("gap", [200.0, -200.0, 20.0])
def test_dkd_with_a_confident_student(monkeypatch, gap, tiling):
    student, teacher = pair(3, CLASSES, scale=1.0)
    labels = torch.tensor([0, 5, 39])
    rows = torch.arange(3)
    student[rows, labels] += gap
    check(monkeypatch, tiling, "dkd", student, teacher, labels=labels)
    check(monkeypatch, tiling, "dkd", teacher, student, labels=labels)
    teacher[rows, labels] += gap
    check(monkeypatch, tiling, "dkd", student, teacher, labels=labels)


@tiling
def test_dkd_of_two_classes_has_no_other_classes_to_compare(monkeypatch, tiling):
    check(monkeypatch, tiling, "dkd", *pair(3, 2), labels=torch.tensor([0, 1, 1]))


@tiling
@pytest.mark.parametrize("classes", [1, 2, 3, 16, 17, 33, 64])
@pytest.mark.parametrize("variant", ["forward", "reverse", "js", "standardized", "hard, T=3.0, smoothing=0.1, argmax"])
def test_any_number_of_classes(monkeypatch, variant, classes, tiling):
    # Two classes have the same z-scores whatever their logits are: no gradient.
    check(monkeypatch, tiling, variant, *pair(2, classes), terms=10.0 if variant == "standardized" else 0.0)


@tiling
@pytest.mark.parametrize("which", ["student", "teacher", "both"])
def test_constant_rows_are_standardized_to_zero(monkeypatch, which, tiling):
    student, teacher = pair(2, CLASSES)
    if which != "teacher":
        student[0] = 1.7e4 / 3
    if which != "student":
        teacher[0] = -0.1
    check(monkeypatch, tiling, "standardized", student, teacher)


@tiling
def test_an_outlier_and_an_offset_leave_the_deviation_exact(monkeypatch, tiling):
    student, teacher = pair(2, CLASSES)
    student[:, 0] += 300.0
    check(monkeypatch, tiling, "standardized", student, teacher + 2000.0)


@tiling
@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_layout_in_memory(monkeypatch, layout, tiling):
    student, teacher = pair(2, 3, CLASSES)
    check(monkeypatch, tiling, "forward", LAYOUTS[layout](student), teacher)
    check(monkeypatch, tiling, "dkd", student, LAYOUTS[layout](teacher))


def test_rows_with_two_strides_are_not_copied():
    x = torch.zeros(4, 6, 8)
    assert rows_of(x) == (x, 1, 8, 0)
    view = x[:, :-1]
    assert rows_of(view) == (view, 5, 48, 8)
    view = torch.zeros(2, 4, 6, 8)[:, :, 1:]
    assert rows_of(view) == (view, 5, 48, 8)
    view = torch.zeros(4, 8).expand(3, 4, 8)
    assert rows_of(view) == (view, 4, 0, 8)
    assert rows_of(torch.zeros(8, 6).T) is None
    assert rows_of(torch.zeros(3, 4, 5, 8)[:, :3, :4]) is None


@tiling
@pytest.mark.parametrize("variant", REPRESENTATIVE)
def test_the_gradient_may_overwrite_the_student(monkeypatch, variant, tiling):
    longer, teacher = pair(2, 4, CLASSES)
    before = longer.clone()
    student, teacher = longer[:, :-1], teacher[:, :-1]
    expected = launch(monkeypatch, tiling, variant, student, teacher)
    loss, _ = launch(monkeypatch, tiling, variant, student, teacher, inplace=True)
    assert torch.equal(loss, expected[0])
    assert torch.equal(longer[:, :-1], expected[1])
    assert torch.equal(longer[:, -1], before[:, -1])


def test_float64_is_refused(monkeypatch):
    with pytest.raises(TypeError, match="float16, bfloat16 or float32"):
        launch(monkeypatch, "one row a program", "forward", *pair(2, 5, dtype=torch.float64))
