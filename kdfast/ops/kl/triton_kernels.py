"""Triton kernels of ``torch.ops.kdfast.kl`` and their launchers: every loss on full rows of logits.

Imported when the first tensor on a GPU shows up: the package itself needs no Triton.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from kdfast import backends
from kdfast.ops.autograd import REDUCTIONS
from kdfast.ops.kl.function import KINDS
from kdfast.ops.rows import Rows, rows_of
from kdfast.ops.sizes import cdiv

FORWARD = tl.constexpr(KINDS["forward"])
REVERSE = tl.constexpr(KINDS["reverse"])
JS = tl.constexpr(KINDS["js"])
DKD = tl.constexpr(KINDS["dkd"])
STANDARDIZED = tl.constexpr(KINDS["standardized"])

LN2 = tl.constexpr(math.log(2))
LOG2E = tl.constexpr(1 / math.log(2))
INFINITY = tl.constexpr(float("inf"))
SMALLEST_NORMAL = tl.constexpr(2.0**-126)
EPS = tl.constexpr(1e-7)  # added to a standard deviation


# One program takes one long row in tiles, more than once (it is in L2 then), or a few short rows at once.
#
# Reads student and teacher, writes the gradient. Floor: 3 * V * itemsize bytes a row (2 without a gradient), beside
# 4 bytes of loss and at most 17 of label, mask and weight. A row in one tile moves just that. A row in several is read
# again, from L2 as far as it fits: the tiles come back in reverse, so that what does not is what was read longest ago.
#
#   special-function operations an element    one tile    several tiles     reads in several tiles
#   forward, dkd                              2           4                 2
#   forward with cross-entropy                2 or 3      4 or 6            2  (the lower one: T is 1, 2 or 4)
#   reverse                                   2           3                 2
#   js                                        3           8                 3  (sum_v p_s log(p_s / m) comes first)
#   standardized                              2           4                 3  (the deviations come first)
#   without a gradient                        the same    2 (3, js 5)       one less
#
# y = logit * log2(e) / T - shift is one fma and e = exp2(y). The product may be 1e5 and more, but an fma rounds only
# what is left of it, so y is as exact as (logit - maximum) / T up to the rounding of shift, which all classes of the
# row share and the normaliser cancels: provided that shift is the same number wherever it stands. Hence no product is
# contracted into an fma but those written as one (enable_fp_fusion=False).
#
# Tiles are (A, B) and sums run over B. Short rows: A rows of V <= B classes. Long rows: A lanes of B neighbouring
# elements, as many as a thread loads at once, so that threads exchange nothing in the loop: a lane keeps its own
# maximum and sums, and lanes are merged once a row. What belongs to rows has shape (R,), R = 1 for long rows.
@triton.jit(do_not_specialize=["rows"])  # another batch size is not another kernel
def _kl_kernel(
    student_ptr, student_split, student_outer, student_inner,  # row r: (r // split) * outer + (r % split) * inner
    teacher_ptr, teacher_split, teacher_outer, teacher_inner,
    grad_ptr, grad_split, grad_outer, grad_inner,  # None: no gradient
    loss_ptr,  # float32, one a row
    labels_ptr, mask_ptr, weight_ptr, count_factor_ptr,  # None where there is none
    rows, classes,
    factor,  # log2(e) / T
    scale, slope,  # of the divergence; of its gradient: scale / T
    weight,  # of every row
    alpha, beta, ce_weight, label_smoothing, ignore_index,
    KIND: tl.constexpr,
    HARD: tl.constexpr,  # FORWARD with cross-entropy; labels None: the teacher's argmax
    POWER: tl.constexpr,  # T where it is 1, 2 or 4, so that exp(x) is a power of exp(x / T), else 0
    SMOOTH: tl.constexpr,
    NVIDIA: tl.constexpr,  # its instruction for log2 may be named
    ONE_TILE: tl.constexpr,
    A: tl.constexpr,
    B: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)  # rows begin beyond 2^31 elements
    R: tl.constexpr = A if ONE_TILE else 1
    row = program * R + tl.arange(0, R)
    inside = row < rows
    keep = inside
    if mask_ptr is not None:
        keep = keep & (tl.load(mask_ptr + row, mask=inside, other=0) != 0)
    label = tl.zeros([R], tl.int64)
    if labels_ptr is not None:
        label = tl.load(labels_ptr + row, mask=inside, other=0)
        keep = keep & (label != ignore_index)

    student = student_ptr + ((row // student_split) * student_outer + (row % student_split) * student_inner)[:, None]
    teacher = teacher_ptr + ((row // teacher_split) * teacher_outer + (row % teacher_split) * teacher_inner)[:, None]
    grad = student
    if grad_ptr is not None:
        grad = grad_ptr + ((row // grad_split) * grad_outer + (row % grad_split) * grad_inner)[:, None]
    kept = keep[:, None]

    if ONE_TILE:
        columns = tl.arange(0, B)[None, :]
        present = kept & (columns < classes)  # a row that does not count is not read
    else:
        columns = tl.arange(0, A)[:, None] * B + tl.arange(0, B)[None, :]
        if tl.max(keep.to(tl.int32), axis=0) == 0:
            tl.store(loss_ptr + row, tl.zeros([1], tl.float32))
            if grad_ptr is not None:
                for start in range(0, classes, A * B):
                    tl.store(grad + (start + columns), tl.zeros([A, B], tl.float32), mask=start + columns < classes)
            return
    tiles = tl.cdiv(classes, A * B)

    weights = tl.zeros([R], tl.float32) + weight
    if weight_ptr is not None:
        weights *= tl.load(weight_ptr + row, mask=keep, other=0.0).to(tl.float32)
    if count_factor_ptr is not None:
        weights *= tl.load(count_factor_ptr)

    # An element to read the others relative to: constant rows then give exactly 0, and an offset costs no digits.
    pivot_s = tl.zeros([R], tl.float32)[:, None]
    pivot_t = pivot_s
    if SMOOTH or KIND == STANDARDIZED:
        pivot_s = tl.load(student, mask=kept, other=0.0).to(tl.float32)
        pivot_t = tl.load(teacher, mask=kept, other=0.0).to(tl.float32)
        if SMOOTH:
            pivot_s = tl.where(pivot_s == -INFINITY, 0.0, pivot_s)

    # What a logit is multiplied with before anything else: 1 / (deviation + eps) where it is standardized.
    stretch_s = tl.full([R], 1.0, tl.float32)[:, None]
    stretch_t = stretch_s
    centre = tl.zeros([R], tl.float32)
    deviation = tl.zeros([R], tl.float32)
    if KIND == STANDARDIZED:
        mean, squares_s, squares_t = _moments(
            student, teacher, columns, keep, pivot_s, pivot_t, classes, ONE_TILE, A, B
        )
        degrees = tl.maximum(classes - 1, 1).to(tl.float32)
        deviation = tl.sqrt_rn(squares_s / degrees)
        stretch_s = (1.0 / (deviation + EPS))[:, None]
        stretch_t = (1.0 / (tl.sqrt_rn(squares_t / degrees) + EPS))[:, None]
        centre = mean / (deviation + EPS)

    # --- sums
    largest_s = tl.full([A], -INFINITY, tl.float32)
    largest_t = tl.full([A], -INFINITY, tl.float32)
    best = tl.zeros([A], tl.int32)
    sum_s = tl.zeros([A], tl.float32)
    sum_t = tl.zeros([A], tl.float32)
    cross = tl.zeros([A], tl.float32)
    along_s = tl.zeros([A], tl.float32)
    along_t = tl.zeros([A], tl.float32)
    hard = tl.zeros([A], tl.float32)
    logits = tl.zeros([A], tl.float32)
    if ONE_TILE:
        s = _read(student, columns, present, pivot_s, stretch_s, KIND, "evict_first")
        t = _read(teacher, columns, present, pivot_t, stretch_t, KIND, "evict_first")
        largest_s, largest_t, best, sum_s, sum_t, cross, along_s, along_t, hard, logits = _with_tile(
            largest_s, largest_t, best, sum_s, sum_t, cross, along_s, along_t, hard, logits,
            s, t, columns, present, label, pivot_s, factor, KIND, HARD, POWER, SMOOTH, labels_ptr is None,
        )  # fmt: skip
    else:
        for tile in range(0, tiles):
            here = tile * (A * B) + columns
            s = _read(student, here, here < classes, pivot_s, stretch_s, KIND, "evict_last")
            t = _read(teacher, here, here < classes, pivot_t, stretch_t, KIND, "evict_last")
            largest_s, largest_t, best, sum_s, sum_t, cross, along_s, along_t, hard, logits = _with_tile(
                largest_s, largest_t, best, sum_s, sum_t, cross, along_s, along_t, hard, logits,
                s, t, here, here < classes, label, pivot_s, factor, KIND, HARD, POWER, SMOOTH, labels_ptr is None,
            )  # fmt: skip
        # Lanes to the row: what had shape (A,) gets shape (1,).
        top_s = tl.max(largest_s, axis=0, keep_dims=True)
        top_t = tl.max(largest_t, axis=0, keep_dims=True)
        best = tl.min(tl.where(largest_t == top_t, best, classes), axis=0, keep_dims=True)
        sum_s, sum_t, cross, along_s, along_t, hard = _moved(
            sum_s, sum_t, cross, along_s, along_t, hard,
            largest_s, largest_t, top_s, top_t, factor, KIND, HARD, POWER,
        )  # fmt: skip
        largest_s = top_s
        largest_t = top_t
        sum_s = tl.sum(sum_s, axis=0, keep_dims=True)
        sum_t = tl.sum(sum_t, axis=0, keep_dims=True)
        cross = tl.sum(cross, axis=0, keep_dims=True)
        along_s = tl.sum(along_s, axis=0, keep_dims=True)
        along_t = tl.sum(along_t, axis=0, keep_dims=True)
        hard = tl.sum(hard, axis=0, keep_dims=True)
        logits = tl.sum(logits, axis=0, keep_dims=True)
    shift_s = _shift(largest_s, factor)
    shift_t = _shift(largest_t, factor)
    hard_shift = _hard_shift(largest_s, factor, POWER)
    log_s = tl.log2(sum_s)
    log_t = tl.log2(sum_t)

    label_s = tl.zeros([R], tl.float32)
    label_t = tl.zeros([R], tl.float32)
    if HARD or KIND == DKD:
        if labels_ptr is None:
            label = best.to(tl.int64)
            label = tl.where(label < classes, label, 0)  # NaN has no largest class: its loss is NaN with any
        # A label that is no class reads nothing and makes its row NaN.
        valid = (keep & (label >= 0) & (label < classes))[:, None]
        label_s = tl.sum(tl.load(student + label[:, None], mask=valid, other=float("nan")).to(tl.float32), axis=1)
        label_t = tl.sum(tl.load(teacher + label[:, None], mask=valid, other=float("nan")).to(tl.float32), axis=1)

    # --- the loss, and what the gradient needs of the row
    slopes = slope * weights
    k_s = slopes / sum_s
    k_t = slopes / sum_t
    k_hard = ce_weight * weights / hard
    middle = tl.zeros([R], tl.float32)  # reverse, js: the mean of the logarithm that stands in the gradient
    floor = tl.zeros([R], tl.float32)  # hard: of every class
    at_label = tl.zeros([R], tl.float32)  # hard: added at the label; dkd: the gradient there
    along = tl.zeros([R], tl.float32)  # standardized: what the deviation takes away, along the logits
    if KIND == REVERSE:
        # p_s (log p_s - log p_t - KL), where the normalisers in the logarithms and in KL cancel
        middle = cross / sum_s
        divergence = (middle + (log_t - log_s)) * LN2
        k_s *= LN2
    elif KIND == JS:
        if ONE_TILE:
            from_s, from_t = _mixture_sums(s, t, factor, shift_s, shift_t, sum_s, sum_t, log_s, log_t, beta, NVIDIA)
        else:
            from_s = tl.zeros([A], tl.float32)
            from_t = tl.zeros([A], tl.float32)
            for step in range(0, tiles):
                here = (tiles - 1 - step) * (A * B) + columns
                s = _read(student, here, here < classes, pivot_s, stretch_s, KIND, "evict_last")
                t = _read(teacher, here, here < classes, pivot_t, stretch_t, KIND, "evict_last")
                more_s, more_t = _mixture_sums(s, t, factor, shift_s, shift_t, sum_s, sum_t, log_s, log_t, beta, NVIDIA)
                from_s += more_s
                from_t += more_t
            from_s = tl.sum(from_s, axis=0, keep_dims=True)
            from_t = tl.sum(from_t, axis=0, keep_dims=True)
        middle = from_s
        divergence = (beta * from_t + (1 - beta) * from_s) * LN2
        k_s = slopes * ((1 - beta) * LN2)
    elif KIND == DKD:
        divergence, k_s, k_t, at_label = _decoupled(
            label_s, label_t, factor, shift_s, shift_t, sum_s, sum_t, log_s, log_t, cross, slopes, alpha, beta
        )
    else:
        divergence = (cross / sum_t + (log_s - log_t)) * LN2
    if KIND == STANDARDIZED:
        # z = (x - mean) / (deviation + eps). The mean takes nothing away, as dL/dz sums to 0; the deviation takes
        # sum_v dL/dz_v z_v, times (x - mean) / (degrees * deviation * (deviation + eps)).
        along = scale * weights * LN2 * (along_s / sum_s - along_t / sum_t)
        constant = deviation == 0
        along = tl.where(constant, 0.0, along / (degrees * deviation))
        stretch = 1.0 / (deviation + EPS)
        k_s = tl.where(constant, 0.0, k_s * stretch)
        k_t = tl.where(constant, 0.0, k_t * stretch)
    # A weight of 0 leaves the divergence out, also where it is infinite.
    value = tl.where(scale == 0, 0.0, scale * divergence)
    if HARD:
        cross_entropy = _cross_entropy(
            label_s, largest_s, hard, hard_shift, logits, pivot_s, classes, label_smoothing, SMOOTH
        )
        at_label = -ce_weight * (1 - label_smoothing) * weights
        if SMOOTH:
            floor = -ce_weight * label_smoothing / classes * weights
        value += ce_weight * cross_entropy
    tl.store(loss_ptr + row, tl.where(keep, value * weights, 0.0), mask=inside)

    # --- the gradient
    if grad_ptr is not None:
        # It may overwrite the student, of which by now every thread has its label's logit.
        tl.debug_barrier()
        if ONE_TILE:
            g = _gradient(
                s, t, columns, label, factor, shift_s, shift_t, hard_shift, sum_s, sum_t, log_s, log_t, beta, NVIDIA,
                k_s, k_t, k_hard, middle, floor, at_label, along, centre, KIND, HARD, POWER,
            )  # fmt: skip
            tl.store(grad + columns, tl.where(keep[:, None], g, 0.0), mask=inside[:, None] & (columns < classes))
        else:
            for step in range(0, tiles):
                here = (tiles - 1 - step) * (A * B) + columns
                s = _read(student, here, here < classes, pivot_s, stretch_s, KIND, "evict_first")
                t = _read(teacher, here, here < classes, pivot_t, stretch_t, KIND, "evict_first")
                g = _gradient(
                    s, t, here, label, factor, shift_s, shift_t, hard_shift, sum_s, sum_t, log_s, log_t, beta, NVIDIA,
                    k_s, k_t, k_hard, middle, floor, at_label, along, centre, KIND, HARD, POWER,
                )  # fmt: skip
                tl.store(grad + here, g, mask=here < classes, eviction_policy="evict_first")


@triton.jit
def _read(base, columns, present, pivot, stretch, KIND: tl.constexpr, EVICTION: tl.constexpr):
    """A tile, widened before any arithmetic; -inf beyond the row, which adds 0 to every sum of exponentials."""
    x = tl.load(base + columns, mask=present, other=-INFINITY, eviction_policy=EVICTION).to(tl.float32)
    if KIND == STANDARDIZED:
        x = (x - pivot) * stretch
    return x


@triton.jit
def _shift(largest, factor):
    """What brings the largest y to about 0; 0 where there is no logit above -inf, so that differences are defined."""
    return tl.where(largest == -INFINITY, 0.0, largest * factor)


@triton.jit
def _hard_shift(largest, factor, POWER: tl.constexpr):
    """The same at T = 1."""
    if POWER == 0:
        return _shift(largest, LOG2E)
    return _shift(largest, factor) * POWER


@triton.jit
def _softened(x, factor, shift):
    y = tl.fma(x, factor, -shift[:, None])
    return y, tl.exp2(y)


@triton.jit
def _hard_exponential(s, e_s, hard_shift, POWER: tl.constexpr):
    if POWER == 0:
        e = tl.exp2(tl.fma(s, LOG2E, -hard_shift[:, None]))
    else:
        e = e_s
        if POWER > 1:
            e = e * e
        if POWER > 2:
            e = e * e
    return e


@triton.jit
def _with_tile(
    largest_s, largest_t, best, sum_s, sum_t, cross, along_s, along_t, hard, logits,
    s, t, columns, present, label, pivot_s, factor,
    KIND: tl.constexpr, HARD: tl.constexpr, POWER: tl.constexpr, SMOOTH: tl.constexpr, NO_LABELS: tl.constexpr,
):  # fmt: skip
    """The sums of each row or lane after one more tile.

    cross is sum e_t (y_t - y_s), reverse: sum e_s (y_s - y_t); along: sum e y_s; an e of 0 adds 0 whatever y is.
    """
    if KIND == DKD:  # the others' softmax: the label has no mass in it
        s = tl.where(columns == label[:, None], -INFINITY, s)
        t = tl.where(columns == label[:, None], -INFINITY, t)
    tile_t = tl.max(t, axis=1)
    new_s = tl.maximum(largest_s, tl.max(s, axis=1))
    new_t = tl.maximum(largest_t, tile_t)
    if HARD and NO_LABELS:
        first = tl.min(tl.where(t == tile_t[:, None], columns, 2147483647), axis=1)
        best = tl.where(tile_t > largest_t, first, best)
    sum_s, sum_t, cross, along_s, along_t, hard = _moved(
        sum_s, sum_t, cross, along_s, along_t, hard, largest_s, largest_t, new_s, new_t, factor, KIND, HARD, POWER
    )
    y_s, e_s = _softened(s, factor, _shift(new_s, factor))
    y_t, e_t = _softened(t, factor, _shift(new_t, factor))
    sum_s += tl.sum(e_s, axis=1)
    sum_t += tl.sum(e_t, axis=1)
    if KIND == REVERSE:
        cross += tl.sum(tl.where(e_s == 0, 0.0, e_s * (y_s - y_t)), axis=1)
    elif KIND != JS:
        cross += tl.sum(tl.where(e_t == 0, 0.0, e_t * (y_t - y_s)), axis=1)
    if KIND == STANDARDIZED:
        along_s += tl.sum(tl.where(e_s == 0, 0.0, e_s * y_s), axis=1)
        along_t += tl.sum(tl.where(e_t == 0, 0.0, e_t * y_s), axis=1)
    if HARD:
        hard += tl.sum(_hard_exponential(s, e_s, _hard_shift(new_s, factor, POWER), POWER), axis=1)
    if SMOOTH:
        logits += tl.sum(tl.where(present, s - pivot_s, 0.0), axis=1)
    return new_s, new_t, best, sum_s, sum_t, cross, along_s, along_t, hard, logits


@triton.jit
def _moved(
    sum_s, sum_t, cross, along_s, along_t, hard, from_s, from_t, to_s, to_t, factor,
    KIND: tl.constexpr, HARD: tl.constexpr, POWER: tl.constexpr,
):  # fmt: skip
    """Sums relative to the maxima ``from``, brought to the maxima ``to``, which are not smaller."""
    d_s = _shift(from_s, factor) - _shift(to_s, factor)
    d_t = _shift(from_t, factor) - _shift(to_t, factor)
    # Only a sum without a finite logit, which is 0, moves up: it must not meet an infinite power.
    f_s = tl.exp2(tl.minimum(d_s, 0.0))
    f_t = tl.exp2(tl.minimum(d_t, 0.0))
    # A sum may be infinite where its factor is 0.
    if KIND == REVERSE:
        cross = tl.where(f_s == 0, 0.0, f_s * (cross + sum_s * (d_s - d_t)))
    elif KIND != JS:
        cross = tl.where(f_t == 0, 0.0, f_t * (cross + sum_t * (d_t - d_s)))
    if KIND == STANDARDIZED:
        along_s = f_s * (along_s + sum_s * d_s)
        along_t = f_t * (along_t + sum_t * d_s)
    if HARD:
        d_hard = _hard_shift(from_s, factor, POWER) - _hard_shift(to_s, factor, POWER)
        hard = hard * tl.exp2(tl.minimum(d_hard, 0.0))
    return f_s * sum_s, f_t * sum_t, cross, along_s, along_t, hard


@triton.jit
def _mixed(s, t, factor, shift_s, shift_t, sum_s, sum_t, log_s, log_t, beta, NVIDIA: tl.constexpr):
    """p_s, log2(p_s / m), p_t, log2(p_t / m) for the mixture m; the logarithms are 0 where the p in front is."""
    y_s, e_s = _softened(s, factor, shift_s)
    y_t, e_t = _softened(t, factor, shift_t)
    p_s = e_s * (1.0 / sum_s)[:, None]
    p_t = e_t * (1.0 / sum_t)[:, None]
    m = tl.fma(p_t, beta, p_s * (1 - beta))
    if NVIDIA:  # tl.log2 is some twenty instructions there; this is one, within 2^-22
        log_m = tl.inline_asm_elementwise("lg2.approx.ftz.f32 $0, $1;", "=f,f", [m], tl.float32, True, 1)
    else:
        log_m = tl.log2(m)
    absent = m < SMALLEST_NORMAL  # its logarithm may be that of 0
    ratio_s = tl.where(absent | (p_s == 0), 0.0, (y_s - log_s[:, None]) - log_m)
    ratio_t = tl.where(absent | (p_t == 0), 0.0, (y_t - log_t[:, None]) - log_m)
    return p_s, ratio_s, p_t, ratio_t


@triton.jit
def _mixture_sums(s, t, factor, shift_s, shift_t, sum_s, sum_t, log_s, log_t, beta, NVIDIA: tl.constexpr):
    p_s, ratio_s, p_t, ratio_t = _mixed(s, t, factor, shift_s, shift_t, sum_s, sum_t, log_s, log_t, beta, NVIDIA)
    return tl.sum(p_s * ratio_s, axis=1), tl.sum(p_t * ratio_t, axis=1)


@triton.jit
def _gradient(
    s, t, columns, label, factor, shift_s, shift_t, hard_shift, sum_s, sum_t, log_s, log_t, beta, NVIDIA,
    k_s, k_t, k_hard, middle, floor, at_label, along, centre,
    KIND: tl.constexpr, HARD: tl.constexpr, POWER: tl.constexpr,
):  # fmt: skip
    """A tile of the gradient. Where the sums were made of this same tile, the compiler sees that e exists already."""
    if KIND == JS:
        p_s, ratio_s, _, _ = _mixed(s, t, factor, shift_s, shift_t, sum_s, sum_t, log_s, log_t, beta, NVIDIA)
        return p_s * k_s[:, None] * (ratio_s - middle[:, None])
    if KIND == DKD:
        s = tl.where(columns == label[:, None], -INFINITY, s)
        t = tl.where(columns == label[:, None], -INFINITY, t)
    y_s, e_s = _softened(s, factor, shift_s)
    if KIND == REVERSE:
        y_t = tl.fma(t, factor, -shift_t[:, None])
        return tl.where(e_s == 0, 0.0, e_s * k_s[:, None] * ((y_s - y_t) - middle[:, None]))
    y_t, e_t = _softened(t, factor, shift_t)
    g = e_s * k_s[:, None] - e_t * k_t[:, None]  # not an fma: equal rows give exactly 0
    if KIND == DKD:
        g = tl.where(columns == label[:, None], at_label[:, None], g)
    if KIND == STANDARDIZED:
        g -= along[:, None] * (s - centre[:, None])
    if HARD:
        g += _hard_exponential(s, e_s, hard_shift, POWER) * k_hard[:, None] + floor[:, None]
        g += tl.where(columns == label[:, None], at_label[:, None], 0.0)
    return g


@triton.jit
def _decoupled(
    label_s, label_t, factor, shift_s, shift_t, sum_s, sum_t, log_s, log_t, cross, slopes, alpha, beta
):  # fmt: skip
    """The divergence of dkd; what e_s and e_t are multiplied with in its gradient; the gradient at the label."""
    # The label against all others together: a sigmoid of u, in units of log2.
    u_s = tl.fma(label_s, factor, -shift_s) - log_s
    u_t = tl.fma(label_t, factor, -shift_t) - log_t
    target = _sigmoid_term(u_t, u_s) + _sigmoid_term(-u_t, -u_s)
    others = cross / sum_t + (log_s - log_t)
    others = tl.where(sum_s == 0, INFINITY, others)  # no mass outside the label: infinitely far,
    others = tl.where(sum_t == 0, 0.0, others)  # or nothing to be far from
    divergence = (alpha * target + beta * others) * LN2
    # p_s - p_t, from p or from 1 - p, whichever are small
    near_one = (u_s > 0) & (u_t > 0)
    difference = tl.where(near_one, _sigmoid(-u_t) - _sigmoid(-u_s), _sigmoid(u_s) - _sigmoid(u_t))
    at_label = slopes * alpha * difference
    slopes = tl.where(sum_t == 0, 0.0, slopes * beta)
    k_s = tl.where(sum_s == 0, 0.0, (slopes - at_label) / sum_s)
    k_t = tl.where(sum_t == 0, 0.0, slopes / sum_t)
    return divergence, k_s, k_t, at_label


@triton.jit
def _cross_entropy(
    label_s, largest_s, hard, hard_shift, logits, pivot_s, classes, label_smoothing, SMOOTH: tl.constexpr
):  # fmt: skip
    log_hard = tl.log2(hard)
    y_label = tl.fma(label_s, LOG2E, -hard_shift)
    value = (1 - label_smoothing) * (LN2 * (log_hard - y_label))
    if SMOOTH:
        # logsumexp - mean; what rounding hard_shift took from the maximum is put back.
        lost = tl.fma(largest_s, LOG2E, -hard_shift)
        pivot = tl.sum(pivot_s, axis=1)
        spread = LN2 * (log_hard - lost) + ((largest_s - pivot) - logits / classes)
        value += label_smoothing * spread
    return value


@triton.jit
def _moments(
    student, teacher, columns, keep, pivot_s, pivot_t, classes,
    ONE_TILE: tl.constexpr, A: tl.constexpr, B: tl.constexpr,
):  # fmt: skip
    """The student's mean, relative to its pivot, and the sums of squares around both sides' means."""
    count = tl.zeros([A], tl.float32)
    mean_s = tl.zeros([A], tl.float32)
    mean_t = tl.zeros([A], tl.float32)
    squares_s = tl.zeros([A], tl.float32)
    squares_t = tl.zeros([A], tl.float32)
    if ONE_TILE:
        present = keep[:, None] & (columns < classes)
        s = _read(student, columns, present, pivot_s, 1.0, STANDARDIZED, "evict_last")
        t = _read(teacher, columns, present, pivot_t, 1.0, STANDARDIZED, "evict_last")
        count, mean_s, squares_s, mean_t, squares_t = _with_moments(
            count, mean_s, squares_s, mean_t, squares_t, s, t, present, tl.where(keep, classes, 0)
        )
    else:
        for tile in range(0, tl.cdiv(classes, A * B)):
            here = tile * (A * B) + columns
            s = _read(student, here, here < classes, pivot_s, 1.0, STANDARDIZED, "evict_last")
            t = _read(teacher, here, here < classes, pivot_t, 1.0, STANDARDIZED, "evict_last")
            left = tl.minimum(tl.maximum(classes - tile * (A * B) - tl.arange(0, A) * B, 0), B)
            count, mean_s, squares_s, mean_t, squares_t = _with_moments(
                count, mean_s, squares_s, mean_t, squares_t, s, t, here < classes, left
            )
        mean_s, squares_s = _merged_moments(count, mean_s, squares_s, classes)
        mean_t, squares_t = _merged_moments(count, mean_t, squares_t, classes)
    return mean_s, squares_s, squares_t


@triton.jit
def _with_moments(count, mean_s, squares_s, mean_t, squares_t, s, t, present, more):
    """Mean and sum of squares around it after one more tile, of which ``more`` elements a row or lane are present.

    The one-pass formula sum x^2 - n mean^2 would cancel.
    """
    more = more.to(tl.float32)
    total = count + more
    share = more / tl.maximum(total, 1.0)
    mean_s, squares_s = _joined_moments(count, mean_s, squares_s, more, share, s, present)
    mean_t, squares_t = _joined_moments(count, mean_t, squares_t, more, share, t, present)
    return total, mean_s, squares_s, mean_t, squares_t


@triton.jit
def _joined_moments(count, mean, squares, more, share, x, present):
    tile_mean = tl.sum(tl.where(present, x, 0.0), axis=1) / tl.maximum(more, 1.0)
    off = tl.where(present, x - tile_mean[:, None], 0.0)
    delta = tile_mean - mean
    return mean + delta * share, squares + tl.sum(off * off, axis=1) + delta * delta * count * share


@triton.jit
def _merged_moments(count, mean, squares, classes):
    """Lanes to the row, shape (1,)."""
    row_mean = tl.sum(count * mean, axis=0, keep_dims=True) / classes
    off = mean - row_mean
    return row_mean, tl.sum(squares + count * off * off, axis=0, keep_dims=True)


@triton.jit
def _sigmoid(u):
    return 1.0 / (1.0 + tl.exp2(-u))


@triton.jit
def _log_sigmoid(u):
    """log2 of the sigmoid, finite for any finite u and exact however near it is to 0."""
    x = tl.exp2(-tl.abs(u))
    w = 1.0 + x
    # log(1 + x) where 1 + x has rounded x away, or part of it
    log1p = tl.where(w == 1.0, x * LOG2E, tl.log2(w) * (x / (w - 1.0)))
    return tl.minimum(u, 0.0) - log1p


@triton.jit
def _sigmoid_term(u_p, u_q):
    """p (log2 p - log2 q), 0 where p is."""
    p = _sigmoid(u_p)
    return tl.where(p == 0, 0.0, p * (_log_sigmoid(u_p) - _log_sigmoid(u_q)))


# Reads mask and labels once: 9 bytes a row. One program: the sum has one order, and nobody waits for it but the GPU.
@triton.jit(do_not_specialize=["rows"])
def _count_factor_kernel(out_ptr, labels_ptr, mask_ptr, rows, ignore_index, factor, BLOCK: tl.constexpr):
    """factor / (number of rows that count, at least 1)."""
    count = tl.zeros([BLOCK], tl.int32)
    for start in range(0, rows, BLOCK):
        row = start + tl.arange(0, BLOCK)
        keep = row < rows
        if mask_ptr is not None:
            keep = keep & (tl.load(mask_ptr + row, mask=keep, other=0) != 0)
        if labels_ptr is not None:
            keep = keep & (tl.load(labels_ptr + row, mask=keep, other=ignore_index) != ignore_index)
        count += keep.to(tl.int32)
    tl.store(out_ptr, factor / tl.maximum(tl.sum(count, axis=0), 1).to(tl.float32))


class Tiling(NamedTuple):
    """How rows are laid on programs: (a, b) tiles, one for ``a`` rows or as many as a long row needs."""

    one_tile: bool
    a: int
    b: int
    num_warps: int


# (largest V, rows a program, warps): of all with 4 to 32 elements a thread, the fastest on an H100 for forward KL in
# bfloat16 and float32 together.
ONE_TILE = (
    (16, 16, 1),
    (32, 8, 1),
    (64, 8, 2),
    (128, 2, 1),
    (256, 4, 4),
    (512, 1, 2),
    (1024, 1, 4),
    (2048, 1, 4),
    (4096, 1, 4),
    (8192, 1, 8),
)


class Row(NamedTuple):
    """How the rows of up to so many bytes are read: threads, and loads of each that are in flight for either side."""

    largest: int
    threads: int
    loads: int


# Of an H100 too. Rows of more than 64 KB are still in L2 when they come back if few are in flight: one program on a
# multiprocessor.
SEVERAL_TILES = (Row(65536, 256, 4), Row(2**63, 1024, 2))
LABELLED = (Row(65536, 256, 2), Row(2**63, 512, 2))  # what a label adds would spill
BYTES_PER_LOAD = 16


def tiling(classes: int, itemsize: int, labelled: bool, nvidia: bool) -> Tiling:
    """The default for rows of ``classes`` logits of ``itemsize`` bytes."""
    for largest, rows, num_warps in ONE_TILE:
        if classes <= largest:
            return Tiling(True, rows, largest, num_warps)
    table = LABELLED if labelled else SEVERAL_TILES
    _, threads, loads = next(row for row in table if classes * itemsize <= row.largest)
    return Tiling(False, loads * threads, BYTES_PER_LOAD // itemsize, threads // (32 if nvidia else 64))


def is_labelled(kind: int, ce_weight: float) -> bool:
    """Whether one class of a row is treated unlike the others: cross-entropy, or dkd."""
    return kind == KINDS["dkd"] or (kind == KINDS["forward"] and ce_weight != 0)


def options_of(
    kind: int, temperature: float, ce_weight: float, label_smoothing: float, tile: Tiling, nvidia: bool
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The kernel's compile-time arguments, and the compiler's options."""
    hard = kind == KINDS["forward"] and ce_weight != 0
    constants = {
        "KIND": kind,
        "HARD": hard,
        "POWER": int(temperature) if hard and temperature in (1.0, 2.0, 4.0) else 0,
        "SMOOTH": hard and label_smoothing != 0,
        "NVIDIA": nvidia,
        "ONE_TILE": tile.one_tile,
        "A": tile.a,
        "B": tile.b,
    }
    options: dict[str, Any] = {"num_warps": tile.num_warps, "enable_fp_fusion": False}
    if nvidia:
        # All that a program can have: ptxas otherwise spills some to let one more program onto the SM.
        options["maxnreg"] = min(255, 65536 // (32 * tile.num_warps))
    return constants, options


def kl(
    student: Tensor,
    teacher: Tensor,
    labels: Tensor | None,
    mask: Tensor | None,
    row_weight: Tensor | None,
    temperature: float,
    kind: int,
    scale: float,
    alpha: float,
    beta: float,
    ce_weight: float,
    label_smoothing: float,
    ignore_index: int,
    reduction: int,
    needs_grad: bool,
) -> tuple[Tensor, Tensor]:
    """``torch.ops.kdfast.kl``: the loss, and its gradient for grad_output 1, empty unless ``needs_grad``."""
    grad = torch.empty(student.shape if needs_grad else (0,), dtype=student.dtype, device=student.device)
    loss = _launch(
        rows_of(student) or rows_of(student.contiguous()), rows_of(grad) if needs_grad else None, teacher, labels, mask,
        row_weight, temperature, kind, scale, alpha, beta, ce_weight, label_smoothing, ignore_index, reduction,
    )  # fmt: skip
    return loss, grad


def kl_(
    student: Tensor,
    teacher: Tensor,
    labels: Tensor | None,
    mask: Tensor | None,
    row_weight: Tensor | None,
    temperature: float,
    kind: int,
    scale: float,
    alpha: float,
    beta: float,
    ce_weight: float,
    label_smoothing: float,
    ignore_index: int,
    reduction: int,
) -> Tensor:
    """``torch.ops.kdfast.kl_``: the gradient overwrites the student."""
    rows = rows_of(student)
    if rows is None:
        raise RuntimeError("kdfast::kl_: rows of student must be addressable in place")
    return _launch(
        rows, rows, teacher, labels, mask, row_weight, temperature, kind, scale, alpha, beta, ce_weight,
        label_smoothing, ignore_index, reduction,
    )  # fmt: skip


def _launch(
    student: Rows | None,
    grad: Rows | None,
    teacher: Tensor,
    labels: Tensor | None,
    mask: Tensor | None,
    row_weight: Tensor | None,
    temperature: float,
    kind: int,
    scale: float,
    alpha: float,
    beta: float,
    ce_weight: float,
    label_smoothing: float,
    ignore_index: int,
    reduction: int,
) -> Tensor:
    assert student is not None  # a contiguous tensor always is rows
    logits = student.tensor
    if logits.dtype == torch.float64:
        raise TypeError("kdfast's Triton kernels take float16, bfloat16 or float32, got float64")
    classes = logits.shape[-1]
    rows = logits.numel() // classes
    losses = torch.empty(logits.shape[:-1], dtype=torch.float32, device=logits.device)
    if rows == 0:
        return losses if reduction == REDUCTIONS["none"] else losses.sum()
    teacher_rows = rows_of(teacher) or rows_of(teacher.contiguous())
    assert teacher_rows is not None
    labels, mask, row_weight = (None if x is None else x.contiguous() for x in (labels, mask, row_weight))
    mask = None if mask is None else mask.view(torch.uint8)

    with torch.cuda.device_of(logits):
        weight, count_factor = average(reduction, rows, classes, labels, mask, ignore_index, logits.device)
        nvidia = backends.on_nvidia(logits)
        tile = tiling(classes, logits.element_size(), is_labelled(kind, ce_weight), nvidia)
        constants, compiler_options = options_of(kind, temperature, ce_weight, label_smoothing, tile, nvidia)
        _kl_kernel[(cdiv(rows, tile.a) if tile.one_tile else rows,)](
            *student.arguments,
            *teacher_rows.arguments,
            *(grad.arguments if grad is not None else (None, 1, 0, 0)),
            losses, labels, mask, row_weight, count_factor, rows, classes,
            1 / (math.log(2) * temperature), scale, scale / temperature, weight,
            alpha, beta, ce_weight, label_smoothing, ignore_index,
            **constants, **compiler_options,
        )  # fmt: skip
    return losses if reduction == REDUCTIONS["none"] else losses.sum()


COUNT_BLOCK = 4096


def average(
    reduction: int,
    rows: int,
    classes: int,
    labels: Tensor | None,
    mask: Tensor | None,
    ignore_index: int,
    device: torch.device,
) -> tuple[float, Tensor | None]:
    """What ``reduction`` multiplies every row with: a number, and one the GPU alone knows where rows may not count."""
    if reduction not in (REDUCTIONS["mean"], REDUCTIONS["batchmean"]):
        return 1.0, None
    per_row = 1.0 / classes if reduction == REDUCTIONS["mean"] else 1.0
    if labels is None and mask is None:
        return per_row / rows, None
    count_factor = torch.empty((), dtype=torch.float32, device=device)
    _count_factor_kernel[(1,)](count_factor, labels, mask, rows, ignore_index, per_row, BLOCK=COUNT_BLOCK, num_warps=8)
    return 1.0, count_factor
