"""The Triton kernels of rkd on the CPU, interpreted. Run by test_rkd_triton.py in a process with TRITON_INTERPRET=1."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from kdfast import reference
from kdfast.ops.rkd import triton_kernels

assert triton_kernels.triton.knobs.runtime.interpret, "TRITON_INTERPRET=1 must be set before triton is imported"

WEIGHTS = {"distance": (1.0, 0.0), "angle": (0.0, 1.0), "both": (25.0, 50.0)}
weights = pytest.mark.parametrize("weights", WEIGHTS)


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    """So that a few rows are several tiles, and tiles are cut by the edge."""
    sizes = {
        "BLOCK": 8,
        "FEATURES": 2,
        "ROW_BLOCK": 16,
        "LANES": 4,
        "APEX_TILE": {"DOWN": 1, "ACROSS": 2, "WARPS_DOWN": 2, "WARPS_ACROSS": 2},
        "PAIR_TILE": {"DOWN": 2, "ACROSS": 1, "WARPS_DOWN": 2, "WARPS_ACROSS": 2, "BLOCKS": 2},
        "PULL_TILE": {"ROWS": 2, "WIDTHS": 2, "WARPS": 2, "LANES": 2, "AT_ONCE": 2},
    }
    for name, size in sizes.items():
        monkeypatch.setattr(triton_kernels, name, size)


def features(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def pair(n: int, d: int = 3, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    return features(n, d, seed=n).to(dtype), features(n, d + 2, seed=n + 1).to(dtype)


def two_scales(n: int, d: int, close: int = 5) -> Tensor:
    """The first ``close`` rows are close to each other: their cosines are wide."""
    x = features(n, d, seed=3)
    x[:close] *= 1e-3
    return x


def launch(student: Tensor, teacher: Tensor, names: str, **options: Any) -> tuple[Tensor, Tensor]:
    arguments = [options.get(name) for name in ("mask", "row_weight", "apexes")]
    mean, needs_grad = options.get("mean", True), options.get("needs_grad", True)
    with np.errstate(all="ignore"):
        return triton_kernels.rkd(student, teacher, *arguments, *WEIGHTS[names], mean, needs_grad)


def truth_of(student: Tensor, teacher: Tensor, names: str, **options: Any) -> tuple[Tensor, Tensor]:
    leaf = student.double().clone().requires_grad_()
    rows = {name: options.get(name) for name in ("mask", "row_weight")}
    rows["reduction"] = "mean" if options.get("mean", True) else "sum"
    of_distance, of_angle = WEIGHTS[names]
    loss = of_distance * reference.rkd_distance_loss(leaf, teacher.double(), **rows)
    loss = loss + of_angle * reference.relations.angle_loss(leaf, teacher.double(), options.get("apexes"), **rows)
    loss.backward()
    return loss.detach(), leaf.grad


def check(student: Tensor, teacher: Tensor, names: str, **options: Any) -> None:
    """A few roundings of float32, relative to the value and to the largest gradient."""
    before = student.clone(), teacher.clone()
    value, gradient = launch(student, teacher, names, **options)
    assert torch.equal(student, before[0]) and torch.equal(teacher, before[1])
    expected = truth_of(student, teacher, names, **options)
    assert value.dtype == gradient.dtype == torch.float32 and gradient.shape == student.shape
    assert abs(value - expected[0]) <= 2e-6 * max(abs(expected[0]), 1e-6)
    largest = float(expected[1].abs().max())
    assert (gradient - expected[1]).abs().max() <= 4e-6 * max(largest, 1e-6), (
        gradient - expected[1]
    ).abs().max() / largest


@weights
@pytest.mark.parametrize("n", [1, 3, 9])
def test_any_number_of_rows(n, weights):
    check(*pair(n), weights)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_types_are_widened(dtype):
    check(*pair(5, dtype=dtype), "both")


@weights
@pytest.mark.parametrize("mean", [True, False])
def test_masks_weights_and_sums(mean, weights):
    student, teacher = pair(10)
    mask = torch.arange(10) % 4 != 1
    weight = torch.rand(10, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 2
    for options in ({}, {"mask": mask}, {"row_weight": weight}, {"mask": mask, "row_weight": weight}):
        check(student, teacher, weights, mean=mean, **options)


@weights
def test_rows_that_do_not_count_reach_nothing(weights):
    student, teacher = pair(9)
    mask = torch.arange(9) % 3 != 1
    clean = launch(student, teacher, weights, mask=mask)
    student[~mask], teacher[~mask] = math.nan, math.inf
    value, gradient = launch(student, teacher, weights, mask=mask)
    assert torch.equal(value, clean[0]) and torch.equal(gradient, clean[1])
    assert (gradient[~mask] == 0).all()
    value, gradient = launch(student, teacher, weights, mask=torch.zeros(9, dtype=torch.bool))
    assert value == 0 and (gradient == 0).all()


@pytest.mark.parametrize("mask", [None, torch.arange(10) % 4 != 1], ids=["all", "masked"])
def test_chosen_apexes(mask):
    check(*pair(10), "both", apexes=torch.tensor([2, 9, 5, 7]), mask=mask)
    check(*pair(10), "angle", apexes=torch.tensor([8, 1]), mask=mask, mean=False)


HARD = {
    "a cluster at 1e3": 1e3 + 1e-2 * features(10, 3),
    "a cluster at 100": 100 + 1e-3 * features(10, 3),
    "two scales": two_scales(10, 3),
    "two scales, one of them in one block of apexes": two_scales(10, 3, close=3),
    "two scales, one of them in the last block": two_scales(10, 3, close=3).flip(0),
    "duplicates": features(10, 3)[torch.arange(10) % 5],
    "in the plane": features(10, 2),
}


@pytest.mark.parametrize("case", HARD)
def test_hard_data(case):
    student = HARD[case].float()
    check(student, features(10, 4, seed=1).float(), "both")
    check(features(10, 4, seed=1).float(), student, "angle")


@pytest.mark.parametrize(("x", "expected"), [(two_scales(10, 3), True), (features(10, 100), False)], ids=["two", "one"])
def test_both_kinds_of_cosines_are_reached(monkeypatch, x, expected):
    seen = []
    kernel = triton_kernels._rows_kernel

    class Spied:
        def __getitem__(self, grid):
            def launched(*arguments, **options):
                kernel[grid](*arguments, **options)
                seen.append(arguments[:3])

            return launched

    monkeypatch.setattr(triton_kernels, "_rows_kernel", Spied())
    launch(x.float(), x.float(), "angle")
    ((sum_s, sum_t, wide),) = seen
    assert wide.bool().any() == expected
    distances = torch.cdist(x.float(), x.float(), compute_mode="donot_use_mm_for_euclid_dist").double().sum(1)
    for sums in (sum_s, sum_t):
        torch.testing.assert_close(sums.double(), distances, rtol=1e-5, atol=0)


@weights
def test_identical_sides_lose_exactly_nothing(weights):
    for x in (features(9, 6).float(), two_scales(9, 6, close=4).float()):
        value, gradient = launch(x, x.clone(), weights)
        assert value == 0 and (gradient == 0).all()


@weights
def test_a_nan_is_seen_by_every_row(weights):
    for side in (0, 1):
        inputs = pair(9)
        inputs[side][3, 2] = math.nan
        value, gradient = launch(*inputs, weights)
        assert value.isnan() and gradient.isnan().all()


@weights
def test_without_a_gradient_the_loss_is_the_same(weights):
    value, gradient = launch(*pair(9), weights, needs_grad=False)
    assert gradient.shape == (0,) and torch.equal(value, launch(*pair(9), weights)[0])


def test_no_rows_and_no_width():
    value, gradient = launch(torch.zeros(0, 3), torch.zeros(0, 3), "both")
    assert value == 0 and gradient.shape == (0, 3)
    value, gradient = launch(torch.zeros(4, 0), torch.zeros(4, 0), "both")
    assert value == 0 and gradient.shape == (4, 0)


def test_terms_of_weight_0_are_left_out():
    with np.errstate(all="ignore"):
        value, gradient = triton_kernels.rkd(*pair(4), None, None, None, 0.0, 0.0, True, True)
    assert value == 0 and (gradient == 0).all()
