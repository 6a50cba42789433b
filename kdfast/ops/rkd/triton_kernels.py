"""Triton kernels of rkd and their launchers. Formulas: csrc/math/. Unmeasured.

Matrices of pairs are (N, N) float32 and hold a = half the squared distance, rounded to ``high``, what that rounding
left in ``low``, and r = 1 / distance: six for student and teacher, two for the gradient, 8 N^2 floats in all. Squared
distances are sums of squared differences in float64, which costs less than the N^3 stage, needs no matrix product (so
no TF32) and loses no digit to an offset.

N^3 stage, without atomics: _apex_kernel sums over k what the distances from an apex get, N^3 evaluations of a cosine;
_pair_kernel sums over apexes what the distance between two other rows gets, N^3 / 2. About 16 and 12 instructions an
evaluation, twice that at apexes that are ``wide``: where distances differ by more than WIDE_RATIO, a_i - a_ik cancels
and both parts of a are used. Every sum has one order.
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
SIZES = ["n", "apexes"]  # another batch size is not another kernel


@triton.jit
def _huber_slope(e):
    slope = tl.minimum(tl.maximum(e, -1.0), 1.0)
    return tl.where(e == e, slope, e)  # minimum and maximum drop NaN


@triton.jit
def _huber(e, slope):
    return slope * (e - 0.5 * slope)


# Reads x, D by N, once for each tile; writes three N x N matrices. N^2 D / 2 differences and FMAs in float64.
@triton.jit(do_not_specialize=SIZES)
def _distances_kernel(high_ptr, low_ptr, r_ptr, x_ptr, n, d, BLOCK: tl.constexpr):
    """Tile (i, k), i <= k, of a and r, and its mirror image. x is transposed: column i is row i of the batch."""
    if tl.program_id(0) > tl.program_id(1):
        return
    rows = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    columns = tl.program_id(1).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK, BLOCK], tl.float64)
    for _ in range(d):
        x_i = tl.load(x_ptr + rows, mask=rows < n, other=0.0).to(tl.float64)
        x_k = tl.load(x_ptr + columns, mask=columns < n, other=0.0).to(tl.float64)
        x_ptr += n
        off = x_i[:, None] - x_k[None, :]
        total += off * off
    a = 0.5 * total
    high = a.to(tl.float32)
    low = (a - high.to(tl.float64)).to(tl.float32)
    # What float32 cannot hold is 0, as a distance in float32 is.
    r = tl.where(high > 0, 1.0 / tl.maximum(tl.sqrt(total), SMALLEST_NORM), 0.0).to(tl.float32)
    r = tl.where(high == high, r, high)
    here = (rows[:, None] < n) & (columns[None, :] < n)
    at, mirrored = rows[:, None] * n + columns[None, :], columns[None, :] * n + rows[:, None]
    tl.store(high_ptr + at, high, mask=here)
    tl.store(low_ptr + at, low, mask=here)
    tl.store(r_ptr + at, r, mask=here)
    tl.store(high_ptr + mirrored, high, mask=here)
    tl.store(low_ptr + mirrored, low, mask=here)
    tl.store(r_ptr + mirrored, r, mask=here)


@triton.jit
def _kept(keep_ptr, at, here):
    """Whether rows ``at`` count."""
    if keep_ptr is not None:
        here = here & (tl.load(keep_ptr + at, mask=here, other=0) != 0)
    return here


@triton.jit
def _weights(weight_ptr, at, here):
    """Weights of rows ``at``; 0 for those that do not count."""
    weight = here.to(tl.float32)
    if weight_ptr is not None:
        weight = tl.load(weight_ptr + at, mask=here, other=0.0)
    return weight


@triton.jit
def _inverse_mean(total, n_kept):
    """1 / mean over the pairs i != k of distances that sum to ``total``; 1 where that is 0."""
    pairs = tl.maximum(n_kept * (n_kept - 1.0), 1.0)
    return tl.where(total == 0, 1.0, pairs / tl.where(total == 0, 1.0, total)).to(tl.float32)


# Reads two matrices a side once: what follows from the distances of one row.
@triton.jit(do_not_specialize=SIZES)
def _rows_kernel(
    sum_s_ptr, sum_t_ptr, wide_ptr, high_s_ptr, r_s_ptr, high_t_ptr, r_t_ptr, keep_ptr, n, BLOCK: tl.constexpr
):  # fmt: skip
    """Sums of the distances from a row, and whether they differ by more than WIDE_RATIO."""
    row = tl.program_id(0).to(tl.int64)
    offset = row * n
    kept = _kept(keep_ptr, row, row < n)
    sum_s = tl.zeros([BLOCK], tl.float32)
    sum_t = tl.zeros([BLOCK], tl.float32)
    far_r_s = tl.full([BLOCK], float("inf"), tl.float32)
    far_r_t = tl.full([BLOCK], float("inf"), tl.float32)
    near_r = tl.zeros([BLOCK], tl.float32)
    near_r_t = tl.zeros([BLOCK], tl.float32)
    for start in range(0, n, BLOCK):
        k = start + tl.arange(0, BLOCK)
        here = _kept(keep_ptr, k, k < n) & kept
        sum_s += tl.sqrt_rn(2.0 * tl.load(high_s_ptr + offset + k, mask=here, other=0.0))
        sum_t += tl.sqrt_rn(2.0 * tl.load(high_t_ptr + offset + k, mask=here, other=0.0))
        r_s = tl.load(r_s_ptr + offset + k, mask=here, other=0.0)
        r_t = tl.load(r_t_ptr + offset + k, mask=here, other=0.0)
        near_r = tl.maximum(near_r, r_s)
        near_r_t = tl.maximum(near_r_t, r_t)
        far_r_s = tl.minimum(far_r_s, tl.where(r_s > 0, r_s, float("inf")))
        far_r_t = tl.minimum(far_r_t, tl.where(r_t > 0, r_t, float("inf")))
    wide = tl.max(near_r, axis=0) > WIDE_RATIO * tl.min(far_r_s, axis=0)
    wide = wide | (tl.max(near_r_t, axis=0) > WIDE_RATIO * tl.min(far_r_t, axis=0))
    tl.store(wide_ptr + row, wide.to(tl.int32))
    tl.store(sum_s_ptr + row, tl.sum(sum_s, axis=0))
    tl.store(sum_t_ptr + row, tl.sum(sum_t, axis=0))


@triton.jit
def _relative(high_s, high_t, inverse_s, inverse_t):
    """Relative distances of the student, and how far they are from the teacher's."""
    psi = tl.sqrt_rn(2.0 * high_s) * inverse_s
    return psi, psi - tl.sqrt_rn(2.0 * high_t) * inverse_t


