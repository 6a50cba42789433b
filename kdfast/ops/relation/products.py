"""What is known of N x N similarities without making them: ``<X X^T, Y Y^T> = |X^T Y|^2``, a product of D x E numbers.

Losses near 0 are small differences of such products, and their gradients differences of sums over all rows, where the
N x N matrices would be subtracted element by element first. So these products are made in float64, in which the
differences keep all the digits that float32 results have, from panels of rows: on a CPU nothing of N x D is ever
float64 in the ops. On CPUs and data-centre GPUs that costs two to three times the operation in float32; elsewhere it
seldom pays.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kdfast import backends
from kdfast.ops.relation.rows import (
    EPS,
    Float64,
    Rows,
    constant,
    empty_gradient,
    float64_panels,
    inverse_norms,
    mean_of_pairs,
    panels,
    raw_rows,
    total,
)
from kdfast.ops.relation.steps import steps_for
from kdfast.reference.geometry import no_autocast

SEEN_AT_ONCE = 1024  # rows of a panel of similarity_preserving's whole rows
# Rows up to which a GPU takes N x N similarities, at most 16 MiB: the host's launches are then most of the time, and
# that form has fewer. By the count of launches and the time an H100 takes for the products; unmeasured.
FEW_ROWS = 2048


def double_cost(device: torch.device) -> float:
    """Time of an operation in float64, with conversion, over float32's: 3 on CPUs (measured), else by data sheet."""
    if device.type != "cuda":
        return 3.0
    if torch.version.hip is not None or torch.cuda.get_device_capability(device) in ((8, 0), (9, 0)):
        return 3.0
    return 64.0


def features_are_cheaper(
    n: int, x: Tensor, y: Tensor, *, products: tuple[int, int, int], instead: tuple[float, float]
) -> bool:
    """Whether ``products`` of sizes N D^2, N D E and N E^2, in float64, cost less than ``instead``, N^2 D and N^2 E."""
    if backends.on_gpu(x) and n <= FEW_ROWS:
        return False
    d, e = x.shape[1], y.shape[1]
    by_features = products[0] * d * d + products[1] * d * e + products[2] * e * e
    return double_cost(x.device) * by_features < n * (instead[0] * d + instead[1] * e)


def feature_products(s: Float64, t: Float64) -> tuple[Tensor, Tensor, Tensor]:
    """``S^T S``, ``S^T T`` and ``T^T T`` of the compared rows, float64; there must be one."""
    x, d, e = s.rows.x, s.rows.x.shape[1], t.rows.x.shape[1]
    ss, st, tt = (x.new_empty(shape, dtype=torch.float64) for shape in ((d, d), (d, e), (e, e)))
    for first, last in float64_panels(s.rows, t.rows):
        u, v = s(first, last), t(first, last)
        for product, left, right in ((ss, u, u), (st, u, v), (tt, v, v)):
            product.addmm_(left.mT, right, beta=int(first > 0))
    return ss, st, tt


def inner_products(ss: Tensor, st: Tensor, tt: Tensor) -> tuple[Tensor, ...]:
    """``<K, L>``, ``|K|^2`` and ``|L|^2`` of the Gram matrices of both sides, from :func:`feature_products`."""
    return tuple(torch.dot(product.view(-1), product.view(-1)) for product in (st, ss, tt))


def gradient_by_features(grad: Tensor, s: Float64, t: Float64, ss: Tensor, st: Tensor) -> None:
    """``(k K + l L) x`` with respect to the student's given rows x to ``grad``; ss and st are multiplied by k and l."""
    for first, last in float64_panels(s.rows, t.rows):
        slope = s(first, last) @ ss
        slope.addmm_(t(first, last), st.mT)
        grad[first:last] = slope if s.rows.factor is None else slope.mul_(s.rows.factor[first:last, None])


