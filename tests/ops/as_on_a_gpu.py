"""Imported first in a process of its own: CPU tensors then take the path of CUDA tensors, Triton kernels included.

What is registered for CUDA is registered for the CPU too, the C++ extension is left out, and the choice of a backend
looks at no device: functions, autograd and launchers are those of a GPU.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor

assert "kdfast" not in sys.modules, "import as_on_a_gpu before kdfast"
sys.modules["kdfast._C"] = None  # type: ignore[assignment]
_impl = torch.library.Library.impl


def on_the_cpu_too(self: torch.library.Library, name: Any, function: Any, key: str = "", **options: Any) -> None:
    _impl(self, name, function, key, **options)
    if self.ns == "kdfast" and key == "CUDA":
        _impl(self, name, function, "CPU", **options)


torch.library.Library.impl = on_the_cpu_too

from kernels import OPS  # noqa: E402

from kdfast import backends  # noqa: E402
from kdfast.ops.relation import rows, tiles  # noqa: E402

asked: set[str] = set()  # ops that functions wanted to run


def as_on_a_gpu(op: str, tensor: Tensor) -> str:
    asked.add(op)
    able = op in OPS and tensor.dtype != torch.float64
    return backends.TRITON if able else backends.REFERENCE


backends.select = as_on_a_gpu
backends.on_gpu = lambda tensor: True
for sizes in (tiles.PANEL_BYTES, tiles.FEWEST, tiles.MOST, tiles.GROWING, tiles.ALIGNED, rows.FLOAT64_BYTES):
    sizes["cpu"] = sizes["cuda"]
assert backends.extension_problem() is not None