# Reads one matrix a side once.
@triton.jit(do_not_specialize=SIZES)
def _distance_loss_kernel(
    loss_ptr, slope_ptr, high_s_ptr, high_t_ptr, total_s_ptr, total_t_ptr, kept_ptr, weight_ptr, n, BLOCK: tl.constexpr
):  # fmt: skip
    """Sums over k of w_i w_k h(e) and w_i w_k h'(e) psi_s of one row."""
    row = tl.program_id(0).to(tl.int64)
    inverse_s = _inverse_mean(tl.load(total_s_ptr), tl.load(kept_ptr))
    inverse_t = _inverse_mean(tl.load(total_t_ptr), tl.load(kept_ptr))
    w_i = _weights(weight_ptr, row, row < n)
    loss = tl.zeros([BLOCK], tl.float32)
    slope = tl.zeros([BLOCK], tl.float32)
    for start in range(0, n, BLOCK):
        k = start + tl.arange(0, BLOCK)
        here = k < n
        high_s = tl.load(high_s_ptr + row * n + k, mask=here, other=0.0)
        psi, e = _relative(high_s, tl.load(high_t_ptr + row * n + k, mask=here, other=0.0), inverse_s, inverse_t)
        g = _huber_slope(e)
        w = w_i * _weights(weight_ptr, k, here)
        loss += w * _huber(e, g)
        slope += w * g * psi
    tl.store(loss_ptr + row, tl.sum(loss, axis=0))
    tl.store(slope_ptr + row, tl.sum(slope, axis=0))


