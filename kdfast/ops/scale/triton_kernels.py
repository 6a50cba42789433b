"""The Triton kernel of ``torch.ops.kdfast.scale_``."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor, cuda

from kdfast.ops.rows import Rows, rows_of
from kdfast.ops.sizes import cdiv


# Reads 4 bytes and ends where the factor is 1. Else reads and writes every element once, and the product is rounded
# once: PyTorch's grad.mul_(factor) rounds the factor to bfloat16 first, and loads single elements.
@triton.jit(do_not_specialize=["rows", "width"])
def _scale_kernel(
    grad_ptr, grad_split, grad_outer, grad_inner,  # row r: (r // split) * outer + (r % split) * inner
    factor_ptr, rows, width, BLOCK: tl.constexpr,
):  # fmt: skip
    factor = tl.load(factor_ptr).to(tl.float32)
    if factor != 1.0:
        tiles = tl.cdiv(width, BLOCK).to(tl.int64)  # of a row; there may be more than 2^31 elements
        for tile in range(tl.program_id(0).to(tl.int64), rows * tiles, tl.num_programs(0)):
            row, start = tile // tiles, (tile % tiles) * BLOCK
            columns, end = start + tl.arange(0, BLOCK), start + BLOCK
            at = grad_ptr + (row // grad_split) * grad_outer + (row % grad_split) * grad_inner + columns
            if end <= width:  # without a mask, loads are vectors whatever the width
                tl.store(at, tl.load(at).to(tl.float32) * factor)
            else:
                tl.store(at, tl.load(at, mask=columns < width).to(tl.float32) * factor, mask=columns < width)


BLOCK, NUM_WARPS = 4096, 8
PROGRAMS = 1024  # a few for each multiprocessor: all that a factor of 1 costs is their start


def scale_(grad: Tensor, factor: Tensor) -> None:
    """``torch.ops.kdfast.scale_``."""
    if grad.numel() == 0:
        return
    # A contiguous gradient is one row, so that short ones fill a program. There is no next one: 0 elements to it, since
    # another number would be another kernel for some batches.
    rows = Rows(grad.view(-1), 1, 0, 0) if grad.is_contiguous() else rows_of(grad)
    if rows is None:
        raise RuntimeError("kdfast::scale_: rows of grad must be addressable in place")
    width = rows.tensor.shape[-1]
    count = grad.numel() // width
    with cuda.device_of(grad):
        _scale_kernel[(min(PROGRAMS, count * cdiv(width, BLOCK)),)](
            *rows.arguments, factor, count, width, BLOCK=BLOCK, num_warps=NUM_WARPS
        )
