"""Large gradients are written past the caches (csrc/cpu/simd.h: stream), and are those of small ones.

A batch in two halves, each below the size that streams, gives the same rows by ordinary stores. Rows begin anywhere
within a line of the cache: widths are odd.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import kdfast
from kdfast import backends

pytestmark = pytest.mark.skipif(backends.extension_problem() is not None, reason="the extension is not built")

STREAMED = 32 * 2**20  # bytes of gradient: kStreamed in csrc/cpu/row_runner.h
WIDTH = 8199  # five blocks of the kernels, the last of seven classes: scratch is read beyond it
BYTES = {torch.float32: 4, torch.float64: 8, torch.bfloat16: 2, torch.float16: 2}
K = 5


def logits(loss: Callable[..., Tensor]) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    return lambda student, teacher, labels: loss(student, teacher)


def stored(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
    values, indices = teacher[:, :K].float().log_softmax(-1), (labels[:, None] + torch.arange(K)) % WIDTH
    return kdfast.topk_kl_divergence(student, values, indices, tail="drop", values="logprobs", reduction="sum")


# One for each way in which a gradient is put together, all sums over rows.
LOSSES = {
    "difference": logits(lambda s, t: kdfast.kl_divergence(s, t, 2.0, reduction="sum")),
    "product": logits(lambda s, t: kdfast.js_divergence(s, t, reduction="sum")),
    "standardized": logits(lambda s, t: kdfast.standardized_kl_divergence(s, t, reduction="sum")),
    "hard, and the label's element again": lambda s, t, y: kdfast.kd_loss(s, t, y, reduction="sum"),
    "one, and the listed elements again": stored,
    "masked rows": lambda s, t, y: kdfast.kl_divergence(s, t, reduction="sum", mask=y % 3 > 0),
    "mse": logits(lambda s, t: kdfast.feature_mse_loss(s, t) * len(s)),
    "attention": logits(lambda s, t: kdfast.attention_transfer_loss(as_maps(s), as_maps(t)) * len(s)),
}


def as_maps(rows: Tensor) -> Tensor:
    """Three channels of an odd number of pixels."""
    return rows.reshape(len(rows), 3, 1, WIDTH // 3)


def gradient(loss: Callable[..., Tensor], student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
    leaf = student.clone().requires_grad_()
    return torch.autograd.grad(loss(leaf, teacher, labels), leaf)[0]


@pytest.fixture(autouse=True)
def memory_full_of_nan():
    """What is not written stays NaN: the pool gives this memory to the gradients."""
    kdfast.empty_cache()
    for dtype in (torch.float32, torch.float64):
        gradient(LOSSES["difference"], *inputs(dtype)).fill_(math.nan)
    yield
    kdfast.empty_cache()


def inputs(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    rows = STREAMED // (8192 * BYTES[dtype])  # a power of two, by which means become sums without rounding
    student, teacher = (torch.randn(rows, WIDTH, generator=generator).to(dtype) for _ in range(2))
    return student, teacher, torch.randint(WIDTH, (rows,), generator=generator)


@pytest.mark.parametrize("dtype", BYTES, ids=str)
@pytest.mark.parametrize("name", LOSSES)
def test_streamed_gradients_are_those_of_ordinary_stores(name, dtype):
    student, teacher, labels = inputs(dtype)
    half = len(student) // 2
    for level in backends.cpu_levels():
        with backends.use_cpu_level(level):
            whole = gradient(LOSSES[name], student, teacher, labels)
            assert whole.numel() * BYTES[dtype] >= STREAMED
            for part in (slice(0, half), slice(half, None)):
                few = gradient(LOSSES[name], student[part], teacher[part], labels[part])
                assert few.numel() * BYTES[dtype] < STREAMED
                # Elements at the ends of a row may be the same formula in other instructions.
                rounding = torch.finfo(dtype).eps * few.abs().max().item()
                torch.testing.assert_close(whole[part], few, rtol=0, atol=rounding)
