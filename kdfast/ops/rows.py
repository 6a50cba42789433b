"""Rows of a tensor where they lie, as the Triton kernels that take logits address them."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Rows(NamedTuple):
    """Rows of a tensor (..., V) in place: row r begins at element (r // split) * outer + (r % split) * inner."""

    tensor: Tensor
    split: int
    outer: int
    inner: int

    @property
    def arguments(self) -> tuple[Tensor, int, int, int]:
        return self.tensor, self.split, self.outer, self.inner


def rows_of(x: Tensor) -> Rows | None:
    """``x`` as rows if its classes are adjacent and two strides reach every row, else None."""
    if x.is_contiguous():
        return Rows(x, 1, x.shape[-1], 0)
    if x.shape[-1] > 1 and x.stride(-1) != 1:
        return None
    dims: list[tuple[int, int]] = []  # (size, stride), outermost first, neighbours joined where one stride does
    for size, stride in zip(x.shape[:-1], x.stride()[:-1], strict=True):
        if size == 1:
            continue
        if dims and dims[-1][1] == size * stride:
            dims[-1] = (dims[-1][0] * size, stride)
        else:
            dims.append((size, stride))
    if len(dims) > 2:
        return None
    if len(dims) == 2:
        return Rows(x, dims[1][0], dims[0][1], dims[1][1])
    # One row: the stride of several, without which it would compile a kernel of its own.
    return Rows(x, 1, dims[0][1] if dims else x.shape[-1], 0)
