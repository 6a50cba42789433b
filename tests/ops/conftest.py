"""What Triton's interpreter does not do as a GPU does: set right for the files it runs (interpreter_<op>.py)."""

from __future__ import annotations

import os

import numpy as np

if os.environ.get("TRITON_INTERPRET") == "1":
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    def rounded_once(self, x, y, z):
        """x * y + z as the hardware's fma: the interpreter's own rounds the product too.

        A product of two float32 is exact in float64.
        """
        exact = x.data.astype(np.float64) * y.data.astype(np.float64) + z.data.astype(np.float64)
        return TensorHandle(exact.astype(z.data.dtype), z.dtype.scalar)

    InterpreterBuilder.create_fma = rounded_once
