"""Losses on the relations between the rows of a batch, in plain PyTorch."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from kdfast.reference.geometry import flatten_rows, gram, pairwise_distances, unit_rows
from kdfast.reference.logits import divergence


class SimilarityGraph(NamedTuple):
    """The k best neighbours of each row, best first."""

    values: Tensor  # (N, k), similarities, or distances for 'euclidean'
    indices: Tensor  # (N, k), int64


def similarity_preserving_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """``sum (G_s - G_t)^2 / N^2``, ``G = X X^T`` with rows divided by their L2 norm."""
    g_student, g_teacher = (unit_rows(gram(flatten_rows(x))) for x in (student, teacher.detach()))
    return mean_or_zero((g_student - g_teacher).square())


def rkd_distance_loss(
    student: Tensor,
    teacher: Tensor,
    *,
    mask: Tensor | None = None,
    row_weight: Tensor | None = None,
    reduction: str = "mean",
) -> Tensor:
    """Mean over all N^2 pairs of ``w_i w_j Huber(d_s - d_t)``, each d over its mean; N are the rows ``mask`` keeps."""
    d_student, d_teacher = (relative_distances(x, mask) for x in (student, teacher.detach()))
    weight = row_weights(mask, row_weight, d_student)
    total = (F.smooth_l1_loss(d_student, d_teacher, reduction="none") * weight.unsqueeze(1) * weight).sum()
    return total / rows_kept(mask, d_student).square().clamp(min=1) if reduction == "mean" else total


def relative_distances(x: Tensor, mask: Tensor | None = None) -> Tensor:
    """Distances divided by their mean over the pairs i != j; all rows in one place: 0. Rows not kept: 0."""
    x = flatten_rows(x)
    keep = x.new_ones(x.shape[0]) if mask is None else mask.to(x.dtype)
    d = pairwise_distances(kept_rows(x, mask)) * keep.unsqueeze(1) * keep
    n = rows_kept(mask, d)
    mean = d.sum() / (n * (n - 1)).clamp(min=1)
    return d / torch.where(mean == 0, 1.0, mean)


def rkd_angle_loss(
    student: Tensor,
    teacher: Tensor,
    *,
    triplets: str | int = "all",
    generator: torch.Generator | None = None,
    mask: Tensor | None = None,
    row_weight: Tensor | None = None,
    reduction: str = "mean",
) -> Tensor:
    """Mean over all N^3 triplets of ``w_i w_j w_k Huber(cos_s - cos_t)``, the cosines of the angles ijk at j.

    An int for ``triplets`` is a number of apexes j to draw: the mean over the triplets at those.
    """
    apexes = sampled_apexes(student, triplets, generator, mask)
    return angle_loss(student, teacher, apexes, mask, row_weight, reduction)


def angle_loss(
    student: Tensor,
    teacher: Tensor,
    apexes: Tensor | None,
    mask: Tensor | None,
    row_weight: Tensor | None,
    reduction: str,
) -> Tensor:
    """:func:`rkd_angle_loss` of the triplets at ``apexes`` (None: all)."""
    c_student, c_teacher = (triplet_cosines(x, apexes, mask) for x in (student, teacher.detach()))
    weight, n = row_weights(mask, row_weight, c_student), rows_kept(mask, c_student)
    at = weight if apexes is None else weight[apexes]
    count = n if apexes is None else rows_kept(None if mask is None else mask[apexes], at)
    weights = at[:, None, None] * weight.unsqueeze(1) * weight
    total = (F.smooth_l1_loss(c_student, c_teacher, reduction="none") * weights).sum() / count.clamp(min=1)
    return total / n.square().clamp(min=1) if reduction == "mean" else total * n


def triplet_cosines(x: Tensor, apexes: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
    """(N, N, N): ``<u_ji, u_jk>`` at [j, i, k], ``u_ji`` the unit vector from j to i; 0 where two rows coincide.

    j runs over ``apexes`` where they are given.
    """
    x = kept_rows(flatten_rows(x), mask)
    return gram(unit_rows(x.unsqueeze(0) - (x if apexes is None else x[apexes]).unsqueeze(1)))


def sampled_apexes(
    x: Tensor, triplets: str | int, generator: torch.Generator | None, mask: Tensor | None
) -> Tensor | None:
    """None for all rows, or int64 indices of ``triplets`` rows, each set of that size as likely as any other.

    Rows ``mask`` drops come last: they are among the indices only if too few others are left.
    """
    if isinstance(triplets, str) or triplets >= x.shape[0]:
        return None
    order = torch.rand(x.shape[0], generator=generator, device=x.device, dtype=torch.float64)
    return (order if mask is None else order.masked_fill(~mask, -1.0)).topk(triplets).indices


def kept_rows(x: Tensor, mask: Tensor | None) -> Tensor:
    """(N, D) with the rows ``mask`` drops at 0, whatever they held."""
    return x if mask is None else x.masked_fill(~mask.unsqueeze(1), 0.0)


def rows_kept(mask: Tensor | None, like: Tensor) -> Tensor:
    """The number N of rows that count, in the dtype of ``like`` (…, N)."""
    return like.new_full((), like.shape[-1]) if mask is None else mask.sum().to(like.dtype)


def row_weights(mask: Tensor | None, row_weight: Tensor | None, like: Tensor) -> Tensor:
    """(N,) in the dtype of ``like`` (…, N): ``row_weight``, or 1, and 0 where ``mask`` drops the row."""
    weight = like.new_ones(like.shape[-1]) if row_weight is None else row_weight.detach().to(like.dtype)
    return weight if mask is None else weight.masked_fill(~mask, 0.0)


def rkd_loss(
    student: Tensor,
    teacher: Tensor,
    *,
    distance_weight: float = 25.0,
    angle_weight: float = 50.0,
    triplets: str | int = "all",
    generator: torch.Generator | None = None,
    mask: Tensor | None = None,
    row_weight: Tensor | None = None,
    reduction: str = "mean",
) -> Tensor:
    """``distance_weight`` times the distance loss plus ``angle_weight`` times the angle loss.

    A term of weight 0 is left out: the angles of many rows may be more than the memory holds.
    """
    apexes = sampled_apexes(student, triplets, generator, mask)
    loss = flatten_rows(student)[:0].sum()
    if distance_weight != 0:
        loss = loss + distance_weight * rkd_distance_loss(
            student, teacher, mask=mask, row_weight=row_weight, reduction=reduction
        )
    if angle_weight != 0:
        loss = loss + angle_weight * angle_loss(student, teacher, apexes, mask, row_weight, reduction)
    return loss


def rkd_sequence_angle_loss(student: Tensor, teacher: Tensor, *, mask: Tensor | None = None) -> Tensor:
    """Mean of ``(theta_s - theta_t)^2``, theta_t the angle between ``x[t+1] - x[t]`` and ``x[t+2] - x[t]``."""
    squares = (step_angles(student, mask) - step_angles(teacher.detach(), mask)).square()
    if mask is None:
        return mean_or_zero(squares)
    keep = mask[:, :-2] & mask[:, 1:-1] & mask[:, 2:]
    return squares.masked_fill(~keep, 0.0).sum() / keep.sum().clamp(min=1)


def step_angles(x: Tensor, mask: Tensor | None) -> Tensor:
    """(N, L, D) to (N, L - 2), in radians; pi/2 with zero gradient where a step is 0. Padding may hold anything."""
    x = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
    if mask is not None:
        x = x.masked_fill(~mask.unsqueeze(-1), 0.0)
    u, v = unit_rows(x[:, 1:-1] - x[:, :-2]), unit_rows(x[:, 2:] - x[:, :-2])
    moved = (u != 0).any(dim=-1) & (v != 0).any(dim=-1)
    # 2 atan2(|u - v|, |u + v|) is accurate and has a bounded gradient at every angle; acos has neither at 0 and pi.
    apart, along = (torch.linalg.vector_norm(w, dim=-1) for w in (u - v, u + v))
    return 2 * torch.atan2(torch.where(moved, apart, 1.0), torch.where(moved, along, 1.0))


def crd_loss(
    student: Tensor,
    teacher: Tensor,
    labels: Tensor,
    *,
    temperature: float = 0.1,
    alignment_weight: float = 1.0,
    normalize: bool = False,
) -> Tensor:
    """Mean of ``softplus(-s_ij)`` for one label, ``softplus(s_ij)`` for two, plus weighted mean ``(s_ij - t_ij)^2``."""
    s, t = (inner_products(x, normalize) / temperature for x in (student, teacher.detach()))
    same_label = labels.unsqueeze(1) == labels.unsqueeze(0)
    contrast = -F.logsigmoid(torch.where(same_label, s, -s))  # softplus, which PyTorch's own cuts off at 20
    return mean_or_zero(contrast) + alignment_weight * mean_or_zero((s - t).square())


def inner_products(x: Tensor, normalize: bool) -> Tensor:
    """(N, …) to (N, N): ``<x_i, x_j>``, of unit vectors if ``normalize``."""
    x = flatten_rows(x)
    return gram(unit_rows(x) if normalize else x)


def similarity_graph(
    features: Tensor,
    k: int = 20,
    *,
    metric: str = "cosine",
    include_self: bool = False,
    keys: Tensor | None = None,
    precision: str = "ieee",
) -> SimilarityGraph:
    """The k most similar of the other rows (or of ``keys``), best first; ties go to the smaller index.

    ``precision`` allows kernels to round; the definition is what they round to.
    """
    similarities = similarity_matrix(features, features if keys is None else keys, metric)
    hidden = None
    if keys is None and not include_self:
        hidden = torch.eye(features.shape[0], dtype=torch.bool, device=features.device)
    indices, _ = best(similarities, k, hidden)
    values = similarities.gather(1, indices)
    return SimilarityGraph(-values if metric == "euclidean" else values, indices)


def graph_distillation_loss(
    student: Tensor, teacher: Tensor, *, k: int = 20, metric: str = "cosine", temperature: float = 0.5
) -> Tensor:
    """Mean over rows of ``KL(softmax(t_ij / T) || softmax(s_ij / T))``, j among the teacher's k best edges of i."""
    n = student.shape[0]
    if n < 2:
        return flatten_rows(student)[:0].sum()  # no neighbours: 0, and gradient 0
    teacher = teacher.detach()
    edges = similarity_graph(teacher, min(k, n - 1), metric=metric).indices
    log_p_student, log_p_teacher = (
        torch.log_softmax(similarity_matrix(x, x, metric).gather(1, edges) / temperature, dim=1)
        for x in (student, teacher)
    )
    return divergence(log_p_teacher, log_p_student).mean()


