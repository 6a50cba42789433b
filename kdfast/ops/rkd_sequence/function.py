"""Schema and fake kernel of ``torch.ops.kdfast.rkd_sequence``; how backward works: ``ScalarLoss`` in
kdfast/ops/autograd.py.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kdfast.ops.autograd import ScalarLoss, apply, scalar_loss_like
from kdfast.ops.library import LIBRARY, define

# The mean over the angles that count of (theta_s - theta_t)^2, of sequences (N, L, D), and its gradient for grad_output
# 1 (empty unless needs_grad), both float32 for half types: float16 is rounded to after the loss scale has reached it.
define("rkd_sequence(Tensor student, Tensor teacher, Tensor? mask, bool needs_grad) -> (Tensor, Tensor)")


def _on_cuda(*arguments: Any) -> tuple[Tensor, Tensor]:
    from kdfast.ops.rkd_sequence import triton_kernels  # needs triton, which a machine without a GPU may lack

    return triton_kernels.rkd_sequence(*arguments)


LIBRARY.impl("rkd_sequence", _on_cuda, "CUDA")


@torch.library.register_fake("kdfast::rkd_sequence", lib=LIBRARY)
def _fake(student: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    loss = scalar_loss_like(student)
    return loss, student.new_empty(student.shape if arguments[-1] else (0,), dtype=loss.dtype)


def rkd_sequence(student: Tensor, teacher: Tensor, *, mask: Tensor | None = None) -> Tensor:
    """The loss of the angles along sequences (N, L, D); arguments are already checked."""
    mask = None if mask is None else mask.contiguous()
    return apply(ScalarLoss, student, torch.ops.kdfast.rkd_sequence.default, (), teacher.detach(), mask)
