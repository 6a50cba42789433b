"""Triton kernels of ``torch.ops.kdfast.attention`` and ``feature_mse`` and their launchers.

Imported when the first tensor on a GPU shows up: the package itself needs no Triton.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kdfast.ops.features.function import gradient_dtype
from kdfast.ops.sizes import cdiv, next_power_of_2

EPS = tl.constexpr(1e-12)  # of the attention's norm
# Elements of a tile, and warps: 8 elements a thread; with 16 ptxas spills. Unmeasured.
TILE, WARPS = 1024, 4
# Programs that share a map's channels: 8 on each of a hundred multiprocessors.
PROGRAMS = 1024


# a[part, n, pixel] = sum over a part of the channels of |f|^p: one program takes a sample's pixels, (BC, BP) at a time.
# Floor: the map's bytes, read once; powers other than 1 and 2 take two special-function operations an element.
@triton.jit
def _power_kernel(
    map_ptr, a_ptr,  # contiguous (N, channels, pixels) and float32 (parts, N, pixels)
    channels, pixels, p,
    POWER: tl.constexpr,  # p where it is 1 or 2, else 0
    BC: tl.constexpr,
    BP: tl.constexpr,
):  # fmt: skip
    sample = tl.program_id(0).to(tl.int64)
    pixel = tl.program_id(1) * BP + tl.arange(0, BP)
    part, parts = tl.program_id(2), tl.num_programs(2)
    channel = tl.arange(0, BC)
    start = map_ptr + sample * channels * pixels
    total = tl.zeros([BC, BP], tl.float32)
    for first in range(part * BC, channels, parts * BC):
        inside = (first + channel < channels)[:, None] & (pixel < pixels)[None, :]
        here = (first + channel).to(tl.int64)[:, None] * pixels + pixel[None, :]
        f = tl.load(start + here, mask=inside, other=0.0).to(tl.float32)
        total += _power(tl.abs(f), p, POWER)
    row = part * tl.num_programs(0).to(tl.int64) + sample
    tl.store(a_ptr + row * pixels + pixel, tl.sum(total, axis=0), mask=pixel < pixels)


@triton.jit
def _power(x, p, POWER: tl.constexpr):
    """x^p for x >= 0, and 0 for 0."""
    if POWER == 1:
        result = x
    elif POWER == 2:
        result = x * x
    else:
        result = tl.where(x == 0, x, tl.exp2(p * tl.log2(tl.where(x == 0, 1.0, x))))
    return result


# One program a sample: both attentions over their norms, the loss, and k = p / C * dL/da over the student's sums.
# Reads 8 bytes a pixel and part three times, from cache, and writes 4: little beside the maps.
@triton.jit(do_not_specialize=["student_parts", "teacher_parts"])
def _compare_kernel(
    student_ptr, teacher_ptr,  # float32 (parts, N, pixels): sums over channels; k overwrites the student's first part
    loss_ptr,  # float32, one a sample
    student_parts, teacher_parts, pixels, student_share, teacher_share,  # shares: 1 / channels
    scale, p,
    NORMALIZE: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    sample = tl.program_id(0).to(tl.int64)
    student = student_ptr + sample * pixels
    teacher = teacher_ptr + sample * pixels
    inverse_s = tl.full([1], 1.0, tl.float32)
    inverse_t = inverse_s
    if NORMALIZE:
        squares_s = tl.zeros([BLOCK], tl.float32)
        squares_t = tl.zeros([BLOCK], tl.float32)
        for first in range(0, pixels, BLOCK):
            s, t, _ = _pair(
                student, teacher, student_parts, teacher_parts, first, pixels, student_share, teacher_share, BLOCK
            )
            squares_s += s * s
            squares_t += t * t
        norm_s = tl.sqrt_rn(tl.sum(squares_s, axis=0, keep_dims=True))
        norm_t = tl.sqrt_rn(tl.sum(squares_t, axis=0, keep_dims=True))
        moves = norm_s >= EPS
        inverse_s = _inverse(norm_s)
        inverse_t = _inverse(norm_t)
    loss = tl.zeros([BLOCK], tl.float32)
    along = tl.zeros([BLOCK], tl.float32)
    for first in range(0, pixels, BLOCK):
        s, t, _ = _pair(
            student, teacher, student_parts, teacher_parts, first, pixels, student_share, teacher_share, BLOCK
        )
        d = s * inverse_s - t * inverse_t
        loss += d * d
        along += d * (s * inverse_s)
    tl.store(loss_ptr + sample, tl.sum(loss, axis=0) * scale)
    if NORMALIZE:
        projected = tl.where(moves, tl.sum(along, axis=0, keep_dims=True), 0.0)
    for first in range(0, pixels, BLOCK):
        s, t, pixel = _pair(
            student, teacher, student_parts, teacher_parts, first, pixels, student_share, teacher_share, BLOCK
        )
        u = s * inverse_s
        d = u - t * inverse_t
        if NORMALIZE:  # else not even 0 times u: that may be infinite
            d -= projected * u
        k = d * (inverse_s * (2.0 * scale * p * student_share))
        tl.store(student + pixel, k, mask=pixel < pixels)


@triton.jit
def _pair(
    student, teacher, student_parts, teacher_parts, first, pixels, student_share, teacher_share, BLOCK: tl.constexpr
):
    pixel = first + tl.arange(0, BLOCK)
    s = _sum_of_parts(student, student_parts, pixel, pixels, BLOCK) * student_share
    t = _sum_of_parts(teacher, teacher_parts, pixel, pixels, BLOCK) * teacher_share
    return s, t, pixel


@triton.jit
def _sum_of_parts(a, parts, pixel, pixels, BLOCK: tl.constexpr):
    total = tl.zeros([BLOCK], tl.float32)
    for part in range(0, parts):
        row = part * tl.num_programs(0).to(tl.int64)
        total += tl.load(a + row * pixels + pixel, mask=pixel < pixels, other=0.0)
    return total


@triton.jit
def _inverse(norm):
    """1 / max(norm, EPS), and 0 for a norm of 0."""
    return tl.where(norm == 0, 0.0, 1.0 / tl.where(norm < EPS, EPS, norm))


# grad = k sign(f) |f|^(p - 1), 0 where f is 0: one tile a program. Reads the map again, from L2 as far as it fits.
@triton.jit
def _power_grad_kernel(
    map_ptr, k_ptr, grad_ptr,
    channels, pixels, p,
    POWER: tl.constexpr,
    BC: tl.constexpr,
    BP: tl.constexpr,
):  # fmt: skip
    sample = tl.program_id(0).to(tl.int64)
    channel = tl.program_id(1).to(tl.int64) * BC + tl.arange(0, BC)
    pixel = tl.program_id(2) * BP + tl.arange(0, BP)
    inside = (channel < channels)[:, None] & (pixel < pixels)[None, :]
    here = (sample * channels + channel)[:, None] * pixels + pixel[None, :]
    f = tl.load(map_ptr + here, mask=inside, other=0.0).to(tl.float32)
    k = tl.load(k_ptr + sample * pixels + pixel, mask=pixel < pixels, other=0.0)[None, :]
    if POWER == 2:
        slope = f
    elif POWER == 1:
        slope = tl.where(f > 0, 1.0, tl.where(f < 0, -1.0, f))
    else:
        size = _power(tl.abs(f), p - 1, 0)
        slope = tl.where(f < 0, -size, size)
    tl.store(grad_ptr + here, slope * k, mask=inside)


# Adaptive average pooling, (planes, H, W) to float32 (planes, h, w): bin b holds [floor(b H / h), ceil((b + 1) H / h)).
@triton.jit
def _pool_kernel(map_ptr, pooled_ptr, H, W, h, w, ROWS, COLUMNS, BLOCK: tl.constexpr):
    """ROWS and COLUMNS: the most a bin has of either."""
    plane = tl.program_id(0).to(tl.int64)
    bin = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    y, x = bin // w, bin % w
    top, bottom = (y * H) // h, ((y + 1) * H + h - 1) // h
    left, right = (x * W) // w, ((x + 1) * W + w - 1) // w
    total = tl.zeros([BLOCK], tl.float32)
    for dy in range(0, ROWS):
        for dx in range(0, COLUMNS):
            inside = (bin < h * w) & (top + dy < bottom) & (left + dx < right)
            here = (top + dy) * W + (left + dx)
            total += tl.load(map_ptr + plane * H * W + here, mask=inside, other=0.0).to(tl.float32)
    area = ((bottom - top) * (right - left)).to(tl.float32)
    tl.store(pooled_ptr + plane * h * w + bin, total / area, mask=bin < h * w)


# Its gradient: a pixel gathers from the bins that hold it: that of its share of the height and, where bins overlap, the
# next one; likewise across.
@triton.jit
def _pool_grad_kernel(pooled_ptr, grad_ptr, H, W, h, w, BLOCK: tl.constexpr):
    plane = tl.program_id(0).to(tl.int64)
    pixel = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    row, column = pixel // W, pixel % W
    total = tl.zeros([BLOCK], tl.float32)
    for dy in tl.static_range(0, 2):
        y = (row * h) // H + dy
        top, bottom = (y * H) // h, ((y + 1) * H + h - 1) // h
        in_rows = (y >= 0) & (y < h) & (row >= top) & (row < bottom)
        for dx in tl.static_range(0, 2):
            x = (column * w) // W + dx
            left, right = (x * W) // w, ((x + 1) * W + w - 1) // w
            inside = (pixel < H * W) & in_rows & (x >= 0) & (x < w) & (column >= left) & (column < right)
            area = ((bottom - top) * (right - left)).to(tl.float32)
            total += tl.load(pooled_ptr + plane * h * w + y * w + x, mask=inside, other=0.0) / area
    tl.store(grad_ptr + plane * H * W + pixel, total, mask=pixel < H * W)


# Floor: both sides' bytes read, the gradient's written, and those of the mask. One tile a program.
@triton.jit(do_not_specialize=["rows"])  # another batch size is not another kernel
def _mse_kernel(
    student_ptr, teacher_ptr, grad_ptr,  # contiguous; grad None: no gradient
    mask_ptr,  # None, or bytes: one an element, or one a row of `width` elements
    count_ptr,  # int64: entries of the mask that count
    loss_ptr,  # float32, one a program
    rows, width, factor,  # 1 / elements, where all count
    BY_ROW: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    here = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = here < rows.to(tl.int64) * width  # a multiple of 16 where the width is: loads are then vectors
    keep = inside
    if mask_ptr is not None:
        entry = here // width if BY_ROW else here
        keep = keep & (tl.load(mask_ptr + entry, mask=inside, other=0) != 0)
        count = tl.load(count_ptr) * (width if BY_ROW else 1)
        factor = 1.0 / tl.maximum(count, 1).to(tl.float32)
    s = tl.load(student_ptr + here, mask=keep, other=0.0).to(tl.float32)
    t = tl.load(teacher_ptr + here, mask=keep, other=0.0).to(tl.float32)
    d = s - t
    tl.store(loss_ptr + tl.program_id(0), tl.sum(d * d, axis=0) * factor)
    if grad_ptr is not None:
        tl.store(grad_ptr + here, d * (2.0 * factor), mask=inside)


def tile(pixels: int) -> tuple[int, int]:
    """(channels, pixels) of a tile of a map: as many pixels as there are, up to 128, neighbours in memory."""
    wide = min(max(next_power_of_2(pixels), 16), 128)
    return TILE // wide, wide


def block(pixels: int) -> int:
    """Pixels that _compare_kernel takes at a time: one to eight a thread."""
    return min(max(next_power_of_2(pixels), 32 * WARPS), TILE)


def power_of(p: float) -> int:
    """p where the kernels have a form for it."""
    return int(p) if p in (1, 2) else 0


def _pooled(maps: Tensor, h: int, w: int) -> Tensor:
    n, c, H, W = maps.shape
    if h == H and w == W:
        return maps
    pooled = torch.empty((n, c, h, w), dtype=torch.float32, device=maps.device)
    most = [cdiv(large, small) + (large % small != 0) for large, small in ((H, h), (W, w))]
    grid = (n * c, cdiv(h * w, 256))
    _pool_kernel[grid](maps, pooled, H, W, h, w, *most, BLOCK=256, num_warps=WARPS)
    return pooled


def attention(
    student_maps: Tensor, teacher_maps: Tensor, p: float, normalize: bool, needs_grad: bool
) -> tuple[Tensor, Tensor]:
    """``torch.ops.kdfast.attention``."""
    student_maps, teacher_maps = student_maps.contiguous(), teacher_maps.contiguous()
    n, c, H, W = student_maps.shape
    h, w = min(H, teacher_maps.shape[2]), min(W, teacher_maps.shape[3])
    shape = student_maps.shape if needs_grad else (0,)
    grad = torch.empty(shape, dtype=gradient_dtype(student_maps), device=student_maps.device)
    losses = torch.empty(n, dtype=torch.float32, device=student_maps.device)
    if n == 0:
        return losses.sum(), grad
    pixels, (bc, bp), power = h * w, tile(h * w), power_of(p)
    blocks, scale = cdiv(pixels, bp), 1 / (n * h * w)
    with torch.cuda.device_of(student_maps):
        student, teacher = _pooled(student_maps, h, w), _pooled(teacher_maps, h, w)
        # Not slices of one: where those begin, which kernels are compiled for, depends on the batch.
        sums = []
        for maps in (student, teacher):
            channels = maps.shape[1]
            parts = max(1, min(cdiv(PROGRAMS, n * blocks), cdiv(channels, bc)))
            a = torch.empty((parts, n, pixels), dtype=torch.float32, device=grad.device)
            _power_kernel[(n, blocks, parts)](maps, a, channels, pixels, p, POWER=power, BC=bc, BP=bp, num_warps=WARPS)
            sums.append(a)
        _compare_kernel[(n,)](
            *sums, losses, *(len(a) for a in sums), pixels, 1 / c, 1 / teacher.shape[1], scale, p,
            NORMALIZE=normalize, BLOCK=block(pixels), num_warps=WARPS,
        )  # fmt: skip
        if needs_grad:
            pooled = student is not student_maps
            out = torch.empty_like(student) if pooled else grad
            _power_grad_kernel[(n, cdiv(c, bc), blocks)](
                student, sums[0], out, c, pixels, p, POWER=power, BC=bc, BP=bp, num_warps=WARPS
            )  # fmt: skip
            if pooled:
                grid = (n * c, cdiv(H * W, 256))
                _pool_grad_kernel[grid](out, grad, H, W, h, w, BLOCK=256, num_warps=WARPS)
    return losses.sum(), grad


def feature_mse(student: Tensor, teacher: Tensor, mask: Tensor | None, needs_grad: bool) -> tuple[Tensor, Tensor]:
    """``torch.ops.kdfast.feature_mse``."""
    student, teacher = student.contiguous(), teacher.contiguous()
    size = student.numel()
    shape = student.shape if needs_grad else (0,)
    grad = torch.empty(shape, dtype=gradient_dtype(student), device=student.device)
    programs = cdiv(size, TILE)
    losses = torch.empty(programs, dtype=torch.float32, device=student.device)
    by_row = mask is not None and mask.shape != student.shape
    rows = student.shape[0]
    width = size // max(rows, 1)
    count = None if mask is None else mask.sum()  # only the device knows it: it stays there
    if programs:
        with torch.cuda.device_of(student):
            _mse_kernel[(programs,)](
                student, teacher, grad if needs_grad else None,
                None if mask is None else mask.contiguous().view(torch.uint8), count,
                losses, rows, width, 1 / size, BY_ROW=by_row, BLOCK=TILE, num_warps=WARPS,
            )  # fmt: skip
    return losses.sum(), grad
