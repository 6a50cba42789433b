"""The steps between matrix products on a CPU, in PyTorch and in csrc/cpu/relation.cpp. On a GPU: triton_kernels.py."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import threshold

from kdfast.ops.relation.rows import Rows, RowSums, given

# Unit rows of up to this size are stored. Larger ones are not: the kernels scale products of the given rows instead,
STORED_BYTES = 2**20
# provided that all norms are within these: products of two are then normal float32 numbers, with as much room again for
# the elements of a row.
MODERATE = (1e-12, 1e12)


def unit_rows(student: Tensor, teacher: Tensor, eps: float) -> tuple[Rows, Rows]:
    """Rows over their norm, at least ``eps``."""
    return _unit_rows(student, eps, add_eps=False), _unit_rows(teacher, eps, add_eps=False)


def _unit_rows(x: Tensor, eps: float, *, add_eps: bool) -> Rows:
    """As :func:`kdfast.reference.geometry.unit_rows` defines it: zero rows stay 0, here by a divisor of infinity."""
    x = given(x)
    norms = torch.linalg.vector_norm(x, dim=1)
    later = _scaled_later(x, norms)
    divisor = threshold(norms, 0, math.inf)
    if add_eps:
        radial = divisor
        divisor = divisor + eps
    else:
        divisor.clamp_(min=eps)
        radial = norms.masked_fill_(norms < eps, math.inf)  # a clamped norm is a constant
    if later:
        return Rows(x, 1 / divisor, None, divisor * radial)
    return Rows(x / divisor[:, None], None, divisor, radial)


def _scaled_later(x: Tensor, norms: Tensor) -> bool:
    """Whether unit rows are not stored. Only a CPU can look at norms without waiting for the device."""
    if x.numel() * x.element_size() <= STORED_BYTES:
        return False
    smallest, largest = torch.where(norms == 0, 1.0, norms).aminmax()
    return MODERATE[0] < float(smallest) and float(largest) < MODERATE[1]


def pkt_rows(student: Tensor, teacher: Tensor, eps: float) -> tuple[Rows, Rows, RowSums]:
    """Rows over their norm plus ``eps``, and what the sums of their similarities lead to."""
    s, t = (_unit_rows(x, eps, add_eps=True) for x in (student, teacher))
    n = s.x.shape[0]
    # The sum of row i of (1 + cos) / 2 is (N + <u_i, sum_j u_j>) / 2.
    summed = _sum_of_rows(s)
    row_sums = torch.stack((_products(s, summed), _products(t, _sum_of_rows(t))))
    inverse = row_sums.add_(n).reciprocal_().mul_(2)
    rounded = inverse.to(s.x.dtype)
    ratio = rounded / inverse
    return s, t, RowSums(summed, inverse[0], rounded, ratio[0] - ratio[1], torch.zeros_like(inverse[0]))


def _sum_of_rows(rows: Rows, weight: Tensor | None = None) -> Tensor:
    """``sum_j u_j``, weighted, in float64."""
    factor = None if rows.factor is None else rows.factor.double()
    if weight is None:
        weight = rows.x.new_ones(rows.x.shape[0], dtype=torch.float64) if factor is None else factor
    elif factor is not None:
        weight = weight * factor
    summed: Tensor = torch.ops.kdfast.sum_of_rows(rows.x, weight)
    return summed


def _products(rows: Rows, vector: Tensor) -> Tensor:
    """``<u_i, vector>``, in float64."""
    products: Tensor = torch.ops.kdfast.products_of_rows(rows.x, vector)
    return products if rows.factor is None else products.mul_(rows.factor)


def crd_panel(
    G: Tensor,
    teacher: Tensor | None,
    s: Rows,
    t: Rows,
    labels: Tensor,
    first: int,
    temperature: float,
    weight: float,
    scale: float,
) -> Tensor:
    """Turns a panel of products into the gradient's, returns its share of the loss as float64 terms to be summed."""
    options = (labels, first, temperature, weight, scale)
    share: Tensor = torch.ops.kdfast.crd_panel(G, teacher, _factor(s), _factor(t), *options)
    return share


def pkt_panel(
    G: Tensor, teacher: Tensor, s: Rows, t: Rows, sums: RowSums, first: int, eps: float, scale: float
) -> Tensor:
    """The same for pkt; also adds to ``sums.along``."""
    share: Tensor = torch.ops.kdfast.pkt_panel(
        G, teacher, _factor(s), _factor(t), *sums.rounded, sums.along, first, eps, scale
    )
    return share


def _factor(rows: Rows) -> Tensor:
    return rows.x.new_ones(rows.x.shape[0]) if rows.factor is None else rows.factor


def into_raw_gradient(grad: Tensor, rows: Rows, sums: RowSums | None = None, slope: float = 0.0) -> None:
    """Turns ``factor_i dL/du_i``, u = x * factor, into the gradient of the given rows, in place.

    With ``sums`` what reaches u through the sums of rows, ``slope`` times two terms of rank one, is taken off first.
    """
    if rows.radial is None:
        return
    share = summed = weighted = None
    if sums is not None:
        share = sums.along * sums.inverse  # the sum of row i answers for this much of each of its k
        summed, weighted = sums.summed, _sum_of_rows(rows, share)
    torch.ops.kdfast.back_through_norms_(
        grad, rows.x, rows.factor, rows.divisor, rows.radial, share, summed, weighted, slope
    )


def similarity_rows(a: Tensor, b: Tensor, needs_grad: bool) -> Tensor:
    """Of rows of similarities ``a`` and ``b``, over their norms: the squared distances, as terms to be summed.

    Half the gradient with respect to ``a`` is written to ``b``; ``a`` may be lost.
    """
    distances: Tensor = torch.ops.kdfast.similarity_rows(a, b, needs_grad)
    return distances


def symmetrized(G: Tensor) -> Tensor:
    """``G + G^T``, in place of ``G``."""
    torch.ops.kdfast.symmetrize_(G)
    return G


def largest_magnitude(x: Tensor, out: Tensor) -> None:
    """The largest magnitude in ``x``, which is not empty, to the scalar ``out``."""
    out.copy_(x.abs().amax())  # PyTorch's norm for that is not vectorised


def alignment_terms(K: Tensor, L: Tensor) -> Tensor:
    """``<K, L>``, ``|K|^2`` and ``|L|^2``, float64 (terms to be summed, 3)."""
    product, *norms = (K * L).sum(), torch.linalg.norm(K), torch.linalg.norm(L)
    return torch.stack((product.double(), *(norm.double().square() for norm in norms)))[None]


def alignment_slopes(terms: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """The loss in ``dtype``, and l and k in float64: ``(l L + k K) x`` is its gradient with respect to x, K = x x^T."""
    product, kk, ll = terms.sum(dim=0).unbind()
    norms = kk.sqrt() * ll.sqrt()
    inverse = torch.where(norms == 0, 0.0, 1 / norms)
    cosine = product * inverse
    return (1 - cosine).to(dtype), -2 * inverse, torch.where(norms == 0, 0.0, 2 * cosine / kk)
