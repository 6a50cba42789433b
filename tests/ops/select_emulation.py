"""``torch.ops.kdfast.graph_select`` on the CPU: the kernel's own source, compiled with select_emulation.cpp."""

from __future__ import annotations

import ctypes
import re
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[2]
MISSING = None if shutil.which("c++") else "no C++ compiler"
SCHEMA = (
    "graph_select(Tensor products, Tensor a, Tensor b, Tensor? labels, Tensor(a!) keys, Tensor(b!) values, "
    "Tensor(c!)? counts, int k, int metric, int row, int column, int m, bool itself, float error) -> ()"
)


@cache
def kernel() -> ctypes._CFuncPtr:
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / "select.so"
        flags = ["-std=c++20", "-O2", "-fno-strict-aliasing", "-shared", "-fPIC", "-w", f"-I{ROOT / 'csrc'}"]
        source = str(Path(__file__).with_suffix(".cpp"))
        subprocess.run(["c++", *flags, source, "-o", str(library)], check=True)
        return ctypes.CDLL(str(library)).graph_select_on_cpu


def pointer(x: Tensor | None) -> ctypes.c_void_p:
    return ctypes.c_void_p(None if x is None else x.data_ptr())


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
    kernel()(
        pointer(products), long(products.stride(0)), pointer(a), pointer(b), pointer(labels), pointer(keys),
        long(keys.stride(0)), pointer(values), pointer(counts), long(row), long(column), number(rows),
        number(min(columns, m - column)), number(k), ctypes.c_bool(itself), ctypes.c_bool(column + columns >= m),
        ctypes.c_float(error), number(metric),
    )  # fmt: skip


def registered() -> torch.library.Library:
    """Keep it as long as the op is needed."""
    source = (ROOT / "csrc" / "cuda" / "graph.cu").read_text()
    assert SCHEMA.replace(" ", "") in re.sub(r'"\s*"|\s', "", source)
    library = torch.library.Library("kdfast", "FRAGMENT")
    if not hasattr(torch.ops.kdfast, "graph_select"):
        library.define(SCHEMA)
    library.impl("graph_select", graph_select, "CPU")
    return library
