"""Triton kernels of rkd and their launchers. Formulas: csrc/math/. Counted, not timed: docs/gpu.md.

Matrices of pairs are N x N, N rounded up to a multiple of BLOCK, and hold, student's and teacher's value side by side
so that one load of 8 bytes brings both: a = half the squared distance, rounded to ``high``, what that rounding left in
``low``, and r = 1 / distance. With two for the gradient that is 8 N^2 floats in all. Rows beyond N and rows that do not
count are 0, and so are their cosines: the N^3 stage needs no masks. Squared distances are sums of squared differences
in float64, which costs less than the N^3 stage, needs no matrix product (so no TF32) and loses no digit to an offset.

N^3 stage, without atomics: _apex_kernel sums over k what the distances from an apex get, N^3 evaluations of a cosine;
_pair_kernel sums over apexes what the distance between two other rows gets, and the loss, N^3 / 2. Both hold a few
pairs a warp in registers, whose lanes share the index that is summed: whatever N is there are warps enough, loads are
coalesced, and what lanes have summed meets once, at the end. 13 and 17 instructions an evaluation, twice that where
apexes are ``wide``: where distances differ by more than WIDE_RATIO, a_i - a_ik cancels and both parts of a are used,
for all apexes of a tile if for one. Every sum has one order.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kdfast.ops.sizes import cdiv

# The largest ratio of distances from one apex for which high alone keeps the cosines to a few roundings.
WIDE_RATIO = tl.constexpr(8.0)
SMALLEST_NORM = tl.constexpr(1e-12)
# Rows of a matrix of pairs that stand together.
GROUP = tl.constexpr(4)
# Another batch size is not another kernel.
SIZES = ["n", "pitch", "apexes", "programs", "d", "d_s", "d_t"]


@triton.jit
def _huber_slope(e):
    return tl.clamp(e, -1.0, 1.0, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _huber_over_slope(e, slope):
    return tl.fma(slope, tl.full(slope.shape, -0.5, tl.float32), e)  # half of a float is one: this rounds once


# Matrices of pairs are stored in blocks of GROUP rows by LANES columns, so that the rows a warp reads lie a constant
# apart: one address serves them all, where that of each row would take as many instructions as half the cosines.
@triton.jit
def _row(row, pitch, LANES: tl.constexpr):
    """Where a row begins."""
    within = row & (GROUP - 1)
    return (row - within) * pitch + within * LANES


@triton.jit
def _column(k, LANES: tl.constexpr):
    """Where a column is, from there."""
    within = k & (LANES - 1)
    return (k - within) * GROUP + within


@triton.jit
def _halves(both):
    """Student's and teacher's value."""
    return both.to(tl.int32).to(tl.float32, bitcast=True), (both >> 32).to(tl.int32).to(tl.float32, bitcast=True)


@triton.jit
def _both(matrix_ptr, at, lanes):
    """Student's and teacher's values of a matrix of pairs: with ``lanes`` those of rows ``at`` (rows, warps) there.

    The compiler deals lanes and warps out along the first axes of what is loaded, and along the last of what is
    computed: transposed here, no thread has to hand another what it loaded.
    """
    if lanes is None:
        both = tl.load(matrix_ptr + at)
    else:
        both = tl.load(matrix_ptr + lanes[:, None, None] + tl.trans(at)[None, :, :])
        both = tl.permute(both, 2, 1, 0)
    return _halves(both)


@triton.jit
def _kept(keep_ptr, at, here):
    """Whether rows ``at`` count; those that do not may hold anything."""
    if keep_ptr is not None:
        here = here & (tl.load(keep_ptr + at, mask=here, other=0) != 0)
    return here


@triton.jit
def _weights(weight_ptr, at, here):
    """Weights of rows ``at``, 0 beyond ``here``."""
    weight = here.to(tl.float32)
    if weight_ptr is not None:
        weight = tl.load(weight_ptr + at, mask=here, other=0.0)
    return weight


@triton.jit
def _count(kept_ptr, n):
    """How many of ``n`` rows count, in float64."""
    if kept_ptr is not None:
        n = tl.load(kept_ptr)
    return n.to(tl.float64)


@triton.jit
def _of_a_pair(weight, rows, MEAN: tl.constexpr):
    """What a pair's term is multiplied with."""
    factor = rows * 0.0 + weight
    if MEAN:
        factor /= tl.maximum(rows * rows, 1.0)
    return factor


@triton.jit
def _of_a_triplet(weight, rows, apexes, MEAN: tl.constexpr):
    """What a triplet's term is multiplied with: the apexes stand for all rows."""
    factor = _of_a_pair(weight, rows, MEAN) / tl.maximum(apexes, 1.0)
    if not MEAN:
        factor *= rows
    return factor


