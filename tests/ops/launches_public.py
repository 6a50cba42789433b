"""What public functions launch, with kernels that do nothing. Run by test_kernels.py in a process of its own."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
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
from kdfast.ops.relation import products, tiles
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
    """Counts what is no view, memory or kernel alike."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += not func.is_view
        return func(*args, **(kwargs or {}))


DRIVERS = {
    "crd": lambda x, y: tiles.crd(x, y, torch.zeros(len(x), dtype=torch.int64), 0.1, 1.0, True, True),
    "pkt": lambda x, y: tiles.pkt(x, y, 1e-7, True),
    "similarity_preserving": lambda x, y: products.similarity_preserving(x, y, True),
}


# Of the widths the first is that of the products of features, the second that of whole rows.
@pytest.mark.parametrize("width", [4, 400])
@pytest.mark.parametrize("name", DRIVERS)
def test_a_larger_batch_launches_no_more_until_its_panels_are_full(monkeypatch, name, width):
    monkeypatch.setattr("kdfast.ops.relation.rows.STORED_BYTES", 2**40)  # of the CPU alone
    counts = set()
    for n in (300, 1000):
        with Operations() as operations:
            DRIVERS[name](torch.randn(n, width), torch.randn(n, width))
        counts.add(operations.count)
    assert len(counts) == 1 and counts.pop() < 60


def test_launches_were_seen():
    assert any("_kernel" in key for key in launched("kl_divergence", 6, 48, 0))
