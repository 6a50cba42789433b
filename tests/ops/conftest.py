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

    def dot_of_any_type(self, a, b, d, input_precision, max_num_imprecise_acc):
        """a @ b + d. The interpreter's own multiplies the bits of bfloat16 as integers, and sums equal columns in
        orders of numpy's choice; in float64 those orders do not show.
        """
        wide = []
        for x in (a, b):
            data = x.data
            if x.dtype.scalar.is_bf16():
                data = (data.astype(np.uint32) << 16).view(np.float32)
            wide.append(data.astype(np.float64))
        return TensorHandle((wide[0] @ wide[1] + d.data).astype(d.data.dtype), d.dtype.scalar)

    InterpreterBuilder.create_fma = rounded_once
    InterpreterBuilder.create_dot = dot_of_any_type