def hardest_negatives(features: Tensor, labels: Tensor, k: int, *, metric: str = "cosine") -> SimilarityGraph:
    """The k most similar rows with another label; where there are fewer: index -1 and value -inf (euclidean +inf)."""
    similarities = similarity_matrix(features, features, metric)
    indices, missing = best(similarities, k, labels.unsqueeze(1) == labels.unsqueeze(0))
    values = similarities.gather(1, indices).masked_fill(missing, -math.inf)
    return SimilarityGraph(-values if metric == "euclidean" else values, indices.masked_fill(missing, -1))


def similarity_matrix(x: Tensor, y: Tensor, metric: str) -> Tensor:
    """(N, …) and (M, …) to (N, M), larger is nearer: distances are negated."""
    x, y = flatten_rows(x), flatten_rows(y)
    if metric == "euclidean":
        return -pairwise_distances(x, y)
    return gram(unit_rows(x), unit_rows(y)) if metric == "cosine" else gram(x, y)


def best(similarities: Tensor, k: int, hidden: Tensor | None) -> tuple[Tensor, Tensor]:
    """Columns of the k largest entries of each row, ties to the smaller, and which of them are ``hidden`` ones.

    The hidden ones come last, and NaN before them: one row of NaN is nobody's best neighbour.
    """
    scores = similarities.detach()
    hidden = torch.zeros_like(scores, dtype=torch.bool) if hidden is None else hidden
    order = scores.masked_fill(scores.isnan(), -math.inf).argsort(dim=1, descending=True, stable=True)
    order = order.gather(1, hidden.gather(1, order).to(torch.int8).argsort(dim=1, stable=True))[:, :k]
    return order, hidden.gather(1, order)


def mean_or_zero(x: Tensor) -> Tensor:
    """The mean; 0 for an empty tensor, where PyTorch's is NaN."""
    return x.sum() / max(x.numel(), 1)