def similarity_preserving(student: Tensor, teacher: Tensor, needs_grad: bool) -> tuple[Tensor, Tensor]:
    """``torch.ops.kdfast.similarity_preserving``."""
    n = student.shape[0]
    if n == 0:
        return constant(0, student, needs_grad)
    with no_autocast(student):
        s, t = raw_rows(student), raw_rows(teacher)
        grad, result = empty_gradient(student, s.x, needs_grad)
        cheaper = features_are_cheaper(n, s.x, t.x, products=(5, 5, 2), instead=(3, 1))
        summed = (_by_features if cheaper else _by_rows)(s, t, grad if needs_grad else None)
        return mean_of_pairs(summed, s.x), result


def _by_features(s: Rows, t: Rows, grad: Tensor | None) -> Tensor:
    """N^2 times the loss from products of features alone.

    Row i of G_s has the norm r_i, r_i^2 = x_i^T (X^T X) x_i; likewise q_i; <G_s,i, G_t,i> = x_i^T (X^T Y) y_i = m_i.
    The loss is the sum of |a_i - b_i|^2 with a = G_s / r, b = G_t / q. Its gradient with respect to G_s is symmetrised
    2 (g_i G_s,ij - h_i G_t,ij) with h = 1 / (r q), and g = m / (r^3 q) where r moves with the norm.
    """
    students, teachers = Float64(s), Float64(t)
    ss, st, tt = feature_products(students, teachers)
    n = s.x.shape[0]
    g, h = ss.new_empty(n, 1), ss.new_empty(n, 1)
    weighted_ss, weighted_st = torch.empty_like(ss), torch.empty_like(st)
    shares = []
    for first, last in float64_panels(s, t):
        u, v = students(first, last), teachers(first, last)
        norms = u.new_empty(2, last - first)
        for w, product, out in ((u, ss, norms[0]), (v, tt, norms[1])):
            torch.sum((w @ product).mul_(w), dim=1, out=out)
        norms.clamp_(min=0).sqrt_()
        inverse_r, inverse_q = inverse = inverse_norms(norms)
        torch.mul(inverse_r, inverse_q, out=h[first:last, 0])
        ab = (u @ st).mul_(v).sum(dim=1).mul_(h[first:last, 0])
        shares.append((norms * inverse).square_().sum(dim=0).sub_(ab, alpha=2))
        if grad is not None:
            ab.masked_fill_(norms[0] < EPS, 1.0)
            torch.mul(ab.mul_(inverse_r), inverse_r, out=g[first:last, 0])
            beta = int(first > 0)
            weighted_ss.addmm_((u * g[first:last]).mT, u, beta=beta)
            weighted_st.addmm_((u * h[first:last]).mT, v, beta=beta)
    if grad is not None:
        factor = 2 / n**2
        for first, last in float64_panels(s, t):
            u, v = students(first, last), teachers(first, last)
            slope = u @ weighted_ss
            slope.addmm_(u * g[first:last], ss)
            slope.addmm_(v, weighted_st.mT, alpha=-1)
            grad[first:last] = slope.addmm_(v * h[first:last], st.mT, beta=factor, alpha=-factor)
    return total(shares).clamp_(min=0)


def _by_rows(s: Rows, t: Rows, grad: Tensor | None) -> Tensor:
    """N^2 times the loss from whole rows of similarities, a panel at a time.

    Here D is more than a few percent of N, and matrix products are nearly all of the time, or all of it is launches.
    """
    n, steps = s.x.shape[0], steps_for(s.x)
    factor, shares = 2 / n**2, []
    for first, last in panels(n, SEEN_AT_ONCE):  # ``b`` becomes the gradient with respect to ``a``
        a, b = (torch.mm(rows.x[first:last], rows.x.mT) for rows in (s, t))
        shares.append(steps.similarity_rows(a, b, grad is not None))
        if grad is None:
            continue
        if last - first == n:
            grad.addmm_(steps.symmetrized(b), s.x, beta=0, alpha=factor)
        else:
            grad.addmm_(b.mT, s.x[first:last], beta=int(first > 0), alpha=factor)
            grad[first:last].addmm_(b, s.x, alpha=factor)
    return total(shares)
