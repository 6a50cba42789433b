"""Divergences between softened rows of logits, and the cross-entropy that rides on the same read: one kernel."""

from kdfast.ops.autograd import REDUCTIONS
from kdfast.ops.kl.function import KINDS, Options, kl

__all__ = ["KINDS", "REDUCTIONS", "Options", "kl"]
