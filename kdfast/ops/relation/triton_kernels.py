"""Triton kernels of ``torch.ops.kdfast.crd_panel`` and ``pkt_panel`` and their launchers.

Imported when the first tensor on a GPU shows up: the package itself needs no Triton. Formulas and the shape of a panel:
csrc/cpu/relation_panels.h. What calls them between matrix products: tiles.py.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kdfast.ops.relation import tiles
from kdfast.ops.sizes import cdiv

# Rows and columns of a program's tile: 8 elements a thread. Unmeasured.
ROWS, COLUMNS, WARPS = 8, 128, 4
OPTIONS: dict[str, Any] = {"num_warps": WARPS}
ALIGNED = tl.constexpr(tiles.ALIGNED["cuda"])
SIZES = ["rows", "columns", "stride", "first"]  # another batch size is not another kernel


# One program takes a tile. Reads one or two panels once and writes one: 8 or 12 bytes an element, and the products on
# either side of it 6 or 8 D operations. Two special-function operations and two divisions an element.
@triton.jit(do_not_specialize=SIZES)
def _crd_kernel(
    student_ptr, teacher_ptr,  # (rows, columns), rows apart by 16 * stride; teacher None: no squared differences
    student_factor_ptr, teacher_factor_ptr, labels_ptr,  # (columns)
    loss_ptr,  # float32, one a program
    rows, columns, stride, first,
    inverse_temperature, weight, scale,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):  # fmt: skip
    row, column, inside, held, here, mirrored = _tile(rows, columns, stride, first, ROWS, COLUMNS)
    i, j = first + row, column
    f_i = tl.load(student_factor_ptr + i, mask=row < rows, other=0.0)[:, None]
    f_j = tl.load(student_factor_ptr + j, mask=column < columns, other=0.0)[None, :]
    same = (
        tl.load(labels_ptr + i, mask=row < rows, other=0)[:, None]
        == tl.load(labels_ptr + j, mask=column < columns, other=0)[None, :]
    )
    s = tl.load(student_ptr + here, mask=held, other=0.0) * (f_j * (f_i * inverse_temperature))
    sign = tl.where(same, -1.0, 1.0)
    a = sign * s
    e = tl.exp(-tl.abs(a))
    u = 1.0 + e
    # log(1 + e) to all its digits: log(u) / (u - 1) does not mind that u is rounded.
    log1p = tl.where(u == 1.0, e, tl.log(u) * (e / tl.where(u == 1.0, 1.0, u - 1.0)))
    loss = tl.where(a > 0, a, 0.0) + log1p
    slope = sign * (tl.where(a > 0, 1.0, e) / u)
    if teacher_ptr is not None:
        t_i = tl.load(teacher_factor_ptr + i, mask=row < rows, other=0.0)[:, None]
        t_j = tl.load(teacher_factor_ptr + j, mask=column < columns, other=0.0)[None, :]
        d = s - tl.load(teacher_ptr + here, mask=held, other=0.0) * (t_j * (t_i * inverse_temperature))
        loss += weight * (d * d)
        slope += 2.0 * weight * d
    # A NaN fails every comparison: with `a` it would be lost above, but e and log1p carry it.
    loss = tl.where(inside, tl.where(mirrored, 2.0 * loss, loss), 0.0)
    tl.store(loss_ptr + tl.program_id(0) * tl.num_programs(1) + tl.program_id(1), tl.sum(tl.sum(loss, axis=1), axis=0))
    tl.store(student_ptr + here, slope * (f_j * (f_i * scale)), mask=held)


# The same for pkt: 12 bytes, two special-function operations and four divisions an element. Sums along rows and columns
# go to scratch of their own, one value a tile's row or column, so that their order is fixed.
@triton.jit(do_not_specialize=SIZES)
def _pkt_kernel(
    student_ptr, teacher_ptr,  # (rows, columns), rows apart by 16 * stride
    student_factor_ptr, teacher_factor_ptr, student_inverse_sum_ptr, teacher_inverse_sum_ptr,  # (columns)
    loss_ptr,  # float32, one a program
    row_sums_ptr,  # float32 (programs over columns, rows)
    column_sums_ptr,  # float32 (programs over rows, columns); not used right of `first`
    rows, columns, stride, first,
    eps, scale,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):  # fmt: skip
    row, column, inside, held, here, mirrored = _tile(rows, columns, stride, first, ROWS, COLUMNS)
    i, j = first + row, column
    in_rows, in_columns = row < rows, column < columns
    f_i = tl.load(student_factor_ptr + i, mask=in_rows, other=0.0)[:, None]
    f_j = tl.load(student_factor_ptr + j, mask=in_columns, other=0.0)[None, :]
    t_i = tl.load(teacher_factor_ptr + i, mask=in_rows, other=0.0)[:, None]
    t_j = tl.load(teacher_factor_ptr + j, mask=in_columns, other=0.0)[None, :]
    k_s = _kernel(tl.load(student_ptr + here, mask=held, other=0.0) * (f_j * (f_i * 0.5)))
    k_t = _kernel(tl.load(teacher_ptr + here, mask=held, other=0.0) * (t_j * (t_i * 0.5)))
    own_s = tl.load(student_inverse_sum_ptr + i, mask=in_rows, other=0.0)[:, None]
    own_t = tl.load(teacher_inverse_sum_ptr + i, mask=in_rows, other=0.0)[:, None]
    loss, w, along = _direction(k_s * own_s, k_t * own_t, eps)
    tl.store(
        row_sums_ptr + tl.program_id(1).to(tl.int64) * rows + row,
        tl.sum(tl.where(inside, along, 0.0), axis=1),
        mask=in_rows,
    )
    other_s = tl.load(student_inverse_sum_ptr + j, mask=in_columns, other=0.0)[None, :]
    other_t = tl.load(teacher_inverse_sum_ptr + j, mask=in_columns, other=0.0)[None, :]
    mirror_loss, mirror_w, mirror_along = _direction(k_s * other_s, k_t * other_t, eps)
    loss = tl.where(inside, loss, 0.0) + tl.where(inside & mirrored, mirror_loss, 0.0)
    tl.store(
        column_sums_ptr + tl.program_id(0).to(tl.int64) * columns + column,
        tl.sum(tl.where(inside, mirror_along, 0.0), axis=0),
        mask=in_columns,
    )
    tl.store(loss_ptr + tl.program_id(0) * tl.num_programs(1) + tl.program_id(1), tl.sum(tl.sum(loss, axis=1), axis=0))
    tl.store(student_ptr + here, (w * own_s + mirror_w * other_s) * (f_j * (f_i * scale)), mask=held)


@triton.jit
def _tile(rows, columns, stride, first, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Rows and columns of this program's tile, what of it exists, what of it there is memory for, where that lies, and
    what stands for two pairs.
    """
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    width = stride.to(tl.int64) * ALIGNED
    held = (row < rows)[:, None] & (column < width)[None, :]
    here = row[:, None] * width + column[None, :]
    return row, column, inside, held, here, (column < first)[None, :]


