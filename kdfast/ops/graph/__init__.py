"""Similarity graphs: the k best columns of every row of a product that is never stored, and what rests on its edges."""

from kdfast.ops.autograd import REDUCTIONS
from kdfast.ops.graph.function import MAX_K, METRICS, graph, graph_kl

__all__ = ["MAX_K", "METRICS", "REDUCTIONS", "graph", "graph_kl"]
