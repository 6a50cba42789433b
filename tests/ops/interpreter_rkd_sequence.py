"""The Triton kernels of rkd_sequence on the CPU, interpreted. Run by test_rkd_sequence_triton.py on its own."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from kdfast import reference
from kdfast.ops.rkd_sequence import triton_kernels

assert triton_kernels.triton.knobs.runtime.interpret, "TRITON_INTERPRET=1 must be set before triton is imported"


def features(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


SEQUENCE_MASK = torch.tensor([[True] * 5 + [False], [True, True, False, True, True, True]])


def check_sequence(student: Tensor, teacher: Tensor, mask: Tensor | None) -> None:
    with np.errstate(all="ignore"):
        value, gradient = triton_kernels.rkd_sequence(student, teacher, mask, True)
    leaf = student.double().requires_grad_()
    expected = reference.rkd_sequence_angle_loss(leaf, teacher.double(), mask=mask)
    expected.backward()
    assert value.dtype == gradient.dtype == torch.float32 and gradient.shape == student.shape
    assert abs(value - expected) <= 2e-6 * max(float(expected), 1e-6)
    assert (gradient - leaf.grad).abs().max() <= 4e-6 * max(float(leaf.grad.abs().max()), 1e-6)


@pytest.mark.parametrize("mask", [None, SEQUENCE_MASK], ids=["all", "masked"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_sequences(monkeypatch, dtype, mask):
    monkeypatch.setattr(triton_kernels, "block", lambda d: 4)  # several a row
    student, teacher = features(2, 6, 5, seed=1).to(dtype), features(2, 6, 7, seed=2).to(dtype)
    student[1, 4] = student[1, 3]  # a step of 0
    check_sequence(student, teacher, mask)
    if mask is not None:
        clean = triton_kernels.rkd_sequence(student, teacher, mask, True)
        student[~mask] = math.nan
        dirty = triton_kernels.rkd_sequence(student, teacher, mask, True)
        assert torch.equal(clean[0], dirty[0]) and torch.equal(clean[1], dirty[1])


@pytest.mark.parametrize("short", [[1], [2], [1, 2]], ids=["first", "second", "both"])
def test_beside_a_step_shorter_than_the_smallest_norm_the_other_has_its_gradient(short):
    student, teacher = features(1, 3, 5, seed=1).float(), features(1, 3, 7, seed=2).float()
    student[0, 0] = 0
    student[0, short] *= 2e-13
    _, gradient = triton_kernels.rkd_sequence(student, teacher, None, True)
    leaf = student.double().requires_grad_()
    reference.rkd_sequence_angle_loss(leaf, teacher.double()).backward()
    # Each row by its own size: that of a short step is 1e12 times as large.
    assert ((gradient - leaf.grad).abs() <= 4e-6 * leaf.grad.abs().amax(dim=-1, keepdim=True)).all()


def test_straight_sequences_have_gradient_zero():
    line = torch.arange(6.0)[None, :, None] * torch.tensor([1.0, 2.0, -3.0])
    value, gradient = triton_kernels.rkd_sequence(line, features(1, 6, 3).float(), None, True)
    assert value > 0 and (gradient == 0).all()


def test_without_a_gradient_the_loss_is_the_same():
    student, teacher = features(2, 6, 5, seed=1).float(), features(2, 6, 7, seed=2).float()
    with np.errstate(all="ignore"):
        value, gradient = triton_kernels.rkd_sequence(student, teacher, SEQUENCE_MASK, False)
        assert gradient.shape == (0,)
        assert torch.equal(value, triton_kernels.rkd_sequence(student, teacher, SEQUENCE_MASK, True)[0])


def test_no_sequences_and_no_width():
    value, gradient = triton_kernels.rkd_sequence(torch.zeros(0, 4, 3), torch.zeros(0, 4, 3), None, True)
    assert value == 0 and gradient.shape == (0, 4, 3)
    value, gradient = triton_kernels.rkd_sequence(torch.zeros(2, 4, 0), torch.zeros(2, 4, 0), None, True)
    assert value == 0 and gradient.shape == (2, 4, 0)
