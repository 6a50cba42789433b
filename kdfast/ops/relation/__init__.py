"""Losses on all pairs of rows of a batch, in memory of the size of the features: one driver, one kernel a loss."""

from kdfast.ops.relation.function import crd, pkt, similarity_preserving
from kdfast.ops.relation.products import kernel_alignment, kernel_cosine

__all__ = ["crd", "kernel_alignment", "kernel_cosine", "pkt", "similarity_preserving"]
