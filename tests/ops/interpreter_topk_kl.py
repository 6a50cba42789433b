"""The Triton kernel of topk_kl on the CPU, interpreted. Run by test_topk_kl_triton.py with TRITON_INTERPRET=1."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from kdfast import reference
from kdfast.ops.topk_kl import triton_kernels
from kdfast.ops.topk_kl.triton_kernels import REDUCTIONS, TAILS, Tiling
from support import HALF, LAYOUTS, assert_within_rule

assert triton_kernels.triton.knobs.runtime.interpret, "TRITON_INTERPRET=1 must be set before triton is imported"

# Rows of 40 classes are one tile, or three; six entries are taken together, or in three parts.
TILINGS = {"one tile": Tiling(8, 16, 4, 1), "several tiles": Tiling(2, 4, 4, 1)}
CLASSES, K = 40, 6

# id -> tail, values, temperature
SETTINGS = {
    "drop, logits": ("drop", "logits", 2.0),
    "drop, logprobs": ("drop", "logprobs", 1.0),
    "bucket": ("bucket", "logprobs", 1.0),
    "renormalize, logits": ("renormalize", "logits", 0.5),
    "renormalize, logprobs": ("renormalize", "logprobs", 3.0),
}
AGAINST_THE_ROW = ["drop, logits", "drop, logprobs", "bucket"]

tiling = pytest.mark.parametrize("tiling", TILINGS)
every_setting = pytest.mark.parametrize("setting", SETTINGS)


@pytest.fixture(autouse=True)
def uninitialized_memory_holds_rubbish() -> Iterator[None]:
    """NaN in outputs, all bits but one in the scratch row: what the kernel does not write shows."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def case(
    *leading: int, classes: int = CLASSES, k: int = K, scale: float = 3.0, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """Student's logits, and log-probabilities and classes of a teacher's k largest."""
    generator = torch.Generator().manual_seed(seed)
    student, teacher = (torch.randn(*leading, classes, generator=generator) * scale for _ in range(2))
    values, indices = teacher.double().log_softmax(-1).float().topk(k)
    return student, values, indices


def launch(
    monkeypatch: pytest.MonkeyPatch,
    tiling: str,
    setting: str,
    student: Tensor,
    values: Tensor,
    indices: Tensor,
    *,
    mask: Tensor | None = None,
    row_weight: Tensor | None = None,
    reduction: str = "batchmean",
    temperature: float | None = None,
    needs_grad: bool = True,
) -> tuple[Tensor, Tensor]:
    monkeypatch.setattr(triton_kernels, "tiling", lambda classes, k, itemsize: TILINGS[tiling])
    tail, kind, default = SETTINGS[setting]
    options = (temperature or default, TAILS[tail], kind == "logprobs", REDUCTIONS[reduction], needs_grad)
    with np.errstate(all="ignore"):  # infinities meet where nothing is listed, and are left out afterwards
        return triton_kernels.topk_kl(student, values, indices, mask, row_weight, *options)


def by_reference(
    setting: str,
    student: Tensor,
    values: Tensor,
    indices: Tensor,
    *,
    mask: Tensor | None = None,
    row_weight: Tensor | None = None,
    reduction: str = "batchmean",
    temperature: float | None = None,
) -> tuple[Tensor, Tensor]:
    tail, kind, default = SETTINGS[setting]
    leaf = student.detach().clone().requires_grad_()
    rows = reference.topk_kl_divergence(
        leaf, values, indices, values=kind, temperature=temperature or default, tail=tail, reduction="none", mask=mask
    )
    loss = reference.logits.reduce_rows(rows, reduction, mask, row_weight, num_classes=student.shape[-1])
    loss.sum().backward()
    return loss.detach(), leaf.grad


def check(
    monkeypatch: pytest.MonkeyPatch,
    tiling: str,
    setting: str,
    student: Tensor,
    values: Tensor,
    indices: Tensor,
    *,
    terms: float = 0.0,
    **options: Any,
) -> tuple[Tensor, Tensor]:
    """Value and gradient of the launcher keep the rule of tests/support.py.

    ``terms``: the size of the terms a gradient is the difference of, where it may vanish.
    """
    before = student.clone()
    fast = launch(monkeypatch, tiling, setting, student, values, indices, **options)
    assert torch.equal(student, before)
    truth = by_reference(setting, student.double(), values, indices, **options)
    plain = by_reference(setting, student, values, indices, **options)
    assert fast[0].dtype == torch.float32 and fast[1].dtype == student.dtype and fast[1].is_contiguous()
    floor = (options.get("temperature") or SETTINGS[setting][2]) ** 2
    dtype, length = student.dtype, student.numel()
    assert_within_rule("value", fast[0], plain[0], truth[0], dtype, length, floor=floor)
    # The interpreter rounds to bfloat16 towards 0, which the rule has room for.
    assert_within_rule("gradient", fast[1], plain[1], truth[1], dtype, length, terms, dtype)
    return fast


