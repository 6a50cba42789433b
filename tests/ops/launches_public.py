"""What public functions launch, with kernels that do nothing. Run by test_kernels.py in a process of its own."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

import as_on_a_gpu  # noqa: F401  (before kdfast)
import pytest
import torch
from kernels import OPS, every_build
from torch.utils._python_dispatch import TorchDispatchMode
from triton.backends.compiler import GPUTarget
from triton.compiler import make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature
from triton_support import TARGETS

import kdfast
from kdfast.ops.autograd import apply
from kdfast.ops.relation import alignment, function, products, tiles
from kdfast.ops.scale import function as scale
from samples import NAMES, SAMPLES
from support import cast, first_output, is_differentiable, of_rows

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "cuda"))
from configurations import CALLS, DTYPES

BACKEND = make_backend(GPUTarget("cuda", 90, 32))
keys: list[str] = []  # what Triton would compile, one entry a launch
configurations: set[str] = set()  # kernel, compile-time arguments and warps of all launches


def note(self: JITFunction, *arguments, grid, warmup, **named) -> None:
    binder = create_function_from_signature(self.signature, self.params, BACKEND)
    _, specialization, options = binder(*arguments, **named)
    keys.append(f"{self.fn.__name__} {specialization} {options}")
    given = dict(zip(self.arg_names, arguments, strict=False)) | named
    configurations.add(configuration(self, given, named))


def configuration(kernel: JITFunction, constants: Mapping[str, Any], options: Mapping[str, Any]) -> str:
    chosen = {kernel.arg_names[index]: constants[kernel.arg_names[index]] for index in kernel.constexprs}
    return json.dumps([kernel.fn.__name__, chosen, options["num_warps"]], sort_keys=True)


JITFunction.run = note


def launched(name: str, rows: int, width: int, seed: int) -> list[str]:
    """Of the sample of 6 rows, some left out or repeated."""
    return compiled_by(name, cast(of_rows(name, seed, rows, width), torch.bfloat16))


def compiled_by(name: str, arguments: Mapping[str, Any]) -> list[str]:
    """Keys of one forward and backward."""
    leaves = [value for key, value in arguments.items() if is_differentiable(key, value)]
    keys.clear()
    torch.autograd.grad(first_output(getattr(kdfast, name)(**arguments)).sum(), leaves)
    return list(keys)


# 1 and multiples of 16 are what Triton would specialize on.
@pytest.mark.parametrize("width", [48, 100, 33])
@pytest.mark.parametrize("name", [name for name in NAMES if (6,) in SAMPLES[name].leading])
def test_another_batch_size_compiles_nothing(monkeypatch, name, width):
    monkeypatch.setattr(scale, "SMALL", 0)
    for seed in range(8):
        first = launched(name, 6, width, seed)
        for rows in (7, 16, 33, 1):
            if rows == 1 and (1,) not in SAMPLES[name].leading:
                continue
            # A single row may have nothing to compute.
            new = [key for key in launched(name, rows, width, seed) if key not in first]
            assert not new, f"{rows} rows after 6, seed {seed}"


@pytest.mark.parametrize("op", OPS)
def test_another_batch_size_compiles_nothing_in_any_configuration(monkeypatch, op):
    monkeypatch.setattr(scale, "SMALL", 0)  # which some batches are and others not
    for call in CALLS[op]():
        n, *others = call.leading
        if any(isinstance(value, torch.Tensor) for value in call.options.values()):
            continue  # a mask of this batch
        seen = set()
        for rows in (n, n + 1, -(-(n + 2) // 16) * 16):
            inputs, options = call._replace(leading=(rows, *others)).arguments()
            seen.add(frozenset(compiled_by(call.function, cast({**inputs, **options}, torch.bfloat16))))
        assert len(seen) == 1, call


@pytest.mark.parametrize("op", OPS)
def test_the_calls_of_the_gpu_tests_reach_every_line_of_the_tables(op):
    configurations.clear()
    for call in CALLS[op]():
        for dtype in DTYPES:
            inputs, options = call.arguments()
            compiled_by(call.function, cast({**inputs, **options}, dtype))
    module = import_module(f"kdfast.ops.{op}.triton_kernels")
    # Launches here are on no NVIDIA device, and AMD's builds have the same tables.
    builds = [build for build in every_build(op) if TARGETS[build.target][0] == "hip"]
    declared = {
        build.name: configuration(getattr(module, build.kernel), build.constants, build.options) for build in builds
    }
    missed = [name for name, wanted in declared.items() if wanted not in configurations]
    assert not missed, "\n".join(missed)


class Operations(TorchDispatchMode):
    """Counts PyTorch's operations on values: no memory, no views, no questions about types."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        memory = "empty" in func.__name__
        self.count += isinstance(result, (torch.Tensor, tuple)) and not (func.is_view or memory)
        return result


