"""Triton kernel of ``torch.ops.kdfast.topk_kl`` and its launcher: a stored teacher against the student's whole row.

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
from kdfast.ops.kl.triton_kernels import BYTES_PER_LOAD, INFINITY, LN2, LOG2E, _shift, _softened, average
from kdfast.ops.rows import rows_of
from kdfast.ops.sizes import cdiv, next_power_of_2
from kdfast.ops.topk_kl.function import TAILS
from kdfast.reference.logits import PADDING_INDEX

DROP = tl.constexpr(TAILS["drop"])
BUCKET = tl.constexpr(TAILS["bucket"])
RENORMALIZE = tl.constexpr(TAILS["renormalize"])

PADDING = tl.constexpr(PADDING_INDEX)
WORD = tl.constexpr(32)  # classes in a word of holes


# One program takes one row, whatever its length: the listed classes K at a time, the row in tiles.
#
# Reads the student, writes the gradient. Floor: 2 * V * itemsize bytes a row (1 without a gradient), beside k entries
# of the teacher and 4 bytes of loss; 'renormalize' reads k logits and writes the row. The gradient reads the row again,
# from L2 as far as it fits, last tile first. Special-function operations an element: 2, and 1 without a gradient.
#
# The listed classes are holes in the row where the rest has a mass of its own, which is 'bucket' alone: a sum over all
# classes minus a sum over the listed ones keeps no digit of a rest of 1e-7, and a confident student has less. Ways to
# tell a listed class from the others in a tile, for V = 128256 and k = 64:
#   every element against every index       64 comparisons an element; the rest of the loop is about 6 instructions
#   a marker of a byte or more in the       1 to 2 bytes an element written and read, 25 to 50% more
#     row of the gradient
#   a bit a class in a scratch row          1/8 byte an element written and read: 16 KB a row, 3% more, and it is in L2
# The last one is here. Entries that share a word must store the same value, or the stores would race: K entries are
# compared with each other, K^2 comparisons a program where all others cost V * k, and an earlier K's words are read
# back.
#
# The rest has its own maximum as well: e = exp2(y) relative to the row's could be 0 for all of it. The other tails need
# no holes: 'drop' wants the normaliser of all classes, and what its second read writes at the listed classes is written
# over, behind a barrier.
#
# y = logit * log2(e) / T - shift as in the kl kernel: one fma, and shift the same number wherever it stands. So no
# product is contracted into an fma but those written as one (enable_fp_fusion=False). Tiles are (A, B): A lanes of B
# neighbouring elements, as many as a thread loads at once; lanes are merged once a row.
@triton.jit
def _topk_kl_kernel(
    student_ptr, student_split, student_outer, student_inner,  # row r: (r // split) * outer + (r % split) * inner
    values_ptr, indices_ptr,  # contiguous (rows, k)
    grad_ptr,  # contiguous (rows, classes); None: no gradient
    loss_ptr,  # float32, one a row
    mask_ptr, weight_ptr, count_factor_ptr,  # None where there is none
    holes_ptr,  # int32 scratch (rows, words) for BUCKET, else None
    classes, k, words,
    factor,  # log2(e) / T
    scale, slope,  # of the divergence; of its gradient: scale / T
    weight,  # of every row
    rounding,  # what k rounded probabilities may leave of 1 - their sum
    TAIL: tl.constexpr,
    SOFTEN: tl.constexpr,  # the teacher is softmax(values / T), else exp(values)
    K: tl.constexpr,
    A: tl.constexpr,
    B: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)  # rows begin beyond 2^31 elements
    student = student_ptr + (row // student_split) * student_outer + (row % student_split) * student_inner
    values = values_ptr + row * k
    indices = indices_ptr + row * k
    lanes = tl.arange(0, A)[:, None] * B
    columns = lanes + tl.arange(0, B)[None, :]
    tiles = tl.cdiv(classes, A * B)
    grad = student
    if grad_ptr is not None:
        grad = grad_ptr + row * classes

    if mask_ptr is not None:  # noqa: SIM102  (decided when compiled; an `and` would be computed)
        if tl.load(mask_ptr + row) == 0:
            tl.store(loss_ptr + row, 0.0)
            if grad_ptr is not None:
                _store_zeros(grad, classes, columns, A, B)
            return

    weights = weight
    if weight_ptr is not None:
        weights *= tl.load(weight_ptr + row).to(tl.float32)
    if count_factor_ptr is not None:
        weights *= tl.load(count_factor_ptr)

    # --- what is listed
    teacher_factor = factor if SOFTEN else LOG2E
    holes = holes_ptr
    if TAIL == BUCKET:
        holes = holes_ptr + row * words
        for start in range(0, words, A):
            word = start + tl.arange(0, A)
            tl.store(holes + word, tl.zeros([A], tl.int32), mask=word < words)
        tl.debug_barrier()
    count = tl.full([1], 0, tl.int32)
    largest_t = tl.full([1], -INFINITY, tl.float32)
    largest_s = tl.full([1], -INFINITY, tl.float32)
    sum_t = tl.zeros([1], tl.float32)
    sum_s = tl.zeros([1], tl.float32)
    for start in range(0, k, K):
        index, listed, inside, t, s = _entries(values, indices, student, start, k, classes, K)
        largest_t, sum_t = _with_tile(largest_t, sum_t, t[None, :], teacher_factor)
        if TAIL != DROP:
            largest_s, sum_s = _with_tile(largest_s, sum_s, s[None, :], factor)
        if TAIL == BUCKET:
            count += tl.sum(listed.to(tl.int32), axis=0)
            word = index // WORD
            bit = tl.where(inside, tl.full([K], 1, tl.int32) << (index % WORD), 0)
            # No class is listed twice, so the sum of their bits is all of them.
            marks = tl.sum(tl.where(word[:, None] == word[None, :], bit[None, :], 0), axis=1)
            marks |= tl.load(holes + word, mask=inside, other=0)
            tl.store(holes + word, marks, mask=inside)
            tl.debug_barrier()
    shift_t = _shift(largest_t, teacher_factor)
    log_t = tl.log2(sum_t)
    if SOFTEN:
        mass = tl.where(sum_t == 0, 0.0, 1.0)
        log_mass = tl.log2(mass)
        teacher_shift = shift_t
        teacher_offset = log_t
    else:
        mass = sum_t * tl.exp2(shift_t)
        log_mass = tl.minimum(shift_t + log_t, 0.0)
        teacher_shift = tl.zeros([1], tl.float32)
        teacher_offset = teacher_shift

    # --- the row, and what the gradient needs of it
    divergence = tl.zeros([1], tl.float32)
    slopes = slope * weights
    if TAIL == RENORMALIZE:
        shift = _shift(largest_s, factor)
        log_s = tl.log2(sum_s)
        if grad_ptr is not None:
            _store_zeros(grad, classes, columns, A, B)
    else:
        largest = tl.full([A], -INFINITY, tl.float32)
        rest = tl.zeros([A], tl.float32)
        for tile in range(0, tiles):
            here = tile * (A * B) + columns
            s = tl.load(student + here, mask=here < classes, other=-INFINITY, eviction_policy="evict_last")
            s = s.to(tl.float32)
            if TAIL == BUCKET:
                lane = tile * (A * B) + lanes
                word = tl.load(holes + lane // WORD, mask=lane < classes, other=0)
                s = tl.where((word >> (here % WORD)) & 1 != 0, -INFINITY, s)
            largest, rest = _with_tile(largest, rest, s, factor)
        # Lanes to the row: what had shape (A,) gets shape (1,).
        largest_r = tl.max(largest, axis=0, keep_dims=True)
        rest = tl.sum(_moved(rest, largest, largest_r, factor), axis=0, keep_dims=True)
        shift_r = _shift(largest_r, factor)
        if TAIL == DROP:
            shift = shift_r
            log_s = tl.log2(rest)
            k_rest = slopes * mass / rest
        else:
            largest_all = tl.maximum(largest_s, largest_r)
            shift = _shift(largest_all, factor)
            log_s = tl.log2(
                _moved(sum_s, largest_s, largest_all, factor) + _moved(rest, largest_r, largest_all, factor)
            )
            log_rest_s = (shift_r - shift) + (tl.log2(rest) - log_s)
            # No bucket where every class is listed. What rounding leaves of 1 - mass is no mass: it would be infinitely
            # far from a student that has none.
            bucket = (count < classes) & ((rest != 0) | (log_mass * LN2 <= -rounding))
            rest_t = tl.where(bucket, _one_minus_exp2(log_mass), 0.0)
            divergence = tl.where(rest_t == 0, 0.0, rest_t * (tl.log2(rest_t) - log_rest_s))
            mass += rest_t
            # An unlisted class: mass * p_s - rest_t * (its share of the rest), both multiples of the same e.
            k_rest = tl.where(rest == 0, 0.0, slopes * (mass * tl.exp2(log_rest_s) - rest_t) / rest)
        if grad_ptr is not None:
            for step in range(0, tiles):
                here = (tiles - 1 - step) * (A * B) + columns
                s = tl.load(student + here, mask=here < classes, other=-INFINITY, eviction_policy="evict_first")
                _, e = _softened(s.to(tl.float32), factor, shift_r)
                tl.store(grad + here, e * k_rest[:, None], mask=here < classes, eviction_policy="evict_first")
    if grad_ptr is not None:
        tl.debug_barrier()  # the row is written before its listed classes are written over

    # --- the listed classes: mass * p_s - p_t
    for start in range(0, k, K):
        index, listed, inside, t, s = _entries(values, indices, student, start, k, classes, K)
        log_p = tl.fma(t, teacher_factor, -teacher_shift) - teacher_offset
        p = tl.where(listed, tl.exp2(log_p), 0.0)
        log_q = tl.fma(s, factor, -shift) - log_s
        if TAIL == RENORMALIZE:
            log_q = tl.where(sum_s == 0, -INFINITY, log_q)  # no mass on any of them: no limit, and no gradient
        divergence += tl.sum(tl.where(p == 0, 0.0, p * (log_p - log_q)), axis=0)
        if grad_ptr is not None:
            g = slopes * (mass * tl.exp2(log_q) - p)
            if TAIL == RENORMALIZE:
                g = tl.where(sum_s == 0, 0.0, g)
            tl.store(grad + index, g, mask=inside)
    tl.store(loss_ptr + row + tl.arange(0, 1), divergence * LN2 * scale * weights)


@triton.jit
def _store_zeros(grad, classes, columns, A: tl.constexpr, B: tl.constexpr):
    for start in range(0, classes, A * B):
        tl.store(grad + (start + columns), tl.zeros([A, B], tl.float32), mask=start + columns < classes)


@triton.jit
def _entries(values, indices, student, start, k, classes, K: tl.constexpr):
    """K entries: class, whether it is listed, whether it is a class at all, teacher's value, student's logit.

    Both are -inf where nothing is listed, and add nothing to a sum of exponentials. An index that is no class reads
    nothing and makes its row NaN.
    """
    entry = start + tl.arange(0, K)
    index = tl.load(indices + entry, mask=entry < k, other=PADDING).to(tl.int64)
    t = tl.load(values + entry, mask=entry < k, other=-INFINITY).to(tl.float32)
    listed = (index != PADDING) & (t != -INFINITY)
    inside = listed & (index >= 0) & (index < classes)
    s = tl.load(student + index, mask=inside, other=float("nan")).to(tl.float32)
    return index, listed, inside, tl.where(listed, t, -INFINITY), tl.where(listed, s, -INFINITY)


@triton.jit
def _with_tile(largest, total, x, factor):
    """Maximum and sum of exponentials of each row or lane after one more tile."""
    new = tl.maximum(largest, tl.max(x, axis=1))
    _, e = _softened(x, factor, _shift(new, factor))
    return new, _moved(total, largest, new, factor) + tl.sum(e, axis=1)


@triton.jit
def _moved(total, largest, new, factor):
    """A sum relative to ``largest``, brought to ``new``, which is not smaller."""
    # Only a sum without a finite logit, which is 0, moves up: it must not meet an infinite power.
    return total * tl.exp2(tl.minimum(_shift(largest, factor) - _shift(new, factor), 0.0))


@triton.jit
def _one_minus_exp2(x):
    """1 - 2^x for x <= 0, to all its digits however near x is to 0."""
    w = tl.exp2(x)
    # (1 - w) x / log2(w) does not mind that w is rounded, as x and log2(w) differ by as much as 1 - w is off.
    small = tl.where(w == 1.0, -x * LN2, (1.0 - w) * (x / tl.log2(w)))
    return tl.where(x > -1.0, small, 1.0 - w)


class Tiling(NamedTuple):
    """(a, b) tiles of a row, the entries taken at a time, and warps."""

    entries: int
    a: int
    b: int
    num_warps: int


# (largest V, warps, most entries at a time), unmeasured. 16 warps: as for the long rows of kl, fewer rows in flight,
# more of each still in L2. Entries are compared with each other: 8 comparisons a thread, at most 16.
WARPS = ((1024, 1, 16), (8192, 4, 32), (65536, 8, 64), (2**31, 16, 64))
LOADS_PER_THREAD = 4  # of 16 bytes, in flight at once: as many as kl has of two sides


def tiling(classes: int, k: int, itemsize: int) -> Tiling:
    """The default for k entries a row of ``classes`` logits of ``itemsize`` bytes."""
    num_warps, most = next((num_warps, most) for largest, num_warps, most in WARPS if classes <= largest)
    entries = min(next_power_of_2(k), most)
    return Tiling(entries, LOADS_PER_THREAD * 32 * num_warps, BYTES_PER_LOAD // itemsize, num_warps)


def options_of(tail: int, logprobs: bool, tile: Tiling, nvidia: bool) -> tuple[dict[str, Any], dict[str, Any]]:
    """The kernel's compile-time arguments, and the compiler's options."""
    soften = not logprobs or tail == TAILS["renormalize"]
    constants = {"TAIL": tail, "SOFTEN": soften, "K": tile.entries, "A": tile.a, "B": tile.b}
    options: dict[str, Any] = {"num_warps": tile.num_warps, "enable_fp_fusion": False}
    if nvidia:
        # All that a program can have: ptxas otherwise spills some to let one more program onto the SM.
        options["maxnreg"] = min(255, 65536 // (32 * tile.num_warps))
    return constants, options


def topk_kl(
    student: Tensor,
    teacher_values: Tensor,
    teacher_indices: Tensor,
    mask: Tensor | None,
    row_weight: Tensor | None,
    temperature: float,
    tail: int,
    logprobs: bool,
    reduction: int,
    needs_grad: bool,
) -> tuple[Tensor, Tensor]:
    """``torch.ops.kdfast.topk_kl``: the loss, and its gradient for grad_output 1, empty unless ``needs_grad``."""
    if student.dtype == torch.float64:
        raise TypeError("kdfast's Triton kernels take float16, bfloat16 or float32, got float64")
    classes, k = student.shape[-1], teacher_values.shape[-1]
    rows = student.numel() // classes
    grad = torch.empty(student.shape if needs_grad else (0,), dtype=student.dtype, device=student.device)
    losses = torch.empty(student.shape[:-1], dtype=torch.float32, device=student.device)
    if rows == 0:
        return (losses if reduction == REDUCTIONS["none"] else losses.sum()), grad
    student_rows = rows_of(student) or rows_of(student.contiguous())
    assert student_rows is not None  # a contiguous tensor always is rows
    teacher_values, teacher_indices = teacher_values.contiguous(), teacher_indices.contiguous()
    mask, row_weight = (None if x is None else x.contiguous() for x in (mask, row_weight))
    mask = None if mask is None else mask.view(torch.uint8)

    with torch.cuda.device_of(student):
        weight, count_factor = average(reduction, rows, classes, None, mask, 0, student.device)
        words, holes = cdiv(classes, WORD.value), None
        if tail == TAILS["bucket"]:
            holes = torch.empty((rows, words), dtype=torch.int32, device=student.device)
        nvidia = backends.on_nvidia(student)
        constants, compiler_options = options_of(tail, logprobs, tiling(classes, k, student.element_size()), nvidia)
        _topk_kl_kernel[(rows,)](
            *student_rows.arguments,
            teacher_values, teacher_indices,
            grad if needs_grad else None,
            losses, mask, row_weight, count_factor, holes, classes, k, words,
            1 / (math.log(2) * temperature), temperature**2, temperature, weight,
            k * torch.finfo(teacher_values.dtype).eps,
            **constants, **compiler_options,
        )  # fmt: skip
    return (losses if reduction == REDUCTIONS["none"] else losses.sum()), grad
