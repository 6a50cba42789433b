"""What is particular to attention and feature_mse: powers, pooling, masks, instruction sets."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import kdfast
from kdfast import backends
from kdfast.functional.features import _beyond_attention_kernels
from kdfast.ops.features import MAX_PIXELS
from support import DTYPES, LAYOUTS, assert_parity

pytestmark = pytest.mark.skipif(backends.extension_problem() is not None, reason="the extension is not built")

# Student's and teacher's height and width. Vectors have up to 16 elements, pooled rows are summed 512 at a time.
SIZES = {
    "one pixel": ((1, 1), (1, 1)),
    "a vector": ((4, 4), (4, 4)),
    "no multiple of a vector": ((5, 7), (5, 7)),
    "halved teacher": ((3, 4), (6, 8)),
    "halved student": ((6, 8), (3, 4)),
    "bins that overlap": ((3, 4), (5, 7)),
    "bins of the student that overlap": ((5, 7), (3, 4)),
    "each is larger once": ((3, 9), (5, 4)),
    "long rows": ((1, 7), (2, 1100)),
    "long rows of the student": ((2, 1100), (1, 700)),
    "long rows halved": ((1, 512), (2, 1024)),
    "long rows quartered": ((1, 256), (2, 1024)),
    "one bin": ((1, 1), (9, 600)),
}


def maps(student: tuple[int, int], teacher: tuple[int, int], n: int = 3, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "student_maps": torch.randn(n, 5, *student, generator=generator, dtype=torch.float64),
        "teacher_maps": torch.randn(n, 3, *teacher, generator=generator, dtype=torch.float64),
    }


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("p", [1, 2, 3, 0.5, 1.7])
@pytest.mark.parametrize("level", backends.cpu_levels())
def test_every_power_and_size_at_every_instruction_set(level, p, sizes):
    with backends.use_cpu_level(level):
        for seed, dtype in enumerate(DTYPES):
            options = {"p": p, "normalize": seed % 2 == 0}
            layout = list(LAYOUTS)[seed % len(LAYOUTS)]
            assert_parity(
                "attention_transfer_loss", maps(*SIZES[sizes], seed=seed), options, dtype, layout=layout, seed=seed
            )


def test_channels_last_maps_are_read_right():
    inputs = {k: v.float() for k, v in maps((6, 8), (6, 8)).items()}
    expected = kdfast.attention_transfer_loss(**inputs)
    turned = {k: v.contiguous(memory_format=torch.channels_last) for k, v in inputs.items()}
    assert torch.equal(kdfast.attention_transfer_loss(**turned), expected)


@pytest.mark.parametrize("p", [0.5, 1, 2, 3])
def test_activations_of_zero_get_gradient_zero(p):
    inputs = {k: v.float() for k, v in maps((4, 4), (4, 4)).items()}
    student = inputs["student_maps"].relu().requires_grad_()
    kdfast.attention_transfer_loss(student, inputs["teacher_maps"], p).backward()
    assert student.grad.isfinite().all()
    assert (student.grad[student == 0] == 0).all() and (student.grad[student > 0] != 0).all()


def test_an_attention_of_zero_stays_zero_and_gets_no_gradient():
    inputs = {k: v.float() for k, v in maps((4, 4), (8, 8)).items()}
    student = inputs["student_maps"].index_fill(0, torch.tensor([1]), 0.0).requires_grad_()
    loss = kdfast.attention_transfer_loss(student, inputs["teacher_maps"])
    loss.backward()
    assert (student.grad[1] == 0).all() and student.grad.isfinite().all()
    torch.testing.assert_close(loss, kdfast.reference.attention_transfer_loss(student, inputs["teacher_maps"]))


@pytest.mark.parametrize("sizes", ["a vector", "halved student"])
def test_a_nan_stays_in_its_sample(sizes):
    inputs = {k: v.float() for k, v in maps(*SIZES[sizes]).items()}
    inputs["student_maps"][1, 2, 0, 1] = math.nan
    student = inputs["student_maps"].requires_grad_()
    loss = kdfast.attention_transfer_loss(student, inputs["teacher_maps"])
    loss.backward()
    assert loss.isnan()
    assert student.grad.isnan().flatten(1).any(dim=1).tolist() == [False, True, False]


@pytest.mark.parametrize("sizes", ["no multiple of a vector", "halved student"])
@pytest.mark.parametrize("p", [0.5, 1, 1.7, 2, 3])
@pytest.mark.parametrize("level", backends.cpu_levels())
def test_an_infinity_is_one_to_every_power(level, p, sizes):
    """Its slope is 0 for p < 1. Normalized, all of its sample is NaN; else what lies at other pixels is finite."""
    with backends.use_cpu_level(level):
        for seed, dtype in enumerate(DTYPES):
            for normalize in (True, False):
                inputs = maps(*SIZES[sizes], seed=seed)
                inputs["student_maps"][0, 1, 0, 1] = inputs["teacher_maps"][1, 2, 0, 1] = math.inf
                inputs["student_maps"][2, 0, 0, 0] = -math.inf
                assert_parity("attention_transfer_loss", inputs, {"p": p, "normalize": normalize}, dtype, seed=seed)


# Blocks have 8192 elements: rows that end within one, at its end and beyond it.
SHAPES = ((1, 1), (5, 17), (3, 8192), (4, 3000), (2, 20001), (300, 100))


@pytest.mark.parametrize("level", backends.cpu_levels())
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", [None, "rows", "elements"])
def test_masks_of_both_kinds(kind, shape, level):
    with backends.use_cpu_level(level):
        for seed, dtype in enumerate(DTYPES):
            generator = torch.Generator().manual_seed(seed)
            inputs = {
                side: torch.randn(shape, generator=generator, dtype=torch.float64) for side in ("student", "teacher")
            }
            kept = {None: None, "rows": shape[:1], "elements": shape}[kind]
            mask = None if kept is None else torch.rand(kept, generator=generator) < 0.6
            layout = list(LAYOUTS)[seed % len(LAYOUTS)]
            assert_parity("feature_mse_loss", inputs, {"mask": mask}, dtype, layout=layout, seed=seed)


@pytest.mark.parametrize("shape", [(4,), (4, 3000)])
def test_what_the_mask_drops_is_never_read(shape):
    mask = torch.arange(math.prod(shape)).view(shape) % 2 == 0
    student, teacher = torch.randn(4, 3000), torch.randn(4, 3000)
    left_out = ~mask.view(4, -1).expand(4, 3000)
    for tensor in (student, teacher):
        tensor[left_out] = math.nan
    student.requires_grad_()
    loss = kdfast.feature_mse_loss(student, teacher, mask=mask)
    loss.backward()
    assert loss.isfinite()
    assert (student.grad[left_out] == 0).all() and (student.grad[~left_out] != 0).all()


def test_a_mask_that_keeps_nothing_gives_zero():
    student = torch.randn(4, 30, requires_grad=True)
    loss = kdfast.feature_mse_loss(student, torch.randn(4, 30), mask=torch.zeros(4, dtype=torch.bool))
    loss.backward()
    assert loss == 0 and (student.grad == 0).all()


@pytest.mark.parametrize("name", ["attention_transfer_loss", "feature_mse_loss"])
def test_no_rows_and_double_backward(name):
    tail = (3, 4, 4) if name == "attention_transfer_loss" else (5,)
    student = torch.randn(0, *tail, requires_grad=True)
    loss = getattr(kdfast, name)(student, torch.randn(0, *tail))
    loss.backward()
    assert loss == 0 and student.grad.shape == student.shape
    student = torch.randn(2, *tail, requires_grad=True)
    (grad,) = torch.autograd.grad(getattr(kdfast, name)(student, torch.randn(2, *tail)), student, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiated once"):
        grad.sum().backward()


def test_threads_change_no_bit():
    inputs = {k: v.float() for k, v in maps((14, 14), (14, 14), n=8).items()}
    features = [torch.randn(100, 3000, generator=torch.Generator().manual_seed(i)) for i in range(2)]
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            student, first = inputs["student_maps"].clone().requires_grad_(), features[0].clone().requires_grad_()
            losses = (
                kdfast.attention_transfer_loss(student, inputs["teacher_maps"]),
                kdfast.feature_mse_loss(first, features[1]),
            )
            sum(losses).backward()
            results.append((*(loss.detach() for loss in losses), student.grad, first.grad))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_maps_beyond_the_grid_of_a_gpu_take_the_reference_there():
    for pixels, limited in ((MAX_PIXELS, False), (MAX_PIXELS + 1, True)):
        for device, here in (("meta", limited), ("cpu", False)):
            maps = [torch.empty(1, device=device).expand(1, 1, 1, size) for size in (4, pixels)]
            assert bool(_beyond_attention_kernels(*maps)) == here
