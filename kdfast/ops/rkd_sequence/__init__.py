"""Angles along sequences of features, compared: autograd function, the op it wraps, its fake and its Triton kernels."""

from kdfast.ops.rkd_sequence.function import rkd_sequence

__all__ = ["rkd_sequence"]
