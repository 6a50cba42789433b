"""Tensors beyond 2^31 elements and strides beyond 2^31, against closed forms: no second tensor of that size."""

from __future__ import annotations

import math

import pytest
import torch

import kdfast

pytestmark = pytest.mark.gpu

CLASSES = 128256
ROWS = 2**31 // CLASSES + 3  # the last rows begin beyond 2^31 elements
BYTES = 5 * ROWS * CLASSES * 2  # student, gradient, and what their making holds


def needs_memory(size: int) -> None:
    free, _ = torch.cuda.mem_get_info()
    if free < size:
        pytest.skip(f"needs {size / 2**30:.0f} GiB of memory on the device, {free / 2**30:.0f} are free")


@pytest.fixture(autouse=True)
def memory_is_given_back():
    yield
    torch.cuda.empty_cache()


def teacher_row() -> torch.Tensor:
    return torch.randn(CLASSES, generator=torch.Generator().manual_seed(0)).bfloat16().cuda()


def expected_of(row: torch.Tensor) -> tuple[float, torch.Tensor]:
    """Against uniform student logits: KL(t || u) = log V - H(t), and its gradient u - p_t."""
    p = torch.softmax(row.double(), -1)
    return math.log(CLASSES) + float((p * p.log()).sum()), 1 / CLASSES - p


def check(loss: torch.Tensor, grad: torch.Tensor, row: torch.Tensor) -> None:
    """All rows alike but the last, whose student is its teacher."""
    kl, gradient = expected_of(row)
    assert loss.isfinite().all()
    torch.testing.assert_close(loss[:-1].double(), torch.full_like(loss[:-1], kl).double(), rtol=1e-5, atol=0)
    assert abs(loss[-1].item()) < 1e-5
    for index in {0, (len(grad) - 1) // 2, len(grad) - 2}:
        torch.testing.assert_close(grad[index].double(), gradient, rtol=2**-7, atol=1e-11)
    assert grad[-1].abs().max() < 1e-8


def test_kl_of_more_than_2_to_the_31_elements():
    needs_memory(BYTES)
    row = teacher_row()
    student = torch.zeros(ROWS, CLASSES, dtype=torch.bfloat16, device="cuda")
    assert student.numel() > 2**31
    student[-1] = row
    student.requires_grad_()
    loss = kdfast.kl_divergence(student, row.expand(ROWS, -1), reduction="none")
    (grad,) = torch.autograd.grad(loss.sum(), student)
    check(loss.detach(), grad, row)


def test_kl_of_rows_more_than_2_to_the_31_elements_apart():
    needs_memory(BYTES)
    row = teacher_row()
    memory = torch.zeros(2**31 + 2 * CLASSES, dtype=torch.bfloat16, device="cuda")
    student = memory.as_strided((2, CLASSES), (2**31 + 16, 1))
    student[-1] = row
    student = student.detach().requires_grad_()
    loss = kdfast.kl_divergence(student, row.expand(2, -1), reduction="none")
    (grad,) = torch.autograd.grad(loss.sum(), student)
    check(loss.detach(), grad, row)


def test_a_stored_teacher_of_more_than_2_to_the_31_student_logits():
    """Two classes listed, tail dropped: sum_k p_k (log p_k - log(1/V))."""
    needs_memory(BYTES)
    student = torch.zeros(ROWS, CLASSES, dtype=torch.bfloat16, device="cuda")
    student[-1, 7] = 30.0
    student.requires_grad_()
    values = torch.tensor([0.75, 0.25], device="cuda").log().expand(ROWS, 2)
    indices = torch.tensor([7, CLASSES - 1], device="cuda").expand(ROWS, 2)
    loss = kdfast.topk_kl_divergence(student, values, indices, values="logprobs", tail="drop", reduction="none")
    (grad,) = torch.autograd.grad(loss.sum(), student)
    entropy = 0.75 * math.log(0.75) + 0.25 * math.log(0.25)
    torch.testing.assert_close(loss[:-1], torch.full_like(loss[:-1], entropy + math.log(CLASSES)), rtol=1e-5, atol=0)
    assert loss[-1].item() == pytest.approx(entropy + 0.25 * 30.0, abs=1e-4)
    for index in (0, ROWS - 2):
        assert grad[index, 7].item() == pytest.approx(1 / CLASSES - 0.75, rel=2**-7)
        assert grad[index, 0].item() == pytest.approx(1 / CLASSES, rel=2**-7)
    assert grad[-1, 7].item() == pytest.approx(0.25, rel=2**-7)
