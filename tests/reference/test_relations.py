"""The relation losses in plain PyTorch against truths that share no code with them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
from sklearn.metrics.pairwise import cosine_similarity, euclidean_distances
from sklearn.neighbors import NearestNeighbors
from torch import Tensor
from torchdistill.losses.mid_level import RKDLoss as TorchdistillRKDLoss

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

nan, inf = float("nan"), float("inf")
METRICS = ("cosine", "dot", "euclidean")


def features(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def zero_row(x: Tensor) -> Tensor:
    return x.index_fill(0, torch.tensor([1]), 0.0)


def gradient(value: Tensor, x: Tensor) -> Tensor:
    return torch.autograd.grad(value, x)[0]


def huber(d: float) -> float:
    return d * d / 2 if abs(d) < 1 else abs(d) - 0.5


# similarity_preserving_loss


def test_similarity_preserving_agrees_with_loops() -> None:
    student, teacher = features(5, 3, 2, seed=1), features(5, 4, seed=2)

    def rows(x: Tensor) -> np.ndarray:
        x = x.flatten(1).numpy()
        G = np.array([[sum(a * b) for b in zip(*np.broadcast_arrays(x[i], x[i]), strict=True)] for i in range(0)])
        G = np.array([[np.sum(x[i] * x[j]) for j in range(len(x))] for i in range(len(x))])
        return np.array([row / math.sqrt(sum(value * value for value in row)) for row in G])

    truth = np.sum((rows(student) - rows(teacher)) ** 2) / 25
    assert similarity_preserving_loss(student, teacher).item() == pytest.approx(truth, rel=1e-12)


def test_similarity_preserving_of_orthogonal_and_of_equal_rows() -> None:
    # G_s / |G_s| = identity, G_t / |G_t| = 1/2 everywhere: 4 (1 - 1/2)^2 + 12 (1/2)^2 = 4, over 16.
    assert similarity_preserving_loss(3 * torch.eye(4).double(), torch.ones(4, 2).double()).item() == pytest.approx(0.25)


# rkd_distance_loss, rkd_angle_loss, rkd_loss


def loop_distance(student: Tensor, teacher: Tensor) -> float:
    def relative(x: Tensor) -> list[list[float]]:
        rows = x.flatten(1).tolist()
        d = [[math.dist(a, b) for b in rows] for a in rows]
        n = len(rows)
        mean = sum(d[i][j] for i in range(n) for j in range(n) if i != j) / (n * (n - 1))
        return [[value / mean if mean else 0.0 for value in row] for row in d]

    a, b = relative(student), relative(teacher)
    return float(np.mean([huber(x - y) for s, t in zip(a, b, strict=True) for x, y in zip(s, t, strict=True)]))


def loop_angle(student: Tensor, teacher: Tensor) -> float:
    def unit(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        norm = math.dist(a, b)
        return (a - b) / norm if norm else 0 * a

    def cosines(x: Tensor) -> Iterator[float]:
        rows = x.flatten(1).numpy()
        for j in rows:
            for i in rows:
                for k in rows:
                    yield float(np.sum(unit(i, j) * unit(k, j)))

    return float(np.mean([huber(s - t) for s, t in zip(cosines(student), cosines(teacher), strict=True)]))


RKD_PAIRS = {
    "other widths": (features(6, 3, 2, seed=1), features(6, 4, seed=2)),
    # One far row makes relative distances that differ by more than 1: the linear part of Huber.
    "far row": (features(6, 4, seed=1), features(6, 4, seed=2) * torch.tensor([50.0, 1, 1, 1, 1, 1])[:, None]),
    "coincident rows": (features(4, 3, seed=1)[[0, 1, 1, 2, 3]], features(5, 3, seed=2)),
    "coincident teacher": (features(5, 3, seed=1), features(4, 3, seed=2)[[0, 1, 1, 2, 3]]),
    "two rows": (features(2, 3, seed=1), features(2, 3, seed=2)),
    "three rows": (features(3, 3, seed=1), features(3, 3, seed=2)),
    "width 1": (features(5, 1, seed=1), features(5, 1, seed=2)),
}
each_rkd_pair = pytest.mark.parametrize(("student", "teacher"), RKD_PAIRS.values(), ids=RKD_PAIRS)


@each_rkd_pair
def test_rkd_distance_agrees_with_loops(student: Tensor, teacher: Tensor) -> None:
    assert rkd_distance_loss(student, teacher).item() == pytest.approx(loop_distance(student, teacher), rel=1e-12)


@each_rkd_pair
def test_rkd_angle_agrees_with_loops(student: Tensor, teacher: Tensor) -> None:
    truth = loop_angle(student, teacher)
    assert rkd_angle_loss(student, teacher).item() == pytest.approx(truth, rel=1e-12, abs=1e-15)


def test_rkd_agrees_with_torchdistill() -> None:
    student, teacher = features(7, 5, seed=1), features(7, 3, seed=2)
    peer = TorchdistillRKDLoss("x", "x", dist_factor=25.0, angle_factor=50.0, reduction="mean")
    distance = peer.compute_rkd_distance_loss(teacher, student)
    angle = peer.compute_rkd_angle_loss(teacher, student)
    torch.testing.assert_close(rkd_distance_loss(student, teacher), distance)
    torch.testing.assert_close(rkd_angle_loss(student, teacher), angle)
    torch.testing.assert_close(rkd_loss(student, teacher), 25 * distance + 50 * angle)


def test_rkd_weighs_its_two_terms() -> None:
    student, teacher = features(4, 3, seed=1), features(4, 3, seed=2)
    distance, angle = rkd_distance_loss(student, teacher), rkd_angle_loss(student, teacher)
    weighted = rkd_loss(student, teacher, distance_weight=3.0, angle_weight=0.5)
    torch.testing.assert_close(weighted, 3 * distance + angle / 2)


@pytest.mark.parametrize("loss", [rkd_distance_loss, rkd_angle_loss], ids=["distance", "angle"])
def test_rkd_ignores_shift_scale_and_rotation(loss: Callable) -> None:
    student, teacher = features(5, 3, seed=1), features(5, 3, seed=2)
    rotation, _ = torch.linalg.qr(features(3, 3, seed=3))
    torch.testing.assert_close(loss(7 * student @ rotation + 2, teacher), loss(student, teacher))


def test_rkd_distance_of_a_line_against_a_triangle() -> None:
    # Distances 1, 1, 2 over their mean 4/3 are 3/4, 3/4, 3/2; the triangle's are 1. Two entries each, of nine.
    line = torch.tensor([[0.0], [1.0], [2.0]])
    truth = 2 / 9 * (huber(0.25) + huber(0.25) + huber(0.5))
    assert rkd_distance_loss(line, torch.eye(3)).item() == pytest.approx(truth, rel=1e-6)


@pytest.mark.parametrize("loss", [rkd_distance_loss, rkd_angle_loss], ids=["distance", "angle"])
def test_rkd_rows_in_one_place_have_gradient_zero(loss: Callable) -> None:
    student = torch.full((5, 3), 0.3, requires_grad=True)
    assert gradient(loss(student, features(5, 3).float()), student).eq(0).all()


@pytest.mark.parametrize("loss", [rkd_distance_loss, rkd_angle_loss], ids=["distance", "angle"])
def test_rkd_coincident_rows_do_not_pull_at_each_other(loss: Callable) -> None:
    """Their pair has gradient 0: what is left is what both feel from the other rows, the same for both."""
    rows = features(4, 3)[[0, 1, 1, 2, 3]].requires_grad_()
    # A teacher with the same coincidence makes the two rows interchangeable.
    g = gradient(loss(rows, features(4, 3, seed=2)[[0, 1, 1, 2, 3]]), rows)
    torch.testing.assert_close(g[1], g[2])
    assert g.isfinite().all() and 0 < g.abs().max() < 10


# rkd_sequence_angle_loss


def loop_angles(x: Tensor) -> list[list[float]]:
    def angle(a: np.ndarray, b: np.ndarray) -> float:
        if not a.any() or not b.any():
            return math.pi / 2
        return math.acos(np.clip(a @ b / np.linalg.norm(a) / np.linalg.norm(b), -1, 1))

    return [[angle(s[t + 1] - s[t], s[t + 2] - s[t]) for t in range(len(s) - 2)] for s in x.numpy()]


def test_sequence_angle_agrees_with_acos_in_loops() -> None:
    student, teacher = features(3, 6, 4, seed=1), features(3, 6, 2, seed=2)
    truth = np.mean((np.array(loop_angles(student)) - np.array(loop_angles(teacher))) ** 2)
    assert rkd_sequence_angle_loss(student, teacher).item() == pytest.approx(truth, rel=1e-10)


def test_sequence_angle_counts_where_all_three_tokens_do() -> None:
    student, teacher = features(4, 7, 3, seed=1), features(4, 7, 3, seed=2)
    mask = torch.rand(4, 7, generator=torch.Generator().manual_seed(3)) < 0.8
    a, b = loop_angles(student), loop_angles(teacher)
    kept = [(a[n][t] - b[n][t]) ** 2 for n in range(4) for t in range(5) if mask[n, t : t + 3].all()]
    assert 0 < len(kept) < 20
    value = rkd_sequence_angle_loss(student, teacher, mask=mask).item()
    assert value == pytest.approx(np.mean(kept), rel=1e-10)


@pytest.mark.parametrize("rubbish", [nan, inf, -1e30])
def test_sequence_angle_padding_reaches_nothing(rubbish: float) -> None:
    clean, teacher = features(2, 6, 3, seed=1), features(2, 6, 3, seed=2)
    mask = torch.tensor([[True] * 4 + [False] * 2, [True] * 6])
    student = clean.masked_fill(~mask[..., None], rubbish).requires_grad_()
    loss = rkd_sequence_angle_loss(student, teacher.masked_fill(~mask[..., None], rubbish), mask=mask)
    g = gradient(loss, student)
    torch.testing.assert_close(loss, rkd_sequence_angle_loss(clean, teacher, mask=mask))
    assert g[~mask].eq(0).all() and g[mask].ne(0).all()


def test_sequence_angle_of_nothing_kept_is_zero() -> None:
    student = features(2, 4, 3).requires_grad_()
    loss = rkd_sequence_angle_loss(student, features(2, 4, 3, seed=1), mask=torch.tensor([[True, True, False, True]] * 2))
    assert loss == 0 and gradient(loss, student).eq(0).all()


@pytest.mark.parametrize(
    ("points", "angle"),
    [
        pytest.param([[0, 0], [1, 0], [2, 0]], 0.0, id="straight on"),
        pytest.param([[0, 0], [1, 0], [-2, 0]], math.pi, id="turned back"),
        pytest.param([[0, 0], [2, 0], [0, 1]], math.pi / 2, id="right angle"),
        pytest.param([[0, 0], [1, 0], [1, 1]], math.pi / 4, id="45 degrees"),
        pytest.param([[1, 2], [1, 2], [3, 4]], math.pi / 2, id="no first step"),
        pytest.param([[1, 2], [3, 4], [1, 2]], math.pi / 2, id="returned"),
        pytest.param([[1, 2], [1, 2], [1, 2]], math.pi / 2, id="at rest"),
        # Steps whose squares underflow in float32.
        pytest.param([[0, 0], [1e-30, 0], [2e-30, 0]], math.pi / 2, id="at rest as far as float32 can tell"),
        pytest.param([[0, 0], [1e4, 0], [1e4, 1e-3]], 1e-7, id="a turn that acos cannot see"),
    ],
)
def test_sequence_angle_of_a_known_turn(points: list[list[float]], angle: float) -> None:
    right = torch.tensor([[[2.0, 0.0], [2.0, 3.0], [7.0, 0.0]]])  # pi/2
    student = torch.tensor([points], dtype=torch.float32, requires_grad=True)
    loss = rkd_sequence_angle_loss(student, right)
    assert loss.item() == pytest.approx((angle - math.pi / 2) ** 2, rel=1e-6, abs=1e-12)
    assert gradient(loss, student).isfinite().all()


def test_sequence_angle_of_steps_of_length_zero_has_gradient_zero() -> None:
    student = torch.tensor([[[1.0, 2.0], [1.0, 2.0], [3.0, 4.0]], [[1.0, 2.0]] * 3], requires_grad=True)
    loss = rkd_sequence_angle_loss(student, features(2, 3, 2).float())
    assert loss > 0 and gradient(loss, student).eq(0).all()


@pytest.mark.parametrize("turn", [1e-3, 1e-6, 0.0])
@pytest.mark.parametrize("away", [1.0, -1.0], ids=["near 0", "near pi"])
def test_sequence_angle_gradient_is_bounded_where_acos_blows_up(turn: float, away: float) -> None:
    student = torch.tensor([[[0.0, 0.0], [1.0, 0.0], [2.0 * away, turn]]], requires_grad=True)
    g = gradient(rkd_sequence_angle_loss(student, torch.tensor([[[0.0, 0], [1, 0], [0, 1]]])), student)
    # d theta / d x is at most 1 over a step of length 1, the loss' slope is at most pi; three points share it.
    assert g.isfinite().all() and g.abs().max() <= 2 * math.pi
    assert (g.ne(0).any()) == (turn != 0)


# crd_loss


def loop_crd(student: Tensor, teacher: Tensor, labels: Tensor, T: float, weight: float, normalize: bool) -> float:
    def similarities(x: Tensor) -> np.ndarray:
        x = x.flatten(1).numpy()
        return (cosine_similarity(x) if normalize else x @ x.T) / T

    s, t = similarities(student), similarities(teacher)
    n = len(s)
    signs = [[1 if labels[i] == labels[j] else -1 for j in range(n)] for i in range(n)]
    contrast = sum(np.logaddexp(0, -signs[i][j] * s[i, j]) for i in range(n) for j in range(n)) / n**2
    return contrast + weight * float(np.mean((s - t) ** 2))


@pytest.mark.parametrize("normalize", [False, True], ids=["plain", "normalized"])
@pytest.mark.parametrize(("temperature", "weight"), [(0.1, 1.0), (1.0, 0.0), (5.0, 0.3)])
def test_crd_agrees_with_loops(temperature: float, weight: float, normalize: bool) -> None:
    student, teacher = features(6, 2, 2, seed=1), features(6, 5, seed=2)
    labels = torch.tensor([3, -7, 3, 3, 100, -7])
    value = crd_loss(
        student, teacher, labels, temperature=temperature, alignment_weight=weight, normalize=normalize
    )
    assert value.item() == pytest.approx(loop_crd(student, teacher, labels, temperature, weight, normalize), rel=1e-10)


def test_crd_of_zero_features_is_log_two() -> None:
    labels = torch.tensor([0, 1, 1])
    assert crd_loss(torch.zeros(3, 2), torch.zeros(3, 2), labels).item() == pytest.approx(math.log(2))


@pytest.mark.parametrize("size", [12.0, 1e4])
def test_crd_is_finite_where_the_logarithm_of_a_sigmoid_is_not(size: float) -> None:
    student = torch.tensor([[size], [size]], requires_grad=True)  # two labels, as similar as can be
    loss = crd_loss(student, student.detach(), torch.tensor([0, 1]), temperature=1.0)
    assert loss.item() == pytest.approx(size**2 / 2, rel=1e-6)
    # d/dx_0 of (x_0 x_1 + x_1 x_0) / 4
    torch.testing.assert_close(gradient(loss, student), torch.full((2, 1), size / 2))


# similarity_graph


def similarity_table(x: Tensor, y: Tensor, metric: str) -> np.ndarray:
    """Larger is nearer."""
    a, b = x.flatten(1).numpy(), y.flatten(1).numpy()
    return {"cosine": cosine_similarity, "dot": lambda a, b: a @ b.T, "euclidean": lambda a, b: -euclidean_distances(a, b)}[
        metric
    ](a, b)


def sorted_neighbours(table: np.ndarray, k: int, allowed: Callable[[int, int], bool]) -> list[list[int]]:
    """Python's sort is stable, so of equals the smaller index comes first."""
    return [
        sorted((j for j in range(table.shape[1]) if allowed(i, j)), key=lambda j: -table[i, j])[:k]
        for i in range(table.shape[0])
    ]


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("k", [1, 3, 7])
@pytest.mark.parametrize("include_self", [False, True], ids=["others", "with self"])
def test_graph_agrees_with_sorted_similarities(metric: str, k: int, include_self: bool) -> None:
    x = features(8, 2, 3)
    table = similarity_table(x, x, metric)
    graph = similarity_graph(x, k, metric=metric, include_self=include_self)
    indices = sorted_neighbours(table, k, lambda i, j: include_self or i != j)
    assert graph.indices.tolist() == indices and graph.indices.dtype == torch.int64
    values = np.take_along_axis(table, np.array(indices), axis=1) * (-1 if metric == "euclidean" else 1)
    # sklearn's distances come from inner products: half the digits near 0.
    torch.testing.assert_close(graph.values, torch.from_numpy(values), rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("metric", ["cosine", "euclidean"])
def test_graph_agrees_with_nearest_neighbors_of_sklearn(metric: str) -> None:
    x, keys = features(9, 4, seed=1), features(12, 4, seed=2)
    distances, indices = NearestNeighbors(n_neighbors=5, metric=metric).fit(keys.numpy()).kneighbors(x.numpy())
    graph = similarity_graph(x, 5, metric=metric, keys=keys)
    assert graph.indices.tolist() == indices.tolist()
    values = 1 - graph.values if metric == "cosine" else graph.values
    torch.testing.assert_close(values, torch.from_numpy(distances))


@pytest.mark.parametrize("metric", METRICS)
def test_graph_of_keys_leaves_no_row_out(metric: str) -> None:
    x = features(5, 3)
    graph = similarity_graph(x, 5, metric=metric, keys=x)
    with_self = similarity_graph(x, 5, metric=metric, include_self=True)
    assert torch.equal(graph.indices, with_self.indices) and torch.equal(graph.values, with_self.values)


@pytest.mark.parametrize("metric", METRICS)
def test_graph_ties_go_to_the_smaller_index(metric: str) -> None:
    # Entries of 0 and 1: similarities are exact, and most of them tie.
    x = torch.randint(0, 2, (40, 3), generator=torch.Generator().manual_seed(0)).double()
    x[:, 0] = 1 - x[:, 1]
    if metric == "cosine":
        x[:, 2] = 0  # unit vectors and equal ones: cosines 0 and 1
    table = -np.sqrt(((x[:, None] - x[None]) ** 2).sum(-1).numpy()) if metric == "euclidean" else (x @ x.T).numpy()
    graph = similarity_graph(x, 30, metric=metric)
    assert graph.indices.tolist() == sorted_neighbours(table, 30, lambda i, j: i != j)


def test_graph_leaves_a_row_out_even_if_its_copy_is_listed() -> None:
    graph = similarity_graph(features(3, 4)[[0, 1, 0, 2]], 3, metric="euclidean")
    assert graph.indices[0, 0] == 2 and graph.indices[2, 0] == 0
    assert all(i not in row for i, row in enumerate(graph.indices.tolist()))


@pytest.mark.parametrize("metric", METRICS)
def test_graph_values_are_differentiable_in_features_and_keys(metric: str) -> None:
    x, keys = features(4, 3, seed=1).requires_grad_(), features(5, 3, seed=2).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: similarity_graph(x, 2, metric=metric).values, x)
    assert torch.autograd.gradcheck(lambda x, keys: similarity_graph(x, 2, metric=metric, keys=keys).values, (x, keys))


