"""Rows, norms and distances that the losses on features share; zero vectors have zero gradient here."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


def flatten_rows(x: Tensor) -> Tensor:
    """(N, …) to (N, D), half types widened to float32 before any arithmetic."""
    x = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
    return x.flatten(start_dim=1)


def unit_rows(x: Tensor, eps: float = 1e-12, *, add_eps: bool = False) -> Tensor:
    """``x / max(|x|, eps)`` over the last dimension, or ``x / (|x| + eps)`` with ``add_eps``.

    A row of norm 0 gives 0 and gets gradient 0, where the plain quotient has a gradient of ``1 / eps``.
    """
    norms = torch.linalg.vector_norm(x, dim=-1, keepdim=True)  # its own gradient at 0 is 0
    return torch.where(norms == 0, 0.0, x) / (norms + eps if add_eps else norms.clamp(min=eps))


def no_autocast(x: Tensor) -> AbstractContextManager[object]:
    """Autocast off on the device of ``x``: it would make products of float32 a half type.

    'meta' has no autocast, and PyTorch raises where it is switched off.
    """
    kind = x.device.type
    return nullcontext() if kind == "meta" else torch.autocast(kind, enabled=False)


def gram(x: Tensor, y: Tensor | None = None) -> Tensor:
    """``x y^T`` (y = x by default) over the last two dimensions, in their dtype whatever autocast says."""
    with no_autocast(x):
        return x @ (x if y is None else y).mT


def pairwise_squared_distances(x: Tensor, y: Tensor | None = None) -> Tensor:
    """(…, N, D) and (…, M, D) (y = x by default) to (…, N, M), from the differences: the Gram form cancels near 0."""
    return (x.unsqueeze(-2) - (x if y is None else y).unsqueeze(-3)).square().sum(dim=-1)


def pairwise_distances(x: Tensor, y: Tensor | None = None) -> Tensor:
    """Euclidean distances, (…, N, D) and (…, M, D) to (…, N, M); coincident rows have distance 0 and gradient 0."""
    squared = pairwise_squared_distances(x, y)
    coincident = squared == 0
    return torch.where(coincident, 0.0, torch.where(coincident, 1.0, squared).sqrt())