@triton.jit
def _sum_of(ptr, count, BLOCK: tl.constexpr):
    """The sum of ``count`` floats, in float64 and one order."""
    total = tl.zeros([BLOCK], tl.float64)
    for start in range(0, count, BLOCK):
        at = start + tl.arange(0, BLOCK)
        total += tl.load(ptr + at, mask=at < count, other=0.0).to(tl.float64)
    return tl.sum(total, axis=0)


# Reads x, D by N in float64, once for each tile; writes the three matrices. N^2 D / 2 differences and FMAs in float64.
@triton.jit(do_not_specialize=SIZES)
def _distances_kernel(
    high_ptr, low_ptr, r_ptr, x_s_ptr, x_t_ptr, keep_ptr, n, pitch, d_s, d_t,
    BLOCK: tl.constexpr, FEATURES: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """Tile (i, k), i <= k, of a and r of one side, and its mirror image. Column i of x is row i of the batch."""
    if tl.program_id(0) > tl.program_id(1):
        return
    side = tl.program_id(2)
    x_ptr, d = x_s_ptr, d_s
    if side == 1:
        x_ptr, d = x_t_ptr, d_t
    rows = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    columns = tl.program_id(1).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK, BLOCK], tl.float64)
    for _ in range(0, d, FEATURES):
        # Loads of many features are under way before the first is used: nothing else hides how long they take.
        for _ in tl.static_range(FEATURES):
            off = tl.load(x_ptr + rows)[:, None] - tl.load(x_ptr + columns)[None, :]
            total = tl.fma(off, off, total)
            x_ptr += pitch
    a = 0.5 * total
    high = a.to(tl.float32)
    low = (a - high.to(tl.float64)).to(tl.float32)
    # What float32 cannot hold is 0, as a distance in float32 is.
    r = tl.where(high > 0, 1.0 / tl.maximum(tl.sqrt(total), SMALLEST_NORM), 0.0).to(tl.float32)
    r = tl.where(high == high, r, high)
    # Whatever other rows hold: their distances and cosines are 0.
    count = _kept(keep_ptr, rows, rows < n)[:, None] & _kept(keep_ptr, columns, columns < n)[None, :]
    high, low, r = tl.where(count, high, 0.0), tl.where(count, low, 0.0), tl.where(count, r, 0.0)
    at = 2 * (_row(rows, pitch, LANES)[:, None] + _column(columns, LANES)[None, :]) + side
    mirrored = 2 * (_row(columns, pitch, LANES)[None, :] + _column(rows, LANES)[:, None]) + side
    tl.store(high_ptr + at, high)
    tl.store(low_ptr + at, low)
    tl.store(r_ptr + at, r)
    tl.store(high_ptr + mirrored, high)
    tl.store(low_ptr + mirrored, low)
    tl.store(r_ptr + mirrored, r)


@triton.jit
def _inverse_mean(total, n_kept):
    """1 / mean over the pairs i != k of distances that sum to ``total``; 1 where that is 0."""
    pairs = tl.maximum(n_kept * (n_kept - 1.0), 1.0)
    return tl.where(total == 0, 1.0, pairs / tl.where(total == 0, 1.0, total)).to(tl.float32)


# Reads two of the matrices once: what follows from the distances of one row.
@triton.jit(do_not_specialize=SIZES)
def _rows_kernel(
    sum_s_ptr, sum_t_ptr, wide_ptr, high_ptr, r_ptr, pitch, BLOCK: tl.constexpr, LANES: tl.constexpr
):  # fmt: skip
    """Sums of the distances from a row, and whether they differ by more than WIDE_RATIO."""
    row = tl.program_id(0).to(tl.int64)
    sum_s = tl.zeros([BLOCK], tl.float32)
    sum_t = tl.zeros([BLOCK], tl.float32)
    far_r_s = tl.full([BLOCK], float("inf"), tl.float32)
    far_r_t = tl.full([BLOCK], float("inf"), tl.float32)
    near_r_s = tl.zeros([BLOCK], tl.float32)
    near_r_t = tl.zeros([BLOCK], tl.float32)
    for start in range(0, pitch, BLOCK):
        k = start + tl.arange(0, BLOCK)
        at = _row(row, pitch, LANES) + _column(k, LANES)
        high_s, high_t = _halves(tl.load(high_ptr + at, mask=k < pitch, other=0))
        r_s, r_t = _halves(tl.load(r_ptr + at, mask=k < pitch, other=0))
        sum_s += tl.sqrt_rn(2.0 * high_s)
        sum_t += tl.sqrt_rn(2.0 * high_t)
        near_r_s = tl.maximum(near_r_s, r_s)
        near_r_t = tl.maximum(near_r_t, r_t)
        far_r_s = tl.minimum(far_r_s, tl.where(r_s > 0, r_s, float("inf")))
        far_r_t = tl.minimum(far_r_t, tl.where(r_t > 0, r_t, float("inf")))
    wide = tl.max(near_r_s, axis=0) > WIDE_RATIO * tl.min(far_r_s, axis=0)
    wide = wide | (tl.max(near_r_t, axis=0) > WIDE_RATIO * tl.min(far_r_t, axis=0))
    tl.store(wide_ptr + row, wide.to(tl.int32))
    tl.store(sum_s_ptr + row, tl.sum(sum_s, axis=0))
    tl.store(sum_t_ptr + row, tl.sum(sum_t, axis=0))


