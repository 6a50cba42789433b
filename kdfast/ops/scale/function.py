"""Schema and fake kernel of ``torch.ops.kdfast.scale_``, the last step of backward where forward wrote the gradient."""

from __future__ import annotations

import torch
from torch import Tensor

from kdfast import backends, checks
from kdfast.ops.library import LIBRARY, define

# Gradients of up to so many elements are multiplied by PyTorch, which takes the host a tenth of the time of a launch by
# Triton; larger ones by a kernel that moves nothing where the factor is 1. Where the GPU gains from that: unmeasured.
SMALL = 2**18
# GPUs alone: factor is a scalar there, of any floating dtype.
define("scale_(Tensor(a!) grad, Tensor factor) -> ()")


def _on_cuda(grad: Tensor, factor: Tensor) -> None:
    from kdfast.ops.scale import triton_kernels  # needs triton, which a machine without a GPU may lack

    triton_kernels.scale_(grad, factor)


LIBRARY.impl("scale_", _on_cuda, "CUDA")


@torch.library.register_fake("kdfast::scale_", lib=LIBRARY)
def _fake(grad: Tensor, factor: Tensor) -> None:
    pass


def scale_(grad: Tensor, factor: Tensor) -> Tensor:
    """``grad`` times the scalar ``factor``, in place; a factor of 1 moves nothing.

    Whether it is 1, on a GPU only the GPU knows: a kernel looks, and nobody waits for it.
    """
    if checks.is_traced(factor):
        return grad.mul_(factor)  # which a compiler may fuse with what comes next
    if backends.on_gpu(grad):
        if grad.numel() <= SMALL:
            # In float32, as in the kernel: grad.mul_(factor) would round the factor to a half type first.
            return torch.mul(grad.float(), factor, out=grad)
        torch.ops.kdfast.scale_.default(grad, factor)
    elif factor.item() != 1:
        grad.mul_(factor)
    return grad
