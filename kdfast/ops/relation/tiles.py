"""Drivers of crd and pkt: panels of the symmetric N x N similarities, lower triangle only, one at a time.

    panel = X[i:i+B] @ X[:i+B]^T                     the vendor's matrix product
    panel <- G, its gradient; loss += its share      one kernel a loss: csrc/cpu/relation_panels.cpp, triton_kernels.py
    dL/dX[i:i+B] += G @ X[:i+B];  dL/dX[:i] += G[:, :i]^T @ X[i:i+B]

Both losses are sums over ordered pairs of functions of the symmetric similarities, so with G_ij = dL/ds_ij + dL/ds_ji
the gradient is G X, and half of the similarities are enough. Operations: N^2 D for each side's similarities and 2 N^2 D
for the gradient; plain autograd takes 2 N^2 D for each side's and 4 N^2 D. Memory: the panels, and the gradient.

Products are made in the dtype of the features (float32 for half types) whatever autocast says. TensorFloat-32 is
PyTorch's own switch, off by default.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import reduce

import torch
from torch import Tensor

from kdfast.ops.relation import products
from kdfast.ops.relation.rows import (
    Float64,
    Rows,
    empty_gradient,
    float64_panels,
    into_raw_gradient,
    mean_of_pairs,
    raw_rows,
    total,
    unit_rows,
)

# Bytes of a panel: of a CPU so few that it stays in L3 between its two products; of a GPU so many that kernels take
# longer than their launches, and two of them a fifth of an 8192 x 8192 matrix.
PANEL_BYTES = {"cpu": 2 * 2**20, "cuda": 24 * 2**20}
# Rows of one: fewer make slow matrix products, more leave little of the upper triangle out. On a GPU that is the lesser
# evil, so its panels are as large as that memory, with more rows where rows are short.
FEWEST, MOST = {"cpu": 64, "cuda": 512}, {"cpu": 256, "cuda": 2**31}
GROWING = {"cpu": False, "cuda": True}
# Elements that the rows of a panel begin at a multiple of: a GPU then loads 16 bytes at a time, whatever the batch.
ALIGNED = {"cpu": 1, "cuda": 16}


def similarity_panels(x: Tensor) -> Iterator[tuple[int, int]]:
    """[first, last) of the panels of the similarities of ``x`` (N, D), which have ``last`` columns."""
    n, device = x.shape[0], x.device.type
    elements, first = PANEL_BYTES[device] // x.element_size(), 0
    while first < n:
        # The rows r of r * (first + r) elements, or those that have room everywhere.
        rows = (math.isqrt(first**2 + 4 * elements) - first) // 2 if GROWING[device] else elements // n
        rows = max(rows - rows % ALIGNED[device], FEWEST[device])
        last = min(first + min(rows, MOST[device]), n)
        yield first, last
        first = last


def _aligned(columns: int, like: Tensor) -> int:
    multiple = ALIGNED[like.device.type]
    return -(-columns // multiple) * multiple


class _Buffer:
    """Memory of one panel, used for all of them."""

    def __init__(self, like: Tensor) -> None:
        size = max((last - first) * _aligned(last, like) for first, last in similarity_panels(like))
        self.memory = like.new_empty(size)

    def products(self, x: Tensor, first: int, last: int) -> Tensor:
        """``x[first:last] @ x[:last]^T``, rows next to each other but for what aligns them, which is 0."""
        width = _aligned(last, x)
        out = self.memory[: (last - first) * width].view(last - first, width)
        if width > last:
            out[:, last:] = 0
            out = out[:, :last]
        return torch.mm(x[first:last], x[:last].mT, out=out)


def _add_gradient(grad: Tensor, G: Tensor, x: Tensor, first: int, last: int, begun: bool) -> None:
    """``begun``: whether rows from ``first`` on hold what this is added to."""
    grad[first:last].addmm_(G, x[:last], beta=int(begun))
    if first > 0:
        grad[:first].addmm_(G[:, :first].mT, x[first:last])


def _factors(s: Rows, t: Rows) -> tuple[Tensor, Tensor]:
    ones = s.x.new_ones(s.x.shape[0]) if s.factor is None or t.factor is None else s.factor
    return ones if s.factor is None else s.factor, ones if t.factor is None else t.factor


def crd(
    student: Tensor,
    teacher: Tensor,
    labels: Tensor,
    temperature: float,
    alignment_weight: float,
    normalize: bool,
    needs_grad: bool,
) -> tuple[Tensor, Tensor]:
    """``torch.ops.kdfast.crd``."""
    with torch.autocast(student.device.type, enabled=False):
        s, t = unit_rows(student, teacher, 1e-12) if normalize else (raw_rows(student), raw_rows(teacher))
        grad, result = empty_gradient(student, s.x, needs_grad)
        n = s.x.shape[0]
        if n == 0:
            return s.x.new_zeros(()), result
        shares = []
        # The squared differences are inner products of Gram matrices: the teacher's tiles can be spared.
        by_features = alignment_weight > 0 and products.features_are_cheaper(
            n, s.x, t.x, products=(2, 1, 2), instead=(0, 1)
        )
        aligned = _alignment(s, t, temperature, alignment_weight, grad if needs_grad else None) if by_features else None
        student_panel = _Buffer(s.x)
        teacher_panel = None if by_features or alignment_weight == 0 else _Buffer(t.x)
        factors = _factors(s, t)
        for first, last in similarity_panels(s.x):
            G = student_panel.products(s.x, first, last)
            share = torch.ops.kdfast.crd_panel(
                G,
                None if teacher_panel is None else teacher_panel.products(t.x, first, last),
                *factors,
                labels,
                first,
                temperature,
                alignment_weight,
                2 / (temperature * n**2),
            )
            shares.append(share)
            if needs_grad:
                _add_gradient(grad, G, s.x, first, last, begun=by_features)
        if needs_grad:
            for panel in float64_panels(s):
                into_raw_gradient(grad, s, panel)
        summed = total(shares)
        return mean_of_pairs(summed if aligned is None else summed + aligned, s.x), result


def _alignment(s: Rows, t: Rows, temperature: float, weight: float, grad: Tensor | None) -> Tensor:
    """The sum of ``weight * (s_ij - t_ij)^2``; its gradient is written to ``grad``."""
    students, teachers = Float64(s), Float64(t)
    ss, st, tt = products.feature_products(students, teachers)
    inner_ss, inner_st, inner_tt = (torch.dot(product.view(-1), product.view(-1)) for product in (ss, st, tt))
    if grad is not None:
        slope = 4 * weight / (temperature * s.x.shape[0]) ** 2
        for first, last in float64_panels(s, t):
            difference = teachers(first, last) @ st.mT
            difference.addmm_(students(first, last), ss, beta=-slope, alpha=slope)
            grad[first:last] = difference if s.factor is None else difference.mul_(s.factor[first:last, None])
    return inner_ss.add_(inner_tt).sub_(inner_st, alpha=2).clamp_(min=0).mul_(weight / temperature**2)


def pkt(student: Tensor, teacher: Tensor, eps: float, needs_grad: bool) -> tuple[Tensor, Tensor]:
    """``torch.ops.kdfast.pkt``.

    The sum of a row of k = (1 + cos) / 2 is (N + <u_i, sum_j u_j>) / 2, so the probabilities c = k / sum need no sweep
    of their own. Through that sum the gradient gets, beside G U, two terms of rank one: of ``along``, sum_j w_ij c_ij.
    """
    with torch.autocast(student.device.type, enabled=False):
        s, t = unit_rows(student, teacher, eps, add_eps=True)
        grad, result = empty_gradient(student, s.x, needs_grad)
        n = s.x.shape[0]
        if n == 0:
            return s.x.new_zeros(()), result
        # Zeros behind the last row, so that the teacher's values too begin where a GPU can load 16 bytes.
        row_sums, along = s.x.new_zeros(3, _aligned(n, s.x), dtype=torch.float64).split([2, 1])
        sum_s = _sum_of_rows(s, row_sums[0, :n])
        _sum_of_rows(t, row_sums[1, :n])
        inverse = row_sums.add_(n).reciprocal_().mul_(2)
        rounded = inverse.to(s.x.dtype)
        along = along[0, :n]
        student_panel, teacher_panel = _Buffer(s.x), _Buffer(t.x)
        factors, slope, shares = _factors(s, t), 0.5 / n**2, []
        for first, last in similarity_panels(s.x):
            G = student_panel.products(s.x, first, last)
            share = torch.ops.kdfast.pkt_panel(
                G,
                teacher_panel.products(t.x, first, last),
                *factors,
                rounded[0, :n],
                rounded[1, :n],
                along,
                first,
                eps,
                slope,
            )
            shares.append(share)
            if needs_grad:
                _add_gradient(grad, G, s.x, first, last, begun=False)
        del G, student_panel, teacher_panel  # a GPU's rows in float64 find room there
        if needs_grad:
            share = along.mul_(inverse[0, :n])  # the sum of row i answers for this much of each of its k
            weighted = torch.empty_like(sum_s)
            for first, last in float64_panels(s):
                weighted.addmv_(s.unit(first, last).mT, share[first:last], beta=int(first > 0))
            for first, last in float64_panels(s):
                through_sums = torch.addr(weighted, share[first:last], sum_s, beta=slope, alpha=slope)
                if s.factor is not None:
                    through_sums *= s.factor[first:last, None]
                grad[first:last].sub_(through_sums)
                into_raw_gradient(grad, s, (first, last))
        # The rounded factors leave rows that do not sum to 1, which is not small where student and teacher are close.
        ratio = rounded / inverse  # of what is behind the last row: the same on both sides
        return mean_of_pairs(total(shares).sub_((ratio[1] - ratio[0]).sum()), s.x), result


def _sum_of_rows(rows: Rows, out: Tensor) -> Tensor:
    """``sum_j u_j``, and ``<u_i, sum_j u_j>`` to ``out``, in float64."""
    units = Float64(rows)
    summed = reduce(torch.add, (units(first, last).sum(dim=0) for first, last in float64_panels(rows)))
    for first, last in float64_panels(rows):
        torch.mv(units(first, last), summed, out=out[first:last])
    return summed