@triton.jit
def _cosine(a_ik, low_ik, a_i, low_i, a_k, low_k, r_i, r_k, WIDE: tl.constexpr):
    """cos of the angle at the apex between i (axis 0) and k (axis 1), from half squared distances."""
    off = a_k - a_ik
    if WIDE:
        # a_k - a_ik + a_i as if in twice the precision: what the first difference rounded away, and the low parts.
        lost = a_k - (off + a_ik)
        over_r = ((off + a_i) + (lost + ((low_k - low_ik) + low_i))) * r_i
    else:
        over_r = tl.fma(off, tl.broadcast_to(r_i, off.shape), tl.broadcast_to(a_i * r_i, off.shape))
    return over_r * r_k


@triton.jit
def _row_of(high_ptr, low_ptr, r_ptr, at, here, WIDE: tl.constexpr):
    a = tl.load(high_ptr + at, mask=here, other=0.0)
    r = tl.load(r_ptr + at, mask=here, other=0.0)
    low = tl.zeros_like(a)
    if WIDE:
        low = tl.load(low_ptr + at, mask=here, other=0.0)
    return a, low, r


@triton.jit
def _tile_of(high_ptr, low_ptr, at, here, WIDE: tl.constexpr):
    a = tl.load(high_ptr + at, mask=here, other=0.0)
    low = tl.zeros_like(a)
    if WIDE:
        low = tl.load(low_ptr + at, mask=here, other=0.0)
    return a, low