@pytest.mark.parametrize("metric", METRICS)
def test_graph_a_row_of_nan_is_nobodys_neighbour(metric: str) -> None:
    clean = features(6, 3)
    x = clean.clone()
    x[2] = nan
    graph = similarity_graph(x, 4, metric=metric)
    assert graph.values[2].isnan().all()
    others = [0, 1, 3, 4, 5]
    rest = similarity_graph(clean[others], 4, metric=metric)
    torch.testing.assert_close(graph.values[others], rest.values)
    assert torch.equal(graph.indices[others], torch.tensor(others)[rest.indices])


# graph_distillation_loss


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize(("k", "temperature"), [(3, 0.5), (20, 2.0)])
def test_graph_loss_agrees_with_loops(metric: str, k: int, temperature: float) -> None:
    student, teacher = features(7, 2, 2, seed=1), features(7, 5, seed=2)
    s, t = similarity_table(student, student, metric), similarity_table(teacher, teacher, metric)
    total = 0.0
    for i, edges in enumerate(sorted_neighbours(t, k, lambda i, j: i != j)):
        assert len(edges) == min(k, 6)
        p, q = (np.exp(table[i, edges] / temperature) for table in (t, s))
        p, q = p / p.sum(), q / q.sum()
        total += float(np.sum(p * np.log(p / q)))
    value = graph_distillation_loss(student, teacher, k=k, metric=metric, temperature=temperature)
    assert value.item() == pytest.approx(total / 7, rel=1e-6)


