"""What the tests on a GPU share: inputs there, one step of a loss, and the sizes that reach every configuration."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

import kdfast
from samples import SAMPLES
from support import cast, first_output, is_differentiable, sample_inputs

Step = Callable[[], tuple[Tensor, ...]]


def arguments_of(
    name: str,
    dtype: torch.dtype = torch.float32,
    *,
    seed: int = 0,
    leading: tuple[int, ...] | None = None,
    width: int = 5,
    **changed: Any,
) -> dict[str, Any]:
    """A sample of ``name`` on the GPU."""
    inputs, options = sample_inputs(name, seed, leading or SAMPLES[name].leading[0], width)
    return cast({**inputs, **options, **changed}, dtype, device="cuda")


def step(name: str, arguments: dict[str, Any]) -> Step:
    """Forward and backward of ``kdfast.<name>``: value and gradients."""
    leaves = [value for key, value in arguments.items() if is_differentiable(key, value)]

    def run() -> tuple[Tensor, ...]:
        value = first_output(getattr(kdfast, name)(**arguments))
        return value.detach(), *torch.autograd.grad(value.masked_fill(value.isinf(), 0.0).sum(), leaves)

    return run


@contextmanager
def graphs_by(launcher: str) -> Iterator[None]:
    """Graphs by a launcher of CUDA C++; 'product', which is no backend yet, takes the place of 'select'."""
    from kdfast.ops.graph import product, select  # need triton

    before, select.graph = select.graph, {"select": select, "product": product}[launcher].graph
    try:
        with kdfast.backends.use(kdfast.backends.CUDA):
            yield
    finally:
        select.graph = before


@contextmanager
def waiting_is_an_error() -> Iterator[None]:
    """Nothing inside may wait for the device."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def captured(run: Step) -> tuple[torch.cuda.CUDAGraph, tuple[Tensor, ...]]:
    """``run`` as a graph, and the tensors that a replay writes."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = run()
    return graph, results


def kernel_functions() -> dict[str, str]:
    """Public function -> op, of those that ask for an op with a Triton kernel; asked on the CPU, where asking is free.

    Sizes and options of a sample's first draw: a function that takes a kernel for other options only is not found here.
    """
    found, select = {}, kdfast.backends.select
    asked: list[str] = []

    def note(op: str, tensor: Tensor) -> str:
        asked.append(op)
        return select(op, tensor)

    kdfast.backends.select = note
    try:
        for name, sample in SAMPLES.items():
            asked.clear()
            inputs, options = sample_inputs(name, 0, sample.leading[0], max(sample.widths))
            getattr(kdfast, name)(**cast({**inputs, **options}, torch.float32))
            for op in asked:
                if kdfast.backends.TRITON in kdfast.backends.KERNELS.get(op, ()):
                    found[name] = op
    finally:
        kdfast.backends.select = select
    return found


def assert_same_bits(first: tuple[Tensor, ...], second: tuple[Tensor, ...], what: str = "") -> None:
    assert len(first) == len(second)
    for a, b in zip(first, second, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True, msg=lambda m: f"{what}: {m}")
