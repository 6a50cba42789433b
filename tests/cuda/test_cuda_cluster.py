"""The cluster kernel of kl, which runs where it is forced."""

from __future__ import annotations

import pytest
import torch
from cuda_support import arguments_of, assert_same_bits, captured, step, waiting_is_an_error

from kdfast import backends
from support import assert_parity, sample_inputs

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def forced():
    able, reason = backends.can_run(backends.CUDA, "kl", "cuda")
    if not able:
        pytest.skip(reason)
    if torch.cuda.get_device_capability()[0] < 9:
        pytest.skip("thread-block clusters need compute capability 9.0")
    with backends.use(backends.CUDA):
        yield


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("width", [64, 1000, 32000, 128256, 151936])
def test_value_and_gradients_keep_the_rule(width, dtype):
    for seed in range(6):
        inputs, options = sample_inputs("kl_divergence", seed, (2, 3), width)
        assert_parity("kl_divergence", inputs, options, dtype, seed=seed, device="cuda")


@pytest.mark.parametrize("layout", ["classes_strided", "shifted", "transposed"])
def test_any_layout_in_memory(layout):
    inputs, options = sample_inputs("kl_divergence", 1, (2, 3), 1000)
    assert_parity("kl_divergence", inputs, options, torch.bfloat16, layout=layout, device="cuda")


def test_two_runs_give_the_same_bits_and_nothing_waits():
    run = step("kl_divergence", arguments_of("kl_divergence", torch.bfloat16, leading=(300,), width=128256))
    first = run()
    with waiting_is_an_error():
        second = run()
    assert_same_bits(first, second)


def test_a_captured_graph_replays():
    run = step("kl_divergence", arguments_of("kl_divergence", torch.bfloat16, leading=(4,), width=32000))
    expected = run()
    graph, results = captured(run)
    graph.replay()
    torch.cuda.synchronize()
    assert_same_bits(results, expected)


def test_what_it_cannot_run_is_an_error():
    for name, width, reason in (("js_divergence", 64, "forward and reverse"), ("kl_divergence", 33, "16 bytes")):
        with pytest.raises(RuntimeError, match=f"'cuda' was asked for but cannot run: .*{reason}"):
            step(name, arguments_of(name, torch.bfloat16, width=width, **({"beta": 0.5} if name[0] == "j" else {})))()
