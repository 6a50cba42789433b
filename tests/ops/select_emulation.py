"""``torch.ops.kdfast.graph_select`` on the CPU: the kernel's own source, compiled with select_emulation.cpp."""

from __future__ import annotations

import ctypes

import emulation
import torch
from emulation import pointer
from torch import Tensor

MISSING = emulation.MISSING


def graph_select(
    products: Tensor,
    a: Tensor,
    b: Tensor,
    labels: Tensor | None,
    keys: Tensor,
    values: Tensor,
    counts: Tensor | None,
    k: int,
    metric: int,
    row: int,
    column: int,
    m: int,
    itself: bool,
    error: float,
) -> None:
    """What csrc/cuda/graph.cu makes of its arguments."""
    assert products.stride(0) % 4 == 0 and products.stride(1) == 1
    assert all(x is None or x.is_contiguous() for x in (a, b, labels, keys, values, counts))
    rows, columns = products.shape
    assert len(b) >= column + columns and len(a) >= row + rows
    long, number = ctypes.c_int64, ctypes.c_int32
    emulation.library("select_emulation").graph_select_on_cpu(
        pointer(products), long(products.stride(0)), pointer(a), pointer(b), pointer(labels), pointer(keys),
        long(keys.stride(0)), pointer(values), pointer(counts), long(row), long(column), number(rows),
        number(min(columns, m - column)), number(k), ctypes.c_bool(itself), ctypes.c_bool(column + columns >= m),
        ctypes.c_float(error), number(metric),
    )  # fmt: skip


def registered() -> torch.library.Library:
    """Keep it as long as the op is needed."""
    return emulation.registered("graph", {"graph_select": graph_select})
