"""Every public function on a GPU against its reference in float64: dtypes, layouts, every line of the tables."""

from __future__ import annotations

import configurations
import pytest
import torch
from cuda_support import assert_same_bits, step

from kdfast import backends
from kdfast.reference import relations
from samples import NAMES, SAMPLES
from support import DTYPES, LAYOUTS, assert_parity, cast, sample_inputs

pytestmark = pytest.mark.gpu


@pytest.mark.filterwarnings("ignore:kdfast runs the plain PyTorch reference on CUDA tensors.*float64")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_value_and_gradients_keep_the_rule(name, dtype):
    sample = SAMPLES[name]
    for seed in range(4):
        leading, width = sample.leading[seed % len(sample.leading)], sample.widths[-1 - seed % len(sample.widths)]
        inputs, options = sample_inputs(name, seed, leading, width)
        assert_parity(name, inputs, options, dtype, seed=seed, device="cuda")


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", NAMES)
def test_any_layout_in_memory(name, layout):
    leading = max(SAMPLES[name].leading, key=len)
    inputs, options = sample_inputs(name, 1, leading, max(SAMPLES[name].widths[0], 5))
    assert_parity(name, inputs, options, torch.bfloat16, layout=layout, device="cuda")


@pytest.mark.parametrize("dtype", configurations.DTYPES, ids=str)
@pytest.mark.parametrize("call", [call for calls in configurations.CALLS.values() for call in calls()], ids=str)
def test_every_configuration_keeps_the_rule_and_gives_the_same_bits_twice(call, dtype):
    """Every line of the tables, not only those that the shapes above lead to."""
    inputs, options = call.arguments()
    with backends.use(backends.TRITON):  # whatever was measured to be faster
        assert_parity(call.function, inputs, options, dtype, device="cuda")
        run = step(call.function, cast({**inputs, **options}, dtype, device="cuda"))
        assert_same_bits(run(), run(), str(call))


@pytest.mark.parametrize("dtype", configurations.DTYPES, ids=str)
@pytest.mark.parametrize("options", [{}, {"reduction": "sum"}], ids=str)
@pytest.mark.parametrize("name", ["rkd_loss", "rkd_angle_loss"])
def test_angles_at_some_rows(monkeypatch, name, options, dtype):
    """Both sides would draw their own."""
    inputs, _ = configurations.Call(name, (150,), 40, {}).arguments()
    apexes = torch.randperm(150, generator=torch.Generator().manual_seed(0))[:60]
    monkeypatch.setattr(relations, "sampled_apexes", lambda x, *_: apexes.to(x.device))
    assert_parity(name, inputs, {**options, "triplets": 60}, dtype, device="cuda")