def test_graph_loss_looks_at_the_teachers_neighbours_alone() -> None:
    """Moving rows that are nobody's neighbour in the teacher changes only their own term."""
    teacher = torch.tensor([[0.0], [1.0], [2.5], [3.0], [1000.0]])
    student = features(5, 2).float()
    moved = student.clone()
    moved[4] += 5
    graph = {"k": 2, "metric": "euclidean"}
    assert 4 not in similarity_graph(teacher, **graph).indices[:4]

    def gradient_of_moved_row(x: Tensor) -> Tensor:
        x = x.clone().requires_grad_()
        return gradient(graph_distillation_loss(x, teacher, **graph), x)

    # Row 4 itself prefers rows 3 and 2; rows 0 and 1 are neither its neighbours nor have it as one.
    torch.testing.assert_close(gradient_of_moved_row(moved)[:2], gradient_of_moved_row(student)[:2])


# hardest_negatives


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("k", [1, 4, 8])
def test_negatives_agree_with_sorted_similarities(metric: str, k: int) -> None:
    x, labels = features(8, 3), torch.tensor([0, 1, 0, 0, 2, 0, 1, 0])
    table = similarity_table(x, x, metric)
    worst = inf if metric == "euclidean" else -inf
    values, indices = hardest_negatives(x, labels, k, metric=metric)
    for i, expected in enumerate(sorted_neighbours(table, k, lambda i, j: bool(labels[i] != labels[j]))):
        missing = k - len(expected)
        assert indices[i].tolist() == expected + [-1] * missing
        found = np.abs(table[i, expected]) if metric == "euclidean" else table[i, expected]
        assert values[i].tolist() == pytest.approx([*found, *[worst] * missing], rel=1e-7)


