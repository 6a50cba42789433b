"""Public functions through the Triton kernels, interpreted: run by test_kernels.py with TRITON_INTERPRET=1."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from as_on_a_gpu import asked
from kernels import OPS
from torch import Tensor
from triton.runtime.interpreter import InterpreterBuilder

import kdfast
from kdfast.ops.scale import function as scale
from samples import NAMES, SAMPLES
from support import LAYOUTS, assert_parity, cast, first_output, is_differentiable, sample_inputs

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SEEDS = 24  # enough draws of the options to reach every compile-time combination the functions can ask for


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy: infinities meet in rows that are masked afterwards
@pytest.mark.parametrize("name", NAMES)
def test_public_functions_keep_the_rule(monkeypatch, name):
    before, sample = set(asked), SAMPLES[name]
    asked.clear()
    widths = [width for width in sample.widths if width <= 100]  # the interpreter is slow
    for seed in range(SEEDS):
        leading, width = sample.leading[seed % len(sample.leading)], widths[seed % len(widths)]
        inputs, options = sample_inputs(name, seed, leading, width)
        layout, dtype = list(LAYOUTS)[seed % len(LAYOUTS)], DTYPES[seed % len(DTYPES)]
        # The interpreter cuts bfloat16 off where a GPU rounds: a gradient cut off twice is too far off.
        monkeypatch.setattr(scale, "SMALL", 0 if dtype == torch.float32 else math.inf)
        assert_parity(name, inputs, options, dtype, layout=layout, seed=seed)
        if not asked & set(OPS):
            break  # the reference, which other tests cover
    asked.update(before)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("name", NAMES)
def test_autocast_does_not_reach_into_the_launchers(name):
    inputs, options = sample_inputs(name, 1, SAMPLES[name].leading[0], 5)
    arguments = cast({**inputs, **options}, torch.float32)
    before = set(asked)
    asked.clear()
    expected = first_output(getattr(kdfast, name)(**arguments))
    if asked & set(OPS) and name != "linear_kl_divergence":  # whose products are the user's own
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(first_output(getattr(kdfast, name)(**arguments)), expected)
    asked.update(before)


UNWRITTEN = 0xA5  # a byte; what consists of it, as float32 or bfloat16, is a number that no input is


def unwritten(data: np.ndarray) -> np.ndarray:
    """Which elements are, or of two floats in one have, what nobody has written."""
    size = data.dtype.itemsize
    parts = np.ascontiguousarray(data).reshape(-1).view(np.uint8).reshape(*data.shape, -1, min(size, 4))
    return (parts == UNWRITTEN).all(axis=-1).any(axis=-1)


@pytest.fixture
def fresh_memory_is_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels load only what was written, also where they drop what they load: compute-sanitizer's initcheck."""

    def filled(make: Any) -> Any:
        def made(*arguments: Any, **options: Any) -> Tensor:
            tensor = make(*arguments, **options)
            tensor.untyped_storage().fill_(UNWRITTEN)
            return tensor

        return made

    load = InterpreterBuilder.create_masked_load

    def watched(self: Any, pointers: Any, mask: Any, *others: Any) -> Any:
        loaded = load(self, pointers, mask, *others)
        if (unwritten(loaded.data) & mask.data).any():
            raise AssertionError("a kernel has read what nobody has written")
        return loaded

    monkeypatch.setattr(InterpreterBuilder, "create_masked_load", watched)
    for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
        monkeypatch.setattr(owner, name, filled(getattr(owner, name)))


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_kernels_read_only_what_was_written(fresh_memory_is_not_read, name, dtype):
    sample = SAMPLES[name]
    for seed in range(4):
        inputs, options = sample_inputs(name, seed, sample.leading[seed % len(sample.leading)], min(sample.widths))
        arguments = cast({**inputs, **options}, dtype)
        value = first_output(getattr(kdfast, name)(**arguments))
        leaves = [argument for key, argument in arguments.items() if is_differentiable(key, argument)]
        torch.autograd.grad(value, leaves, torch.full_like(value, 2.0))
