"""Distances and angles among all rows of a batch, and angles along sequences: relational knowledge distillation."""

from kdfast.ops.rkd.function import Options, rkd

__all__ = ["Options", "rkd"]