def kernels_of(function: Callable[..., Any], *arguments: Any) -> int:
    """About how many a call of ``function`` launches."""
    keys.clear()
    with Operations() as operations:
        function(*arguments)
    return operations.count + len(keys)


DRIVERS = {
    "crd": lambda x, y: tiles.crd(x, y, torch.zeros(len(x), dtype=torch.int64), 0.1, 1.0, True, True),
    "pkt": lambda x, y: tiles.pkt(x, y, 1e-7, True),
    "similarity_preserving": lambda x, y: products.similarity_preserving(x, y, True),
    "kernel_alignment": lambda x, y: alignment.kernel_alignment(x, y, False, True),
}


# Of the widths the first is that of the products of features, if they are not too few, the second that of whole rows.
@pytest.mark.parametrize("width", [4, 400])
@pytest.mark.parametrize("few", [0, 2048])
@pytest.mark.parametrize("name", DRIVERS)
def test_a_larger_batch_launches_no_more_until_its_panels_are_full(monkeypatch, name, width, few):
    monkeypatch.setattr(products, "FEW_ROWS", few)
    counts = {kernels_of(DRIVERS[name], torch.randn(n, width), torch.randn(n, width)) for n in (300, 1000)}
    assert len(counts) == 1 and counts.pop() < 50


# Kernels of forward and backward: ours, at most, and the reference's, at least. docs/gpu.md shows them.
SMALL_BATCHES: list[tuple[str, dict[str, Any], int, int]] = [
    ("crd_loss", {}, 11, 40),
    ("crd_loss", {"normalize": True}, 11, 68),
    ("pkt_loss", {}, 17, 67),
    ("similarity_preserving_loss", {}, 12, 45),
    ("kernel_alignment_loss", {}, 16, 51),
    ("kernel_alignment_loss", {"centered": True}, 28, 74),
]


@pytest.mark.parametrize("n", [112, 1024])
@pytest.mark.parametrize(("name", "options", "most", "least"), SMALL_BATCHES)
def test_a_small_batch_launches_less_than_half_of_what_the_reference_does(monkeypatch, name, options, most, least, n):
    # What an op does is seen where its driver is called by name.
    drivers = {
        getattr(torch.ops.kdfast, driver.__name__).default: driver
        for driver in (tiles.crd, tiles.pkt, products.similarity_preserving, alignment.kernel_alignment)
    }
    monkeypatch.setattr(
        function, "apply", lambda autograd, student, op, *rest: apply(autograd, student, drivers[op], *rest)
    )
    student, teacher = torch.randn(n, 64).bfloat16().requires_grad_(), torch.randn(n, 64).bfloat16()
    labels = {"labels": torch.zeros(n, dtype=torch.int64)} if name == "crd_loss" else {}

    def both_ways(loss: Callable[..., torch.Tensor]) -> None:
        torch.autograd.grad(loss(student, teacher, **labels, **options), student)

    fused, plain = (kernels_of(both_ways, getattr(module, name)) for module in (kdfast, kdfast.reference))
    assert fused <= most and plain >= least and 2 * fused < plain, (fused, plain)


def test_launches_were_seen():
    assert any("_kernel" in key for key in launched("kl_divergence", 6, 48, 0))
