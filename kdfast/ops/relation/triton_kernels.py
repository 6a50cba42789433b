"""The steps between matrix products on a GPU: Triton kernels and their launchers. On a CPU: cpu_steps.py.

Imported when the first tensor on a GPU shows up: the package itself needs no Triton. Formulas and the shape of a panel:
csrc/cpu/relation_panels.h. Rows are always stored, so that no kernel reads a factor.

Up to a few thousand rows the host's launches are the time, so one kernel takes all that a row or a tile leads to, casts
of half types included. A sum over programs is made by PyTorch or by the next kernel, in one order: no atomics.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kdfast.ops.relation import tiles
from kdfast.ops.relation.rows import EPS, Rows, RowSums
from kdfast.ops.sizes import cdiv

# Rows and columns of a program's tile: 8 elements a thread. Unmeasured.
ROWS, COLUMNS, WARPS = 8, 128, 4
OPTIONS: dict[str, Any] = {"num_warps": WARPS}
# Elements that a program takes at a time of matrices it reads as they lie, and how often the sums of alignment do.
BLOCK, TURNS = 1024, 8
ALIGNED = tl.constexpr(tiles.ALIGNED["cuda"])
SMALLEST_NORM = tl.constexpr(EPS)
# Another batch size is not another kernel.
SIZES = ["rows", "columns", "stride", "first"]
ROW_SIZES = ["n", "width", "student_width", "teacher_width", "stride"]


# One program takes a tile. Reads one or two panels once and writes one: 8 or 12 bytes an element, and the products on
# either side of it 6 or 8 D operations. Two special-function operations and two divisions an element.
@triton.jit(do_not_specialize=SIZES)
def _crd_kernel(
    student_ptr, teacher_ptr,  # (rows, columns), rows apart by 16 * stride; teacher None: no squared differences
    labels_ptr,  # (columns)
    loss_ptr,  # float64, one a program
    rows, columns, stride, first,
    inverse_temperature, weight, scale,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):  # fmt: skip
    row, column, inside, held, here, mirrored = _tile(rows, columns, stride, first, ROWS, COLUMNS)
    i, j = first + row, column
    same = (
        tl.load(labels_ptr + i, mask=row < rows, other=0)[:, None]
        == tl.load(labels_ptr + j, mask=column < columns, other=0)[None, :]
    )
    s = tl.load(student_ptr + here, mask=held, other=0.0) * inverse_temperature
    sign = tl.where(same, -1.0, 1.0)
    a = sign * s
    e = tl.exp(-tl.abs(a))
    u = 1.0 + e
    # log(1 + e) to all its digits: log(u) / (u - 1) does not mind that u is rounded.
    log1p = tl.where(u == 1.0, e, tl.log(u) * (e / tl.where(u == 1.0, 1.0, u - 1.0)))
    loss = tl.where(a > 0, a, 0.0) + log1p
    slope = sign * (tl.where(a > 0, 1.0, e) / u)
    if teacher_ptr is not None:
        d = s - tl.load(teacher_ptr + here, mask=held, other=0.0) * inverse_temperature
        loss += weight * (d * d)
        slope += 2.0 * weight * d
    # A NaN fails every comparison: with `a` it would be lost above, but e and log1p carry it.
    loss = tl.where(inside, tl.where(mirrored, 2.0 * loss, loss), 0.0)
    _store_sum(loss_ptr, loss)
    tl.store(student_ptr + here, slope * scale, mask=held)


# The same for pkt: 12 bytes, two special-function operations and four divisions an element. Sums along rows and columns
# go to scratch of their own, one value a tile's row or column, so that their order is fixed.
@triton.jit(do_not_specialize=SIZES)
def _pkt_kernel(
    student_ptr, teacher_ptr,  # (rows, columns), rows apart by 16 * stride
    student_inverse_sum_ptr, teacher_inverse_sum_ptr,  # (columns)
    loss_ptr,  # float64, one a program
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
    k_s = _kernel(tl.load(student_ptr + here, mask=held, other=0.0) * 0.5)
    k_t = _kernel(tl.load(teacher_ptr + here, mask=held, other=0.0) * 0.5)
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
    _store_sum(loss_ptr, loss)
    tl.store(student_ptr + here, (w * own_s + mirror_w * other_s) * scale, mask=held)


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
def _store_sum(loss_ptr, loss):
    """A tile's share of the loss to the place of this program."""
    at = tl.program_id(0).to(tl.int64) * tl.num_programs(1) + tl.program_id(1)
    tl.store(loss_ptr + at, tl.sum(tl.sum(loss, axis=1), axis=0).to(tl.float64))


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


