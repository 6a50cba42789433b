"""The logit losses in plain PyTorch against truths that share no code with them: 60-digit sums, PyTorch, peers."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import mpmath
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torchdistill.losses import mid_level as torchdistill

from kdfast.reference.logits import (
    dist_loss,
    dkd_loss,
    js_divergence,
    kd_loss,
    kl_divergence,
    linear_kl_divergence,
    standardized_kl_divergence,
    topk_kl_divergence,
)

INF = math.inf
# Divisor of the oracle's numbers: a sum over 5 classes at unit scale is off by a few eps.
close = partial(torch.testing.assert_close, rtol=1e-12, atol=1e-13)


def normal(*shape: int, seed: int = 0, scale: float = 3.0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed)) * scale


def row(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def logprobs(*shape: int, seed: int = 0) -> Tensor:
    return normal(*shape, seed=seed).log_softmax(-1)


# The truth: plain sums over probabilities with 60 digits, where exp(-400) is a number like any other.

Row = list[mpmath.mpf]
P60 = mpmath.mp.clone()
P60.dps = 60


def softmax(logits: Tensor, temperature: float = 1.0, classes: list[int] | None = None) -> Row:
    values = [logits[v].item() for v in (range(len(logits)) if classes is None else classes)]
    weights = [P60.mpf(0) if x == -INF else P60.exp(P60.mpf(x) / P60.mpf(temperature)) for x in values]
    return [w / sum(weights) for w in weights]


def kl(p: Row, q: Row) -> mpmath.mpf:
    total = P60.mpf(0)
    for a, b in zip(p, q, strict=True):
        if a > 0:
            total += a * P60.log(a / b) if b > 0 else P60.inf
    return total


def true_js(student: Tensor, teacher: Tensor, beta: float, temperature: float) -> float:
    s, t, b = softmax(student, temperature), softmax(teacher, temperature), P60.mpf(beta)
    if beta in (0, 1):
        return float(kl(t, s) if beta == 0 else kl(s, t))
    m = [b * y + (1 - b) * x for x, y in zip(s, t, strict=True)]
    return float(b * kl(t, m) + (1 - b) * kl(s, m))


def true_dkd(student: Tensor, teacher: Tensor, y: int, alpha: float, beta: float, temperature: float) -> float:
    others = [v for v in range(len(student)) if v != y]
    s, t = softmax(student, temperature), softmax(teacher, temperature)
    target_kl = kl([t[y], sum(t[v] for v in others)], [s[y], sum(s[v] for v in others)])
    has_others = any(teacher[v] > -INF for v in others)
    other_kl = kl(softmax(teacher, temperature, others), softmax(student, temperature, others)) if has_others else 0
    return float((alpha * target_kl + beta * other_kl) * temperature**2)


def true_topk(student: Tensor, values: Tensor, indices: list[int], kind: str, tail: str, temperature: float) -> float:
    entries = [i for i, index in enumerate(indices) if index != -100 and values[i] > -INF]
    if not entries:
        return 0.0
    classes = [indices[i] for i in entries]
    if kind == "logits" or tail == "renormalize":
        t = softmax(values, temperature, entries)
    else:
        t = [P60.exp(P60.mpf(values[i].item())) for i in entries]
    s_all = softmax(student, temperature)
    s = [s_all[v] for v in classes] if tail != "renormalize" else softmax(student, temperature, classes)
    if tail == "bucket":
        t.append(1 - sum(t))
        s.append(sum((s_all[v] for v in range(len(student)) if v not in classes), P60.mpf(0)))
    return float(kl(t, s) * temperature**2)


# name: student, teacher. Every row says what it stands for.
ROWS = {
    "ordinary": (row(1.0, -2.0, 0.5, 3.0, 0.0), row(0.2, 1.4, -3.0, 2.0, 1.0)),
    "identical": (row(1.0, -2.0, 0.5, 3.0, 0.0), row(1.0, -2.0, 0.5, 3.0, 0.0)),
    "nearly identical": (row(1.0, -2.0, 0.5, 3.0, 1e-6), row(1.0, -2.0, 0.5, 3.0, 0.0)),
    "constant": (row(2.0, 2.0, 2.0, 2.0, 2.0), row(0.2, 1.4, -3.0, 2.0, 1.0)),
    "gap of 200, agreed": (row(200.0, 1.0, 0.0, -1.0, 2.0), row(200.0, 2.0, 1.0, 0.0, -2.0)),
    "gap of 200, opposed": (row(-200.0, 1.0, 0.0, -1.0, 2.0), row(200.0, 2.0, 1.0, 0.0, -2.0)),
    "gap of 900, underflowing": (row(0.0, 900.0, 0.0, 0.0, 0.0), row(900.0, 0.0, -900.0, 0.0, 0.0)),
    "teacher lacks a class": (row(1.0, -2.0, 0.5, 3.0, 0.0), row(0.2, -INF, -3.0, 2.0, 1.0)),
    "student lacks a class": (row(1.0, -INF, 0.5, 3.0, 0.0), row(0.2, 1.4, -3.0, 2.0, 1.0)),
    "both lack a class": (row(1.0, -INF, 0.5, 3.0, 0.0), row(0.2, -INF, -3.0, 2.0, 1.0)),
    "no class in common": (row(1.0, 2.0, -INF, -INF, -INF), row(-INF, -INF, -3.0, 2.0, 1.0)),
    "one class each": (row(-INF, 1.0, -INF, -INF, -INF), row(1.0, -INF, -INF, -INF, -INF)),
    "the same one class": (row(1.0, -INF, -INF, -INF, -INF), row(2.0, -INF, -INF, -INF, -INF)),
}
every_row = pytest.mark.parametrize(("student", "teacher"), ROWS.values(), ids=ROWS)


def value_and_gradient(function: Callable[[Tensor], Tensor], student: Tensor) -> tuple[Tensor, Tensor]:
    leaf = student.clone().requires_grad_()
    value = function(leaf)
    return value.detach(), torch.autograd.grad(value, leaf)[0]


def assert_is(function: Callable[[Tensor], Tensor], student: Tensor, truth: float) -> None:
    """The value is ``truth``, which may be inf; where it is finite, so is the gradient."""
    value, gradient = value_and_gradient(function, student)
    close(value, torch.tensor(truth, dtype=torch.float64))
    if math.isfinite(truth):
        assert gradient.isfinite().all(), gradient


# kl


@pytest.mark.parametrize("temperature", [1.0, 0.5, 4.0])
@every_row
def test_kl_agrees_with_sixty_digits(student: Tensor, teacher: Tensor, temperature: float) -> None:
    s, t = softmax(student, temperature), softmax(teacher, temperature)
    for direction, truth in (("forward", kl(t, s)), ("reverse", kl(s, t))):
        function = partial(kl_divergence, teacher_logits=teacher, temperature=temperature, direction=direction)
        assert_is(function, student, float(truth * temperature**2))


@pytest.mark.filterwarnings("ignore:reduction. 'mean'")
@pytest.mark.parametrize("reduction", ["sum", "mean", "batchmean"])
@pytest.mark.parametrize("direction", ["forward", "reverse"])
def test_kl_agrees_with_torch_on_two_dimensions(direction: str, reduction: str) -> None:
    student, teacher = normal(6, 5, seed=1), normal(6, 5, seed=2)
    p, q = (teacher, student) if direction == "forward" else (student, teacher)
    truth = F.kl_div((q / 2).log_softmax(-1), (p / 2).log_softmax(-1), log_target=True, reduction=reduction)
    close(kl_divergence(student, teacher, 2.0, direction=direction, reduction=reduction), 4 * truth)
    unscaled = kl_divergence(
        student, teacher, 2.0, direction=direction, reduction=reduction, scale_by_temperature=False
    )
    close(unscaled, truth)


# what kl, js and standardized share: rows


@pytest.mark.parametrize("function", [kl_divergence, js_divergence, standardized_kl_divergence])
def test_rows_are_all_leading_dimensions_and_weights_do_not_change_their_number(
    function: Callable[..., Tensor],
) -> None:
    student, teacher, weight = normal(2, 3, 5, seed=1), normal(2, 3, 5, seed=2), normal(2, 3, seed=3).abs()
    mask = torch.tensor([[True, False, True], [True, True, False]])
    rows = torch.stack([function(student[i, j], teacher[i, j]) for i in range(2) for j in range(3)]).view(2, 3)
    kept = (rows * weight)[mask]
    options = {"mask": mask, "row_weight": weight}
    close(function(student, teacher), rows.sum() / 6)
    close(function(student, teacher, reduction="none", **options), (rows * weight).where(mask, torch.zeros(())))
    close(function(student, teacher, reduction="sum", **options), kept.sum())
    close(function(student, teacher, reduction="batchmean", **options), kept.sum() / 4)
    close(function(student, teacher, reduction="mean", **options), kept.sum() / 4 / 5)


# js


@pytest.mark.parametrize("beta", [0.5, 0.1, 0.9, 0.0, 1.0])
@pytest.mark.parametrize("temperature", [1.0, 0.5, 4.0])
@every_row
def test_js_agrees_with_sixty_digits(student: Tensor, teacher: Tensor, temperature: float, beta: float) -> None:
    function = partial(js_divergence, teacher_logits=teacher, beta=beta, temperature=temperature)
    assert_is(function, student, true_js(student, teacher, beta, temperature))


@pytest.mark.parametrize("beta", [0.5, 0.2])
def test_js_of_nothing_in_common_is_the_entropy_of_beta(beta: float) -> None:
    student, teacher = ROWS["no class in common"]
    entropy = -beta * math.log(beta) - (1 - beta) * math.log(1 - beta)
    value, gradient = value_and_gradient(lambda s: js_divergence(s, teacher, beta), student)
    close(value, torch.tensor(entropy, dtype=torch.float64))
    close(gradient, torch.zeros_like(student))


def test_js_has_no_factor_of_temperature() -> None:
    student, teacher = normal(4, 5, seed=1), normal(4, 5, seed=2)
    close(js_divergence(student * 3, teacher * 3, 0.3, 3.0), js_divergence(student, teacher, 0.3))


# kd


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_kd_agrees_with_torchdistill_whose_alpha_is_the_other_one(temperature: float) -> None:
    student, teacher = normal(6, 5, seed=1), normal(6, 5, seed=2)
    labels = torch.tensor([0, 4, 1, 1, 3, 2])
    peer = torchdistill.KDLoss("", "logits", "", "logits", temperature=temperature, alpha=0.2)
    truth = peer({"": {"logits": student}}, {"": {"logits": teacher}}, labels)
    close(kd_loss(student, teacher, labels, alpha=0.8, temperature=temperature), truth)


def test_kd_alpha_weighs_the_divergence() -> None:
    student, teacher = normal(6, 5, seed=1), normal(6, 5, seed=2)
    labels = torch.tensor([0, 4, 1, 1, 3, 2])
    close(kd_loss(student, teacher, labels, alpha=1.0), kl_divergence(student, teacher, 4.0))
    close(kd_loss(student, teacher, labels, alpha=0.0), F.cross_entropy(student, labels))


def test_kd_term_of_weight_zero_is_left_out_where_it_is_infinite() -> None:
    student, teacher = row(1.0, -INF, 0.0), row(1.0, -INF, 2.0)
    assert_is(
        lambda s: kd_loss(s, teacher, torch.tensor(1), alpha=1.0), student, kl_divergence(student, teacher, 4.0).item()
    )
    teacher = row(1.0, 5.0, 2.0)  # has mass where the student has none
    truth = F.cross_entropy(student, torch.tensor(2)).item()
    assert_is(lambda s: kd_loss(s, teacher, torch.tensor(2), alpha=0.0), student, truth)


@pytest.mark.parametrize("ignore_index", [-100, -1, 3])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_kd_rows_with_an_ignored_label_count_in_neither_term(smoothing: float, ignore_index: int) -> None:
    student, teacher = normal(2, 3, 5, seed=1), normal(2, 3, 5, seed=2)
    labels = torch.tensor([[0, ignore_index, 1], [4, 2, ignore_index]])
    keep = labels != ignore_index
    cross_entropy = F.cross_entropy(student[keep], labels[keep], label_smoothing=smoothing)
    truth = 0.7 * kl_divergence(student[keep], teacher[keep], 4.0) + 0.3 * cross_entropy
    student[0, 1], teacher[1, 2] = math.nan, INF
    options = {"ignore_index": ignore_index, "label_smoothing": smoothing}
    value, gradient = value_and_gradient(lambda s: kd_loss(s, teacher, labels, **options), student)
    close(value, truth)
    assert gradient[~keep].eq(0).all() and gradient[keep].ne(0).all()
    rows = kd_loss(student, teacher, labels, reduction="none", **options)
    assert rows.shape == (2, 3) and rows[~keep].eq(0).all()
    close(rows.sum() / 4, truth)
    close(kd_loss(student, teacher, labels, reduction="sum", **options) / 4, truth)


def test_kd_without_a_row_left_is_zero() -> None:
    student, teacher = normal(3, 5, seed=1), normal(3, 5, seed=2)
    value, gradient = value_and_gradient(lambda s: kd_loss(s, teacher, torch.full((3,), -100)), student)
    assert value == 0 and gradient.eq(0).all()


@pytest.mark.parametrize("ignore_index", [-100, 4])
def test_kd_without_labels_takes_the_teachers_argmax_and_ignores_no_row(ignore_index: int) -> None:
    student, teacher = normal(6, 5, seed=1), normal(6, 5, seed=2)
    labels = teacher.argmax(-1)
    assert 4 in labels
    close(kd_loss(student, teacher, ignore_index=ignore_index), kd_loss(student, teacher, labels))


# dkd


@pytest.mark.parametrize(("alpha", "beta", "temperature"), [(1.0, 8.0, 4.0), (1.0, 0.5, 1.0), (0.3, 2.0, 0.5)])
@pytest.mark.parametrize("label", [0, 3])
@every_row
def test_dkd_agrees_with_sixty_digits(
    student: Tensor, teacher: Tensor, label: int, alpha: float, beta: float, temperature: float
) -> None:
    options = {"alpha": alpha, "beta": beta, "temperature": temperature}
    truth = true_dkd(student, teacher, label, **options)
    assert_is(lambda s: dkd_loss(s, teacher, torch.tensor(label), **options), student, truth)


def test_dkd_with_the_teachers_own_weight_is_kl() -> None:
    # KL = TCKD + (1 - p_y of the teacher) NCKD, the identity its paper starts from.
    student, teacher = ROWS["ordinary"]
    rest = 1 - teacher.softmax(-1)[2].item()
    close(
        dkd_loss(student, teacher, torch.tensor(2), alpha=1.0, beta=rest, temperature=1.0),
        kl_divergence(student, teacher),
    )


def test_dkd_of_two_classes_has_no_second_term() -> None:
    student, teacher, labels = normal(4, 2, seed=1), normal(4, 2, seed=2), torch.tensor([0, 1, 1, 0])
    value, gradient = value_and_gradient(lambda s: dkd_loss(s, teacher, labels, alpha=1.0, beta=8.0), student)
    close(value, kl_divergence(student, teacher, 4.0))
    second, no_gradient = value_and_gradient(lambda s: dkd_loss(s, teacher, labels, alpha=0.0, beta=8.0), student)
    assert second == 0 and no_gradient.eq(0).all() and gradient.isfinite().all()


def test_dkd_is_the_mean_over_all_rows() -> None:
    student, teacher, labels = normal(2, 3, 5, seed=1), normal(2, 3, 5, seed=2), torch.tensor([[0, 1, 2], [3, 4, 0]])
    rows = [true_dkd(student[i, j], teacher[i, j], int(labels[i, j]), 1, 8, 4) for i in range(2) for j in range(3)]
    close(dkd_loss(student, teacher, labels), torch.tensor(sum(rows) / 6, dtype=torch.float64))


# dist


@pytest.mark.parametrize("leading", [(6,), (2, 3)], ids=str)
def test_dist_agrees_with_torchdistill(leading: tuple[int, ...]) -> None:
    student, teacher = normal(6, 5, seed=1), normal(6, 5, seed=2)
    peer = torchdistill.DISTLoss("", "logits", "", "logits", beta=2.0, gamma=0.5, tau=3.0)
    truth = peer({"": {"logits": student}}, {"": {"logits": teacher}})
    value = dist_loss(student.view(*leading, 5), teacher.view(*leading, 5), beta=2.0, gamma=0.5, temperature=3.0)
    # torchdistill bounds the product of norms from below by its eps, here eps is added: 1e-8 / product of norms
    torch.testing.assert_close(value, truth, rtol=0, atol=1e-5)


def test_dist_is_pearson_with_eps_added() -> None:
    student, teacher = normal(3, 4, seed=1), normal(3, 4, seed=2)
    s, t = (x.softmax(-1).tolist() for x in (student, teacher))

    def distance(a: list[float], b: list[float]) -> float:
        a, b = ([x - math.fsum(y) / len(y) for x in y] for y in (a, b))
        return 1 - math.fsum(x * y for x, y in zip(a, b, strict=True)) / (math.hypot(*a) * math.hypot(*b) + 1e-8)

    rows = math.fsum(map(distance, s, t)) / 3
    columns = math.fsum(map(distance, map(list, zip(*s, strict=True)), map(list, zip(*t, strict=True)))) / 4
    value = dist_loss(student, teacher, beta=2.0, gamma=0.5)
    close(value, torch.tensor(2 * rows + 0.5 * columns, dtype=torch.float64))


def test_dist_constant_student_has_correlation_zero_and_gradient_zero() -> None:
    # Not 1e8, for the first step of a zero-initialised classifier; 7 classes, as 1/7 has a rounded mean.
    student, teacher = torch.full((4, 7), 0.3), normal(4, 7, seed=2, dtype=torch.float32)
    value, gradient = value_and_gradient(lambda s: dist_loss(s, teacher, beta=2.0, gamma=0.5), student)
    assert value == 2.5 and gradient.eq(0).all()


# standardized


@pytest.mark.parametrize("temperature", [2.0, 1.0])
def test_standardized_agrees_with_torchdistill(temperature: float) -> None:
    student, teacher = normal(6, 5, seed=1), normal(6, 5, seed=2) * 100 + 7
    peer = torchdistill.LogitStdKDLoss("", "logits", "", "logits", temperature=temperature, beta=1.0)
    truth = peer({"": {"logits": student}}, {"": {"logits": teacher}})  # without targets: no T^2
    close(standardized_kl_divergence(student, teacher, temperature), truth * temperature**2)


def test_standardized_leaves_shift_and_scale_out() -> None:
    student, teacher = normal(6, 5, seed=1), normal(6, 5, seed=2)
    # 1e-7 next to the standard deviation is what is left of the scale
    value, truth = standardized_kl_divergence(student * 50 + 4, teacher), standardized_kl_divergence(student, teacher)
    torch.testing.assert_close(value, truth, rtol=1e-6, atol=0)


@pytest.mark.parametrize("level", [0.0, 0.1, 1e4])
def test_standardized_constant_row_is_uniform_with_gradient_zero(level: float) -> None:
    student, teacher = torch.full((7,), level), normal(7, seed=2, dtype=torch.float32)
    value, gradient = value_and_gradient(lambda s: standardized_kl_divergence(s, teacher), student)
    torch.testing.assert_close(value, standardized_kl_divergence(torch.zeros(7), teacher))
    assert value > 0 and gradient.eq(0).all()


def test_standardized_of_one_class_is_zero() -> None:
    value, gradient = value_and_gradient(lambda s: standardized_kl_divergence(s, normal(3, 1, seed=2)), normal(3, 1))
    assert value == 0 and gradient.eq(0).all()


# topk

SETTINGS = [
    ("logits", "drop", 1.0),
    ("logits", "drop", 3.0),
    ("logits", "renormalize", 3.0),
    ("logprobs", "drop", 1.0),
    ("logprobs", "bucket", 1.0),
    ("logprobs", "renormalize", 1.0),
    ("logprobs", "renormalize", 0.5),
]
every_setting = pytest.mark.parametrize(("values", "tail", "temperature"), SETTINGS, ids=str)

# name: log-probabilities, classes
STORED = {
    "ordinary": ([-0.5, -2.0, -1.9], [3, 0, 1]),
    "one entry": ([-0.5], [4]),
    "a padding index": ([-0.5, -2.0, 7.0], [3, 0, -100]),
    "a padding value": ([-0.5, -INF, -2.0], [3, 3, 0]),
    "padding alone": ([-INF, 3.0, -INF], [0, -100, 7]),
    "a rest of 1e-9": ([math.log(0.75), math.log(0.25 - 1e-9)], [2, 0]),
    "hardly any mass": ([-200.0, -210.0, -220.0], [2, 4, 0]),
}
every_stored = pytest.mark.parametrize(("stored", "indices"), STORED.values(), ids=STORED)


@every_setting
@every_stored
@pytest.mark.parametrize("name", ["ordinary", "gap of 200, agreed", "student lacks a class"])
def test_topk_agrees_with_sixty_digits(
    name: str, stored: list[float], indices: list[int], values: str, tail: str, temperature: float
) -> None:
    student, teacher = ROWS[name][0], row(*stored)
    truth = true_topk(student, teacher, indices, values, tail, temperature)

    def function(s: Tensor) -> Tensor:
        options = {"values": values, "tail": tail, "temperature": temperature}
        return topk_kl_divergence(s, teacher, torch.tensor(indices), **options)

    value, gradient = value_and_gradient(function, student)
    # 1 - mass is known to eps of the mass: a rest of 1e-9 to 1e-7 of itself, which adds 200 * 1e-16 here
    torch.testing.assert_close(value, torch.tensor(truth, dtype=torch.float64), rtol=1e-12, atol=1e-12)
    assert gradient.isfinite().all() or math.isinf(truth)


@every_setting
def test_topk_of_all_classes_is_kl(values: str, tail: str, temperature: float) -> None:
    student, teacher = normal(40, 5, seed=1), logprobs(40, 5, seed=2)
    stored, indices = teacher.topk(5)
    options = {"values": values, "tail": tail, "temperature": temperature}
    value, gradient = value_and_gradient(lambda s: topk_kl_divergence(s, stored, indices, **options), student)
    truth, true_gradient = value_and_gradient(lambda s: kl_divergence(s, teacher, temperature), student)
    close(value, truth)
    close(gradient, true_gradient)


def test_topk_bucket_is_finite_where_the_teacher_has_all_its_mass_in_the_list() -> None:
    # 0.5 + 0.5 is 1 exactly; in half precision stored values may even add up to more.
    student = row(1.0, -2.0, 0.5, -INF)
    for stored in ([0.5, 0.5], [0.6, 0.41]):
        function = partial(
            topk_kl_divergence,
            teacher_values=row(*stored).log(),
            teacher_indices=torch.tensor([2, 0]),
            values="logprobs",
            tail="bucket",
        )
        s = softmax(student)
        truth = sum(p * math.log(p / s[v]) for p, v in zip(stored, (2, 0), strict=True))
        assert_is(function, student, float(truth))


def test_topk_bucket_does_not_exist_where_every_class_is_listed() -> None:
    student, stored = normal(4, 5, seed=1), logprobs(4, 5, seed=2) - 0.01
    indices = torch.arange(5).expand(4, 5)
    dropped, bucket = (
        topk_kl_divergence(student, stored, indices, values="logprobs", tail=tail) for tail in ("drop", "bucket")
    )
    close(bucket, dropped)


def test_topk_bucket_knows_a_small_rest_to_all_its_digits() -> None:
    # Next to nothing but the rest counts here: 1e-9 of mass where the student has e^-700. 1 - exp has 8 digits.
    student, stored = row(700.0, 0.0, -INF), row(-1e-9)
    value = topk_kl_divergence(student, stored, torch.tensor([0]), values="logprobs", tail="bucket")
    truth = true_topk(student, stored, [0], "logprobs", "bucket", 1.0)
    torch.testing.assert_close(value.item(), truth, rtol=1e-9, atol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_topk_bucket_takes_rounding_for_no_rest_where_the_student_has_none(dtype: torch.dtype) -> None:
    student, teacher = normal(200, 9, seed=1), normal(200, 9, seed=2)
    student[:, 5:], teacher[:, 5:] = -INF, -INF  # a padded vocabulary: all mass is in the list, to the rounding
    stored, indices = teacher.log_softmax(-1).to(dtype).topk(5)
    options = {"values": "logprobs", "tail": "bucket"}
    value, gradient = value_and_gradient(lambda s: topk_kl_divergence(s, stored, indices, **options), student)
    torch.testing.assert_close(value, kl_divergence(student, teacher), rtol=0, atol=30 * torch.finfo(dtype).eps)
    assert gradient.isfinite().all()
    stored[0, 0] -= 1  # real mass is missing
    assert topk_kl_divergence(student, stored, indices, **options) == INF


def test_topk_bucket_is_a_divergence_and_drop_is_not() -> None:
    student, teacher = normal(200, 30, seed=1), logprobs(200, 30, seed=2)
    stored, indices = teacher.topk(3)
    rows = {
        tail: topk_kl_divergence(student, stored, indices, values="logprobs", tail=tail, reduction="none")
        for tail in ("drop", "bucket")
    }
    assert rows["bucket"].min() > 0
    own = teacher.clone()
    own[:, :] = math.log(1e-3)
    spread = topk_kl_divergence(own, own[:, :3], indices.sort().values, values="logprobs", reduction="none")
    assert spread.max() < 0  # the student is uniform: log 1e-3 - log(1/30) < 0
    assert (
        rows["bucket"].le(kl_divergence(student, teacher, reduction="none")).all()
    )  # merging classes loses information


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@every_setting
def test_topk_rows_reduce_like_kl(values: str, tail: str, temperature: float, dtype: torch.dtype) -> None:
    student, (stored, indices) = normal(2, 3, 5, seed=1), logprobs(2, 3, 5, seed=2).topk(3)
    indices = indices.to(dtype)
    mask = torch.tensor([[True, False, True], [True, True, False]])
    options = {"values": values, "tail": tail, "temperature": temperature}
    rows = torch.stack(
        [topk_kl_divergence(student[i, j], stored[i, j], indices[i, j], **options) for i in range(2) for j in range(3)]
    ).view(2, 3)
    # What masked rows hold reaches nothing: rubbish classes, values and logits.
    indices[~mask], stored[~mask], student[~mask] = 77, math.nan, math.nan
    kept = rows[mask].sum()
    for reduction, truth in {
        "none": rows.where(mask, torch.zeros(())),
        "sum": kept,
        "batchmean": kept / 4,
        "mean": kept / 20,
    }.items():
        close(topk_kl_divergence(student, stored, indices, mask=mask, reduction=reduction, **options), truth)


def test_topk_padding_rows_count_unless_the_mask_drops_them() -> None:
    student, (stored, indices) = normal(4, 5, seed=1), logprobs(4, 5, seed=2).topk(2)
    indices[3] = -100
    total = topk_kl_divergence(student, stored, indices, reduction="sum")
    close(topk_kl_divergence(student, stored, indices), total / 4)
    close(topk_kl_divergence(student, stored, indices, mask=torch.arange(4) < 3), total / 3)


def test_topk_refuses_a_class_listed_twice() -> None:
    with pytest.raises(ValueError, match="twice"):
        topk_kl_divergence(normal(2, 5), normal(2, 3), torch.tensor([[0, 1, 2], [4, 0, 4]]))


def test_topk_takes_the_dtype_of_the_student() -> None:
    student, (stored, indices) = normal(4, 5, seed=1, dtype=torch.bfloat16), logprobs(4, 5, seed=2).topk(2)
    value = topk_kl_divergence(student, stored, indices)
    assert value.dtype == torch.float32
    torch.testing.assert_close(value, topk_kl_divergence(student.float(), stored.float(), indices))


# linear


def projections(dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    return {
        "student_hidden": normal(2, 3, 4, seed=1, dtype=dtype),
        "student_weight": normal(5, 4, seed=2, scale=1, dtype=dtype),
        "teacher_hidden": normal(2, 3, 7, seed=3, dtype=dtype),
        "teacher_weight": normal(5, 7, seed=4, scale=1, dtype=dtype),
        "student_bias": normal(5, seed=5, dtype=dtype),
        "teacher_bias": normal(5, seed=6, dtype=dtype),
    }


@pytest.mark.parametrize("labelled", [False, True])
@pytest.mark.parametrize("divergence", ["forward", "reverse", "js"])
def test_linear_is_its_divergence_of_the_logits(divergence: str, labelled: bool) -> None:
    p = projections()
    for name, tensor in p.items():
        tensor.requires_grad_(name.startswith("student"))
    labels = torch.tensor([[0, -100, 1], [4, 2, -100]]) if labelled else None
    mask, weight = torch.tensor([[True, True, True], [False, True, True]]), normal(2, 3, seed=7).abs()
    mixing = {"labels": labels, "alpha": 0.3, "label_smoothing": 0.1} if labelled else {}
    value = linear_kl_divergence(
        **p, **mixing, divergence=divergence, beta=0.2, temperature=2.0, mask=mask, row_weight=weight
    )
    gradients = torch.autograd.grad(value, [p["student_hidden"], p["student_weight"], p["student_bias"]])

    student = p["student_hidden"] @ p["student_weight"].T + p["student_bias"]
    teacher = p["teacher_hidden"] @ p["teacher_weight"].T + p["teacher_bias"]
    if divergence == "js":
        rows = js_divergence(student, teacher, 0.2, 2.0, reduction="none")
    else:
        rows = kl_divergence(student, teacher, 2.0, direction=divergence, reduction="none")
    keep = mask
    if labels is not None:
        keep = mask & (labels >= 0)
        cross_entropy = F.cross_entropy(
            student.flatten(0, 1), labels.flatten(), reduction="none", label_smoothing=0.1
        ).view(2, 3)
        rows = 0.3 * rows + 0.7 * cross_entropy
    truth = (rows * weight)[keep].sum() / keep.sum()
    close(value, truth)
    for gradient, true_gradient in zip(
        gradients,
        torch.autograd.grad(truth, [p["student_hidden"], p["student_weight"], p["student_bias"]]),
        strict=True,
    ):
        close(gradient, true_gradient)


@pytest.mark.parametrize("by", ["mask", "labels"])
@pytest.mark.parametrize("rubbish", [math.nan, INF])
def test_linear_rows_left_out_reach_no_gradient(rubbish: float, by: str) -> None:
    p = projections()
    keep = torch.tensor([[True, False, True], [True, True, False]])
    left_out = {"mask": keep} if by == "mask" else {"labels": torch.where(keep, 1, -100), "alpha": 0.5}
    truth = linear_kl_divergence(**p, **left_out)
    p["student_hidden"][~keep] = rubbish
    p["teacher_hidden"][~keep] = rubbish
    names = ["student_hidden", "student_weight", "student_bias"]
    value = linear_kl_divergence(**{k: v.requires_grad_(k in names) for k, v in p.items()}, **left_out)
    close(value, truth)
    hidden, weight, bias = torch.autograd.grad(value, [p[name] for name in names])
    assert hidden[~keep].eq(0).all() and weight.isfinite().all() and bias.isfinite().all()


def test_linear_rounds_half_logits_and_returns_float32() -> None:
    p = projections(torch.bfloat16)
    student = F.linear(p["student_hidden"], p["student_weight"], p["student_bias"])
    teacher = F.linear(p["teacher_hidden"], p["teacher_weight"], p["teacher_bias"])
    assert student.dtype == torch.bfloat16
    value = linear_kl_divergence(**p)
    assert value.dtype == torch.float32
    assert value == kl_divergence(student.float(), teacher.float())


# all

LABELS = torch.tensor([1, 0, 1, 0])
TAILS = [("logprobs", "drop"), ("logprobs", "bucket"), ("logprobs", "renormalize"), ("logits", "drop")]


def stored(student: Tensor, teacher: Tensor, values: str, tail: str, temperature: float) -> Tensor:
    """The two likeliest classes of the teacher (one where there is no more)."""
    if values == "logprobs":
        teacher = teacher.float().log_softmax(-1)
    entries, indices = teacher.topk(min(2, teacher.shape[-1]))
    temperature = temperature if (values, tail) not in TAILS[:2] else 1.0
    return topk_kl_divergence(student, entries, indices, values=values, tail=tail, temperature=temperature)


def linear(student: Tensor, teacher: Tensor, temperature: float, divergence: str) -> Tensor:
    """Logits from an identity."""
    eye = torch.eye(student.shape[-1], dtype=student.dtype)
    return linear_kl_divergence(student, eye, teacher, eye, temperature=temperature, divergence=divergence)


# name: (student, teacher, temperature) -> loss, on (4, V)
LOSSES: dict[str, Callable[[Tensor, Tensor, float], Tensor]] = {
    "kl forward": lambda s, t, T: kl_divergence(s, t, T),
    "kl reverse": lambda s, t, T: kl_divergence(s, t, T, direction="reverse"),
    "js": lambda s, t, T: js_divergence(s, t, 0.3, T),
    "js beta 0": lambda s, t, T: js_divergence(s, t, 0.0, T),
    "js beta 1": lambda s, t, T: js_divergence(s, t, 1.0, T),
    "kd": lambda s, t, T: kd_loss(s, t, LABELS[: len(s)] % s.shape[-1], temperature=T),
    "kd without labels": lambda s, t, T: kd_loss(s, t, temperature=T, label_smoothing=0.1),
    "dkd": lambda s, t, T: dkd_loss(s, t, LABELS[: len(s)], temperature=T),
    "dist": lambda s, t, T: dist_loss(s, t, temperature=T),
    "standardized": lambda s, t, T: standardized_kl_divergence(s, t, T),
    **{f"topk {v} {tail}": lambda s, t, T, v=v, tail=tail: stored(s, t, v, tail, T) for v, tail in TAILS},
    "linear": lambda s, t, T: linear(s, t, T, "forward"),
    "linear js": lambda s, t, T: linear(s, t, T, "js"),
}
every_loss = pytest.mark.parametrize("name", LOSSES)


def large(seed: int) -> Tensor:
    return normal(4, 5, seed=seed, dtype=torch.float32).sign() * 1e4


# name: student, teacher, in float32
HARD = {
    "identical": (normal(4, 5, seed=1, dtype=torch.float32),) * 2,
    "constant student": (torch.full((4, 5), 0.1), normal(4, 5, seed=2, dtype=torch.float32)),
    "constant teacher": (normal(4, 5, seed=1, dtype=torch.float32), torch.full((4, 5), 0.1)),
    "both zero": (torch.zeros(4, 5), torch.zeros(4, 5)),
    "two classes": (normal(4, 2, seed=1, dtype=torch.float32), normal(4, 2, seed=2, dtype=torch.float32)),
    "one class": (normal(4, 1, seed=1, dtype=torch.float32), normal(4, 1, seed=2, dtype=torch.float32)),
    "one row": (normal(1, 5, seed=1, dtype=torch.float32), normal(1, 5, seed=2, dtype=torch.float32)),
    "no row": (torch.zeros(0, 5), torch.zeros(0, 5)),
    "logits of 1e4": (large(1), large(2)),
}


# dkd of one class is an error: there is no other class
HARD_PAIRS = [(name, case) for name in LOSSES for case in HARD if (name, case) != ("dkd", "one class")]


@pytest.mark.parametrize("temperature", [1.0, 0.05, 100.0])
@pytest.mark.parametrize(("name", "case"), HARD_PAIRS)
def test_hard_cases_are_finite_in_value_and_gradient(name: str, case: str, temperature: float) -> None:
    student, teacher = HARD[case]
    value, gradient = value_and_gradient(lambda s: LOSSES[name](s, teacher, temperature), student)
    assert value.isfinite() and gradient.isfinite().all(), (value, gradient)
    if case == "no row":
        assert value == 0


@every_loss
@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_gradients_are_those_of_the_value(name: str, temperature: float) -> None:
    teacher = normal(4, 5, seed=2, scale=1)
    student = normal(4, 5, seed=1, scale=1).requires_grad_()
    assert torch.autograd.gradcheck(lambda s: LOSSES[name](s, teacher.to(s.dtype), temperature), student)


@every_loss
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_half_types_are_widened_first(name: str, dtype: torch.dtype) -> None:
    student, teacher = normal(4, 5, seed=1, dtype=dtype), normal(4, 5, seed=2, dtype=dtype)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    value, gradient = value_and_gradient(lambda s: LOSSES[name](s, teacher, 2.0), student)
    assert value.dtype == wide and gradient.dtype == dtype
    if "linear" not in name:  # its products are formed in the dtype of the input
        torch.testing.assert_close(value, LOSSES[name](student.to(wide), teacher.to(wide), 2.0))


@every_loss
def test_teachers_get_no_gradient_and_inputs_are_not_written(name: str) -> None:
    student, teacher = (normal(4, 5, seed=i).requires_grad_() for i in (1, 2))
    kept = student.detach().clone(), teacher.detach().clone()
    LOSSES[name](student, teacher, 2.0).backward()
    assert student.grad is not None and teacher.grad is None
    close(student.detach(), kept[0], rtol=0, atol=0)
    close(teacher.detach(), kept[1], rtol=0, atol=0)


@pytest.mark.parametrize("name", [name for name in LOSSES if name != "dist"])  # whose columns join all rows
def test_a_nan_row_is_nan_and_touches_no_other(name: str) -> None:
    student, teacher = normal(4, 5, seed=1), normal(4, 5, seed=2)
    _, clean = value_and_gradient(lambda s: LOSSES[name](s, teacher, 2.0), student)
    student[2] = math.nan
    value, gradient = value_and_gradient(lambda s: LOSSES[name](s, teacher, 2.0), student)
    others = torch.tensor([0, 1, 3])
    assert value.isnan() and gradient[2].isnan().any()
    close(gradient[others], clean[others])


@every_loss
def test_compiles_to_one_graph(name: str) -> None:
    torch.compiler.reset()
    student, teacher = normal(4, 5, seed=1), normal(4, 5, seed=2)
    compiled = torch.compile(LOSSES[name], fullgraph=True, backend="aot_eager")
    value, gradient = value_and_gradient(lambda s: compiled(s, teacher, 1.0), student)
    truth, true_gradient = value_and_gradient(lambda s: LOSSES[name](s, teacher, 1.0), student)
    close(value, truth)
    close(gradient, true_gradient)