def test_every_compile_time_combination_is_among_the_settings():
    def constants(tail: str, values: str) -> tuple[Any, ...]:
        chosen, _ = triton_kernels.options_of(TAILS[tail], values == "logprobs", TILINGS["one tile"], nvidia=False)
        return chosen["TAIL"], chosen["SOFTEN"]

    reachable = {
        constants(tail, values)
        for tail, values in product(TAILS, ("logits", "logprobs"))
        if (tail, values) != ("bucket", "logits")  # refused
    }
    assert reachable == {constants(tail, values) for tail, values, _ in SETTINGS.values()}


@tiling
@every_setting
@pytest.mark.parametrize("dtype", [torch.float32, *HALF], ids=str)
def test_every_setting_agrees_with_the_reference(monkeypatch, setting, dtype, tiling):
    student, values, indices = case(5)
    check(monkeypatch, tiling, setting, student.to(dtype), values, indices)


@tiling
@pytest.mark.parametrize("stored", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_the_teacher_has_a_dtype_of_its_own(monkeypatch, stored, tiling):
    student, values, indices = case(2)
    for setting in SETTINGS:
        check(monkeypatch, tiling, setting, student, values.to(stored), indices)


@tiling
@pytest.mark.parametrize("reduction", REDUCTIONS)
@every_setting
def test_reductions_mask_weights_index_types_and_padding(monkeypatch, setting, reduction, tiling):
    student, values, indices = case(2, 2)
    mask = torch.tensor([[True, False], [True, True]])
    weight = torch.rand(2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) + 0.5
    indices[0, 0, 4], values[1, 0, 0], values[1, 1, 2:] = -100, -math.inf, -math.inf
    values[0, 0, 4] = math.nan  # padding, whatever its value
    indices[1, 0, 0] = 10**6  # padding, whatever its index
    options = {"row_weight": weight, "reduction": reduction}
    padded = indices.masked_fill(values == -math.inf, 0)
    fast = launch(monkeypatch, tiling, setting, student, values, indices.int(), mask=mask, **options)
    values = values.nan_to_num(nan=0.0, neginf=-math.inf)
    kept = check(monkeypatch, tiling, setting, student, values, padded, mask=mask, **options)
    assert torch.equal(fast[0], kept[0]) and torch.equal(fast[1], kept[1])


@tiling
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_reductions_where_every_row_counts(monkeypatch, reduction, tiling):
    check(monkeypatch, tiling, "drop, logits", *case(3), row_weight=torch.tensor([0.5, 2.0, 0.0]), reduction=reduction)


@tiling
@every_setting
def test_without_a_gradient_the_loss_is_the_same(monkeypatch, setting, tiling):
    loss, grad = launch(monkeypatch, tiling, setting, *case(2), needs_grad=False)
    assert grad.shape == (0,)
    assert torch.equal(loss, launch(monkeypatch, tiling, setting, *case(2))[0])


@tiling
@every_setting
def test_rows_that_do_not_count_are_not_read(monkeypatch, setting, tiling):
    student, values, indices = case(4)
    mask = torch.tensor([True, False, True, False])
    student[~mask], values[~mask], indices[~mask] = math.nan, math.nan, 2**40
    for reduction in ("none", "batchmean"):
        loss, grad = launch(monkeypatch, tiling, setting, student, values, indices, mask=mask, reduction=reduction)
        assert loss.isfinite().all() and (grad[~mask] == 0).all()
        expected = launch(monkeypatch, tiling, setting, student[mask], values[mask], indices[mask], reduction=reduction)
        torch.testing.assert_close((loss if reduction == "batchmean" else loss[mask], grad[mask]), expected)
        assert reduction == "batchmean" or (loss[~mask] == 0).all()


@tiling
@every_setting
def test_no_row_left_is_zero(monkeypatch, setting, tiling):
    none = torch.zeros(3, dtype=torch.bool)
    for reduction in ("sum", "mean", "batchmean"):
        loss, grad = launch(monkeypatch, tiling, setting, *case(3), mask=none, reduction=reduction)
        assert loss.item() == 0 and (grad == 0).all()


@pytest.mark.parametrize("leading", [(0,), (2, 0)])
def test_no_rows_are_zero(monkeypatch, leading):
    for setting in SETTINGS:
        loss, grad = launch(monkeypatch, "one tile", setting, *case(*leading))
        assert loss.item() == 0 and grad.shape == (*leading, CLASSES)


@tiling
@every_setting
@pytest.mark.parametrize("padding", ["index", "value"])
def test_a_row_of_padding_is_zero_and_counts(monkeypatch, setting, padding, tiling):
    student, values, indices = case(3)
    if padding == "index":
        indices[1] = -100
    else:
        values[1] = -math.inf
    loss, grad = check(monkeypatch, tiling, setting, student, values, indices)
    assert (grad[1] == 0).all()
    loss = launch(monkeypatch, tiling, setting, student, values, indices, reduction="none")[0]
    assert loss[1] == 0 and (loss != 0).sum() == 2


@tiling
def test_renormalized_tails_never_read_the_other_classes(monkeypatch, tiling):
    student, values, indices = case(3)
    alone = torch.full_like(student, math.nan).scatter(1, indices, student.gather(1, indices))
    setting = "renormalize, logits"
    expected = launch(monkeypatch, tiling, setting, student, values, indices)
    loss, grad = launch(monkeypatch, tiling, setting, alone, values, indices)
    assert torch.equal(loss, expected[0]) and torch.equal(grad, expected[1])
    assert (grad != 0).sum() == indices.numel()


@tiling
@pytest.mark.parametrize("setting", ["drop, logits", "bucket", "renormalize, logits"])
@pytest.mark.parametrize(
    "shape", [(1, 1), (2, 1), (2, 2), (16, 16), (17, 1), (32, 9), (33, 5), (64, 16), (100, 3)], ids=str
)
def test_any_number_of_classes_and_entries(monkeypatch, setting, shape, tiling):
    classes, k = shape
    # Where one class is all there is, or all are listed, the gradient may vanish as a difference of probabilities.
    check(monkeypatch, tiling, setting, *case(1, classes=classes, k=k), terms=1.0)


# Which classes share a word of holes, a lane, a tile, or a part of the entries.
LISTS = {
    "one word, neighbours": [0, 1, 2, 3, 4, 5],
    "around the end of a word": [30, 33, 31, 32, 34, 29],
    "the last bit": [31, 39, 0, 8, 16, 24],
    "words take turns": [1, 33, 2, 34, 3, 35],
}


@tiling
@pytest.mark.parametrize("name", LISTS)
def test_every_listed_class_is_left_out_of_the_rest(monkeypatch, name, tiling):
    student, values, indices = case(2)
    indices = indices.new_tensor(LISTS[name]).expand(2, -1)
    for gap in (0.0, 100.0):  # at 100 the rest has e^-100 of the mass
        student.scatter_add_(1, indices, torch.full((2, K), gap))
        check(monkeypatch, tiling, "bucket", student, values, indices)
        check(monkeypatch, tiling, "drop, logprobs", student, values, indices)


@tiling
def test_the_rest_is_known_to_all_its_digits(monkeypatch, tiling):
    """The rest alone counts: with next to no mass in the student, in the teacher, or in both."""
    index = torch.tensor([[0]])
    for rest_t, gap in product((-1e-9, -1e-6, -1e-2, -3.0), (10.0, 50.0, 700.0, -50.0)):
        student = torch.zeros(1, CLASSES)
        student[0, 0] = gap
        values = torch.tensor([[rest_t]])
        loss, grad = launch(monkeypatch, tiling, "bucket", student, values, index)
        truth = by_reference("bucket", student.double(), values.double(), index)
        torch.testing.assert_close(loss.double(), truth[0], rtol=2e-6, atol=1e-7)
        torch.testing.assert_close(grad.double(), truth[1], rtol=2e-5, atol=1e-7)


@tiling
def test_a_teacher_with_all_its_mass_in_the_list(monkeypatch, tiling):
    student = case(3)[0]
    indices = torch.tensor([[7, 1, 2]] * 3)
    # one class; exactly 1 after rounding; more than 1
    values = torch.tensor([[0.0, -math.inf, -math.inf], [math.log(0.5), math.log(0.5), -math.inf], [-0.5, -0.9, -5.0]])
    for setting in SETTINGS:
        loss, grad = check(monkeypatch, tiling, setting, student, values, indices)
        assert loss.isfinite() and grad.isfinite().all()


@tiling
def test_no_bucket_where_every_class_is_listed(monkeypatch, tiling):
    student, values, indices = case(2, classes=7, k=7)
    values -= 0.5
    drop, bucket = (
        launch(monkeypatch, tiling, name, student, values, indices) for name in ("drop, logprobs", "bucket")
    )
    torch.testing.assert_close(bucket, drop)
    # One entry of padding: the other six are listed, and the class that is left is the rest.
    indices[:, 6] = -100
    check(monkeypatch, tiling, "bucket", student, values, indices)


@tiling
@pytest.mark.parametrize("stored", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_rounding_is_no_rest_where_the_student_has_none(monkeypatch, stored, tiling):
    generator = torch.Generator().manual_seed(3)
    student, teacher = (torch.randn(4, 9, generator=generator) for _ in range(2))
    student[:, 5:], teacher[:, 5:] = -math.inf, -math.inf  # a padded vocabulary
    values, indices = teacher.log_softmax(-1).to(stored).topk(5)
    loss, grad = launch(monkeypatch, tiling, "bucket", student, values, indices)
    assert loss.isfinite() and grad.isfinite().all()
    truth = by_reference("drop, logprobs", student, values, indices)
    torch.testing.assert_close((loss, grad), truth)
    values[0, 0] -= 1  # real mass is missing
    loss, grad = launch(monkeypatch, tiling, "bucket", student, values, indices, reduction="none")
    assert loss.isinf().tolist() == [True] + [False] * 3 and grad.isfinite().all()


@tiling
@every_setting
def test_classes_that_the_student_lacks(monkeypatch, setting, tiling):
    student, values, indices = case(4)
    unlisted = torch.ones(4, CLASSES, dtype=torch.bool).scatter(1, indices, False)
    student[0, indices[0, 0]] = -math.inf  # the teacher has mass there
    student[1, indices[1]] = -math.inf
    student[2] = torch.where(unlisted[2] & (torch.arange(CLASSES) % 2 == 0), -math.inf, student[2])
    student[3] = torch.where(unlisted[3] & (torch.arange(CLASSES) < 30), -math.inf, student[3])
    loss, grad = check(monkeypatch, tiling, setting, student, values, indices, reduction="none", terms=1.0)
    assert loss.isinf().tolist() == [True, True, False, False] and grad.isfinite().all()


@tiling
@every_setting
def test_a_nan_stays_in_its_row(monkeypatch, setting, tiling):
    for side in (0, 1):
        inputs = case(3)
        inputs[side][1, inputs[2][1, 2] if side == 0 else 2] = math.nan
        loss, grad = launch(monkeypatch, tiling, setting, *inputs, reduction="none")
        assert loss.isnan().tolist() == [False, True, False]
        assert grad[1].isnan().any() and not grad[[0, 2]].isnan().any()


@tiling
@pytest.mark.parametrize("setting", AGAINST_THE_ROW)
def test_a_nan_that_is_not_listed_counts_too(monkeypatch, setting, tiling):
    student, values, indices = case(3)
    student[1, next(v for v in range(CLASSES) if v not in indices[1])] = math.nan
    loss, grad = launch(monkeypatch, tiling, setting, student, values, indices, reduction="none")
    assert loss.isnan().tolist() == [False, True, False] and not grad[[0, 2]].isnan().any()


@tiling
@pytest.mark.parametrize("setting", ["drop, logits", "bucket", "renormalize, logits"])
@pytest.mark.parametrize("index", [-1, CLASSES, 2**40])
def test_an_index_that_is_no_class_makes_its_row_nan_and_writes_nowhere(monkeypatch, setting, index, tiling):
    student, values, indices = case(3)
    expected = launch(monkeypatch, tiling, setting, student, values, indices, reduction="none")
    indices[1, 3] = index
    loss, grad = launch(monkeypatch, tiling, setting, student, values, indices, reduction="none")
    assert loss.isnan().tolist() == [False, True, False]
    assert torch.equal(loss[[0, 2]], expected[0][[0, 2]]) and torch.equal(grad[[0, 2]], expected[1][[0, 2]])


@tiling
@every_setting
def test_extreme_logits_and_temperatures(monkeypatch, setting, tiling):
    for temperature, scale in ((0.05, 1e4), (100.0, 3.0), (0.05, 3.0)):
        if SETTINGS[setting][1] == "logprobs" and SETTINGS[setting][0] != "renormalize":
            temperature = 1.0
        inputs = case(3, scale=scale)
        check(monkeypatch, tiling, setting, *inputs, temperature=temperature, terms=temperature)


@tiling
@every_setting
def test_an_offset_of_the_logits_costs_no_more_digits_than_in_pytorch(monkeypatch, setting, tiling):
    student, values, indices = case(2)
    check(monkeypatch, tiling, setting, student + 1000.0, values, indices)


@tiling
@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_layout_in_memory(monkeypatch, layout, tiling):
    student, values, indices = case(2, 2)
    check(monkeypatch, tiling, "drop, logprobs", LAYOUTS[layout](student), values, indices)
    check(monkeypatch, tiling, "renormalize, logits", LAYOUTS[layout](student), values, indices)
    indices = indices.movedim(0, -1).contiguous().movedim(-1, 0)
    check(monkeypatch, tiling, "renormalize, logits", student, LAYOUTS[layout](values), indices)


def test_float64_is_refused(monkeypatch):
    student, values, indices = case(2)
    with pytest.raises(TypeError, match="float16, bfloat16 or float32"):
        launch(monkeypatch, "one tile", "bucket", student.double(), values, indices)
