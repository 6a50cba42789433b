"""Similarity graphs: the k best columns of every row of a product that is never stored, and what rests on its edges."""

from kdfast.ops.graph.function import MAX_K, METRICS, graph, graph_kl

__all__ = ["MAX_K", "METRICS", "graph", "graph_kl"]
