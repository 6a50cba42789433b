"""Triton kernels of rkd_sequence and their launcher. Formulas: csrc/math/turn.h. Unmeasured.

Kernels read and write the features; what lies between them, a number for each position, is plain PyTorch.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kdfast.ops.sizes import cdiv, next_power_of_2

SMALLEST_NORM = tl.constexpr(1e-12)


@triton.jit
def _steps(x_ptr, row, here, columns, d):
    """x[1] - x[0] and x[2] - x[0] of the three positions from ``row`` on, a block of features; 0 unless ``here``."""
    present = here & (columns < d)
    x = tl.load(x_ptr + row * d + columns, mask=present, other=0.0).to(tl.float32)
    u = tl.load(x_ptr + (row + 1) * d + columns, mask=present, other=0.0).to(tl.float32) - x
    v = tl.load(x_ptr + (row + 2) * d + columns, mask=present, other=0.0).to(tl.float32) - x
    return u, v


# Reads three rows twice, the second time from cache.
@triton.jit
def _turns_kernel(norm_u_ptr, norm_v_ptr, apart_ptr, along_ptr, x_ptr, counts_ptr, d, WIDTH: tl.constexpr):
    """|u|, |v|, and |u/|u| - v/|v||^2, |u/|u| + v/|v||^2 of the angle at one position; norms are 0 unless it counts."""
    row = tl.program_id(0).to(tl.int64)
    here = tl.load(counts_ptr + row) != 0
    squared_u = tl.zeros([WIDTH], tl.float32)
    squared_v = tl.zeros([WIDTH], tl.float32)
    for start in range(0, d, WIDTH):
        u, v = _steps(x_ptr, row, here, start + tl.arange(0, WIDTH), d)
        squared_u += u * u
        squared_v += v * v
    norm_u = tl.sqrt_rn(tl.sum(squared_u, axis=0))
    norm_v = tl.sqrt_rn(tl.sum(squared_v, axis=0))
    over_u = tl.where(norm_u < SMALLEST_NORM, SMALLEST_NORM, norm_u)
    over_v = tl.where(norm_v < SMALLEST_NORM, SMALLEST_NORM, norm_v)
    apart = tl.zeros([WIDTH], tl.float32)
    along = tl.zeros([WIDTH], tl.float32)
    for start in range(0, d, WIDTH):
        u, v = _steps(x_ptr, row, here, start + tl.arange(0, WIDTH), d)
        # Divided, not multiplied with an inverse: on a line both are exactly equal or opposite then.
        u = tl.div_rn(u, tl.broadcast_to(over_u, u.shape))
        v = tl.div_rn(v, tl.broadcast_to(over_v, v.shape))
        apart += (u - v) * (u - v)
        along += (u + v) * (u + v)
    tl.store(norm_u_ptr + row, norm_u)
    tl.store(norm_v_ptr + row, norm_v)
    tl.store(apart_ptr + row, tl.sum(apart, axis=0))
    tl.store(along_ptr + row, tl.sum(along, axis=0))


@triton.jit
def _turn_gradient(x_ptr, row, columns, d, norm_u_ptr, norm_v_ptr, apart_ptr, along_ptr, stretch_ptr, counts_ptr):
    """What the angle at ``row`` sends to its second and its third position: csrc/math/turn.h."""
    here = row >= 0
    here = here & (tl.load(counts_ptr + row, mask=here, other=0) != 0)
    u, v = _steps(x_ptr, row, here, columns, d)
    norm_u = tl.load(norm_u_ptr + row, mask=here, other=1.0)
    norm_v = tl.load(norm_v_ptr + row, mask=here, other=1.0)
    over_u = tl.where(norm_u < SMALLEST_NORM, SMALLEST_NORM, norm_u)
    over_v = tl.where(norm_v < SMALLEST_NORM, SMALLEST_NORM, norm_v)
    u = tl.div_rn(u, tl.broadcast_to(over_u, u.shape))
    v = tl.div_rn(v, tl.broadcast_to(over_v, v.shape))
    off = (u - v) * tl.load(apart_ptr + row, mask=here, other=0.0)
    along = (u + v) * tl.load(along_ptr + row, mask=here, other=0.0)
    # What the norms take off: where both lengths are 1 not even its rounding.
    stretch = tl.load(stretch_ptr + row, mask=here, other=0.0)
    stretch_u = tl.where((norm_v < SMALLEST_NORM) & (norm_u >= SMALLEST_NORM), stretch, 0.0)
    stretch_v = tl.where((norm_u < SMALLEST_NORM) & (norm_v >= SMALLEST_NORM), stretch, 0.0)
    return (off - along - u * stretch_u) / over_u, (-off - along - v * stretch_v) / over_v


# Reads five rows, four of them from cache, and writes one.
@triton.jit
def _turn_gradient_kernel(
    out_ptr, x_ptr, norm_u_ptr, norm_v_ptr, apart_ptr, along_ptr, stretch_ptr, counts_ptr, d, WIDTH: tl.constexpr
):  # fmt: skip
    """The gradient of one position: first in an angle, second in the one before, third in the one before that."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    u, v = _turn_gradient(x_ptr, row, columns, d, norm_u_ptr, norm_v_ptr, apart_ptr, along_ptr, stretch_ptr, counts_ptr)
    total = -(u + v)
    u, v = _turn_gradient(
        x_ptr, row - 1, columns, d, norm_u_ptr, norm_v_ptr, apart_ptr, along_ptr, stretch_ptr, counts_ptr
    )
    total += u
    u, v = _turn_gradient(
        x_ptr, row - 2, columns, d, norm_u_ptr, norm_v_ptr, apart_ptr, along_ptr, stretch_ptr, counts_ptr
    )
    tl.store(out_ptr + row * d + columns, total + v, mask=columns < d)