# One program takes a tile's width of columns. Adds to `along` the sums of _pkt_kernel's scratch, read once.
@triton.jit(do_not_specialize=SIZES)
def _along_kernel(
    along_ptr,  # float64 (columns)
    row_sums_ptr, column_sums_ptr,  # as _pkt_kernel writes them
    rows, columns, first,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):  # fmt: skip
    column = tl.program_id(0).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.load(along_ptr + column, mask=column < columns, other=0.0)
    mirrored, own = column < first, (column >= first) & (column < columns)
    for begin in range(0, tl.where(tl.program_id(0) * COLUMNS < first, tl.cdiv(rows, ROWS), 0), ROWS):
        tile = begin + tl.arange(0, ROWS)[:, None].to(tl.int64)
        held = (tile < tl.cdiv(rows, ROWS)) & mirrored[None, :]
        share = tl.load(column_sums_ptr + tile * columns + column[None, :], mask=held, other=0.0)
        total += tl.sum(share.to(tl.float64), axis=0)
    for begin in range(0, tl.cdiv(columns, COLUMNS), ROWS):
        tile = begin + tl.arange(0, ROWS)[:, None].to(tl.int64)
        held = (tile < tl.cdiv(columns, COLUMNS)) & own[None, :]
        share = tl.load(row_sums_ptr + tile * rows + (column - first)[None, :], mask=held, other=0.0)
        total += tl.sum(share.to(tl.float64), axis=0)
    tl.store(along_ptr + column, total, mask=column < columns)


