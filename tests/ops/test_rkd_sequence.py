"""What is particular to the rkd_sequence kernel: chunks, instruction sets, threads, padding, straight runs."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import kdfast
from kdfast import backends
from support import DTYPES, LAYOUTS, assert_parity

pytestmark = pytest.mark.skipif(backends.extension_problem() is not None, reason="the extension is not built")

# A chunk is 32 positions, an angle reaches over three: below, at and above one chunk and two.
LENGTHS = (3, 4, 31, 32, 33, 34, 35, 64, 65, 66, 100)


def sequences(n: int, length: int, d: int = 9, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "student": torch.randn(n, length, d, generator=generator, dtype=torch.float64),
        "teacher": torch.randn(n, length, d + 2, generator=generator, dtype=torch.float64),
    }


def mask_of(n: int, length: int, seed: int = 0) -> Tensor:
    return torch.rand(n, length, generator=torch.Generator().manual_seed(seed)) < 0.8


def value_and_gradient(student: Tensor, teacher: Tensor, **options) -> tuple[Tensor, Tensor]:
    leaf = student.clone().requires_grad_()
    value = kdfast.rkd_sequence_angle_loss(leaf, teacher, **options)
    value.backward()
    return value.detach(), leaf.grad


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("level", backends.cpu_levels())
def test_every_instruction_set_keeps_the_rule(level, dtype):
    with backends.use_cpu_level(level):
        for seed, length in enumerate(LENGTHS):
            options = {"mask": mask_of(2, length, seed)} if seed % 2 else {}
            layout = list(LAYOUTS)[seed % len(LAYOUTS)]
            inputs = sequences(2, length, 1 + 5 * seed, seed)
            assert_parity("rkd_sequence_angle_loss", inputs, options, dtype, layout=layout, seed=seed)


def test_same_bits_with_any_number_of_threads():
    inputs = {k: v.float() for k, v in sequences(3, 100).items()}
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3, 1):
            torch.set_num_threads(count)
            results.append(value_and_gradient(**inputs, mask=mask_of(3, 100)))
    finally:
        torch.set_num_threads(threads)
    for value, gradient in results[1:]:
        assert torch.equal(value, results[0][0]) and torch.equal(gradient, results[0][1])


def test_padding_is_never_read():
    inputs, mask = sequences(2, 70), mask_of(2, 70)
    clean = value_and_gradient(**inputs, mask=mask)
    for x in inputs.values():
        x[~mask] = math.nan
    value, gradient = value_and_gradient(**inputs, mask=mask)
    assert torch.equal(value, clean[0]) and torch.equal(gradient, clean[1])
    assert (gradient[~mask] == 0).all()


def test_a_nan_stays_with_the_angles_that_see_it():
    inputs = sequences(2, 70)
    inputs["student"][1, 40, 3] = math.nan
    value, gradient = value_and_gradient(**inputs)
    assert value.isnan()
    touched = gradient.isnan().any(dim=-1)
    assert touched[1, 38:43].all() and touched.sum() == 5  # positions of the three angles through it


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("degrees", [0.0, 1e-3, 1e-2, 90.0, 179.99, 180.0])
def test_gradients_are_finite_and_accurate_at_every_angle(degrees, dtype):
    """An angle of 1e-3 degrees has 1 / theta times the rounding of a unit vector, as in the reference."""
    angle = math.radians(degrees)
    turn = [[0.0, 0.0], [1.0, 0.0], [2 * math.cos(angle), 2 * math.sin(angle) if 0 < degrees < 180 else 0.0]]
    student = torch.tensor([turn], dtype=torch.float64)
    upright = torch.tensor([[[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]]], dtype=torch.float64)
    value, gradient = value_and_gradient(student.to(dtype), upright.to(dtype))
    leaf = student.to(dtype).double().requires_grad_()
    expected = kdfast.reference.rkd_sequence_angle_loss(leaf, upright)
    expected.backward()
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(value.double(), expected.detach(), rtol=8 * eps, atol=8 * eps)
    sharp = max(math.sin(angle), 1e-5)
    torch.testing.assert_close(gradient.double(), leaf.grad, rtol=0, atol=8 * eps / sharp)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("short", [[1], [2], [1, 2]], ids=["first", "second", "both"])
@pytest.mark.parametrize("level", backends.cpu_levels())
def test_beside_a_step_shorter_than_the_smallest_norm_the_other_has_its_gradient(level, short, dtype):
    """Each row by its own size: that of a short step is 1e12 times as large."""
    inputs = {k: v.to(dtype) for k, v in sequences(1, 3).items()}
    inputs["student"][0, 0] = 0
    inputs["student"][0, short] *= 2e-13
    with backends.use_cpu_level(level):
        _, gradient = value_and_gradient(**inputs)
    leaf = inputs["student"].double().requires_grad_()
    kdfast.reference.rkd_sequence_angle_loss(leaf, inputs["teacher"].double()).backward()
    error = (gradient - leaf.grad).abs().amax(dim=-1)
    assert (error <= 64 * torch.finfo(dtype).eps * leaf.grad.abs().amax(dim=-1)).all()


def test_straight_runs_have_gradient_zero():
    line = torch.arange(40.0)[None, :, None] * torch.tensor([1.0, 2.0, -3.0])
    value, gradient = value_and_gradient(line, sequences(1, 40)["teacher"].float())
    assert value > 0 and (gradient == 0).all()


def test_double_backward_is_refused():
    inputs = sequences(2, 5)
    student = inputs["student"].requires_grad_()
    (grad,) = torch.autograd.grad(
        kdfast.rkd_sequence_angle_loss(student, inputs["teacher"]), student, create_graph=True
    )
    with pytest.raises(RuntimeError, match="differentiated once"):
        grad.sum().backward()


@pytest.mark.parametrize("shape", [(0, 5, 3), (2, 4, 0)])
def test_nothing_to_turn_gives_zero(shape):
    for layout in LAYOUTS.values():
        student = layout(torch.zeros(shape)).requires_grad_()
        value = kdfast.rkd_sequence_angle_loss(student, layout(torch.zeros(shape)))
        value.backward()
        assert value == 0 and (student.grad == 0).all()


def test_the_op_passes_opcheck():
    inputs = {k: v.float() for k, v in sequences(2, 6).items()}
    for needs_grad in (True, False):
        torch.library.opcheck(torch.ops.kdfast.rkd_sequence.default, (*inputs.values(), mask_of(2, 6), needs_grad))