WARPS = 4
# Opposite and equal directions give exact zeros, which a fused multiply-add would not.
OPTIONS: dict[str, Any] = {"num_warps": WARPS, "enable_fp_fusion": False}


def block(d: int) -> int:
    """Features that a program takes at a time: one to four a thread."""
    return min(max(next_power_of_2(d), 32 * WARPS), 512)


def rkd_sequence(student: Tensor, teacher: Tensor, mask: Tensor | None, needs_grad: bool) -> tuple[Tensor, Tensor]:
    """``torch.ops.kdfast.rkd_sequence``: the loss, and its gradient for grad_output 1, empty unless ``needs_grad``."""
    if student.dtype == torch.float64:
        raise TypeError("kdfast's Triton kernels take float16, bfloat16 or float32, got float64")
    n, length, d = student.shape
    grad = torch.empty(student.shape if needs_grad else (0,), dtype=torch.float32, device=student.device)
    if n == 0:
        return grad.new_zeros(()), grad
    student, teacher = student.contiguous(), teacher.contiguous()
    counts = torch.zeros(n, length, dtype=torch.bool, device=student.device)
    counts[:, :-2] = True if mask is None else mask[:, :-2] & mask[:, 1:-1] & mask[:, 2:]

    with torch.cuda.device_of(student):
        of_student, of_teacher = (_turns(x, counts) for x in (student, teacher))
        # A number for each position from here on: the features are read and written by kernels alone.
        (theta, still, p, q), (target, *_) = (_angle(*of) for of in (of_student, of_teacher))
        off = torch.where(counts, theta - target, 0.0)
        count = counts.sum().clamp(min=1)
        loss = off.square().sum(dtype=torch.float64) / count
        if needs_grad and d > 0:
            norm_u, norm_v, apart, along = of_student
            slope, total = 2 * off / count, apart + along
            # a, b and c of csrc/math/turn.h, times the slope
            a, b = (slope * (2 * y / (x * total)).masked_fill_(still | (x == 0), 0.0) for x, y in ((p, q), (q, p)))
            c = torch.addcmul(a - b, a + b, along - apart, value=-0.25)
            width = block(d)
            _turn_gradient_kernel[(n * length, cdiv(d, width))](
                grad, student, norm_u, norm_v, a, b, c, counts.view(torch.uint8), d,
                WIDTH=width, **OPTIONS,
            )  # fmt: skip
    return loss.float(), grad


def _turns(x: Tensor, counts: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What _turns_kernel makes, (N, L) each."""
    d = x.shape[-1]
    # Not slices of one: where those begin, which kernels are compiled for, depends on the batch.
    norm_u, norm_v, apart, along = (torch.empty(counts.shape, dtype=torch.float32, device=x.device) for _ in range(4))
    _turns_kernel[(counts.numel(),)](
        norm_u, norm_v, apart, along, x, counts.view(torch.uint8), d, WIDTH=block(d), **OPTIONS
    )  # fmt: skip
    return norm_u, norm_v, apart, along


def _angle(norm_u: Tensor, norm_v: Tensor, apart: Tensor, along: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The angle, a right one where a step is 0; where that is so; |u/|u| - v/|v|| and |u/|u| + v/|v||."""
    p, q = apart.sqrt(), along.sqrt()
    still = (norm_u == 0) | (norm_v == 0)
    # A number in torch.where would be a launch of its own.
    return (2 * torch.atan2(p, q)).masked_fill_(still, math.pi / 2), still, p, q
