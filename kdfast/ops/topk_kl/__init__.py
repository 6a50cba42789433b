"""Divergence of a stored teacher of k classes a row from the student's whole row."""

from kdfast.ops.topk_kl.function import TAILS, Options, topk_kl

__all__ = ["TAILS", "Options", "topk_kl"]