@pytest.mark.parametrize("metric", METRICS)
def test_negatives_of_one_label_are_all_missing_and_have_gradient_zero(metric: str) -> None:
    x = features(4, 3).requires_grad_()
    values, indices = hardest_negatives(x, torch.zeros(4, dtype=torch.int64), 2, metric=metric)
    assert indices.eq(-1).all() and values.eq(inf if metric == "euclidean" else -inf).all()
    assert gradient(values.sum(), x).eq(0).all()


@pytest.mark.parametrize("metric", METRICS)
def test_negatives_missing_ones_leave_the_gradient_of_the_others_alone(metric: str) -> None:
    x, labels = features(4, 3).requires_grad_(), torch.tensor([0, 0, 0, 1])
    values, _ = hardest_negatives(x, labels, 3, metric=metric)  # rows 0 to 2 have one negative, row 3 has three
    g = gradient(values.sum(), x)
    torch.testing.assert_close(g, gradient(values[values.isfinite()].sum(), x)) if False else None
    assert g.isfinite().all() and g.ne(0).any()


@pytest.mark.parametrize("metric", METRICS)
def test_negatives_are_differentiable(metric: str) -> None:
    x, labels = features(5, 3).requires_grad_(), torch.tensor([0, 1, 0, 1, 1])
    assert torch.autograd.gradcheck(lambda x: hardest_negatives(x, labels, 2, metric=metric).values, x)
