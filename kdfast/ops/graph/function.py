"""Schemas, fake kernels and autograd of the graph ops: the selection, the gradient of its values, the loss on edges.

``graph`` looks at all N M pairs, the other two at N k edges, with Triton's kernels also where that of CUDA C++ selects.
How the backward of ``graph_kl`` works: kdfast/ops/autograd.py.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from kdfast import backends
from kdfast.ops.autograd import REDUCTIONS, RowLoss, apply, differentiable_once, loss_like, save, saved
from kdfast.ops.library import LIBRARY, define

METRICS = {"cosine": 0, "dot": 1, "euclidean": 2}
MAX_K = 128  # neighbours a row that the kernels keep


class Options(NamedTuple):
    """The arguments of ``graph_kl`` that are not tensors."""

    temperature: float
    metric: int
    reduction: int = REDUCTIONS["batchmean"]


# Values and int64 indices (N, k) of features (N, D) among keys (M, D), or among themselves. Labels: rows of one label
# are no neighbours; where a row has fewer than k, value -inf (euclidean: inf) and index -1.
define(
    "graph(Tensor features, Tensor? keys, Tensor? labels, int k, int metric, bool include_self, bool ieee) "
    "-> (Tensor, Tensor)"
)
# The ops below take values, indices and their gradients contiguous, as ``graph`` returns them.
# Gradients of features and keys, empty where not needed; without keys the first has both sides' share.
define(
    "graph_backward(Tensor features, Tensor? keys, Tensor values, Tensor indices, Tensor grad_values, int metric, "
    "bool needs_features, bool needs_keys) -> (Tensor, Tensor)"
)
# The loss, and its gradient for grad_output 1 (empty unless needs_grad).
define(
    "graph_kl(Tensor student, Tensor teacher_values, Tensor indices, Tensor? row_weight, float temperature, "
    "int metric, int reduction, bool needs_grad) -> (Tensor, Tensor)"
)


def _graph_cuda(
    features: Tensor, keys: Tensor | None, labels: Tensor | None, k: int, metric: int, *options: Any
) -> tuple[Tensor, Tensor]:
    from kdfast.ops.graph import product, select, triton_kernels  # need triton, which a machine without a GPU may lack

    # Asked for by name, 'cuda' is ``select``, which takes every dtype and metric.
    fastest = product if product.is_faster(features, keys, k, metric) and backends.is_forced(backends.AUTO) else select
    faster = fastest.is_faster(features, keys, k, metric)
    launchers = fastest if backends.prefers_cuda("graph", features, faster) else triton_kernels
    return launchers.graph(features, keys, labels, k, metric, *options)


def _graph_backward_cuda(*arguments: Any) -> tuple[Tensor, Tensor]:
    from kdfast.ops.graph import triton_kernels

    return triton_kernels.graph_backward(*arguments)


def _graph_kl_cuda(*arguments: Any) -> tuple[Tensor, Tensor]:
    from kdfast.ops.graph import triton_kernels

    return triton_kernels.graph_kl(*arguments)


LIBRARY.impl("graph", _graph_cuda, "CUDA")
LIBRARY.impl("graph_backward", _graph_backward_cuda, "CUDA")
LIBRARY.impl("graph_kl", _graph_kl_cuda, "CUDA")


def empty_graph(features: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Values and indices of k neighbours a row, to be written."""
    values = features.new_empty(
        (features.shape[0], k), dtype=torch.float64 if features.dtype == torch.float64 else torch.float32
    )
    return values, values.new_empty(values.shape, dtype=torch.int64)


@torch.library.register_fake("kdfast::graph", lib=LIBRARY)
def _graph_fake(
    features: Tensor, keys: Tensor | None, labels: Tensor | None, k: int, *options: Any
) -> tuple[Tensor, Tensor]:
    return empty_graph(features, k)


@torch.library.register_fake("kdfast::graph_backward", lib=LIBRARY)
def _graph_backward_fake(features: Tensor, keys: Tensor | None, *arguments: Any) -> tuple[Tensor, Tensor]:
    *_, needs_features, needs_keys = arguments
    other = features if keys is None else keys
    return (
        features.new_empty(features.shape if needs_features else (0,)),
        other.new_empty(other.shape if needs_keys else (0,)),
    )


@torch.library.register_fake("kdfast::graph_kl", lib=LIBRARY)
def _graph_kl_fake(student: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    *_, reduction, needs_grad = arguments
    return loss_like(student, reduction), student.new_empty(student.shape if needs_grad else (0,))


class _Graph(torch.autograd.Function):
    """Values that carry gradients to both sides, and indices."""

    @staticmethod
    def forward(
        ctx: Any,
        features: Tensor,
        keys: Tensor | None,
        labels: Tensor | None,
        k: int,
        metric: int,
        include_self: bool,
        ieee: bool,
    ) -> tuple[Tensor, Tensor]:
        values, indices = torch.ops.kdfast.graph.default(features, keys, labels, k, metric, include_self, ieee)
        ctx.metric = metric
        save(ctx, features, keys, values, indices)
        ctx.mark_non_differentiable(indices)
        return values, indices

    @staticmethod
    def backward(ctx: Any, grad_values: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
        features, keys, values, indices = saved(ctx)
        needs = ctx.needs_input_grad[:2]
        grads = torch.ops.kdfast.graph_backward.default(
            features.detach(),
            None if keys is None else keys.detach(),
            values.detach(),
            indices,
            grad_values.detach().contiguous(),
            ctx.metric,
            *needs,
        )
        behind = (features, grad_values) if keys is None else (features, keys, grad_values)
        wanted = [differentiable_once(grad, *behind) if need else None for grad, need in zip(grads, needs, strict=True)]
        return *wanted, None, None, None, None, None


def graph(
    features: Tensor,
    keys: Tensor | None,
    labels: Tensor | None,
    k: int,
    metric: str,
    *,
    include_self: bool = False,
    precision: str = "ieee",
) -> tuple[Tensor, Tensor]:
    """Values and indices of the k best columns of each row of (N, D); arguments are already checked."""
    labels = None if labels is None else labels.contiguous()
    return _Graph.apply(features, keys, labels, k, METRICS[metric], include_self, precision == "ieee")


def graph_kl(student: Tensor, teacher_values: Tensor, indices: Tensor, metric: str, temperature: float) -> Tensor:
    """KL between row softmaxes over the edges of (N, k) ``indices``, mean over rows; arguments are already checked."""
    options = Options(temperature, METRICS[metric])
    return apply(RowLoss, student, torch.ops.kdfast.graph_kl.default, options, teacher_values, indices, None)
