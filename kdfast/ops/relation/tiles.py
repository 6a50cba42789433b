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

import torch
from torch import Tensor

from kdfast.ops.relation import products
from kdfast.ops.relation.rows import Float64, Rows, constant, empty_gradient, mean_of_pairs, raw_rows, total
from kdfast.ops.relation.steps import steps_for
from kdfast.reference.geometry import no_autocast

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


def padded(columns: int, like: Tensor) -> int:
    multiple = ALIGNED[like.device.type]
    return -(-columns // multiple) * multiple


class _Buffer:
    """Memory of one panel, used for all of them."""

    def __init__(self, like: Tensor) -> None:
        size = max((last - first) * padded(last, like) for first, last in similarity_panels(like))
        self.memory = like.new_empty(size)

    def products(self, x: Tensor, first: int, last: int) -> Tensor:
        """``x[first:last] @ x[:last]^T``, rows next to each other but for what aligns them, which is 0."""
        width = padded(last, x)
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
    n = student.shape[0]
    if n == 0:
        return constant(0, student, needs_grad)
    with no_autocast(student):
        steps = steps_for(student)
        s, t = steps.unit_rows(student, teacher, 1e-12) if normalize else (raw_rows(student), raw_rows(teacher))
        grad, result = empty_gradient(student, s.x, needs_grad)
        shares = []
        # The squared differences are inner products of Gram matrices: the teacher's tiles can be spared.
        by_features = alignment_weight > 0 and products.features_are_cheaper(
            n, s.x, t.x, products=(2, 1, 2), instead=(0, 1)
        )
        aligned = _alignment(s, t, temperature, alignment_weight, grad if needs_grad else None) if by_features else None
        student_panel = _Buffer(s.x)
        teacher_panel = None if by_features or alignment_weight == 0 else _Buffer(t.x)
        for first, last in similarity_panels(s.x):
            G = student_panel.products(s.x, first, last)
            T = None if teacher_panel is None else teacher_panel.products(t.x, first, last)
            scale = 2 / (temperature * n**2)
            shares.append(steps.crd_panel(G, T, s, t, labels, first, temperature, alignment_weight, scale))
            if needs_grad:
                _add_gradient(grad, G, s.x, first, last, begun=by_features)
        if needs_grad:
            steps.into_raw_gradient(grad, s)
        summed = total(shares)
        return mean_of_pairs(summed if aligned is None else summed + aligned, s.x), result


def _alignment(s: Rows, t: Rows, temperature: float, weight: float, grad: Tensor | None) -> Tensor:
    """The sum of ``weight * (s_ij - t_ij)^2``; its gradient is written to ``grad``."""
    students, teachers = Float64(s), Float64(t)
    ss, st, tt = products.feature_products(students, teachers)
    inner_st, inner_ss, inner_tt = products.inner_products(ss, st, tt)
    if grad is not None:
        slope = 4 * weight / (temperature * s.x.shape[0]) ** 2
        products.gradient_by_features(grad, students, teachers, ss.mul_(slope), st.mul_(-slope))
    return inner_ss.add(inner_tt).sub_(inner_st, alpha=2).clamp_(min=0).mul_(weight / temperature**2)


def pkt(student: Tensor, teacher: Tensor, eps: float, needs_grad: bool) -> tuple[Tensor, Tensor]:
    """``torch.ops.kdfast.pkt``.

    The sum of a row of k = (1 + cos) / 2 is (N + <u_i, sum_j u_j>) / 2, so the probabilities c = k / sum need no sweep
    of their own. Through that sum the gradient gets, beside G U, two terms of rank one: of ``along``, sum_j w_ij c_ij.
    """
    n = student.shape[0]
    if n == 0:
        return constant(0, student, needs_grad)
    with no_autocast(student):
        steps = steps_for(student)
        s, t, sums = steps.pkt_rows(student, teacher, eps)
        grad, result = empty_gradient(student, s.x, needs_grad)
        student_panel, teacher_panel, slope, shares = _Buffer(s.x), _Buffer(t.x), 0.5 / n**2, []
        for first, last in similarity_panels(s.x):
            G = student_panel.products(s.x, first, last)
            T = teacher_panel.products(t.x, first, last)
            shares.append(steps.pkt_panel(G, T, s, t, sums, first, eps, slope))
            if needs_grad:
                _add_gradient(grad, G, s.x, first, last, begun=False)
        if needs_grad:
            steps.into_raw_gradient(grad, s, sums, slope)
        # The rounded factors leave rows that do not sum to 1, which is not small where student and teacher are close.
        return mean_of_pairs(total([*shares, sums.excess]), s.x), result
