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

import torch
from torch import Tensor

from kdfast.ops.relation import products
from kdfast.ops.relation.rows import Rows, into_raw_gradient, panels, raw_rows, unit_rows

# Bytes of a panel, so that it stays in cache between its two products: L3 of a CPU, L2 of a GPU (unmeasured).
PANEL_BYTES = {"cpu": 2 * 2**20, "cuda": 16 * 2**20}
# Rows of one: fewer make slow matrix products, more leave little of the upper triangle out.
FEWEST, MOST = 64, {"cpu": 256, "cuda": 1024}
SUMMED_ROWS = 128
# Elements that the rows of a panel begin at a multiple of: a GPU then loads 16 bytes at a time, whatever the batch.
ALIGNED = {"cpu": 1, "cuda": 16}


def panel_rows(x: Tensor) -> int:
    """Rows of a panel of the similarities of ``x`` (N, D)."""
    n, device = x.shape[0], x.device.type
    fitting = PANEL_BYTES[device] // max(n * x.element_size(), 1)
    fitting -= fitting % ALIGNED[device]
    return min(max(fitting, FEWEST), MOST[device], max(n, 1))


class _Buffer:
    """Memory of one panel, used for all of them."""

    def __init__(self, like: Tensor, rows: int) -> None:
        self.aligned = ALIGNED[like.device.type]
        self.memory = like.new_empty(rows * self._width(like.shape[0]))

    def _width(self, columns: int) -> int:
        return -(-columns // self.aligned) * self.aligned

    def products(self, x: Tensor, first: int, last: int) -> Tensor:
        """``x[first:last] @ x[:last]^T``, rows next to each other but for what aligns them, which is 0."""
        width = self._width(last)
        out = self.memory[: (last - first) * width].view(last - first, width)
        if width > last:
            out[:, last:] = 0
            out = out[:, :last]
        return torch.mm(x[first:last], x[:last].mT, out=out)


def _add_gradient(grad: Tensor, G: Tensor, x: Tensor, first: int, last: int) -> None:
    grad[first:last].addmm_(G, x[:last])
    if first > 0:
        grad[:first].addmm_(G[:, :first].mT, x[first:last])


def _empty_gradient(student: Tensor, x: Tensor, needs_grad: bool) -> tuple[Tensor, Tensor]:
    """Zeros (N, D), and what the op returns: the same in the student's shape, or nothing."""
    if not needs_grad:
        return x.new_empty(0), x.new_empty(0)
    grad = x.new_zeros(x.shape)
    return grad, grad.view(student.shape)


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
        s, t = (unit_rows(x, 1e-12) if normalize else raw_rows(x) for x in (student, teacher))
        n, pairs = s.x.shape[0], max(s.x.shape[0] ** 2, 1)
        grad, result = _empty_gradient(student, s.x, needs_grad)
        total = s.x.new_zeros((), dtype=torch.float64)
        # The squared differences are inner products of Gram matrices: the teacher's tiles can be spared.
        by_features = alignment_weight > 0 and products.features_are_cheaper(
            n, s.x, t.x, products=(2, 1, 2), instead=(0, 1)
        )
        if by_features:
            total += _alignment(s, t, temperature, alignment_weight, grad if needs_grad else None)
        rows = panel_rows(s.x)
        student_panel = _Buffer(s.x, rows)
        teacher_panel = None if by_features or alignment_weight == 0 else _Buffer(t.x, rows)
        for first, last in panels(n, rows):
            G = student_panel.products(s.x, first, last)
            total += torch.ops.kdfast.crd_panel(
                G,
                None if teacher_panel is None else teacher_panel.products(t.x, first, last),
                s.factor,
                t.factor,
                labels,
                first,
                temperature,
                alignment_weight,
                2 / (temperature * pairs),
            )
            if needs_grad:
                _add_gradient(grad, G, s.x, first, last)
        if needs_grad:
            for panel in panels(n, rows):
                into_raw_gradient(grad, s, panel)
        return (total / pairs).to(s.x.dtype), result


def _alignment(s: Rows, t: Rows, temperature: float, weight: float, grad: Tensor | None) -> Tensor:
    """The sum of ``weight * (s_ij - t_ij)^2``; its gradient is added to ``grad``."""
    ss, st, tt = products.feature_products(s, t)
    squares = ss.square().sum() - 2 * st.square().sum() + tt.square().sum()
    if grad is not None:
        n = s.x.shape[0]
        slope = 4 * weight / (temperature * n) ** 2
        for first, last in panels(n, products.PANEL_ROWS):
            difference = s.unit(first, last) @ ss - t.unit(first, last) @ st.mT
            difference *= slope * s.factor[first:last, None]
            grad[first:last] += difference.to(grad.dtype)
    return squares.clamp(min=0) * (weight / temperature**2)


def pkt(student: Tensor, teacher: Tensor, eps: float, needs_grad: bool) -> tuple[Tensor, Tensor]:
    """``torch.ops.kdfast.pkt``.

    The sum of a row of k = (1 + cos) / 2 is (N + <u_i, sum_j u_j>) / 2, so the probabilities c = k / sum need no sweep
    of their own. Through that sum the gradient gets, beside G U, two terms of rank one: of ``along``, sum_j w_ij c_ij.
    """
    with torch.autocast(student.device.type, enabled=False):
        s, t = (unit_rows(x, eps, add_eps=True) for x in (student, teacher))
        n, pairs = s.x.shape[0], max(s.x.shape[0] ** 2, 1)
        grad, result = _empty_gradient(student, s.x, needs_grad)
        total, along = s.x.new_zeros((), dtype=torch.float64), s.x.new_zeros(n, dtype=torch.float64)
        (sum_s, inverse_s), (_, inverse_t) = _inverse_row_sums(s), _inverse_row_sums(t)
        rows = panel_rows(s.x)
        student_panel, teacher_panel = _Buffer(s.x, rows), _Buffer(t.x, rows)
        for first, last in panels(n, rows):
            G = student_panel.products(s.x, first, last)
            total += torch.ops.kdfast.pkt_panel(
                G,
                teacher_panel.products(t.x, first, last),
                s.factor,
                t.factor,
                inverse_s.to(s.x.dtype),
                inverse_t.to(s.x.dtype),
                along,
                first,
                eps,
                0.5 / pairs,
            )
            if needs_grad:
                _add_gradient(grad, G, s.x, first, last)
        if needs_grad:
            share = along * inverse_s  # the sum of row i answers for this much of each of its k
            weighted = _sum_of_rows(s, share.to(s.x.dtype))
            for first, last in panels(n, rows):
                through_sums = torch.outer(share[first:last], sum_s) + weighted
                through_sums *= 0.5 / pairs * s.factor[first:last, None]
                grad[first:last] -= through_sums.to(grad.dtype)
                into_raw_gradient(grad, s, (first, last))
        return (total / pairs).to(s.x.dtype), result


def _inverse_row_sums(rows: Rows) -> tuple[Tensor, Tensor]:
    """``sum_j u_j`` and ``1 / sum_j k_ij``, in float64."""
    n = rows.x.shape[0]
    total, sums = _sum_of_rows(rows), rows.x.new_empty(n, dtype=torch.float64)
    for first, last in panels(n, products.PANEL_ROWS):
        torch.mv(rows.unit(first, last), total, out=sums[first:last])
    return total, 2 / (n + sums)


def _sum_of_rows(rows: Rows, weight: Tensor | None = None) -> Tensor:
    """``sum_j weight_j u_j``: panels in their dtype, few enough rows for its digits, and their sums in float64."""
    total = rows.x.new_zeros(rows.x.shape[1], dtype=torch.float64)
    weight = rows.factor if weight is None else rows.factor * weight
    for first, last in panels(rows.x.shape[0], SUMMED_ROWS):
        total += torch.mv(rows.x[first:last].mT, weight[first:last])
    return total
