"""Launcher of ``torch.ops.kdfast.graph_bounds`` and ``graph_hits``: both looks at the similarities, in our own product.

The steps are those of triton_kernels.py, whose kernels make the coefficients, the limits and the sorted result. Without
keys one half of the symmetric matrix is multiplied. Half types on NVIDIA GPUs. Has not run on a GPU yet: it takes
nothing from the other launchers (``FASTER``) and has no name among the backends; tests and benchmarks call ``graph``.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from kdfast.ops.graph import triton_kernels
from kdfast.ops.graph.function import METRICS, empty_graph

# (neighbours up to, pairs from which) it was faster than the others on an H100: nothing is measured.
FASTER: tuple[tuple[int, int], ...] = ()
DTYPES = (torch.float16, torch.bfloat16)
ALIGNED = 8  # features of a row are a multiple of it: reads of 16 bytes
BIN = 8  # columns of a tile that share a bin
# Rows of a tile, 128 or 256. By arithmetic the former's two blocks on an SM hide one another's comparisons, the latter
# reads a quarter less from L2; benchmarks/graph_kernels.py tries both.
ROWS = 128


class Selection(NamedTuple):
    """For up to ``k`` neighbours: every how many tiles the limits look at, a row's bins, and its buffer."""

    k: int
    stride: int
    bins: int
    capacity: int


# By arithmetic, in docs/gpu.md. A stride costs 2 / stride of the half product, and about stride * k columns reach the
# limit, all of which are sorted; k is then chosen so that fewer than 1 of 10^5 rows have more than there is room for.
SELECTIONS = (Selection(32, 4, 256, 256), Selection(64, 4, 256, 512), Selection(128, 2, 512, 512))


def selection(k: int, columns: int) -> Selection:
    """The line for ``k``; of few columns every tile is looked at, so that 2 k bins hold something."""
    line = next(line for line in SELECTIONS if k <= line.k)
    return line._replace(stride=max(1, min(line.stride, columns // (2 * k * BIN))))


def is_faster(features: Tensor, keys: Tensor | None, k: int, metric: int) -> bool:
    """Whether it was measured to be faster than what else there is at such sizes."""
    pairs = features.shape[0] * (features if keys is None else keys).shape[0]
    return features.dtype in DTYPES and any(k <= most and pairs >= fewest for most, fewest in FASTER)


def graph(
    features: Tensor,
    keys: Tensor | None,
    labels: Tensor | None,
    k: int,
    metric: int,
    include_self: bool,
    ieee: bool,
) -> tuple[Tensor, Tensor]:
    """``torch.ops.kdfast.graph``; products of half types are sums of float32, whatever ``ieee`` says."""
    if features.dtype not in DTYPES:
        raise TypeError(f"kdfast's own product takes float16 or bfloat16, got {features.dtype}")
    x = aligned(features)
    y = x if keys is None else aligned(keys)
    n, m, width = x.shape[0], y.shape[0], x.shape[1]
    values, indices = empty_graph(features, k)
    if n == 0:
        return values, indices
    itself, exact = include_self or keys is not None, metric == METRICS["euclidean"]
    _, stride, bins, capacity = selection(k, m)
    with torch.cuda.device_of(x):
        a = triton_kernels.coefficients(x, metric)
        b = a if x is y else triton_kernels.coefficients(y, metric)
        binned = torch.empty(n, bins, dtype=torch.float32, device=x.device)
        limits = torch.empty(n, dtype=torch.float32, device=x.device)
        counts = torch.zeros(n, dtype=torch.int32, device=x.device)
        found = torch.empty(n, capacity, dtype=torch.int64, device=x.device)
        torch.ops.kdfast.graph_bounds.default(x, y, a, b, labels, binned, metric, itself, stride, ROWS)
        error = triton_kernels.rounding(width, x.dtype, ieee)
        triton_kernels.limit(binned, limits, a, None, k, error, metric, exact)
        torch.ops.kdfast.graph_hits.default(x, y, a, b, labels, limits, counts, found, metric, itself, x is y, ROWS)
        triton_kernels.finish(x, y, a, b, labels, counts, found, values, indices, k, metric, itself, exact)
    return values, indices


def aligned(x: Tensor) -> Tensor:
    """Contiguous rows that begin at multiples of 16 bytes; features of zeros are added where they do not."""
    if x.shape[1] % ALIGNED:
        return F.pad(x, (0, -x.shape[1] % ALIGNED))
    x = x.contiguous()
    return x if x.data_ptr() % 16 == 0 else x.clone()