@triton.jit
def _apex_sums(
    high_s_ptr, low_s_ptr, r_s_ptr, high_t_ptr, low_t_ptr, r_t_ptr, weight_ptr, apex, i, n,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Sums over k of w_k g r_k, w_k g cos and w_k h at one apex, by row i."""
    row, here_i = apex * n, i < n
    a_i, low_i, r_i = _row_of(high_s_ptr, low_s_ptr, r_s_ptr, row + i, here_i, WIDE)
    b_i, below_i, q_i = _row_of(high_t_ptr, low_t_ptr, r_t_ptr, row + i, here_i, WIDE)
    sum_r = tl.zeros([ROWS, COLUMNS], tl.float32)
    sum_cos = tl.zeros([ROWS, COLUMNS], tl.float32)
    sum_h = tl.zeros([ROWS, COLUMNS], tl.float32)
    for start in range(0, n, COLUMNS):
        k = start + tl.arange(0, COLUMNS)
        here_k = k < n
        here = here_i[:, None] & here_k[None, :]
        at = i[:, None] * n + k[None, :]
        a_k, low_k, r_k = _row_of(high_s_ptr, low_s_ptr, r_s_ptr, row + k, here_k, WIDE)
        b_k, below_k, q_k = _row_of(high_t_ptr, low_t_ptr, r_t_ptr, row + k, here_k, WIDE)
        a_ik, low_ik = _tile_of(high_s_ptr, low_s_ptr, at, here, WIDE)
        b_ik, below_ik = _tile_of(high_t_ptr, low_t_ptr, at, here, WIDE)
        cos = _cosine(a_ik, low_ik, a_i[:, None], low_i[:, None], a_k[None, :], low_k[None, :], r_i[:, None],
                      r_k[None, :], WIDE)  # fmt: skip
        target = _cosine(b_ik, below_ik, b_i[:, None], below_i[:, None], b_k[None, :], below_k[None, :], q_i[:, None],
                         q_k[None, :], WIDE)  # fmt: skip
        e = cos - target
        g = _huber_slope(e)
        h = _huber(e, g)
        if weight_ptr is not None:
            w_k = tl.load(weight_ptr + k, mask=here_k, other=0.0)[None, :]
            g *= w_k
            h *= w_k
        sum_h += h
        sum_r = tl.fma(g, tl.broadcast_to(r_k[None, :], [ROWS, COLUMNS]), sum_r)
        sum_cos = tl.fma(g, cos, sum_cos)
    return tl.sum(sum_r, axis=1), tl.sum(sum_cos, axis=1), tl.sum(sum_h, axis=1), a_i, r_i


@triton.jit(do_not_specialize=SIZES)
def _apex_kernel(
    grad_ptr, loss_ptr, high_s_ptr, low_s_ptr, r_s_ptr, high_t_ptr, low_t_ptr, r_t_ptr, wide_ptr, weight_ptr,
    apexes_ptr, factor_ptr, n, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Row ``apex`` of the gradient with respect to the distances from it, and the loss of its angles, by block of i."""
    apex = tl.program_id(0).to(tl.int64)
    place = apex
    if apexes_ptr is not None:
        apex = tl.load(apexes_ptr + apex)
    i = tl.program_id(1).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    here = i < n
    if tl.load(wide_ptr + apex) != 0:
        sum_r, sum_cos, sum_h, a, r = _apex_sums(
            high_s_ptr, low_s_ptr, r_s_ptr, high_t_ptr, low_t_ptr, r_t_ptr, weight_ptr, apex, i, n, ROWS, COLUMNS, True
        )
    else:
        sum_r, sum_cos, sum_h, a, r = _apex_sums(
            high_s_ptr, low_s_ptr, r_s_ptr, high_t_ptr, low_t_ptr, r_t_ptr, weight_ptr, apex, i, n, ROWS, COLUMNS, False
        )
    w = _weights(weight_ptr, apex, apex < n) * _weights(weight_ptr, i, here)
    tl.store(loss_ptr + place * tl.num_programs(1) + tl.program_id(1), tl.sum(w * sum_h, axis=0))
    if grad_ptr is not None:
        bent = tl.where(2.0 * a < SMALLEST_NORM * SMALLEST_NORM, 0.0, r)  # at the limit r is constant
        g = w * (r * sum_r - bent * (bent * sum_cos)) * (2.0 * tl.load(factor_ptr))
        tl.store(grad_ptr + apex * n + i, g, mask=here)


@triton.jit
def _pair_term(
    high_s_ptr, low_s_ptr, r_s_ptr, high_t_ptr, low_t_ptr, r_t_ptr, weight_ptr, apex, a_ik, b_ik, i, k, n,
    WIDE: tl.constexpr,
):  # fmt: skip
    """w_j g r_i r_k at one apex."""
    row, here_i, here_k = apex * n, i < n, k < n
    a_i, low_i, r_i = _row_of(high_s_ptr, low_s_ptr, r_s_ptr, row + i, here_i, WIDE)
    b_i, below_i, q_i = _row_of(high_t_ptr, low_t_ptr, r_t_ptr, row + i, here_i, WIDE)
    a_k, low_k, r_k = _row_of(high_s_ptr, low_s_ptr, r_s_ptr, row + k, here_k, WIDE)
    b_k, below_k, q_k = _row_of(high_t_ptr, low_t_ptr, r_t_ptr, row + k, here_k, WIDE)
    low_ik = a_ik
    below_ik = b_ik
    if WIDE:
        at = i[:, None] * n + k[None, :]
        here = here_i[:, None] & here_k[None, :]
        low_ik = tl.load(low_s_ptr + at, mask=here, other=0.0)
        below_ik = tl.load(low_t_ptr + at, mask=here, other=0.0)
    cos = _cosine(a_ik, low_ik, a_i[:, None], low_i[:, None], a_k[None, :], low_k[None, :], r_i[:, None],
                  r_k[None, :], WIDE)  # fmt: skip
    target = _cosine(b_ik, below_ik, b_i[:, None], below_i[:, None], b_k[None, :], below_k[None, :], q_i[:, None],
                     q_k[None, :], WIDE)  # fmt: skip
    g = _huber_slope(cos - target)
    if weight_ptr is not None:
        g *= tl.load(weight_ptr + apex)
    return (g * r_i[:, None]) * r_k[None, :]


@triton.jit(do_not_specialize=SIZES)
def _pair_kernel(
    grad_ptr, from_apex_ptr, high_s_ptr, low_s_ptr, r_s_ptr, high_t_ptr, low_t_ptr, r_t_ptr, wide_ptr, weight_ptr,
    apexes_ptr, angle_ptr, total_s_ptr, total_t_ptr, kept_ptr, keep_ptr, distance_ptr, slope_ptr, n, apexes,
    BLOCK: tl.constexpr, ANGLE: tl.constexpr, DISTANCE: tl.constexpr,
):  # fmt: skip
    """Tile (i, k), i <= k, of the whole gradient with respect to the half squared distances, and its mirror image."""
    if tl.program_id(0) > tl.program_id(1):
        return
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    k = tl.program_id(1).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    here = (i[:, None] < n) & (k[None, :] < n)
    at, mirrored = i[:, None] * n + k[None, :], k[None, :] * n + i[:, None]
    a_ik = tl.load(high_s_ptr + at, mask=here, other=0.0)
    b_ik = tl.load(high_t_ptr + at, mask=here, other=0.0)
    w = _weights(weight_ptr, i, i < n)[:, None] * _weights(weight_ptr, k, k < n)[None, :]
    grad = tl.zeros([BLOCK, BLOCK], tl.float32)
    if ANGLE:
        zero = tl.program_id(0).to(tl.int64) * 0  # the loop counts in 32 bits, rows are addressed in 64
        for m in range(apexes):
            apex = zero + m
            if apexes_ptr is not None:
                apex = tl.load(apexes_ptr + apex)
            if tl.load(wide_ptr + apex) != 0:
                grad += _pair_term(
                    high_s_ptr, low_s_ptr, r_s_ptr, high_t_ptr, low_t_ptr, r_t_ptr, weight_ptr, apex, a_ik, b_ik, i, k,
                    n, True,
                )  # fmt: skip
            else:
                grad += _pair_term(
                    high_s_ptr, low_s_ptr, r_s_ptr, high_t_ptr, low_t_ptr, r_t_ptr, weight_ptr, apex, a_ik, b_ik, i, k,
                    n, False,
                )  # fmt: skip
        grad *= w * (-2.0 * tl.load(angle_ptr))
        grad += tl.load(from_apex_ptr + at, mask=here, other=0.0)
        grad += tl.load(from_apex_ptr + mirrored, mask=here, other=0.0)
    if DISTANCE:
        kept = tl.load(kept_ptr)
        inverse_s = _inverse_mean(tl.load(total_s_ptr), kept)
        _, e = _relative(a_ik, b_ik, inverse_s, _inverse_mean(tl.load(total_t_ptr), kept))
        share = (tl.load(slope_ptr) / tl.maximum(kept * (kept - 1.0), 1.0)).to(tl.float32)
        counted = _kept(keep_ptr, i, i < n)[:, None] & _kept(keep_ptr, k, k < n)[None, :]
        d = tl.sqrt_rn(2.0 * a_ik)
        inverse = tl.where(d == 0, 0.0, 1.0 / tl.where(d == 0, 1.0, d))
        term = (w * _huber_slope(e) - share) * (2.0 * inverse_s * tl.load(distance_ptr)) * inverse
        grad += tl.where(counted, term, 0.0)
    tl.store(grad_ptr + at, grad, mask=here)
    # A tile on the diagonal has both orders of its pairs already, and not to the same bit.
    tl.store(grad_ptr + mirrored, grad, mask=here & (tl.program_id(0) != tl.program_id(1)))


# Reads the gradient of the pairs once for each block of features. N^2 D differences and FMAs.
@triton.jit(do_not_specialize=SIZES)
def _pull_kernel(out_ptr, grad_ptr, x_ptr, n, d, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    """out_i = sum_k grad_ik (x_i - x_k), of x (n, d); grad is symmetric, so its row k is read."""
    i = tl.program_id(1).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    features = tl.program_id(0) * WIDTH + tl.arange(0, WIDTH)
    here = (i[:, None] < n) & (features[None, :] < d)
    at = i[:, None] * d + features[None, :]
    x_i = tl.load(x_ptr + at, mask=here, other=0.0)
    total = tl.zeros([ROWS, WIDTH], tl.float32)
    for _ in range(n):
        g = tl.load(grad_ptr + i, mask=i < n, other=0.0)
        x_k = tl.load(x_ptr + features, mask=features < d, other=0.0)
        grad_ptr += n
        x_ptr += d
        total = tl.fma(tl.broadcast_to(g[:, None], [ROWS, WIDTH]), x_i - x_k[None, :], total)
    tl.store(out_ptr + at, total, mask=here)


# Tiles, unmeasured: 8 or 16 elements a thread, whose sums, operands and 64-bit addresses fit in its registers.
DISTANCE_BLOCK, ROW_BLOCK = 64, 1024
APEX_ROWS, APEX_COLUMNS = 32, 32
PAIR_BLOCK = 32
PULL_ROWS, PULL_WIDTH = 32, 32
# Sums of a difference and what it lost are the point of the wide cosines; tl.fma stands where one is wanted.
FUSION = {"enable_fp_fusion": False}
OPTIONS: dict[str, dict[str, Any]] = {
    "_distances_kernel": {"num_warps": 8, **FUSION},
    "_rows_kernel": {"num_warps": 4, **FUSION},
    "_distance_loss_kernel": {"num_warps": 4, **FUSION},
    "_apex_kernel": {"num_warps": 4, **FUSION},
    "_pair_kernel": {"num_warps": 4, **FUSION},
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
    any_loss = angle_weight != 0 or distance_weight != 0
    make = torch.empty if any_loss else torch.zeros  # the last kernel writes all of it
    grad = make(student.shape if needs_grad else (0,), dtype=torch.float32, device=device)
    if n == 0:
        return grad.new_zeros(()), grad
    x_student, x_teacher = (_rows(x, mask) for x in (student, teacher))
    keep = None if mask is None else mask.contiguous().view(torch.uint8)
    weight = None if row_weight is None else row_weight.float()
    if mask is not None:
        weight = mask.float() if weight is None else weight.masked_fill(~mask, 0.0)
    number = float(n) if mask is None else mask.sum().double()  # of the rows that count
    kept = _scalar(number, torch.float64, device)

    with torch.cuda.device_of(student):
        of_student, of_teacher = _pairs(x_student), _pairs(x_teacher)
        # Two tensors: the second half of one would begin anywhere.
        sums = [torch.empty(n, dtype=torch.float32, device=device) for _ in range(2)]
        wide = torch.empty(n, dtype=torch.int32, device=device)
        _rows_kernel[(n,)](
            *sums, wide, of_student[0], of_student[2], of_teacher[0], of_teacher[2], keep, n,
            BLOCK=ROW_BLOCK, **OPTIONS["_rows_kernel"],
        )  # fmt: skip
        matrices = (*of_student, *of_teacher)
        losses = []
        chosen = n if apexes is None else apexes.numel()
        from_apex = None
        if angle_weight != 0:
            if needs_grad:
                make = torch.empty if apexes is None else torch.zeros  # a row for each apex is written
                from_apex = make(n, n, dtype=torch.float32, device=device)
            count = number
            if apexes is not None:
                count = float(chosen) if mask is None else mask[apexes].sum().double()
            count = _at_least_1(count)
            angle = angle_weight / (count * _at_least_1(number * number)) if mean else angle_weight * number / count
            angle_factor = _scalar(angle, torch.float32, device)
            blocks = cdiv(n, APEX_ROWS)
            values = torch.empty(chosen, blocks, dtype=torch.float32, device=device)
            _apex_kernel[(chosen, blocks)](
                from_apex, values, *matrices, wide, weight, apexes, angle_factor, n,
                ROWS=APEX_ROWS, COLUMNS=APEX_COLUMNS, **OPTIONS["_apex_kernel"],
            )  # fmt: skip
            losses.append(angle * values.sum(dtype=torch.float64))
        else:
            angle_factor = _scalar(0.0, torch.float32, device)  # not read
        totals, slope, distance_factor = [kept, kept], kept, angle_factor  # not read without distances
        if distance_weight != 0:
            totals = [side.sum(dtype=torch.float64) for side in sums]
            distance = distance_weight / _at_least_1(number * number) if mean else distance_weight
            distance_factor = _scalar(distance, torch.float32, device)
            values, slopes = (torch.empty(n, dtype=torch.float32, device=device) for _ in range(2))
            _distance_loss_kernel[(n,)](
                values, slopes, of_student[0], of_teacher[0], *totals, kept, weight, n,
                BLOCK=ROW_BLOCK, **OPTIONS["_distance_loss_kernel"],
            )  # fmt: skip
            losses.append(distance * values.sum(dtype=torch.float64))
            slope = slopes.sum(dtype=torch.float64)
        if needs_grad and any_loss:
            pairs = torch.empty(n, n, dtype=torch.float32, device=device)
            blocks = cdiv(n, PAIR_BLOCK)
            _pair_kernel[(blocks, blocks)](
                pairs, from_apex, *matrices, wide, weight, apexes, angle_factor, *totals, kept, keep, distance_factor,
                slope, n, chosen, BLOCK=PAIR_BLOCK, ANGLE=angle_weight != 0, DISTANCE=distance_weight != 0,
                **OPTIONS["_pair_kernel"],
            )  # fmt: skip
            d = x_student.shape[1]
            if d > 0:
                grid = (cdiv(d, PULL_WIDTH), cdiv(n, PULL_ROWS))  # x alone may have more than 65535
                _pull_kernel[grid](
                    grad, pairs, x_student, n, d, ROWS=PULL_ROWS, WIDTH=PULL_WIDTH, **OPTIONS["_pull_kernel"]
                )
        loss = sum(losses[1:], start=losses[0]) if losses else torch.zeros_like(kept)
    return loss.float(), grad


def _at_least_1(count: Tensor | float) -> Tensor | float:
    return count.clamp(min=1) if isinstance(count, Tensor) else max(count, 1.0)


def _scalar(value: Tensor | float, dtype: torch.dtype, device: torch.device) -> Tensor:
    """``value`` on the device: a number that the host knows is one launch there, and nothing to compute."""
    return value.to(dtype) if isinstance(value, Tensor) else torch.full((), value, dtype=dtype, device=device)


def _rows(x: Tensor, mask: Tensor | None) -> Tensor:
    """(N, D) float32, contiguous, rows that do not count at 0."""
    x = x.float()
    return (x if mask is None else x.masked_fill(~mask.unsqueeze(1), 0.0)).contiguous()


def _pairs(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """high, low and r of all pairs of rows."""
    n, d = x.shape
    high, low, r = (torch.empty(n, n, dtype=torch.float32, device=x.device) for _ in range(3))
    blocks = cdiv(n, DISTANCE_BLOCK)
    transposed = x.t().contiguous()
    _distances_kernel[(blocks, blocks)](
        high, low, r, transposed, n, d, BLOCK=DISTANCE_BLOCK, **OPTIONS["_distances_kernel"]
    )
    return high, low, r
