"""Losses on all pairs of rows of a batch, in memory of the size of the features: one driver, one kernel a loss."""

from kdfast.ops.relation.alignment import kernel_cosine
from kdfast.ops.relation.function import crd, kernel_alignment, pkt, similarity_preserving

__all__ = ["crd", "kernel_alignment", "kernel_cosine", "pkt", "similarity_preserving"]
