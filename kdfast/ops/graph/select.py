"""Launcher of ``torch.ops.kdfast.graph_select``: the selection from tiles of the product, which cuBLAS makes.

A tile is read before the next one takes its place: the matrix is never stored. All products have one shape, for which
cuBLAS sums in one order, so that equal rows have equal similarities in whichever tile they are. Runs what it was
measured to be faster at than Triton (``is_faster``), and where ``kdfast.backends.use('cuda')`` asks for it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor

from kdfast.ops.graph import triton_kernels
from kdfast.ops.graph.function import MAX_K, METRICS, empty_graph
from kdfast.reference.geometry import no_autocast

# (neighbours up to, pairs from which) it was faster on an H100. Few neighbours: of half types alone, since the product
# of float32 is nearly all the time that either takes.
FASTER = ((64, 2**28), (128, 2**26))
# Products of a tile in float32, 64 MiB: of 32 MiB, which an H100's L2 would hold, the two launches of a tile took
# longer, 0.1 ms, than its work.
TILE = 2**24
ROWS = 4096  # a warp each, 31 on an SM; fewer where there are fewer
COLUMNS = 2**16  # of a tile of few rows, at most
ALIGNED = 16  # columns of a tile are a multiple of it, for cuBLAS and for reads of 16 bytes


def is_faster(features: Tensor, keys: Tensor | None, k: int, metric: int) -> bool:
    """Whether it was measured to be faster than Triton at such sizes."""
    pairs = features.shape[0] * (features if keys is None else keys).shape[0]
    most, fewest = next(line for line in FASTER if k <= line[0])
    return (
        pairs >= fewest
        and metric != METRICS["euclidean"]  # not measured
        and (most == MAX_K or features.dtype != torch.float32)
    )


def graph(
    features: Tensor,
    keys: Tensor | None,
    labels: Tensor | None,
    k: int,
    metric: int,
    include_self: bool,
    ieee: bool,
) -> tuple[Tensor, Tensor]:
    """``torch.ops.kdfast.graph``."""
    x = features.contiguous()
    y = x if keys is None else keys.contiguous()
    n, m, width = x.shape[0], y.shape[0], x.shape[1]
    values, indices = empty_graph(features, k)
    if n == 0:
        return values, indices
    itself = include_self or keys is not None
    # Autocast would round the product.
    with torch.cuda.device_of(x), no_autocast(x), product_precision(ieee):
        rows, columns = shape_of_tiles(n, m)
        near, far = triton_kernels.centred(x, y, metric)
        far = F.pad(far, (0, 0, 0, -m % columns))
        b = triton_kernels.coefficients(far, metric)
        a = b if x is y else triton_kernels.coefficients(near, metric)
        # Between the tiles of a row its best keys wait where the indices will be. Distances are not exact: what may be
        # among the nearest goes to a buffer, and Triton's last step computes it anew.
        found, counts = indices, None
        if metric == METRICS["euclidean"]:
            capacity = triton_kernels.selection(k).capacity
            found = torch.empty(n, capacity, dtype=torch.int64, device=x.device)
            counts = torch.empty(n, dtype=torch.int32, device=x.device)
        error = triton_kernels.rounding(width, x.dtype, ieee)
        tile = torch.empty(rows, columns, dtype=torch.float32, device=x.device)
        starts = range(0, m, columns)
        blocks = [block.T for block in far.split(columns)]
        for row in range(0, n, rows):
            begin = min(row, n - rows)  # the last rows once more rather than a smaller product
            for column, block in zip(starts, blocks, strict=True):
                product(near[begin : begin + rows], block, tile)
                torch.ops.kdfast.graph_select.default(
                    tile[row - begin :], a, b, labels, found, values, counts, k, metric, row, column, m, itself, error
                )
        if counts is not None:
            triton_kernels.finish(x, y, a, b, labels, counts, found, values, indices, k, metric, itself, True)
    return values, indices


@contextmanager
def product_precision(ieee: bool) -> Iterator[None]:
    """PyTorch's products of float32, whatever the process allows otherwise."""
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "ieee" if ieee else "tf32"
    try:
        yield
    finally:
        torch.backends.cuda.matmul.fp32_precision = before


def shape_of_tiles(n: int, m: int) -> tuple[int, int]:
    """Rows and columns of tiles that cover n rows and m columns evenly."""
    columns = min(TILE // min(n, ROWS), COLUMNS)
    columns = -(-m // -(-m // columns))
    columns += -columns % ALIGNED
    rows = min(n, max(TILE // columns, 1))
    return -(-n // -(-n // rows)), columns


def product(rows: Tensor, columns: Tensor, out: Tensor) -> None:
    """rows @ columns in float32, of half types too."""
    if rows.dtype == torch.float32:
        torch.mm(rows, columns, out=out)
    else:
        torch.mm(rows, columns, out_dtype=torch.float32, out=out)
