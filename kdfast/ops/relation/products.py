"""What is known of N x N similarities without making them: ``<X X^T, Y Y^T> = |X^T Y|^2``, a product of D x E numbers.

Losses near 0 are small differences of such products, and their gradients differences of sums over all rows, where the
N x N matrices would be subtracted element by element first. So these products are made in float64, in which the
differences keep all the digits that float32 results have, from panels of rows: nothing of N x D is ever float64 in the
ops. On CPUs and data-centre GPUs that costs two to three times the operation in float32; elsewhere it seldom pays.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kdfast.ops.relation.rows import Rows, panels, raw_rows
from kdfast.reference.features import kernel_features, safe_ratio
from kdfast.reference.geometry import gram

PANEL_ROWS = 256  # of float64: twice as many are a fifth faster, and take 7 % of an 8192 x 8192 matrix in place of 4 %
EPS = 1e-12  # of similarity_preserving's norms
SEEN_AT_ONCE = 1024  # rows of a panel of similarity_preserving's whole rows


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
    d, e = x.shape[1], y.shape[1]
    by_features = products[0] * d * d + products[1] * d * e + products[2] * e * e
    return double_cost(x.device) * by_features < n * (instead[0] * d + instead[1] * e)


def feature_products(s: Rows, t: Rows) -> tuple[Tensor, Tensor, Tensor]:
    """``S^T S``, ``S^T T`` and ``T^T T`` of the compared rows, float64."""
    d, e = s.x.shape[1], t.x.shape[1]
    ss, st, tt = (s.x.new_zeros(shape, dtype=torch.float64) for shape in ((d, d), (d, e), (e, e)))
    for first, last in panels(s.x.shape[0], PANEL_ROWS):
        u, v = s.unit(first, last), t.unit(first, last)
        ss.addmm_(u.mT, u)
        st.addmm_(u.mT, v)
        tt.addmm_(v.mT, v)
    return ss, st, tt


def kernel_alignment(student: Tensor, teacher: Tensor, centered: bool) -> Tensor:
    """The loss of :func:`kdfast.kernel_alignment_loss`; arguments are already checked."""
    s, t = kernel_features(student, centered), kernel_features(teacher.detach(), centered)
    return 1 - kernel_cosine(s, t)


def kernel_cosine(x: Tensor, y: Tensor) -> Tensor:
    """``<K_x, K_y> / (|K_x| |K_y|)`` of (N, D) and (N, E), K = x x^T, from whichever of the two forms is cheaper.

    Plain PyTorch, which autograd differentiates: a handful of matrix products of one size are all the time it takes.
    """
    n, dtype = x.shape[0], x.dtype
    with torch.autocast(x.device.type, enabled=False):
        if features_are_cheaper(n, x, y, products=(2, 2, 1), instead=(2, 1)):
            x, y = x.double(), y.double()
            product = (x.mT @ y).square().sum()
            norms = torch.linalg.norm(x.mT @ x) * torch.linalg.norm(y.mT @ y)
        else:
            K, L = gram(x), gram(y)
            product = (K * L).sum()
            norms = torch.linalg.norm(K) * torch.linalg.norm(L)
        return safe_ratio(product, norms).to(dtype)


def similarity_preserving(student: Tensor, teacher: Tensor, needs_grad: bool) -> tuple[Tensor, Tensor]:
    """``torch.ops.kdfast.similarity_preserving``."""
    with torch.autocast(student.device.type, enabled=False):
        s, t = raw_rows(student), raw_rows(teacher)
        n = s.x.shape[0]
        grad = s.x.new_zeros(s.x.shape) if needs_grad else None
        cheaper = features_are_cheaper(n, s.x, t.x, products=(5, 5, 2), instead=(3, 1))
        total = (_by_features if cheaper else _by_rows)(s, t, grad)
        loss = (total / max(n * n, 1)).to(s.x.dtype)
        return loss, s.x.new_empty(0) if grad is None else grad.view(student.shape)


def _inverse_norms(norms: Tensor) -> tuple[Tensor, Tensor]:
    """``1 / max(norm, EPS)``, 0 for a norm of 0, and whether it moves with the norm."""
    return torch.where(norms == 0, 0.0, 1 / norms.clamp(min=EPS)), norms >= EPS


def _by_features(s: Rows, t: Rows, grad: Tensor | None) -> Tensor:
    """N^2 times the loss from products of features alone.

    Row i of G_s has the norm r_i, r_i^2 = x_i^T (X^T X) x_i; likewise q_i; <G_s,i, G_t,i> = x_i^T (X^T Y) y_i = m_i.
    The loss is the sum of |a_i - b_i|^2 with a = G_s / r, b = G_t / q. Its gradient with respect to G_s is symmetrised
    2 (g_i G_s,ij - h_i G_t,ij) with h = 1 / (r q), and g = m / (r^3 q) where r moves with the norm.
    """
    ss, st, tt = feature_products(s, t)
    total = ss.new_zeros(())
    n = s.x.shape[0]
    g, h = ss.new_empty(n), ss.new_empty(n)
    weighted_ss, weighted_st = torch.zeros_like(ss), torch.zeros_like(st)
    for first, last in panels(n, PANEL_ROWS):
        u, v = s.unit(first, last), t.unit(first, last)
        r, q = (((w @ product) * w).sum(dim=1).clamp(min=0).sqrt() for w, product in ((u, ss), (v, tt)))
        (inverse_r, moves), (inverse_q, _) = _inverse_norms(r), _inverse_norms(q)
        aa, bb = (r * inverse_r).square(), (q * inverse_q).square()
        ab = ((u @ st) * v).sum(dim=1) * inverse_r * inverse_q
        total += (aa + bb - 2 * ab).sum()
        if grad is not None:
            g[first:last] = inverse_r.square() * torch.where(moves, 1 - aa + ab, 1.0)
            h[first:last] = inverse_r * inverse_q
            scaled = u.mT * g[first:last]
            weighted_ss.addmm_(scaled, u)
            weighted_st.addmm_(u.mT * h[first:last], v)
    if grad is not None:
        for first, last in panels(n, PANEL_ROWS):
            u, v = s.unit(first, last), t.unit(first, last)
            slope = u @ weighted_ss - v @ weighted_st.mT
            slope += g[first:last, None] * (u @ ss) - h[first:last, None] * (v @ st.mT)
            grad[first:last] = (slope * (2 / n**2)).to(grad.dtype)
    return total.clamp(min=0)


def _by_rows(s: Rows, t: Rows, grad: Tensor | None) -> Tensor:
    """N^2 times the loss from whole rows of similarities, a panel at a time.

    Here D is more than a few percent of N, and matrix products are nearly all of the time: no kernel of its own.
    """
    n = s.x.shape[0]
    total = s.x.new_zeros((), dtype=torch.float64)
    for first, last in panels(n, SEEN_AT_ONCE):
        a, b = (torch.mm(rows.x[first:last], rows.x.mT) for rows in (s, t))
        (inverse_r, moves), (inverse_q, _) = (_inverse_norms(torch.linalg.vector_norm(G, dim=1)) for G in (a, b))
        a *= inverse_r[:, None]
        difference = torch.addcmul(a, b, inverse_q[:, None], value=-1, out=b)
        total += torch.linalg.vector_norm(difference, dim=1).double().square().sum()
        if grad is None:
            continue
        along = torch.where(moves, (difference * a).sum(dim=1), 0.0)
        slope = difference.addcmul_(a, along[:, None], value=-1).mul_((2 / n**2) * inverse_r[:, None])
        if last - first == n:
            torch.mm(slope + slope.mT, s.x, out=grad)
        else:
            grad[first:last].addmm_(slope, s.x)
            grad.addmm_(slope.mT, s.x[first:last])
    return total