@triton.jit
def _relative(high_s, high_t, inverse_s, inverse_t):
    """Relative distances of the student, and how far they are from the teacher's."""
    psi = tl.sqrt_rn(2.0 * high_s) * inverse_s
    return psi, psi - tl.sqrt_rn(2.0 * high_t) * inverse_t


# Reads one matrix once.
@triton.jit(do_not_specialize=SIZES)
def _distance_loss_kernel(
    loss_ptr, slope_ptr, inverse_ptr, high_ptr, sum_s_ptr, sum_t_ptr, kept_ptr, weight_ptr, n, pitch,
    BLOCK: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """Sums over k of w_i w_k h(e) and w_i w_k h'(e) psi_s of one row; what distances are multiplied with, once."""
    row = tl.program_id(0).to(tl.int64)
    n_kept = _count(kept_ptr, n)
    inverse_s = _inverse_mean(_sum_of(sum_s_ptr, n, BLOCK), n_kept)
    inverse_t = _inverse_mean(_sum_of(sum_t_ptr, n, BLOCK), n_kept)
    if row == 0:
        tl.store(inverse_ptr, inverse_s)
        tl.store(inverse_ptr + 1, inverse_t)
    w_i = _weights(weight_ptr, row, row < n)
    loss = tl.zeros([BLOCK], tl.float32)
    slope = tl.zeros([BLOCK], tl.float32)
    for start in range(0, n, BLOCK):
        k = start + tl.arange(0, BLOCK)
        here = k < n
        at = _row(row, pitch, LANES) + _column(k, LANES)
        high_s, high_t = _halves(tl.load(high_ptr + at, mask=here, other=0))
        psi, e = _relative(high_s, high_t, inverse_s, inverse_t)
        g = _huber_slope(e)
        w = w_i * _weights(weight_ptr, k, here)
        loss += w * (g * _huber_over_slope(e, g))
        slope += w * g * psi
    tl.store(loss_ptr + row, tl.sum(loss, axis=0))
    tl.store(slope_ptr + row, tl.sum(slope, axis=0))


@triton.jit
def _cosine(a_ik, low_ik, a_i, low_i, a_k, low_k, r_i, r_k, WIDE: tl.constexpr):
    """cos of the angle at the apex between i and k, from half squared distances."""
    off = a_k - a_ik
    if WIDE:
        # a_k - a_ik + a_i as if in twice the precision: what the first difference rounded away, and the low parts.
        lost = a_k - (off + a_ik)
        over_r = ((off + a_i) + (lost + ((low_k - low_ik) + low_i))) * r_i
    else:
        over_r = tl.fma(off, tl.broadcast_to(r_i, off.shape), tl.broadcast_to(a_i * r_i, off.shape))
    return over_r * r_k


@triton.jit
def _low(low_ptr, at, lanes, a, b, WIDE: tl.constexpr):
    """What rounding ``a`` and ``b`` left; them, which nothing reads, where cosines are not wide."""
    if WIDE:
        a, b = _both(low_ptr, at, lanes)
    return a, b


@triton.jit
def _chosen(apexes_ptr, place, apexes):
    """Rows of the apexes at ``place``; the last one's beyond ``apexes``."""
    if apexes_ptr is not None:
        place = tl.load(apexes_ptr + tl.minimum(place, apexes - 1))
    return place


@triton.jit
def _apex_sums(
    high_ptr, low_ptr, r_ptr, weight_ptr, at_apex, at_i, at_apex_i, n,
    DOWN: tl.constexpr, ACROSS: tl.constexpr, WARPS: tl.constexpr, LANES: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Sums over k of w_k g r_k and w_k g cos by apex and row i; what does not depend on k is computed once."""
    a_i, b_i = _both(high_ptr, at_apex_i, None)
    r_i, q_i = _both(r_ptr, at_apex_i, None)
    sum_r = tl.zeros([DOWN, ACROSS, WARPS, LANES], tl.float32)
    sum_cos = tl.zeros([DOWN, ACROSS, WARPS, LANES], tl.float32)
    for start in range(0, n, LANES):
        at_k = start * GROUP + tl.arange(0, LANES)
        low_i, below_i = _low(low_ptr, at_apex_i, None, a_i, b_i, WIDE)  # each time: registers are for the others
        a_k, b_k = _both(high_ptr, at_apex, at_k)
        r_k, q_k = _both(r_ptr, at_apex, at_k)
        low_k, below_k = _low(low_ptr, at_apex, at_k, a_k, b_k, WIDE)
        a_ik, b_ik = _both(high_ptr, at_i, at_k)
        low_ik, below_ik = _low(low_ptr, at_i, at_k, a_ik, b_ik, WIDE)
        cos = _cosine(
            a_ik[None, :, :, :], low_ik[None, :, :, :], a_i[:, :, :, None], low_i[:, :, :, None],
            a_k[:, None, :, :], low_k[:, None, :, :], r_i[:, :, :, None], r_k[:, None, :, :], WIDE,
        )  # fmt: skip
        target = _cosine(
            b_ik[None, :, :, :], below_ik[None, :, :, :], b_i[:, :, :, None], below_i[:, :, :, None],
            b_k[:, None, :, :], below_k[:, None, :, :], q_i[:, :, :, None], q_k[:, None, :, :], WIDE,
        )  # fmt: skip
        g = _huber_slope(cos - target)
        if weight_ptr is not None:
            k = start + tl.arange(0, LANES)
            g *= _weights(weight_ptr, k, k < n)[None, None, None, :]
        sum_r = tl.fma(g, tl.broadcast_to(r_k[:, None, :, :], g.shape), sum_r)
        sum_cos = tl.fma(g, cos, sum_cos)
    return tl.sum(sum_r, axis=3), tl.sum(sum_cos, axis=3)


@triton.jit
def _rows_of_warps(tile, warp, pitch, COUNT: tl.constexpr, WARPS: tl.constexpr, LANES: tl.constexpr):
    """COUNT rows a warp (COUNT, warps), ``warp`` of WARPS in ``tile``, and where they begin: within one group."""
    first = tile.to(tl.int64) * (COUNT * WARPS) + (warp * COUNT)[None, :]
    row = tl.arange(0, COUNT)[:, None]
    return first + row, _row(first, pitch, LANES) + row * LANES


# Reads, for each k, 16 bytes an apex and 8 bytes an i of a program's tile.
@triton.jit(do_not_specialize=SIZES)
def _apex_kernel(
    grad_ptr, high_ptr, low_ptr, r_ptr, wide_ptr, weight_ptr, apexes_ptr, kept_ptr, kept_apexes_ptr, angle_weight,
    n, pitch, apexes, MEAN: tl.constexpr, DOWN: tl.constexpr, ACROSS: tl.constexpr,
    WARPS_DOWN: tl.constexpr, WARPS_ACROSS: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """Tile (apex, i) of the gradient with respect to the distances from apexes."""
    WARPS: tl.constexpr = WARPS_DOWN * WARPS_ACROSS
    warp = tl.arange(0, WARPS)
    apex, at_apex = _rows_of_warps(tl.program_id(0), warp // WARPS_ACROSS, pitch, DOWN, WARPS_DOWN, LANES)
    i, at_i = _rows_of_warps(tl.program_id(1), warp % WARPS_ACROSS, pitch, ACROSS, WARPS_ACROSS, LANES)
    here = apex < apexes
    if apexes_ptr is not None:
        apex = _chosen(apexes_ptr, apex, apexes)
        at_apex = _row(apex, pitch, LANES)
    at = at_apex[:, None, :] + _column(i, LANES)[None, :, :]
    if tl.max(tl.ravel(tl.load(wide_ptr + apex, mask=here, other=0)), axis=0) != 0:
        sum_r, sum_cos = _apex_sums(
            high_ptr, low_ptr, r_ptr, weight_ptr, at_apex, at_i, at, n, DOWN, ACROSS, WARPS, LANES, True
        )
    else:
        sum_r, sum_cos = _apex_sums(
            high_ptr, low_ptr, r_ptr, weight_ptr, at_apex, at_i, at, n, DOWN, ACROSS, WARPS, LANES, False
        )
    rows, n_apexes = _count(kept_ptr, n), _count(kept_apexes_ptr, apexes)
    a, _ = _both(high_ptr, at, None)  # again: the loop needs all registers
    r, _ = _both(r_ptr, at, None)
    w = _weights(weight_ptr, apex, apex < n)[:, None, :] * _weights(weight_ptr, i, i < n)[None, :, :]
    bent = tl.where(2.0 * a < SMALLEST_NORM * SMALLEST_NORM, 0.0, r)  # at the limit r is constant
    factor = _of_a_triplet(angle_weight, rows, n_apexes, MEAN).to(tl.float32)
    g = w * (r * sum_r - bent * (bent * sum_cos)) * (2.0 * factor)
    tl.store(grad_ptr + (apex * pitch)[:, None, :] + i[None, :, :], g, mask=here[:, None, :])


@triton.jit
def _pair_sums(
    sum_h, sum_g, high_ptr, low_ptr, r_ptr, weight_ptr, apexes_ptr, at_i, at_k, at_ik, a_ik, b_ik, begin, apexes,
    LANES: tl.constexpr, BLOCKS: tl.constexpr, WIDE: tl.constexpr, GRAD: tl.constexpr,
):  # fmt: skip
    """Adds w_j h and w_j g r_i r_k at BLOCKS blocks of apexes, one a lane."""
    low_ik, below_ik = _low(low_ptr, at_ik, None, a_ik, b_ik, WIDE)
    for start in range(begin, tl.minimum(begin + LANES * BLOCKS, apexes), LANES):
        place = start + tl.arange(0, LANES)
        apex = _chosen(apexes_ptr, place, apexes)
        at_j = start * GROUP + tl.arange(0, LANES)
        if apexes_ptr is not None:
            at_j = _column(apex, LANES)
        a_i, b_i = _both(high_ptr, at_i, at_j)
        r_i, q_i = _both(r_ptr, at_i, at_j)
        low_i, below_i = _low(low_ptr, at_i, at_j, a_i, b_i, WIDE)
        a_k, b_k = _both(high_ptr, at_k, at_j)
        r_k, q_k = _both(r_ptr, at_k, at_j)
        low_k, below_k = _low(low_ptr, at_k, at_j, a_k, b_k, WIDE)
        cos = _cosine(
            a_ik[:, :, :, None], low_ik[:, :, :, None], a_i[:, None, :, :], low_i[:, None, :, :],
            a_k[None, :, :, :], low_k[None, :, :, :], r_i[:, None, :, :], r_k[None, :, :, :], WIDE,
        )  # fmt: skip
        target = _cosine(
            b_ik[:, :, :, None], below_ik[:, :, :, None], b_i[:, None, :, :], below_i[:, None, :, :],
            b_k[None, :, :, :], below_k[None, :, :, :], q_i[:, None, :, :], q_k[None, :, :, :], WIDE,
        )  # fmt: skip
        e = cos - target
        g = _huber_slope(e)
        h_over_slope = _huber_over_slope(e, g)
        if (weight_ptr is not None) | (apexes_ptr is not None):  # without a list, rows beyond N are 0 as they are
            g *= _weights(weight_ptr, apex, place < apexes)[None, None, None, :]
        sum_h = tl.fma(g, h_over_slope, sum_h)
        if GRAD:
            g *= r_i[:, None, :, :]
            sum_g = tl.fma(g, tl.broadcast_to(r_k[None, :, :, :], g.shape), sum_g)
    return sum_h, sum_g


# Reads, for each apex, 16 bytes a row and 16 bytes a column of a program's tile.
@triton.jit(do_not_specialize=SIZES)
def _pair_kernel(
    grad_ptr, loss_ptr, from_apex_ptr, high_ptr, low_ptr, r_ptr, wide_ptr, weight_ptr, apexes_ptr, inverse_ptr,
    slope_ptr, kept_ptr, kept_apexes_ptr, angle_weight, distance_weight, n, pitch, apexes,
    MEAN: tl.constexpr, ANGLE: tl.constexpr, DISTANCE: tl.constexpr, DOWN: tl.constexpr, ACROSS: tl.constexpr,
    WARPS_DOWN: tl.constexpr, WARPS_ACROSS: tl.constexpr, LANES: tl.constexpr,
    BLOCKS: tl.constexpr, SUM: tl.constexpr,
):  # fmt: skip
    """Tile (i, k), i <= k, of the whole gradient with respect to the half squared distances, and its mirror image.

    And what the cosines of its pairs lose at all apexes: with ``from_apex_ptr`` and ``grad_ptr`` None that alone.
    """
    at_loss = tl.program_id(0).to(tl.int64) * tl.num_programs(1) + tl.program_id(1)
    # Wholly below the diagonal: other programs have its pairs.
    below = tl.program_id(0) * (DOWN * WARPS_DOWN) >= (tl.program_id(1) + 1) * (ACROSS * WARPS_ACROSS)
    if below:
        if ANGLE:
            tl.store(loss_ptr + at_loss, 0.0)
        return
    WARPS: tl.constexpr = WARPS_DOWN * WARPS_ACROSS
    warp = tl.arange(0, WARPS)
    i, at_i = _rows_of_warps(tl.program_id(0), warp // WARPS_ACROSS, pitch, DOWN, WARPS_DOWN, LANES)
    k, at_k = _rows_of_warps(tl.program_id(1), warp % WARPS_ACROSS, pitch, ACROSS, WARPS_ACROSS, LANES)
    at_ik = at_i[:, None, :] + _column(k, LANES)[None, :, :]
    at, mirrored = (i * pitch)[:, None, :] + k[None, :, :], (k * pitch)[None, :, :] + i[:, None, :]
    first = i[:, None, :] <= k[None, :, :]  # of the two orders of a pair
    a_ik, b_ik = _both(high_ptr, at_ik, None)
    w = _weights(weight_ptr, i, i < n)[:, None, :] * _weights(weight_ptr, k, k < n)[None, :, :]
    rows, n_apexes = _count(kept_ptr, n), _count(kept_apexes_ptr, apexes)
    grad = tl.zeros([DOWN, ACROSS, WARPS], tl.float32)
    if ANGLE:
        sum_h = tl.zeros([DOWN, ACROSS, WARPS, LANES], tl.float32)
        sum_g = tl.zeros([DOWN, ACROSS, WARPS, LANES], tl.float32)
        for begin in range(0, apexes, LANES * BLOCKS):
            wide = tl.zeros([LANES], tl.int32)  # LANES at a time: no warp then has to wait for what another read
            for block in tl.static_range(BLOCKS):
                place = begin + block * LANES + tl.arange(0, LANES)
                wide |= tl.load(wide_ptr + _chosen(apexes_ptr, place, apexes), mask=place < apexes, other=0)
            if tl.max(wide, axis=0) != 0:
                sum_h, sum_g = _pair_sums(
                    sum_h, sum_g, high_ptr, low_ptr, r_ptr, weight_ptr, apexes_ptr, at_i, at_k, at_ik, a_ik, b_ik,
                    begin, apexes, LANES, BLOCKS, True, grad_ptr is not None,
                )  # fmt: skip
            else:
                sum_h, sum_g = _pair_sums(
                    sum_h, sum_g, high_ptr, low_ptr, r_ptr, weight_ptr, apexes_ptr, at_i, at_k, at_ik, a_ik, b_ik,
                    begin, apexes, LANES, BLOCKS, False, grad_ptr is not None,
                )  # fmt: skip
        orders = tl.where(first, tl.where(i[:, None, :] == k[None, :, :], 1.0, 2.0), 0.0)
        loss = tl.sum(tl.ravel(orders * w * tl.sum(sum_h, axis=3)), axis=0)
        tl.store(loss_ptr + at_loss, loss)
        if grad_ptr is not None:
            factor = _of_a_triplet(angle_weight, rows, n_apexes, MEAN).to(tl.float32)
            grad = w * (-2.0 * factor) * tl.sum(sum_g, axis=3)
            made = (i < n)[:, None, :] & (k < n)[None, :, :]
            grad += tl.load(from_apex_ptr + at, mask=made, other=0.0)
            grad += tl.load(from_apex_ptr + mirrored, mask=made, other=0.0)
    if grad_ptr is not None:
        if DISTANCE:
            inverse_s = tl.load(inverse_ptr)
            _, e = _relative(a_ik, b_ik, inverse_s, tl.load(inverse_ptr + 1))
            share = (_sum_of(slope_ptr, n, SUM) / tl.maximum(rows * (rows - 1.0), 1.0)).to(tl.float32)
            d = tl.sqrt_rn(2.0 * a_ik)
            inverse = tl.where(d == 0, 0.0, 1.0 / tl.where(d == 0, 1.0, d))
            factor = _of_a_pair(distance_weight, rows, MEAN).to(tl.float32)
            grad += (w * _huber_slope(e) - share) * (2.0 * inverse_s * factor) * inverse
        tl.store(grad_ptr + at, grad, mask=first)
        tl.store(grad_ptr + mirrored, grad, mask=first)


# One program: reads a number for each program of _pair_kernel, and one a row.
@triton.jit(do_not_specialize=SIZES)
def _loss_kernel(
    out_ptr, angle_ptr, distance_ptr, kept_ptr, kept_apexes_ptr, angle_weight, distance_weight, n, apexes, programs,
    MEAN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The loss: sums of the angles' and the distances' terms, in float64."""
    rows, n_apexes = _count(kept_ptr, n), _count(kept_apexes_ptr, apexes)
    loss = rows * 0.0
    if angle_ptr is not None:
        loss += _of_a_triplet(angle_weight, rows, n_apexes, MEAN) * _sum_of(angle_ptr, programs, BLOCK)
    if distance_ptr is not None:
        loss += _of_a_pair(distance_weight, rows, MEAN) * _sum_of(distance_ptr, n, BLOCK)
    tl.store(out_ptr, loss.to(tl.float32))


# Reads the gradient of the pairs once for each block of features. N^2 D differences and FMAs.
@triton.jit(do_not_specialize=SIZES)
def _pull_kernel(
    out_ptr, grad_ptr, x_ptr, keep_ptr, n, pitch, d,
    ROWS: tl.constexpr, WIDTHS: tl.constexpr, WARPS: tl.constexpr, LANES: tl.constexpr, AT_ONCE: tl.constexpr,
):  # fmt: skip
    """out_i = sum_k grad_ik (x_i - x_k), of x (n, d); grad is symmetric, so its row k is read. Each warp has its k."""
    i = tl.program_id(1).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    features = tl.program_id(0) * (WIDTHS * LANES) + tl.arange(0, LANES)
    features = features[:, None] + (tl.arange(0, WIDTHS) * LANES)[None, :]
    there = features < d
    at = i[:, None, None] * d + tl.trans(features)[None, :, :]
    here = (i < n)[:, None, None] & tl.trans(there)[None, :, :]
    x_i = tl.load(x_ptr + at, mask=_kept(keep_ptr, i, i < n)[:, None, None] & here, other=0.0).to(tl.float32)
    total = tl.zeros([ROWS, WIDTHS, WARPS, LANES], tl.float32)
    for start in range(0, n, WARPS * AT_ONCE):
        for step in tl.static_range(AT_ONCE):  # their loads are under way together
            k = (start + step * WARPS + tl.arange(0, WARPS)).to(tl.int64)
            g = tl.load(grad_ptr + (k * pitch)[None, :] + i[:, None], mask=(k < n)[None, :], other=0.0)
            counted = _kept(keep_ptr, k, k < n)[None, :, None] & there[:, None, :]
            x_k = tl.load(x_ptr + (k * d)[None, :, None] + features[:, None, :], mask=counted, other=0.0)
            off = x_i[:, :, None, :] - tl.permute(x_k.to(tl.float32), 2, 1, 0)[None, :, :, :]  # as in _both
            total = tl.fma(tl.broadcast_to(g[:, None, :, None], off.shape), off, total)
    tl.store(out_ptr + at, tl.sum(total, axis=2), mask=here)


# Counted, not timed. BLOCK is a multiple of LANES and of all tiles: matrices of pairs end with one.
BLOCK, LANES = 32, 32
FEATURES, ROW_BLOCK = 8, 1024
# DOWN by ACROSS pairs a warp, neither more than GROUP, and warps in a rectangle, so that what one reads others find in
# L1: as many pairs as 128 registers a thread hold, with 16 warps a multiprocessor.
APEX_TILE = {"DOWN": 2, "ACROSS": 4, "WARPS_DOWN": 4, "WARPS_ACROSS": 4}
PAIR_TILE = {"DOWN": 2, "ACROSS": 4, "WARPS_DOWN": 4, "WARPS_ACROSS": 4, "BLOCKS": 4}
PULL_TILE = {"ROWS": 8, "WIDTHS": 4, "WARPS": 4, "LANES": 32, "AT_ONCE": 4}
# Sums of a difference and what it lost are the point of the wide cosines; tl.fma stands where one is wanted.
FUSION = {"enable_fp_fusion": False}
OPTIONS: dict[str, dict[str, Any]] = {
    "_distances_kernel": {"num_warps": 4, **FUSION},
    "_rows_kernel": {"num_warps": 4, **FUSION},
    "_distance_loss_kernel": {"num_warps": 4, **FUSION},
    "_apex_kernel": {"num_warps": 16, **FUSION},
    "_pair_kernel": {"num_warps": 16, **FUSION},
    "_loss_kernel": {"num_warps": 4, **FUSION},
    "_pull_kernel": {"num_warps": 4, **FUSION},
}


def rkd(
    student: Tensor,
    teacher: Tensor,
    mask: Tensor | None,
    row_weight: Tensor | None,
    apexes: Tensor | None,
    distance_weight: float,
    angle_weight: float,
    mean: bool,
    needs_grad: bool,
) -> tuple[Tensor, Tensor]:
    """``torch.ops.kdfast.rkd``: the loss, and its gradient for grad_output 1, empty unless ``needs_grad``."""
    if student.dtype == torch.float64:
        raise TypeError("kdfast's Triton kernels take float16, bfloat16 or float32, got float64")
    n, device = student.shape[0], student.device
    angle, distance = angle_weight != 0, distance_weight != 0
    make = torch.empty if n > 0 and (angle or distance) else torch.zeros  # the last kernels write all of both
    loss = make((), dtype=torch.float32, device=device)
    grad = make(student.shape if needs_grad else (0,), dtype=torch.float32, device=device)
    if n == 0 or not (angle or distance):
        return loss, grad
    keep = None if mask is None else mask.contiguous().view(torch.uint8)
    weight = None if row_weight is None else row_weight.float()
    if weight is not None and mask is not None:
        weight = weight.masked_fill(~mask, 0.0)
    kept = None if mask is None else mask.sum()
    kept_apexes = kept if mask is None or apexes is None else mask[apexes].sum()
    chosen = n if apexes is None else apexes.numel()
    blocks = cdiv(n, BLOCK)
    pitch = blocks * BLOCK
    sizes = {"n": n, "pitch": pitch}

    def floats(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=device)

    with torch.cuda.device_of(student):
        matrices = [floats(pitch, pitch, 2) for _ in range(3)]
        _distances_kernel[(blocks, blocks, 2)](
            *matrices, *(_transposed(x, pitch) for x in (student, teacher)), keep,
            d_s=student.shape[1], d_t=teacher.shape[1], BLOCK=BLOCK, FEATURES=FEATURES, LANES=LANES,
            **sizes, **OPTIONS["_distances_kernel"],
        )  # fmt: skip
        high, low, r = (matrix.view(torch.int64) for matrix in matrices)
        # One tensor each: the second half of one would begin anywhere.
        sums, wide = (floats(n), floats(n)), torch.empty(n, dtype=torch.int32, device=device)
        _rows_kernel[(n,)](*sums, wide, high, r, pitch, BLOCK=ROW_BLOCK, LANES=LANES, **OPTIONS["_rows_kernel"])
        of_distance = of_angle = slope = inverse = from_apex = pairs = None
        if distance:
            of_distance, slope, inverse = floats(n), floats(n), floats(2)
            _distance_loss_kernel[(n,)](
                of_distance, slope, inverse, high, *sums, kept, weight,
                BLOCK=ROW_BLOCK, LANES=LANES, **sizes, **OPTIONS["_distance_loss_kernel"],
            )  # fmt: skip
        if angle and needs_grad:
            # Only the rows of apexes are written.
            from_apex = floats(pitch, pitch) if apexes is None else floats(pitch, pitch).zero_()
            down, across = _tile(APEX_TILE)
            grid = (cdiv(chosen, down), cdiv(n, across))
            _apex_kernel[grid](
                from_apex, high, low, r, wide, weight, apexes, kept, kept_apexes, angle_weight, apexes=chosen,
                MEAN=mean, LANES=LANES, **sizes, **APEX_TILE, **OPTIONS["_apex_kernel"],
            )  # fmt: skip
        down, across = _tile(PAIR_TILE)
        tiles = cdiv(n, down), cdiv(n, across)
        programs = tiles[0] * tiles[1]
        if angle or needs_grad:
            of_angle = floats(programs) if angle else None
            pairs = floats(pitch, pitch) if needs_grad else None
            _pair_kernel[tiles](
                pairs, of_angle, from_apex, high, low, r, wide, weight, apexes, inverse, slope, kept, kept_apexes,
                angle_weight, distance_weight, apexes=chosen, MEAN=mean, ANGLE=angle,
                DISTANCE=distance and needs_grad, SUM=ROW_BLOCK, LANES=LANES,
                **sizes, **PAIR_TILE, **OPTIONS["_pair_kernel"],
            )  # fmt: skip
        _loss_kernel[(1,)](
            loss, of_angle, of_distance, kept, kept_apexes, angle_weight, distance_weight, n, chosen, programs,
            MEAN=mean, BLOCK=ROW_BLOCK, **OPTIONS["_loss_kernel"],
        )  # fmt: skip
        d = student.shape[1]
        if needs_grad and d > 0:
            # x alone may have more than 65535.
            grid = (cdiv(d, PULL_TILE["WIDTHS"] * PULL_TILE["LANES"]), cdiv(n, PULL_TILE["ROWS"]))
            _pull_kernel[grid](
                grad, pairs, student.contiguous(), keep, d=d, **sizes, **PULL_TILE, **OPTIONS["_pull_kernel"]
            )
    return loss, grad


def _transposed(x: Tensor, pitch: int) -> Tensor:
    """(D, N) float64, which no kernel then converts anew in each of its threads; both filled up with zeros."""
    n, d = x.shape
    full = torch.zeros(cdiv(d, FEATURES) * FEATURES, pitch, dtype=torch.float64, device=x.device)
    full[:d, :n] = x.t()
    return full


def _tile(tile: dict[str, int]) -> tuple[int, int]:
    """Rows and columns that a program's warps hold together."""
    return tile["DOWN"] * tile["WARPS_DOWN"], tile["ACROSS"] * tile["WARPS_ACROSS"]
