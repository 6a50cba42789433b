"""A finished gradient times grad_output, which nearly always is 1: the op and its Triton kernel."""

from kdfast.ops.scale.function import scale_

__all__ = ["scale_"]
