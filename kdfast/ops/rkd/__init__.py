"""Distances and angles among all rows of a batch: relational knowledge distillation."""

from kdfast.ops.rkd.function import Options, rkd

__all__ = ["Options", "rkd"]
