"""The Triton kernels of features on the CPU, interpreted. Run by test_features_triton.py with TRITON_INTERPRET=1."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from test_features import SIZES, maps
from torch import Tensor

from kdfast.ops import features, nodes
from kdfast.ops.features import triton_kernels
from support import assert_parity

assert triton_kernels.triton.knobs.runtime.interpret, "TRITON_INTERPRET=1 must be set before triton is imported"

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SLOW = ("long rows", "long rows of the student", "long rows halved", "long rows quartered", "one bin")  # one by one


@pytest.fixture(autouse=True)
def triton_ops(monkeypatch) -> None:
    """The functions of the op on CPU tensors, with Triton's launchers."""

    class Op:
        def __init__(self, launcher) -> None:
            self.default = launcher

    for name in ("attention", "feature_mse"):
        monkeypatch.setattr(torch.ops.kdfast, name, Op(getattr(triton_kernels, name)))
    monkeypatch.setattr(nodes, "_missing", "a launcher has none")
    monkeypatch.setattr(triton_kernels, "TILE", 64)
    monkeypatch.setattr(triton_kernels, "block", lambda pixels: 16)  # several a map


@pytest.fixture(autouse=True)
def no_warnings():
    with np.errstate(all="ignore"):
        yield


def attention(student_maps: Tensor, teacher_maps: Tensor, p: float = 2, normalize: bool = True) -> Tensor:
    return features.attention(student_maps, teacher_maps, p, normalize)


def feature_mse(student: Tensor, teacher: Tensor, mask: Tensor | None = None) -> Tensor:
    return features.feature_mse(student, teacher, mask)


@pytest.mark.parametrize("sizes", [name for name in SIZES if name not in SLOW])
@pytest.mark.parametrize("p", [1, 2, 3, 0.5])
def test_every_power_and_size(p, sizes):
    for seed, dtype in enumerate(DTYPES):
        options = {"p": p, "normalize": seed % 2 == 0}
        inputs = maps(*SIZES[sizes], n=2, seed=seed)
        assert_parity("attention_transfer_loss", inputs, options, dtype, function=attention, seed=seed)


@pytest.mark.parametrize("p", [1, 2, 3, 0.5])
def test_an_infinity_is_one_to_every_power(p):
    for normalize in (True, False):
        inputs = maps(*SIZES["no multiple of a vector"], n=3)
        inputs["student_maps"][0, 1, 0, 1] = inputs["teacher_maps"][1, 2, 0, 1] = math.inf
        inputs["student_maps"][2, 0, 0, 0] = -math.inf
        options = {"p": p, "normalize": normalize}
        assert_parity("attention_transfer_loss", inputs, options, torch.float32, function=attention)


def test_pooled_halves_are_summed_in_float32():
    inputs = maps((3, 4), (6, 8))
    inputs["teacher_maps"] *= 100
    assert_parity("attention_transfer_loss", inputs, {}, torch.bfloat16, function=attention)


def test_an_attention_of_zero_gets_no_gradient():
    inputs = {k: v.float() for k, v in maps((4, 4), (8, 8)).items()}
    student = inputs["student_maps"].index_fill(0, torch.tensor([1]), 0.0).requires_grad_()
    attention(student, inputs["teacher_maps"]).backward()
    assert (student.grad[1] == 0).all() and student.grad.isfinite().all() and (student.grad[0] != 0).all()


@pytest.mark.parametrize("shape", [(1, 1), (5, 17), (4, 64), (3, 100)])
@pytest.mark.parametrize("kind", [None, "rows", "elements"])
def test_masks_of_both_kinds(kind, shape):
    for seed, dtype in enumerate(DTYPES):
        generator = torch.Generator().manual_seed(seed)
        inputs = {s: torch.randn(shape, generator=generator, dtype=torch.float64) for s in ("student", "teacher")}
        kept = {None: None, "rows": shape[:1], "elements": shape}[kind]
        mask = None if kept is None else torch.rand(kept, generator=generator) < 0.6
        assert_parity("feature_mse_loss", inputs, {"mask": mask}, dtype, function=feature_mse, seed=seed)


def test_what_the_mask_drops_is_never_read():
    student, teacher = torch.randn(4, 30), torch.randn(4, 30)
    mask = torch.tensor([True, False, True, False])
    student[~mask] = teacher[~mask] = math.nan
    student.requires_grad_()
    loss = feature_mse(student, teacher, mask)
    loss.backward()
    assert loss.isfinite() and (student.grad[~mask] == 0).all() and (student.grad[mask] != 0).all()
    loss = feature_mse(student, teacher, torch.zeros(4, dtype=torch.bool))
    assert loss == 0


@pytest.mark.parametrize("sizes", ["a vector", "halved student"])
def test_without_a_gradient_the_loss_is_the_same(sizes):
    inputs = {k: v.float() for k, v in maps(*SIZES[sizes], n=2).items()}
    kept = inputs["student_maps"].clone().requires_grad_()
    assert torch.equal(attention(**inputs), attention(kept, inputs["teacher_maps"]))
    student, teacher = torch.randn(5, 17), torch.randn(5, 17)
    for mask in (None, torch.arange(5) % 2 == 0):
        assert torch.equal(feature_mse(student, teacher, mask), feature_mse(student.requires_grad_(), teacher, mask))
        student = student.detach()
