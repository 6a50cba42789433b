"""Schema, fake kernel and options of ``torch.ops.kdfast.topk_kl``. How backward works: kdfast/ops/autograd.py."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from kdfast.ops.autograd import REDUCTIONS, RowLoss, apply, loss_like
from kdfast.ops.library import LIBRARY, define

TAILS = {"drop": 0, "bucket": 1, "renormalize": 2}


class Options(NamedTuple):
    """The op's arguments that are not tensors."""

    temperature: float
    tail: int
    logprobs: bool  # what teacher_values are; else logits
    reduction: int = REDUCTIONS["batchmean"]


# The loss, and its gradient for grad_output 1 (empty unless needs_grad).
define(
    "topk_kl(Tensor student, Tensor teacher_values, Tensor teacher_indices, Tensor? mask, Tensor? row_weight, "
    "float temperature, int tail, bool logprobs, int reduction, bool needs_grad) -> (Tensor, Tensor)"
)


def _topk_kl_cuda(*arguments: Any) -> tuple[Tensor, Tensor]:
    from kdfast.ops.topk_kl import triton_kernels  # needs triton, which a machine without a GPU may lack

    return triton_kernels.topk_kl(*arguments)


LIBRARY.impl("topk_kl", _topk_kl_cuda, "CUDA")


@torch.library.register_fake("kdfast::topk_kl", lib=LIBRARY)
def _topk_kl_fake(student: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    *_, reduction, needs_grad = arguments
    return loss_like(student, reduction), student.new_empty(student.shape if needs_grad else (0,))


def topk_kl(
    student_logits: Tensor,
    teacher_values: Tensor,
    teacher_indices: Tensor,
    options: Options,
    *,
    mask: Tensor | None = None,
) -> Tensor:
    """The loss ``options`` describe; arguments are already checked."""
    mask = None if mask is None else mask.contiguous()
    op = torch.ops.kdfast.topk_kl.default
    return apply(RowLoss, student_logits, op, options, teacher_values.detach(), teacher_indices, mask, None)