@triton.jit
def _kernel(half_cosine):
    """(1 + cos) / 2, which rounding can leave just below 0."""
    k = half_cosine + 0.5
    return tl.where(k < 0, 0.0, k)


@triton.jit
def _direction(c_s, c_t, eps):
    """One direction of a pair: its share of the loss, 1 + d/dc_s, and that times c_s."""
    w = (c_s - c_t + eps) / (c_s + eps)
    return c_t * tl.log((c_t + eps) / (c_s + eps)), w, w * c_s


def _grid(panel: Tensor) -> tuple[int, int]:
    return cdiv(panel.shape[0], ROWS), cdiv(panel.shape[1], COLUMNS)


def _sizes(panel: Tensor, first: int) -> tuple[int, int, int, int]:
    """What SIZES names."""
    rows, columns = panel.shape
    stride, rest = divmod(panel.stride(0), ALIGNED.value)
    assert rest == 0, "rows of a panel begin at multiples of 16"
    return rows, columns, stride, first


def crd_panel(
    student: Tensor,
    teacher: Tensor | None,
    student_factor: Tensor,
    teacher_factor: Tensor,
    labels: Tensor,
    first: int,
    temperature: float,
    weight: float,
    scale: float,
) -> Tensor:
    """``torch.ops.kdfast.crd_panel``: overwrites ``student``, returns its share of the loss as terms to be summed."""
    grid = _grid(student)
    losses = torch.empty(grid, dtype=torch.float32, device=student.device)
    with torch.cuda.device_of(student):
        _crd_kernel[grid](
            student, teacher, student_factor, teacher_factor, labels, losses, *_sizes(student, first),
            1 / temperature, weight, scale, ROWS=ROWS, COLUMNS=COLUMNS, **OPTIONS,
        )  # fmt: skip
    return losses


def pkt_panel(
    student: Tensor,
    teacher: Tensor,
    student_factor: Tensor,
    teacher_factor: Tensor,
    student_inverse_sum: Tensor,
    teacher_inverse_sum: Tensor,
    along: Tensor,
    first: int,
    eps: float,
    scale: float,
) -> Tensor:
    """``torch.ops.kdfast.pkt_panel``: overwrites ``student``, adds to ``along``, returns the terms of its share."""
    grid, (rows, columns) = _grid(student), student.shape
    losses = torch.empty(grid, dtype=torch.float32, device=student.device)
    row_sums = torch.empty((grid[1], rows), dtype=torch.float32, device=student.device)
    column_sums = torch.empty((grid[0], columns), dtype=torch.float32, device=student.device)
    with torch.cuda.device_of(student):
        _pkt_kernel[grid](
            student, teacher, student_factor, teacher_factor, student_inverse_sum, teacher_inverse_sum,
            losses, row_sums, column_sums, *_sizes(student, first), eps, scale,
            ROWS=ROWS, COLUMNS=COLUMNS, **OPTIONS,
        )  # fmt: skip
    sums = torch.empty(columns, dtype=torch.float64, device=student.device)
    torch.sum(row_sums, dim=0, dtype=torch.float64, out=sums[first:])
    if first > 0:
        torch.sum(column_sums[:, :first], dim=0, dtype=torch.float64, out=sums[:first])
    along[:columns].add_(sums)
    return losses
