"""``torch.ops.kdfast.graph_bounds`` and ``graph_hits`` on the CPU: the kernels' own source, product_emulation.cpp."""

from __future__ import annotations

from ctypes import c_bool, c_int, c_int32

import emulation
import torch
from emulation import pointer
from torch import Tensor

MISSING = emulation.MISSING


def checked(x: Tensor, y: Tensor, *others: Tensor | None) -> None:
    """What csrc/cuda/graph_product.cu expects."""
    assert x.dtype == y.dtype and x.dtype in (torch.float16, torch.bfloat16)
    assert x.shape[1] == y.shape[1] and x.shape[1] % 8 == 0 and x.data_ptr() % 16 == y.data_ptr() % 16 == 0
    assert all(t is None or t.is_contiguous() for t in (x, y, *others))


def graph_bounds(
    x: Tensor,
    y: Tensor,
    a: Tensor,
    b: Tensor,
    labels: Tensor | None,
    bins: Tensor,
    metric: int,
    itself: bool,
    stride: int,
    rows: int,
) -> None:
    checked(x, y, a, b, labels, bins)
    library = emulation.library("product_emulation")
    of_a_block = library.bins_of_a_block_on_cpu()
    assert rows in (128, 256) and bins.shape[0] == len(x) and bins.shape[1] % of_a_block == 0
    library.graph_bounds_on_cpu(
        *map(pointer, (x, y, a, b, labels, bins)),
        *map(c_int32, (len(x), len(y), x.shape[1], stride, bins.shape[1] // of_a_block)),
        *map(c_bool, (itself, x.dtype == torch.bfloat16)), c_int(metric), c_int(rows),
    )  # fmt: skip


def graph_hits(
    x: Tensor,
    y: Tensor,
    a: Tensor,
    b: Tensor,
    labels: Tensor | None,
    limits: Tensor,
    counts: Tensor,
    found: Tensor,
    metric: int,
    itself: bool,
    symmetric: bool,
    rows: int,
) -> None:
    checked(x, y, a, b, labels, limits, counts, found)
    assert not symmetric or x.data_ptr() == y.data_ptr()
    emulation.library("product_emulation").graph_hits_on_cpu(
        *map(pointer, (x, y, a, b, labels, limits, counts, found)),
        *map(c_int32, (len(x), len(y), x.shape[1], found.shape[1])),
        *map(c_bool, (itself, symmetric, x.dtype == torch.bfloat16)), c_int(metric), c_int(rows),
    )  # fmt: skip


def registered() -> torch.library.Library:
    """Keep it as long as the ops are needed."""
    return emulation.registered("graph_product", {"graph_bounds": graph_bounds, "graph_hits": graph_hits})