# One program takes some rows of one side. Reads them twice, the second time from a cache, and writes them once. Norms
# are float64, in which no square of a float32 over- or underflows.
@triton.jit(do_not_specialize=ROW_SIZES)
def _unit_rows_kernel(
    student_ptr, teacher_ptr,  # (n, width), any type up to float32
    student_unit_ptr, teacher_unit_ptr,  # the same, float32
    divisor_ptr, radial_ptr,  # float64 (n), the student's
    sums_ptr,  # float64 (programs over rows, student_width + teacher_width): sums of a program's unit rows; or None
    n, student_width, teacher_width,
    eps,
    ADD_EPS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    if sums_ptr is not None:
        sums_ptr += tl.program_id(0).to(tl.int64) * (student_width + teacher_width)
    if tl.program_id(1) == 0:
        divisor, radial = _normalize(
            student_ptr, student_unit_ptr, sums_ptr, row, n, student_width, eps, ADD_EPS, ROWS, COLUMNS
        )
        tl.store(divisor_ptr + row, divisor, mask=row < n)
        tl.store(radial_ptr + row, radial, mask=row < n)
    else:
        if sums_ptr is not None:
            sums_ptr += student_width
        _normalize(teacher_ptr, teacher_unit_ptr, sums_ptr, row, n, teacher_width, eps, ADD_EPS, ROWS, COLUMNS)


@triton.jit
def _normalize(
    x_ptr, unit_ptr, sums_ptr, row, n, width, eps, ADD_EPS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    """Writes unit rows, and their sum where there is room for it; returns what Rows calls divisor and radial."""
    squares = tl.zeros([ROWS], tl.float64)
    for begin in range(0, width, COLUMNS):
        x = _load_rows(x_ptr, row, begin, n, width, COLUMNS)
        squares += tl.sum(x * x, axis=1)
    norm = tl.sqrt(squares)
    # A NaN fails every comparison and is kept.
    if ADD_EPS:
        divisor, constant = norm + eps, norm == 0
    else:
        divisor, constant = tl.where(norm < eps, eps, norm), norm < eps  # a clamped norm is a constant
    divisor = tl.where(norm == 0, float("inf"), divisor)
    inverse = 1.0 / divisor
    for begin in range(0, width, COLUMNS):
        column = begin + tl.arange(0, COLUMNS)
        here, held = _places(row, begin, n, width, COLUMNS)
        unit = (_load_rows(x_ptr, row, begin, n, width, COLUMNS) * inverse[:, None]).to(tl.float32)
        tl.store(unit_ptr + here, unit, mask=held)
        if sums_ptr is not None:
            tl.store(sums_ptr + column, tl.sum(unit.to(tl.float64), axis=0), mask=column < width)
    return divisor, tl.where(constant, float("inf"), norm)


@triton.jit
def _places(row, begin, n, width, COLUMNS: tl.constexpr):
    """Where columns from ``begin`` on of some rows lie, and which of them exist."""
    column = begin + tl.arange(0, COLUMNS)
    return row[:, None] * width + column[None, :], (row < n)[:, None] & (column < width)[None, :]


@triton.jit
def _load_rows(x_ptr, row, begin, n, width, COLUMNS: tl.constexpr):
    """Those columns in float64, 0 where there are none."""
    here, held = _places(row, begin, n, width, COLUMNS)
    return tl.load(x_ptr + here, mask=held, other=0.0).to(tl.float32).to(tl.float64)


# One program takes some rows of both sides. Reads them once.
@triton.jit(do_not_specialize=ROW_SIZES)
def _pkt_sums_kernel(
    student_ptr, teacher_ptr,  # (n, width), unit rows
    summed_ptr,  # float64 (student_width + teacher_width): their sums
    inverse_ptr, excess_ptr, along_ptr,  # float64 (n)
    rounded_ptr,  # float32 (2, 16 * stride)
    n, student_width, teacher_width, stride,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    held = row < n
    inverse_s = _inverse_sum(student_ptr, summed_ptr, row, n, student_width, ROWS, COLUMNS)
    inverse_t = _inverse_sum(teacher_ptr, summed_ptr + student_width, row, n, teacher_width, ROWS, COLUMNS)
    rounded_s, rounded_t = inverse_s.to(tl.float32), inverse_t.to(tl.float32)
    tl.store(inverse_ptr + row, inverse_s, mask=held)
    tl.store(rounded_ptr + row, rounded_s, mask=held)
    tl.store(rounded_ptr + stride.to(tl.int64) * ALIGNED + row, rounded_t, mask=held)
    excess = rounded_s.to(tl.float64) / inverse_s - rounded_t.to(tl.float64) / inverse_t
    tl.store(excess_ptr + row, excess, mask=held)
    tl.store(along_ptr + row, tl.zeros([ROWS], tl.float64), mask=held)


@triton.jit
def _inverse_sum(x_ptr, summed_ptr, row, n, width, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """1 / sum_j (1 + <u_i, u_j>) / 2 in float64."""
    total = tl.zeros([ROWS], tl.float64) + n
    for begin in range(0, width, COLUMNS):
        column = begin + tl.arange(0, COLUMNS)
        summed = tl.load(summed_ptr + column, mask=column < width, other=0.0)
        total += tl.sum(_load_rows(x_ptr, row, begin, n, width, COLUMNS) * summed[None, :], axis=1)
    return 2.0 / total


# One program takes some rows, and reads them once.
@triton.jit(do_not_specialize=ROW_SIZES)
def _weighted_rows_kernel(
    x_ptr,  # (n, width)
    along_ptr, inverse_ptr,  # float64 (n), whose product is the weight
    sums_ptr,  # float64 (programs, width)
    n, width,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    weight = _weights(along_ptr, inverse_ptr, row, n)
    sums_ptr += tl.program_id(0).to(tl.int64) * width
    for begin in range(0, width, COLUMNS):
        column = begin + tl.arange(0, COLUMNS)
        x = _load_rows(x_ptr, row, begin, n, width, COLUMNS)
        tl.store(sums_ptr + column, tl.sum(x * weight[:, None], axis=0), mask=column < width)


@triton.jit
def _weights(along_ptr, inverse_ptr, row, n):
    """The sum of row i answers for this much of each of its k."""
    along = tl.load(along_ptr + row, mask=row < n, other=0.0)
    return along * tl.load(inverse_ptr + row, mask=row < n, other=0.0)


# One program takes some rows. Reads x and the gradient twice, the second time from a cache, and writes the gradient.
@triton.jit(do_not_specialize=ROW_SIZES)
def _raw_gradient_kernel(
    grad_ptr, x_ptr,  # (n, width), unit rows
    divisor_ptr, radial_ptr,  # float64 (n), as _unit_rows_kernel writes them
    along_ptr, inverse_ptr,  # float64 (n), of pkt alone, as are the next
    summed_ptr, weighted_ptr,  # float64 (width)
    n, width,
    slope,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    share = None
    if along_ptr is not None:
        share = _weights(along_ptr, inverse_ptr, row, n) * slope
    radial_part = tl.zeros([ROWS], tl.float64)
    for begin in range(0, width, COLUMNS):
        g = _unit_gradient(grad_ptr, share, summed_ptr, weighted_ptr, row, begin, n, width, slope, COLUMNS)
        radial_part += tl.sum(g * _load_rows(x_ptr, row, begin, n, width, COLUMNS), axis=1)
    radial_part /= tl.load(radial_ptr + row, mask=row < n, other=1.0)
    inverse = (1.0 / tl.load(divisor_ptr + row, mask=row < n, other=1.0))[:, None]
    for begin in range(0, width, COLUMNS):
        here, held = _places(row, begin, n, width, COLUMNS)
        g = _unit_gradient(grad_ptr, share, summed_ptr, weighted_ptr, row, begin, n, width, slope, COLUMNS)
        g = g * inverse - _load_rows(x_ptr, row, begin, n, width, COLUMNS) * radial_part[:, None]
        tl.store(grad_ptr + here, g.to(tl.float32), mask=held)


@triton.jit
def _unit_gradient(grad_ptr, share, summed_ptr, weighted_ptr, row, begin, n, width, slope, COLUMNS: tl.constexpr):
    """dL/du of some columns, less what pkt's sums of rows take off it."""
    g = _load_rows(grad_ptr, row, begin, n, width, COLUMNS)
    if share is not None:
        column = begin + tl.arange(0, COLUMNS)
        summed = tl.load(summed_ptr + column, mask=column < width, other=0.0)
        weighted = tl.load(weighted_ptr + column, mask=column < width, other=0.0) * slope
        g -= weighted[None, :] + share[:, None] * summed[None, :]
    return g


# One program takes a row. Reads both three times, from a cache but for the first, and writes b.
@triton.jit(do_not_specialize=["columns", "gradient"])
def _similarity_rows_kernel(
    a_ptr, b_ptr,  # (programs, columns)
    loss_ptr,  # float64 (programs)
    columns,
    gradient,  # whether to write it: 1 or 0
    BLOCK: tl.constexpr,
):  # fmt: skip
    a_ptr += tl.program_id(0).to(tl.int64) * columns
    b_ptr += tl.program_id(0).to(tl.int64) * columns
    # Sums along a row are float64, those within a block are not.
    aa = tl.zeros([1], tl.float64)
    bb = tl.zeros([1], tl.float64)
    for begin in range(0, columns, BLOCK):
        a, b = _pair(a_ptr, b_ptr, begin, columns, BLOCK)
        aa += tl.sum(a * a, axis=0).to(tl.float64)
        bb += tl.sum(b * b, axis=0).to(tl.float64)
    norm = tl.sqrt(aa)
    inverse_r, inverse_q = _inverse_norm(norm), _inverse_norm(tl.sqrt(bb))
    squares = tl.zeros([1], tl.float64)
    along = tl.zeros([1], tl.float64)
    for begin in range(0, columns, BLOCK):
        a, b = _pair(a_ptr, b_ptr, begin, columns, BLOCK)
        a *= inverse_r
        d = a - b * inverse_q
        squares += tl.sum(d * d, axis=0).to(tl.float64)
        along += tl.sum(d * a, axis=0).to(tl.float64)
    tl.store(loss_ptr + tl.program_id(0) + tl.arange(0, 1), squares)
    if gradient != 0:
        radial = tl.where(norm < SMALLEST_NORM, 0.0, along).to(tl.float32)  # a clamped norm is a constant
        for begin in range(0, columns, BLOCK):
            a, b = _pair(a_ptr, b_ptr, begin, columns, BLOCK)
            a *= inverse_r
            column = begin + tl.arange(0, BLOCK)
            tl.store(b_ptr + column, (a - b * inverse_q - a * radial) * inverse_r, mask=column < columns)


@triton.jit
def _pair(a_ptr, b_ptr, begin, end, BLOCK: tl.constexpr):
    at = begin + tl.arange(0, BLOCK)
    return tl.load(a_ptr + at, mask=at < end, other=0.0), tl.load(b_ptr + at, mask=at < end, other=0.0)


@triton.jit
def _inverse_norm(norm):
    """As rows.inverse_norms, and a NaN is kept."""
    inverse = 1.0 / tl.where(norm < SMALLEST_NORM, SMALLEST_NORM, norm)
    return tl.where(norm == 0, 0.0, inverse).to(tl.float32)


# One program takes TURNS blocks of two N x N matrices, and reads them once.
@triton.jit(do_not_specialize=["n"])
def _alignment_terms_kernel(
    a_ptr, b_ptr,  # (n, n)
    terms_ptr,  # float64 (programs, 3): <a, b>, <a, a>, <b, b>
    n,
    BLOCK: tl.constexpr,
    TURNS: tl.constexpr,
):  # fmt: skip
    end = n.to(tl.int64) * n
    ab = tl.zeros([1], tl.float64)
    aa = tl.zeros([1], tl.float64)
    bb = tl.zeros([1], tl.float64)
    for turn in range(TURNS):
        begin = (tl.program_id(0).to(tl.int64) * TURNS + turn) * BLOCK
        a, b = _pair(a_ptr, b_ptr, begin, end, BLOCK)
        ab += tl.sum(a * b, axis=0).to(tl.float64)
        aa += tl.sum(a * a, axis=0).to(tl.float64)
        bb += tl.sum(b * b, axis=0).to(tl.float64)
    terms_ptr += tl.program_id(0).to(tl.int64) * 3 + tl.arange(0, 1)
    tl.store(terms_ptr, ab)
    tl.store(terms_ptr + 1, aa)
    tl.store(terms_ptr + 2, bb)


# One program: the sums of all terms, and what is made of them.
@triton.jit(do_not_specialize=["count"])
def _alignment_slopes_kernel(
    terms_ptr,  # float64 (count, 3)
    loss_ptr,  # float32
    slopes_ptr,  # float64 (2)
    count,
    BLOCK: tl.constexpr,
):  # fmt: skip
    product = _column_sum(terms_ptr, count, BLOCK)
    kk = _column_sum(terms_ptr + 1, count, BLOCK)
    ll = _column_sum(terms_ptr + 2, count, BLOCK)
    norms = tl.sqrt(kk) * tl.sqrt(ll)
    inverse = tl.where(norms == 0, 0.0, 1.0 / norms)
    cosine = product * inverse
    tl.store(loss_ptr, (1.0 - cosine).to(tl.float32))
    tl.store(slopes_ptr, -2.0 * inverse)
    tl.store(slopes_ptr + 1, tl.where(norms == 0, 0.0, 2.0 * cosine / kk))


@triton.jit
def _column_sum(terms_ptr, count, BLOCK: tl.constexpr):
    totals = tl.zeros([BLOCK], tl.float64)
    for begin in range(0, count, BLOCK):
        row = begin + tl.arange(0, BLOCK)
        totals += tl.load(terms_ptr + row * 3, mask=row < count, other=0.0)
    return tl.sum(totals, axis=0)


def _grid(panel: Tensor) -> tuple[int, int]:
    return cdiv(panel.shape[0], ROWS), cdiv(panel.shape[1], COLUMNS)


def _sizes(panel: Tensor, first: int) -> tuple[int, int, int, int]:
    """What SIZES names."""
    rows, columns = panel.shape
    stride, rest = divmod(panel.stride(0), ALIGNED.value)
    assert rest == 0, "rows of a panel begin at multiples of 16"
    return rows, columns, stride, first


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
    """As in cpu_steps.py."""
    losses = torch.empty(_grid(G), dtype=torch.float64, device=G.device)
    with torch.cuda.device_of(G):
        _crd_kernel[_grid(G)](
            G, teacher, labels, losses, *_sizes(G, first), 1 / temperature, weight, scale,
            ROWS=ROWS, COLUMNS=COLUMNS, **OPTIONS,
        )  # fmt: skip
    return losses


def pkt_panel(
    G: Tensor, teacher: Tensor, s: Rows, t: Rows, sums: RowSums, first: int, eps: float, scale: float
) -> Tensor:
    """As in cpu_steps.py."""
    grid, (rows, columns) = _grid(G), G.shape
    losses = torch.empty(grid, dtype=torch.float64, device=G.device)
    row_sums = torch.empty((grid[1], rows), dtype=torch.float32, device=G.device)
    column_sums = torch.empty((grid[0], columns), dtype=torch.float32, device=G.device)
    student_inverse_sum, teacher_inverse_sum = sums.rounded
    with torch.cuda.device_of(G):
        _pkt_kernel[grid](
            G, teacher, student_inverse_sum, teacher_inverse_sum, losses, row_sums, column_sums, *_sizes(G, first),
            eps, scale, ROWS=ROWS, COLUMNS=COLUMNS, **OPTIONS,
        )  # fmt: skip
        _along_kernel[grid[1:]](
            sums.along, row_sums, column_sums, rows, columns, first, ROWS=ROWS, COLUMNS=COLUMNS, **OPTIONS
        )
    return losses


def unit_rows(student: Tensor, teacher: Tensor, eps: float) -> tuple[Rows, Rows]:
    """As in cpu_steps.py."""
    return _unit_rows(student, teacher, eps, add_eps=False, sums=None)


def _unit_rows(x: Tensor, y: Tensor, eps: float, *, add_eps: bool, sums: Tensor | None) -> tuple[Rows, Rows]:
    x, y = (side.detach().flatten(start_dim=1).contiguous() for side in (x, y))
    s, t = (torch.empty(side.shape, dtype=torch.float32, device=side.device) for side in (x, y))
    divisor, radial = _row_values(x, 2, torch.float64)
    with torch.cuda.device_of(x):
        _unit_rows_kernel[_programs(x), 2](
            x, y, s, t, divisor, radial, sums, *_row_sizes(x, y), eps,
            ADD_EPS=add_eps, ROWS=ROWS, COLUMNS=COLUMNS, **OPTIONS,
        )  # fmt: skip
    return Rows(s, None, divisor, radial), Rows(t, None, None, None)


def _row_sizes(*sides: Tensor) -> tuple[int, ...]:
    """n and the width of each."""
    return sides[0].shape[0], *(side.shape[1] for side in sides)


def _programs(x: Tensor) -> int:
    return cdiv(x.shape[0], ROWS)


def _row_values(x: Tensor, count: int, dtype: torch.dtype) -> Tensor:
    """Memory of ``count`` numbers a row, each kind of which begins at a multiple of 16."""
    return torch.empty((count, tiles.padded(x.shape[0], x)), dtype=dtype, device=x.device)


def pkt_rows(student: Tensor, teacher: Tensor, eps: float) -> tuple[Rows, Rows, RowSums]:
    """As in cpu_steps.py."""
    n, width = student.shape[0], student[:1].numel()
    sums = torch.empty((_programs(student), width + teacher[:1].numel()), dtype=torch.float64, device=student.device)
    s, t = _unit_rows(student, teacher, eps, add_eps=True, sums=sums)
    summed = sums.sum(dim=0)
    inverse, excess, along = _row_values(s.x, 3, torch.float64)
    rounded = _row_values(s.x, 2, torch.float32)
    with torch.cuda.device_of(s.x):
        _pkt_sums_kernel[_programs(s.x),](
            s.x, t.x, summed, inverse, excess, along, rounded, *_row_sizes(s.x, t.x),
            rounded.stride(0) // ALIGNED.value, ROWS=ROWS, COLUMNS=COLUMNS, **OPTIONS,
        )  # fmt: skip
    return s, t, RowSums(summed[:width], inverse, rounded, excess[:n], along)


def into_raw_gradient(grad: Tensor, rows: Rows, sums: RowSums | None = None, slope: float = 0.0) -> None:
    """As in cpu_steps.py."""
    if rows.radial is None:
        return
    along = inverse = summed = weighted = None
    with torch.cuda.device_of(grad):
        if sums is not None:
            along, inverse, summed = sums.along, sums.inverse, sums.summed
            shares = torch.empty((_programs(grad), grad.shape[1]), dtype=torch.float64, device=grad.device)
            _weighted_rows_kernel[_programs(grad),](
                rows.x, along, inverse, shares, *_row_sizes(grad), ROWS=ROWS, COLUMNS=COLUMNS, **OPTIONS
            )
            weighted = shares.sum(dim=0)
        _raw_gradient_kernel[_programs(grad),](
            grad, rows.x, rows.divisor, rows.radial, along, inverse, summed, weighted, *_row_sizes(grad), slope,
            ROWS=ROWS, COLUMNS=COLUMNS, **OPTIONS,
        )  # fmt: skip


def similarity_rows(a: Tensor, b: Tensor, needs_grad: bool) -> Tensor:
    """As in cpu_steps.py."""
    distances = torch.empty(a.shape[0], dtype=torch.float64, device=a.device)
    with torch.cuda.device_of(a):
        _similarity_rows_kernel[a.shape[0],](a, b, distances, a.shape[1], int(needs_grad), BLOCK=BLOCK, **OPTIONS)
    return distances


def symmetrized(G: Tensor) -> Tensor:
    """As in cpu_steps.py; ``G`` stays."""
    return G + G.mT


def largest_magnitude(x: Tensor, out: Tensor) -> None:
    """As in cpu_steps.py, in one launch."""
    torch.linalg.vector_norm(x, math.inf, dtype=out.dtype, out=out)


def alignment_terms(K: Tensor, L: Tensor) -> Tensor:
    """As in cpu_steps.py."""
    terms = torch.empty((cdiv(K.numel(), BLOCK * TURNS), 3), dtype=torch.float64, device=K.device)
    with torch.cuda.device_of(K):
        _alignment_terms_kernel[terms.shape[:1]](K, L, terms, K.shape[0], BLOCK=BLOCK, TURNS=TURNS, **OPTIONS)
    return terms


def alignment_slopes(terms: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """As in cpu_steps.py; ``dtype`` is float32."""
    loss = torch.empty((), dtype=dtype, device=terms.device)
    slopes = torch.empty(2, dtype=torch.float64, device=terms.device)
    with torch.cuda.device_of(terms):
        _alignment_slopes_kernel[1,](terms, loss, slopes, terms.shape[0], BLOCK=BLOCK, **OPTIONS)
    return loss, slopes[0], slopes[1]
