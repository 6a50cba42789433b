"""How functions behave on a GPU: graphs, streams, synchronisation, compilation, autocast, in-place gradients."""

from __future__ import annotations

import copy

import pytest
import torch
from cuda_support import arguments_of, assert_same_bits, captured, kernel_functions, step, waiting_is_an_error

import kdfast
from samples import NAMES, SAMPLES
from support import cast, first_output, is_differentiable, of_rows

pytestmark = pytest.mark.gpu

every_name = pytest.mark.parametrize("name", NAMES)
FUNCTIONS = kernel_functions()
every_kernel_function = pytest.mark.parametrize("name", FUNCTIONS)
IN_PLACE = ("kl_divergence", "js_divergence", "kd_loss")


@every_kernel_function
def test_a_cuda_tensor_takes_the_kernel(name):
    """Nothing below would say so if the reference ran instead."""
    x = torch.zeros(1, device="cuda")
    assert kdfast.backends.select(FUNCTIONS[name], x) != kdfast.backends.REFERENCE


@every_name
def test_nothing_waits_for_the_device(name):
    run = step(name, arguments_of(name, seed=1))
    run()  # compiles, and loads what is loaded once
    with waiting_is_an_error():
        run()


def test_waiting_for_the_device_would_be_noticed():
    x = torch.ones(3, device="cuda")
    with waiting_is_an_error(), pytest.raises(RuntimeError, match="synchroniz"):
        x.sum().item()


@every_name
def test_two_runs_give_the_same_bits(name):
    for seed in range(3):
        run = step(name, arguments_of(name, seed=seed))
        assert_same_bits(run(), run(), name)


@every_name
def test_a_captured_graph_replays_on_new_inputs(name):
    arguments, fresh = arguments_of(name, seed=1), arguments_of(name, seed=1)
    generator = torch.Generator().manual_seed(5)
    for key, value in fresh.items():
        if is_differentiable(key, value):
            with torch.no_grad():
                value.copy_(torch.randn(value.shape, generator=generator))
    expected = step(name, fresh)()
    run = step(name, arguments)
    graph, results = captured(run)
    with torch.no_grad():
        for key, value in arguments.items():
            if is_differentiable(key, value):
                value.copy_(fresh[key])
    for _ in range(2):
        graph.replay()
        torch.cuda.synchronize()
        assert_same_bits(results, expected, name)


@every_name
def test_the_current_stream_is_used(name):
    """Inputs that arrive late on another stream: a kernel on the default stream would read NaN."""
    arguments = arguments_of(name, seed=1)
    expected = step(name, arguments)()
    late = {
        key: torch.full_like(value, float("nan")).requires_grad_(value.requires_grad)
        if is_differentiable(key, value)
        else value
        for key, value in arguments.items()
    }
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(20_000_000)  # about 10 ms
        with torch.no_grad():
            for key, value in late.items():
                if is_differentiable(key, value):
                    value.copy_(arguments[key])
        results = step(name, late)()
    stream.synchronize()
    assert_same_bits(results, expected, name)


@every_name
def test_tensors_of_another_device_than_the_current_one(name):
    if torch.cuda.device_count() < 2:
        pytest.skip("one CUDA device only")
    arguments = arguments_of(name, seed=1)
    expected = step(name, arguments)()
    moved = {
        key: value.detach().to("cuda:1").requires_grad_(value.requires_grad) if torch.is_tensor(value) else value
        for key, value in arguments.items()
    }
    assert torch.cuda.current_device() == 0
    results = step(name, moved)()
    assert {result.device.index for result in results} == {1}
    assert_same_bits(tuple(result.to("cuda:0") for result in results), expected, name)


@every_name
def test_compiles_to_one_graph(name):
    """Kernels with the default backend too: there the gradient and the loss are fused with what is around them."""
    for backend in ("aot_eager", *(["inductor"] if name in FUNCTIONS else [])):
        arguments = arguments_of(name, seed=1)
        torch._dynamo.reset()
        function = getattr(kdfast, name)
        compiled = torch.compile(lambda f=function, **kw: first_output(f(**kw)), backend=backend, fullgraph=True)
        leaves = [value for key, value in arguments.items() if is_differentiable(key, value)]
        try:
            value = compiled(**arguments)
        except torch._inductor.exc.InductorError as error:
            if "PassManager::run failed" not in str(error):
                raise
            pytest.skip(
                "this Triton does not compile what Inductor makes of plain PyTorch code"
            )  # kernel_alignment, 3.6
        got = (value.detach(), *torch.autograd.grad(value.masked_fill(value.isinf(), 0.0).sum(), leaves))
        for a, b in zip(got, step(name, arguments)(), strict=True):
            torch.testing.assert_close(a, b)


@every_name
def test_autocast_changes_no_dtype_and_little_else(name):
    arguments = arguments_of(name, seed=1)
    expected = step(name, arguments)()
    leaves = [value for key, value in arguments.items() if is_differentiable(key, value)]
    with torch.autocast("cuda", torch.bfloat16):
        value = first_output(getattr(kdfast, name)(**arguments))
    # Outside, as PyTorch asks for: a backward inside would cast what it computes to float16.
    got = (value.detach(), *torch.autograd.grad(value.masked_fill(value.isinf(), 0.0).sum(), leaves))
    assert [x.dtype for x in got] == [x.dtype for x in expected]
    if name in FUNCTIONS and name != "linear_kl_divergence":  # whose products autocast rounds
        assert_same_bits(got, expected, name)
    else:
        assert all(x.isfinite().all() or name == "hardest_negatives" for x in got)


@every_kernel_function
def test_another_batch_size_compiles_nothing(name):
    from triton import knobs

    made = []

    def run(rows: int) -> None:
        for seed in range(3):
            step(name, cast(of_rows(name, seed, rows, 48), torch.bfloat16, device="cuda"))()

    run(6)
    knobs.runtime.jit_post_compile_hook = lambda **kw: made.append(kw["repr"])
    try:
        for rows in (7, 16, 1, 33):
            if rows > 1 or (1,) in SAMPLES[name].leading:
                run(rows)
    finally:
        knobs.runtime.jit_post_compile_hook = None
    assert made == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("width", [100, 70000])
@pytest.mark.parametrize("name", IN_PLACE)
def test_the_gradient_in_place_is_the_gradient(name, width, dtype):
    arguments = arguments_of(name, dtype, leading=(2, 3), width=width)
    expected = step(name, arguments)()
    leaf = arguments["student_logits"]
    held = copy.deepcopy(leaf.detach())
    logits = held.clone().requires_grad_()
    student = logits * 1  # what a model returns: its storage may be overwritten
    value = getattr(kdfast, name)(**{**arguments, "student_logits": student, "inplace_backward": True})
    (grad,) = torch.autograd.grad(value.sum(), student, retain_graph=True)
    assert grad.data_ptr() == student.data_ptr()
    assert_same_bits((value.detach(),), expected[:1], name)
    torch.testing.assert_close(grad, expected[1])
    with pytest.raises(RuntimeError, match="a second backward"):
        torch.autograd.grad(value.sum(), student)
