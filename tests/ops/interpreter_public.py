"""Public functions through the Triton kernels, interpreted: run by test_kernels.py with TRITON_INTERPRET=1."""

from __future__ import annotations

import math

import pytest
import torch
from as_on_a_gpu import asked
from kernels import OPS

import kdfast
from kdfast.ops.scale import function as scale
from samples import NAMES, SAMPLES
from support import LAYOUTS, assert_parity, cast, first_output, sample_inputs

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
