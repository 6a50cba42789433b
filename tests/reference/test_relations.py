"""The relation losses in plain PyTorch against truths that share no code with them."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from sklearn.metrics.pairwise import cosine_similarity
from sklearn.neighbors import NearestNeighbors
from torch import Tensor
from torchdistill.losses.mid_level import RKDLoss as TorchdistillRKDLoss
from torchdistill.losses.mid_level import SPKDLoss

from kdfast.reference.relations import (
    crd_loss,
    graph_distillation_loss,
    hardest_negatives,
    rkd_angle_loss,
    rkd_distance_loss,
    rkd_loss,
    rkd_sequence_angle_loss,
    similarity_graph,
    similarity_preserving_loss,
)

METRICS = ("cosine", "dot", "euclidean")
each_metric = pytest.mark.parametrize("metric", METRICS)


def features(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def zero_row(x: Tensor) -> Tensor:
    return x.index_fill(0, torch.tensor([1]), 0.0)


def gradient_of(loss: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    x = x.detach().clone().requires_grad_()
    (gradient,) = torch.autograd.grad(loss(x), x)
    return gradient


def huber(d: float) -> float:
    return d * d / 2 if abs(d) < 1 else abs(d) - 0.5


def similarities(x: Tensor, y: Tensor, metric: str) -> np.ndarray:
    """Larger is nearer."""
    a, b = x.flatten(1).numpy(), y.flatten(1).numpy()
    if metric == "euclidean":
        return -np.array([[math.dist(p, q) for q in b] for p in a])
    return cosine_similarity(a, b) if metric == "cosine" else a @ b.T


# similarity_preserving_loss


def loop_similarity_preserving(student: Tensor, teacher: Tensor, p: int) -> float:
    n = len(student)

    def normalized(x: Tensor) -> list[list[float]]:
        rows = x.flatten(1).tolist()
        g = [[sum(a * b for a, b in zip(u, v, strict=True)) for v in rows] for u in rows]
        return [[value / sum(abs(other) ** p for other in row) ** (1 / p) for value in row] for row in g]

    g_s, g_t = normalized(student), normalized(teacher)
    return sum((g_s[i][j] - g_t[i][j]) ** 2 for i in range(n) for j in range(n)) / n**2


def test_similarity_preserving_normalises_by_l2_where_torchdistill_normalises_by_l1() -> None:
    student, teacher = features(6, 3, 2, seed=1), features(6, 9, seed=2)
    ours = similarity_preserving_loss(student, teacher)
    theirs = SPKDLoss("student", "teacher", "batchmean")(
        {"student": {"output": student}}, {"teacher": {"output": teacher}}
    )
    assert ours.item() == pytest.approx(loop_similarity_preserving(student, teacher, 2), rel=1e-10)
    assert theirs.item() == pytest.approx(loop_similarity_preserving(student, teacher, 1), rel=1e-10)


def test_similarity_preserving_zero_row_stays_zero() -> None:
    # Orthogonal rows: only the diagonals differ, at the one zero row.
    student, teacher = zero_row(torch.eye(4).double()), torch.eye(4).double()
    assert similarity_preserving_loss(student, teacher).item() == pytest.approx(1 / 16, rel=1e-12)


def test_similarity_preserving_zero_student_has_gradient_zero() -> None:
    assert gradient_of(lambda s: similarity_preserving_loss(s, features(4, 3)), torch.zeros(4, 3).double()).eq(0).all()


def test_similarity_preserving_zero_row_feels_the_rows_of_the_others_alone() -> None:
    # Its own row of G has no direction; as a column of G it still counts in the other rows.
    student, teacher = zero_row(features(4, 3)), features(4, 2, seed=2)

    def other_rows(s: Tensor) -> Tensor:
        g_s, g_t = (torch.stack([g[i] / g[i].norm() for i in (0, 2, 3)]) for g in (s @ s.mT, teacher @ teacher.mT))
        return (g_s - g_t).square().sum() / 16

    gradient = gradient_of(lambda s: similarity_preserving_loss(s, teacher), student)
    torch.testing.assert_close(gradient, gradient_of(other_rows, student))


# rkd_distance_loss, rkd_angle_loss, rkd_loss


def loop_distance(student: Tensor, teacher: Tensor) -> float:
    n = len(student)

    def relative(x: Tensor) -> list[list[float]]:
        rows = x.flatten(1).tolist()
        d = [[math.dist(a, b) for b in rows] for a in rows]
        mean = sum(map(sum, d)) / (n * (n - 1))
        return [[value / mean for value in row] for row in d]

    d_s, d_t = relative(student), relative(teacher)
    return sum(huber(d_s[i][j] - d_t[i][j]) for i in range(n) for j in range(n)) / n**2


def loop_angle(student: Tensor, teacher: Tensor) -> float:
    n = len(student)

    def cosine(x: list[list[float]], i: int, j: int, k: int) -> float:
        a = [p - q for p, q in zip(x[i], x[j], strict=True)]
        b = [p - q for p, q in zip(x[k], x[j], strict=True)]
        norms = math.hypot(*a) * math.hypot(*b)
        return sum(p * q for p, q in zip(a, b, strict=True)) / norms if norms else 0.0

    s, t = student.flatten(1).tolist(), teacher.flatten(1).tolist()
    triplets = [(i, j, k) for i in range(n) for j in range(n) for k in range(n)]
    return sum(huber(cosine(s, *triplet) - cosine(t, *triplet)) for triplet in triplets) / n**3


RKD_PAIRS = {
    "random": (features(6, 3, 2, seed=1), features(6, 9, seed=2)),
    # Relative distances and cosines that differ by more than 1: the linear part of Huber's function.
    "far apart": (features(6, 2, seed=1) ** 5, features(6, 1, seed=2) ** 5),
    "coincident rows": (features(6, 3, seed=1)[[0, 1, 1, 2, 3, 1]], features(6, 3, seed=2)[[0, 0, 1, 2, 3, 4]]),
}


@pytest.mark.parametrize(
    ("loss", "loop"), [(rkd_distance_loss, loop_distance), (rkd_angle_loss, loop_angle)], ids=["distance", "angle"]
)
@pytest.mark.parametrize("pair", RKD_PAIRS.values(), ids=RKD_PAIRS)
def test_rkd_agrees_with_loops(loss: Callable, loop: Callable, pair: tuple[Tensor, Tensor]) -> None:
    assert loss(*pair).item() == pytest.approx(loop(*pair), rel=1e-10)


@pytest.mark.parametrize(("distance", "angle"), [(25.0, 50.0), (1.0, 0.0), (0.0, 1.0), (0.0, 0.0)])
def test_rkd_agrees_with_torchdistill(distance: float, angle: float) -> None:
    student, teacher = features(7, 5, seed=1), features(7, 4, seed=2)
    peer = TorchdistillRKDLoss("", "", distance, angle, "mean")

    def truth(s: Tensor) -> Tensor:
        return (
            distance * peer.compute_rkd_distance_loss(teacher, s)
            + angle * peer.compute_rkd_angle_loss(teacher, s)
            + 0.0 * s.sum()
        )

    def ours(s: Tensor) -> Tensor:
        return rkd_loss(s, teacher, distance_weight=distance, angle_weight=angle)

    torch.testing.assert_close(ours(student), truth(student))
    torch.testing.assert_close(gradient_of(ours, student), gradient_of(truth, student))


@pytest.mark.parametrize(("left_out", "weight"), [("angle_loss", "angle"), ("rkd_distance_loss", "distance")])
def test_rkd_a_term_of_weight_0_is_not_computed(left_out: str, weight: str, monkeypatch: pytest.MonkeyPatch) -> None:
    student, teacher = features(5, 4), features(5, 3, seed=1)
    other = rkd_distance_loss if weight == "angle" else rkd_angle_loss
    expected = 2.0 * other(student, teacher)
    monkeypatch.setattr(f"kdfast.reference.relations.{left_out}", None)
    weights = {"angle_weight": 2.0, "distance_weight": 2.0, f"{weight}_weight": 0.0}
    torch.testing.assert_close(rkd_loss(student, teacher, **weights), expected)
    assert gradient_of(lambda s: rkd_loss(s, teacher, angle_weight=0.0, distance_weight=0.0), student).eq(0).all()


def test_rkd_distance_of_a_triangle() -> None:
    # Distances 3, 4, 5 have mean 4; an equilateral triangle has all three at 1.
    student = torch.tensor([[0.0, 0.0], [3.0, 0.0], [0.0, 4.0]]).double()
    teacher = torch.eye(3).double()
    assert rkd_distance_loss(student, teacher).item() == pytest.approx(2 * (0.25**2 / 2 * 2) / 9, rel=1e-12)


def test_rkd_angle_of_a_triangle() -> None:
    # Cosines 0, 3/5 and 4/5 against 1/2 three times; the rest of the 27 triplets is 0 or 1 on either side.
    student = torch.tensor([[0.0, 0.0], [3.0, 0.0], [0.0, 4.0]]).double()
    teacher = torch.eye(3).double()
    assert rkd_angle_loss(student, teacher).item() == pytest.approx((0.5**2 + 0.1**2 + 0.3**2) / 27, rel=1e-12)


@pytest.mark.parametrize("loss", [rkd_distance_loss, rkd_angle_loss, rkd_loss])
def test_rkd_ignores_scale_shift_and_rotation(loss: Callable) -> None:
    x = features(6, 4)
    rotation = torch.linalg.qr(features(4, 4, seed=1)).Q
    assert loss(3 * x @ rotation + 5, x).item() == pytest.approx(0, abs=1e-20)


def test_rkd_distance_of_near_rows_far_from_the_origin_is_accurate_in_float32() -> None:
    near, teacher = features(6, 4, seed=1).float(), features(6, 4, seed=2).float()
    shifted = near + 1000
    truth = rkd_distance_loss(shifted.double(), teacher.double())
    peer = TorchdistillRKDLoss("", "", 1.0, 1.0, "mean")
    assert abs(rkd_distance_loss(shifted, teacher).double() - truth) < 1e-6 * truth
    assert abs(peer.compute_rkd_distance_loss(teacher, shifted).double() - truth) > 1e-3 * truth


@pytest.mark.parametrize("loss", [rkd_distance_loss, rkd_angle_loss, rkd_loss])
@pytest.mark.parametrize("rows", [2, 5])
def test_rkd_all_rows_coincident_have_gradient_zero(loss: Callable, rows: int) -> None:
    student = features(1, 3).expand(rows, 3)
    assert gradient_of(lambda s: loss(s, features(rows, 3, seed=1)), student).eq(0).all()


def test_rkd_a_coincident_pair_has_gradient_zero() -> None:
    # Rows 0 and 1 coincide in the student and are equally far from row 2 in the teacher: they are pulled alike.
    student = torch.tensor([[1.0, 2.0], [1.0, 2.0], [4.0, 7.0], [0.0, 5.0]]).double()
    teacher = torch.tensor([[0.0, 1.0], [0.0, -1.0], [5.0, 0.0], [1.0, 0.0]]).double()
    for loss in (rkd_distance_loss, rkd_angle_loss):
        gradient = gradient_of(lambda s, loss=loss: loss(s, teacher), student)
        torch.testing.assert_close(gradient[0], gradient[1], rtol=0, atol=1e-15)
        assert gradient[0].ne(0).all()


def test_rkd_angle_coincident_rows_have_a_gradient_of_the_size_of_the_others() -> None:
    student, teacher = features(5, 4)[[0, 1, 1, 2, 3]], features(5, 4, seed=1)
    peer = TorchdistillRKDLoss("", "", 1.0, 1.0, "mean")
    assert gradient_of(lambda s: rkd_angle_loss(s, teacher), student).abs().max() < 1
    assert gradient_of(lambda s: peer.compute_rkd_angle_loss(teacher, s), student).abs().max() > 1e9


# rkd_sequence_angle_loss


def loop_sequence(student: Tensor, teacher: Tensor, mask: Tensor | None) -> float:
    def angle(x: list[list[float]], t: int) -> float:
        a = [p - q for p, q in zip(x[t + 1], x[t], strict=True)]
        b = [p - q for p, q in zip(x[t + 2], x[t], strict=True)]
        norms = math.hypot(*a) * math.hypot(*b)
        cosine = sum(p * q for p, q in zip(a, b, strict=True)) / norms if norms else 0.0
        return math.acos(min(max(cosine, -1.0), 1.0))

    kept = [
        (angle(s, t) - angle(u, t)) ** 2
        for n, (s, u) in enumerate(zip(student.tolist(), teacher.tolist(), strict=True))
        for t in range(len(s) - 2)
        if mask is None or all(mask[n, t : t + 3])
    ]
    return sum(kept) / max(len(kept), 1)


SEQUENCE_MASKS = {
    "none": None,
    "all": torch.ones(3, 6, dtype=torch.bool),
    "padded right": torch.arange(6) < torch.tensor([[6], [4], [2]]),
    "padded left": torch.arange(6) >= torch.tensor([[0], [2], [5]]),
    "a hole": torch.arange(6) != torch.tensor([[2], [0], [4]]),
    "nothing": torch.zeros(3, 6, dtype=torch.bool),
}


@pytest.mark.parametrize("mask", SEQUENCE_MASKS.values(), ids=SEQUENCE_MASKS)
def test_sequence_angle_agrees_with_loops(mask: Tensor | None) -> None:
    student, teacher = features(3, 6, 4, seed=1), features(3, 6, 5, seed=2)
    truth = loop_sequence(student, teacher, mask)
    assert rkd_sequence_angle_loss(student, teacher, mask=mask).item() == pytest.approx(truth, rel=1e-10)


@pytest.mark.parametrize("degrees", [0, 1e-3, 30, 90, 179.999, 180])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_sequence_angle_is_accurate_at_every_angle(degrees: float, dtype: torch.dtype) -> None:
    angle = math.radians(degrees)
    turn = torch.tensor([[[0.0, 0.0], [1.0, 0.0], [2 * math.cos(angle), 2 * math.sin(angle)]]], dtype=dtype)
    upright = torch.tensor([[[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]]], dtype=dtype)
    root = rkd_sequence_angle_loss(turn, upright).sqrt().item()
    assert root == pytest.approx(abs(angle - math.pi / 2), rel=0, abs=4 * torch.finfo(dtype).eps)
    straight = torch.tensor([[[0.0, 0.0], [1.0, 0.0], [2.0, 0.0]]], dtype=dtype)
    root = rkd_sequence_angle_loss(turn, straight).sqrt().item()
    assert root == pytest.approx(angle, rel=4 * torch.finfo(dtype).eps, abs=1e-15)


@pytest.mark.parametrize("student", [[0.0, 0.0, 1.0], [0.0, 1.0, 0.0], [0.0, 0.0, 0.0]], ids=["one", "two", "both"])
def test_sequence_angle_at_a_step_of_zero_is_a_right_angle_with_gradient_zero(student: list[float]) -> None:
    still = torch.tensor(student).double()[None, :, None] * torch.tensor([1.0, 2.0]).double()
    straight = torch.arange(3).double()[None, :, None] * torch.ones(2).double()
    assert rkd_sequence_angle_loss(still, straight).item() == pytest.approx((math.pi / 2) ** 2, rel=1e-12)
    assert gradient_of(lambda s: rkd_sequence_angle_loss(s, straight), still).eq(0).all()


@pytest.mark.parametrize("second", [2e-30, 1.0], ids=["both steps", "the first step"])
def test_sequence_angle_at_a_step_whose_square_underflows_is_a_right_angle(second: float) -> None:
    student = torch.tensor([[[0.0, 0.0], [1e-30, 0.0], [second, 0.0]]])
    upright = torch.tensor([[[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]]])
    assert rkd_sequence_angle_loss(student, upright).item() == pytest.approx(0, abs=1e-12)
    assert gradient_of(lambda s: rkd_sequence_angle_loss(s, upright), student).eq(0).all()


@pytest.mark.parametrize("rubbish", [math.nan, math.inf, -1e300])
def test_sequence_angle_padding_reaches_nothing(rubbish: float) -> None:
    mask = SEQUENCE_MASKS["padded right"]
    clean = features(3, 6, 4, seed=1), features(3, 6, 5, seed=2)
    student, teacher = (x.masked_fill(~mask.unsqueeze(-1), rubbish) for x in clean)

    def loss(s: Tensor, t: Tensor) -> Tensor:
        return rkd_sequence_angle_loss(s, t, mask=mask)

    torch.testing.assert_close(loss(student, teacher), loss(*clean), rtol=0, atol=0)
    gradient = gradient_of(lambda s: loss(s, teacher), student)
    assert gradient[~mask].eq(0).all() and gradient[:2][mask[:2]].ne(0).all()


# crd_loss


def loop_crd(
    student: Tensor, teacher: Tensor, labels: list[int], temperature: float, weight: float, normalize: bool
) -> float:
    metric = "cosine" if normalize else "dot"
    s, t = (similarities(x, x, metric) / temperature for x in (student, teacher))
    n = len(labels)
    contrast = [
        math.log1p(math.exp(-s[i, j] if labels[i] == labels[j] else s[i, j])) for i in range(n) for j in range(n)
    ]
    return (sum(contrast) + weight * sum((s[i, j] - t[i, j]) ** 2 for i in range(n) for j in range(n))) / n**2


@pytest.mark.parametrize("normalize", [False, True], ids=["as they are", "normalized"])
@pytest.mark.parametrize(("temperature", "weight"), [(0.1, 1.0), (0.05, 0.0), (1.0, 2.5), (100.0, 1.0)])
def test_crd_agrees_with_loops(temperature: float, weight: float, normalize: bool) -> None:
    student, teacher, labels = features(6, 3, 2, seed=1), features(6, 9, seed=2), [0, 1, 0, -7, 1, 1]
    value = crd_loss(
        student,
        teacher,
        torch.tensor(labels),
        temperature=temperature,
        alignment_weight=weight,
        normalize=normalize,
    )
    truth = loop_crd(student, teacher, labels, temperature, weight, normalize)
    assert value.item() == pytest.approx(truth, rel=1e-10)


def test_crd_keeps_the_tail_of_the_contrast() -> None:
    # softplus(-30) is 9.4e-14, which log(1 + exp) loses.
    student = torch.tensor([[30.0**0.5]], dtype=torch.float64)
    value = crd_loss(student, student, torch.tensor([3]), temperature=1.0)
    assert value.item() == pytest.approx(math.exp(-30), rel=1e-9)
    # softplus(21) is 21 + 7.6e-10, which the linear part of PyTorch's own loses.
    student = torch.full((2, 1), 21.0**0.5, dtype=torch.float64)
    value = crd_loss(student, student, torch.tensor([0, 1]), temperature=1.0)
    assert value.item() == pytest.approx(21 / 2 + math.exp(-21), rel=1e-12)


def test_crd_far_wrong_pairs_are_finite_where_a_logarithm_of_a_sigmoid_is_not() -> None:
    student = torch.tensor([[3.0], [-3.0]])  # one label, similarity -90
    value = crd_loss(student, student, torch.tensor([0, 0]))
    assert value.item() == pytest.approx(2 * 90 / 4, rel=1e-6)
    assert torch.sigmoid(torch.tensor(-90.0)).log().isinf()


@pytest.mark.parametrize("side", ["student", "teacher"])
def test_crd_normalized_zero_row_is_similar_to_nothing(side: str) -> None:
    x, labels = features(4, 3), torch.tensor([0, 1, 0, 1])
    value = crd_loss(zero_row(x), zero_row(x), labels, normalize=True)
    rest = loop_crd(x[[0, 2, 3]], x[[0, 2, 3]], [0, 0, 1], 0.1, 1.0, True)
    assert value.item() == pytest.approx((9 * rest + 7 * math.log(2)) / 16, rel=1e-10)
    gradient = gradient_of(lambda s: crd_loss(s, x, labels, normalize=True), zero_row(x))
    assert gradient[1].eq(0).all() and gradient[0].ne(0).all()


# similarity_graph


@pytest.mark.parametrize("k", [1, 3, 11])
@pytest.mark.parametrize("metric", ["cosine", "euclidean"])
def test_graph_agrees_with_sklearn(metric: str, k: int) -> None:
    x = features(12, 5)
    distances, indices = NearestNeighbors(metric=metric).fit(x.numpy()).kneighbors(n_neighbors=k)
    graph = similarity_graph(x, k, metric=metric)
    assert graph.indices.tolist() == indices.tolist() and graph.indices.dtype == torch.int64
    truth = torch.from_numpy(distances if metric == "euclidean" else 1 - distances)
    torch.testing.assert_close(graph.values, truth)


@each_metric
@pytest.mark.parametrize("with_keys", [False, True], ids=["self", "keys"])
def test_graph_with_self_or_keys_agrees_with_argsort(metric: str, with_keys: bool) -> None:
    x, keys = features(7, 2, 3), features(9, 2, 3, seed=1) if with_keys else None
    s = similarities(x, x if keys is None else keys, metric)
    order = np.argsort(-s, axis=1, kind="stable")[:, :5]
    graph = similarity_graph(x, 5, metric=metric, include_self=not with_keys, keys=keys)
    assert graph.indices.tolist() == order.tolist()
    best = np.take_along_axis(s, order, axis=1)
    torch.testing.assert_close(graph.values, torch.from_numpy(-best if metric == "euclidean" else best))


def test_graph_dot_leaves_out_self_even_where_another_row_is_more_similar() -> None:
    x = torch.tensor([[1.0], [3.0], [2.0], [-1.0]])
    graph = similarity_graph(x, 3, metric="dot")
    assert graph.indices.tolist() == [[1, 2, 3], [2, 0, 3], [1, 0, 3], [0, 2, 1]]
    assert graph.values.tolist() == [[3, 2, -1], [6, 3, -3], [6, 2, -2], [-1, -2, -3]]


@each_metric
@pytest.mark.parametrize("include_self", [False, True])
def test_graph_ties_go_to_the_smaller_index(metric: str, include_self: bool) -> None:
    n, k = 100, 20  # more rows than the insertion sort of an unstable sort keeps in order
    graph = similarity_graph(torch.zeros(n, 3), k, metric=metric, include_self=include_self)
    truth = [[j for j in range(n) if include_self or j != i][:k] for i in range(n)]
    assert graph.indices.tolist() == truth


def test_graph_ties_among_others_go_to_the_smaller_index() -> None:
    x = torch.randint(-2, 3, (60, 2), generator=torch.Generator().manual_seed(0)).double()  # products are exact
    s = x @ x.T
    truth = [sorted((j for j in range(60) if j != i), key=lambda j, i=i: (-s[i, j].item(), j))[:10] for i in range(60)]
    assert similarity_graph(x, 10, metric="dot").indices.tolist() == truth


@each_metric
def test_graph_values_carry_gradients_to_features_and_keys(metric: str) -> None:
    x, keys = features(4, 3, seed=1).requires_grad_(), features(5, 3, seed=2).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: similarity_graph(x, 2, metric=metric).values, x)
    assert torch.autograd.gradcheck(lambda x, y: similarity_graph(x, 2, metric=metric, keys=y).values, (x, keys))


@pytest.mark.parametrize(("metric", "x"), [("cosine", torch.zeros(4, 3)), ("euclidean", torch.ones(4, 3))])
def test_graph_of_coincident_or_zero_rows_has_gradient_zero(metric: str, x: Tensor) -> None:
    assert gradient_of(lambda x: similarity_graph(x, 3, metric=metric).values.sum(), x).eq(0).all()


@each_metric
def test_graph_a_row_of_nan_is_nobodys_neighbour(metric: str) -> None:
    clean, others = features(6, 3), [0, 1, 3, 4, 5]
    graph = similarity_graph(clean.index_fill(0, torch.tensor([2]), math.nan), 4, metric=metric)
    rest = similarity_graph(clean[others], 4, metric=metric)
    assert graph.values[2].isnan().all()
    torch.testing.assert_close(graph.values[others], rest.values)
    assert torch.equal(graph.indices[others], torch.tensor(others)[rest.indices])


# graph_distillation_loss


def loop_graph_loss(student: Tensor, teacher: Tensor, k: int, metric: str, temperature: float) -> float:
    n = len(student)
    s, t = (similarities(x, x, metric) / temperature for x in (student, teacher))
    total = 0.0
    for i in range(n):
        edges = sorted((j for j in range(n) if j != i), key=lambda j, i=i: -t[i, j])[:k]
        log_p_s, log_p_t = (
            [row[j] - math.log(sum(math.exp(row[e]) for e in edges)) for j in edges] for row in (s[i], t[i])
        )
        total += sum(math.exp(b) * (b - a) for a, b in zip(log_p_s, log_p_t, strict=True))
    return total / n


@each_metric
@pytest.mark.parametrize(("k", "temperature"), [(2, 0.5), (4, 1.0), (7, 3.0), (3, 0.05)])
def test_graph_loss_agrees_with_loops(metric: str, k: int, temperature: float) -> None:
    student, teacher = features(8, 3, 2, seed=1), features(8, 4, seed=2)
    value = graph_distillation_loss(student, teacher, k=k, metric=metric, temperature=temperature)
    assert value.item() == pytest.approx(loop_graph_loss(student, teacher, k, metric, temperature), rel=1e-9)


@each_metric
def test_graph_loss_takes_all_other_rows_of_a_short_batch(metric: str) -> None:
    student, teacher = features(4, 3, seed=1), features(4, 3, seed=2)
    torch.testing.assert_close(
        graph_distillation_loss(student, teacher, metric=metric),
        graph_distillation_loss(student, teacher, k=3, metric=metric),
        rtol=0,
        atol=0,
    )


@each_metric
@pytest.mark.parametrize("rows", [0, 1, 2])
def test_graph_loss_of_fewer_than_three_rows_is_zero_with_gradient_zero(rows: int, metric: str) -> None:
    student, teacher = features(rows, 3, seed=1), features(rows, 3, seed=2)
    assert graph_distillation_loss(student, teacher, metric=metric) == 0
    assert gradient_of(lambda s: graph_distillation_loss(s, teacher, metric=metric), student).eq(0).all()


def test_graph_loss_looks_at_the_neighbours_of_the_teacher_alone() -> None:
    # Row 3 is nobody's neighbour in the teacher and has itself all others as neighbours.
    teacher = torch.tensor([[1.0, 0.0], [1.0, 0.1], [1.0, -0.1], [-1.0, 0.3]]).double()
    student = features(4, 3)
    moved = student.index_fill(0, torch.tensor([3]), 2.0)

    def rows_0_to_2(x: Tensor) -> Tensor:
        return 4 * graph_distillation_loss(x, teacher, k=2) - own_row_3(x)

    def own_row_3(x: Tensor) -> Tensor:
        edges = similarity_graph(teacher, 2).indices[3]
        log_p = [torch.log_softmax(torch.cosine_similarity(y[edges], y[3:]) / 0.5, dim=0) for y in (x, teacher)]
        return torch.nn.functional.kl_div(log_p[0], log_p[1], log_target=True, reduction="sum")

    torch.testing.assert_close(rows_0_to_2(moved), rows_0_to_2(student), rtol=0, atol=1e-12)
    assert not torch.isclose(own_row_3(moved), own_row_3(student))


# hardest_negatives


@each_metric
@pytest.mark.parametrize("k", [1, 4, 9])
def test_negatives_agree_with_loops(metric: str, k: int) -> None:
    x, labels = features(9, 3, 2), [0, 1, 0, 2, 1, 1, 0, 0, 0]
    s = similarities(x, x, metric)
    sign = -1 if metric == "euclidean" else 1
    values, indices = hardest_negatives(x, torch.tensor(labels), k, metric=metric)
    for i in range(9):
        others = sorted((j for j in range(9) if labels[j] != labels[i]), key=lambda j, i=i: -s[i, j])[:k]
        missing = k - len(others)
        assert indices[i].tolist() == others + [-1] * missing
        assert values[i].tolist() == pytest.approx([sign * s[i, j] for j in others] + [sign * -math.inf] * missing)


@each_metric
def test_negatives_ties_go_to_the_smaller_index(metric: str) -> None:
    labels = torch.arange(90) % 3
    indices = hardest_negatives(torch.zeros(90, 2), labels, 20, metric=metric).indices
    assert indices.tolist() == [[j for j in range(90) if j % 3 != i % 3][:20] for i in range(90)]


@each_metric
def test_negatives_missing_ones_pass_gradient_zero(metric: str) -> None:
    x = features(4, 3)

    def finite_sum(x: Tensor, labels: list[int]) -> Tensor:
        values = hardest_negatives(x, torch.tensor(labels), 4, metric=metric).values
        return torch.where(values.isinf(), 0.0, values).sum()

    assert gradient_of(lambda x: finite_sum(x, [5, 5, 5, 5]), x).eq(0).all()
    assert gradient_of(lambda x: finite_sum(x, [5, 5, 5, 6]), x).ne(0).any()
    # Even an upstream gradient that is not masked finds nothing to flow through.
    values = hardest_negatives(x.requires_grad_(), torch.tensor([5, 5, 5, 5]), 4, metric=metric).values
    assert torch.autograd.grad(values, x, torch.ones_like(values))[0].eq(0).all()


def test_negatives_an_overflow_goes_before_a_missing_one() -> None:
    x = torch.tensor([[1e30], [-1e30], [1e30]])
    values, indices = hardest_negatives(x, torch.tensor([0, 1, 0]), 2, metric="dot")
    assert indices.tolist() == [[1, -1], [0, 2], [1, -1]]
    assert values.eq(-math.inf).all()


@each_metric
def test_negatives_values_carry_gradients(metric: str) -> None:
    x, labels = features(5, 3).requires_grad_(), torch.tensor([0, 1, 0, 1, 2])
    assert torch.autograd.gradcheck(lambda x: hardest_negatives(x, labels, 2, metric=metric).values, x)


# All of them


def labels_of(x: Tensor) -> Tensor:
    return torch.arange(len(x)) % 2


def as_sequence(x: Tensor) -> Tensor:
    """Features (N, D) as one sequence (1, N, D)."""
    return x[None]


LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "similarity": similarity_preserving_loss,
    "rkd distance": rkd_distance_loss,
    "rkd angle": rkd_angle_loss,
    "rkd": rkd_loss,
    "sequence": lambda s, t: rkd_sequence_angle_loss(as_sequence(s), as_sequence(t)),
    "crd": lambda s, t: crd_loss(s, t, labels_of(s)),
    "crd normalized": lambda s, t: crd_loss(s, t, labels_of(s), normalize=True),
    "crd T=0.05": lambda s, t: crd_loss(s, t, labels_of(s), temperature=0.05),
    "crd T=100": lambda s, t: crd_loss(s, t, labels_of(s), temperature=100.0),
    **{
        f"graph {metric} T={T}": lambda s, t, metric=metric, T=T: graph_distillation_loss(
            s, t, k=3, metric=metric, temperature=T
        )
        for metric in METRICS
        for T in (0.05, 0.5, 100.0)
    },
}
each_loss = pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)

INPUTS: dict[str, tuple[Tensor, Tensor]] = {
    "identical": (features(5, 4), features(5, 4)),
    "coincident rows": (features(5, 4)[[0, 1, 1, 2, 3]], features(5, 4, seed=1)[[0, 1, 1, 2, 3]]),
    "coincident rows of the student": (features(5, 4)[[0, 1, 1, 2, 3]], features(5, 4, seed=1)),
    "coincident rows of the teacher": (features(5, 4), features(5, 4, seed=1)[[0, 1, 1, 2, 3]]),
    "all rows coincident": (features(1, 4).expand(5, 4), features(5, 4, seed=1)),
    "zero row of the student": (zero_row(features(5, 4)), features(5, 4, seed=1)),
    "zero row of the teacher": (features(5, 4), zero_row(features(5, 4, seed=1))),
    "all zero student": (torch.zeros(5, 4), features(5, 4)),
    "all zero teacher": (features(5, 4), torch.zeros(5, 4)),
    "all zero": (torch.zeros(5, 4), torch.zeros(5, 4)),
    "constant row": (features(5, 4).index_fill(0, torch.tensor([2]), 0.3), features(5, 4, seed=1)),
    "on a line": (torch.arange(5.0)[:, None] * torch.ones(4), torch.arange(5.0)[:, None] * torch.ones(4)),
    "there and back": (torch.tensor([[0.0], [1.0], [0.0], [1.0], [0.5]]), features(5, 1)),
    "width 1": (features(5, 1), features(5, 1, seed=1)),
    "width 0": (torch.zeros(5, 0), features(5, 2)),
    "two rows": (features(2, 4), features(2, 4, seed=1)),
    "one row": (features(1, 4), features(1, 4, seed=1)),
    "no row": (torch.zeros(0, 4), torch.zeros(0, 4)),
    "large": (features(5, 4).sign() * 1e4, features(5, 4, seed=1).sign() * 1e4),
    "tiny": (features(5, 4) * 1e-30, features(5, 4, seed=1) * 1e-30),
    "near": (1 + features(5, 4) * 1e-7, features(5, 4, seed=1)),
    "opposite rows": (features(5, 4)[[0, 0, 1, 1]] * torch.tensor([[1], [-1], [1], [-1]]), features(4, 4, seed=1)),
}

GRAPH_INPUTS = {name: pair[0] for name, pair in INPUTS.items() if len(pair[0]) > 1}


@each_loss
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("pair", INPUTS.values(), ids=INPUTS)
def test_value_and_gradient_are_finite(loss: Callable, pair: tuple[Tensor, Tensor], dtype: torch.dtype) -> None:
    student, teacher = pair[0].to(dtype).requires_grad_(), pair[1].to(dtype)
    value = loss(student, teacher)
    (gradient,) = torch.autograd.grad(value, student)
    assert value.isfinite() and gradient.isfinite().all()


@each_metric
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("x", GRAPH_INPUTS.values(), ids=GRAPH_INPUTS)
def test_graph_values_and_gradients_are_finite(x: Tensor, dtype: torch.dtype, metric: str) -> None:
    x = x.to(dtype).requires_grad_()
    labels = torch.arange(len(x))
    for graph in (
        similarity_graph(x, len(x) - 1, metric=metric),
        hardest_negatives(x, labels, len(x) - 1, metric=metric),
    ):
        (gradient,) = torch.autograd.grad(graph.values.sum(), x)
        assert graph.values.isfinite().all() and gradient.isfinite().all()


@pytest.mark.parametrize(
    "loss", [loss for name, loss in LOSSES.items() if "crd" not in name], ids=[n for n in LOSSES if "crd" not in n]
)
def test_identical_student_and_teacher_give_zero(loss: Callable) -> None:
    x = features(5, 4)
    assert loss(x, x).item() == pytest.approx(0, abs=1e-15)


@each_loss
def test_gradient_agrees_with_differences(loss: Callable) -> None:
    student = (features(5, 3, seed=1) + 0.2).requires_grad_()
    assert torch.autograd.gradcheck(lambda s: loss(s, features(5, 3, seed=2)), student)


@each_loss
def test_teacher_has_no_gradient(loss: Callable) -> None:
    student, teacher = features(5, 3, seed=1).requires_grad_(), features(5, 3, seed=2).requires_grad_()
    loss(student, teacher).backward()
    assert teacher.grad is None and student.grad is not None


@each_loss
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_inputs_are_widened_before_any_arithmetic(loss: Callable, dtype: torch.dtype) -> None:
    # 300 squared is more than float16 holds.
    student, teacher = (300 * features(5, 3, seed=seed) for seed in (1, 2))
    student, teacher = student.to(dtype).requires_grad_(), teacher.to(dtype)
    value = loss(student, teacher)
    value.backward()
    assert value.dtype == torch.float32 and student.grad is not None and student.grad.dtype == dtype
    torch.testing.assert_close(value, loss(student.float(), teacher.float()), rtol=0, atol=0)


@each_metric
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_features_give_float32_graphs(metric: str, dtype: torch.dtype) -> None:
    x = (300 * features(5, 3)).to(dtype)
    labels = torch.arange(5)
    for half, full in (
        (similarity_graph(x, 3, metric=metric), similarity_graph(x.float(), 3, metric=metric)),
        (similarity_graph(x, 3, metric=metric, keys=x), similarity_graph(x.float(), 3, metric=metric, keys=x.float())),
        (hardest_negatives(x, labels, 3, metric=metric), hardest_negatives(x.float(), labels, 3, metric=metric)),
    ):
        assert half.values.dtype == torch.float32
        assert torch.equal(half.values, full.values) and torch.equal(half.indices, full.indices)


@each_loss
def test_autocast_changes_nothing(loss: Callable) -> None:
    student, teacher = (features(5, 3, seed=seed, dtype=torch.float32) for seed in (1, 2))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = loss(student, teacher)
    assert value.dtype == torch.float32
    torch.testing.assert_close(value, loss(student, teacher), rtol=0, atol=0)


@each_loss
def test_strides_do_not_matter(loss: Callable) -> None:
    student, teacher = features(3, 5, seed=1).t(), features(5, 6, seed=2)[:, ::2]
    torch.testing.assert_close(loss(student, teacher), loss(student.contiguous(), teacher.contiguous()))


@each_loss
def test_nan_in_gives_nan_out(loss: Callable) -> None:
    assert loss(features(5, 3).index_fill(0, torch.tensor([1]), math.nan), features(5, 3, seed=2)).isnan()


@each_loss
def test_inputs_stay_as_they_are(loss: Callable) -> None:
    student, teacher = zero_row(features(5, 3, seed=1)), zero_row(features(5, 3, seed=2))
    before = student.clone(), teacher.clone()
    loss(student, teacher)
    assert torch.equal(student, before[0]) and torch.equal(teacher, before[1])
