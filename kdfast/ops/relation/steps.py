"""Who takes the steps between the matrix products of the drivers: functions of the same names for either device."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from kdfast import backends
from kdfast.ops.relation import cpu_steps


def steps_for(x: Tensor) -> Any:
    """The module whose functions run where ``x`` is."""
    if backends.on_gpu(x):
        from kdfast.ops.relation import triton_kernels  # needs triton, which a machine without a GPU may lack

        return triton_kernels
    return cpu_steps
