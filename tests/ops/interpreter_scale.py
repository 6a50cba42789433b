"""The Triton kernel of scale on the CPU, interpreted. Run by test_scale_triton.py on its own."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from kdfast.ops.scale import triton_kernels
from support import LAYOUTS

assert triton_kernels.triton.knobs.runtime.interpret, "TRITON_INTERPRET=1 must be set before triton is imported"

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(triton_kernels, "BLOCK", 16)
    monkeypatch.setattr(triton_kernels, "PROGRAMS", 3)  # fewer than there are tiles


def gradient(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)


@pytest.mark.parametrize("layout", [layout for layout in LAYOUTS if layout not in ("classes_strided", "transposed")])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [5, 16, 40])
def test_every_element_is_multiplied_and_rounded_once(width, dtype, layout):
    grad = LAYOUTS[layout](gradient(2, 3, width, dtype=dtype))
    factor = torch.tensor(0.1)  # not a number of a half type
    expected = (grad.double() * factor.double()).float().to(dtype)
    triton_kernels.scale_(grad, factor)
    # The interpreter cuts bfloat16 off where a GPU rounds.
    rtol = torch.finfo(dtype).eps if dtype == torch.bfloat16 else 0
    torch.testing.assert_close(grad, expected, rtol=rtol, atol=0)


def test_what_lies_between_rows_is_not_touched():
    memory = torch.ones(6, 40)
    triton_kernels.scale_(memory[:, 3:39], torch.tensor(-2.0))
    assert (memory[:, 3:39] == -2).all() and (memory[:, :3] == 1).all() and (memory[:, 39:] == 1).all()


def test_a_factor_of_1_leaves_the_bits_alone():
    grad = gradient(2, 40, dtype=torch.float32)
    grad.view(torch.int32)[0, 0] = 0x7F800001  # a NaN that arithmetic would make quiet
    before = grad.clone().view(torch.int32)
    triton_kernels.scale_(grad, torch.tensor(1.0))
    assert torch.equal(grad.view(torch.int32), before)


@pytest.mark.parametrize("factor", [0.0, math.inf, math.nan])
def test_factors_that_are_no_ordinary_numbers(factor):
    grad = torch.tensor([1.0, -1.0, math.inf, math.nan, 0.0])
    expected = grad * factor
    triton_kernels.scale_(grad, torch.tensor(factor))
    torch.testing.assert_close(grad, expected, equal_nan=True)


def test_nothing_and_what_no_two_strides_reach():
    triton_kernels.scale_(torch.empty(0, 5), torch.tensor(2.0))
    with pytest.raises(RuntimeError, match="addressable in place"):
        triton_kernels.scale_(torch.ones(3, 4).T, torch.tensor(2.0))
