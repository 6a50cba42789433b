"""Schemas and fake kernels of ``torch.ops.kdfast.attention`` and ``feature_mse``.

Both return the loss and its gradient for grad_output 1, which saves backward a read of either side. How backward works:
``ScalarLoss`` in kdfast/ops/autograd.py.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kdfast.ops.autograd import ScalarLoss, apply, scalar_loss_like
from kdfast.ops.library import LIBRARY, define

MAX_PIXELS = 65535 * 128  # of a map on a GPU: its blocks of pixels are a grid's second or third axis

define(
    "attention(Tensor student_maps, Tensor teacher_maps, float p, bool normalize, bool needs_grad) -> (Tensor, Tensor)"
)
define("feature_mse(Tensor student, Tensor teacher, Tensor? mask, bool needs_grad) -> (Tensor, Tensor)")


def _on_cuda(name: str) -> Any:
    def launch(*arguments: Any) -> tuple[Tensor, Tensor]:
        from kdfast.ops.features import triton_kernels  # needs triton, which a machine without a GPU may lack

        return getattr(triton_kernels, name)(*arguments)

    return launch


def gradient_dtype(student: Tensor) -> torch.dtype:
    """The student's, but float32 for float16: a gradient not yet multiplied by the loss scale would leave its range."""
    return torch.float32 if student.dtype == torch.float16 else student.dtype


def _fake(student: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    shape = student.shape if arguments[-1] else (0,)
    return scalar_loss_like(student), student.new_empty(shape, dtype=gradient_dtype(student))


for _name in ("attention", "feature_mse"):
    LIBRARY.impl(_name, _on_cuda(_name), "CUDA")
    torch.library.register_fake(f"kdfast::{_name}", _fake, lib=LIBRARY)


def attention(student_maps: Tensor, teacher_maps: Tensor, p: float, normalize: bool) -> Tensor:
    """The loss of :func:`kdfast.attention_transfer_loss`; arguments are already checked."""
    op = torch.ops.kdfast.attention.default
    return apply(ScalarLoss, student_maps, op, (float(p), normalize), teacher_maps.detach())


def feature_mse(student: Tensor, teacher: Tensor, mask: Tensor | None) -> Tensor:
    """The loss of :func:`kdfast.feature_mse_loss`; arguments are already checked."""
    mask = None if mask is None else mask.contiguous()
    return apply(ScalarLoss, student, torch.ops.kdfast.feature_mse.default, (), teacher.detach(), mask)
