"""What the tests of all Triton kernels share: compiling them for GPUs that are not here, and the interpreter.

This file imports triton lazily: TRITON_INTERPRET decides at import what ``@triton.jit`` makes.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping, Sequence, Set
from concurrent.futures import ProcessPoolExecutor
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[2]
# Compiled kernels, found by what they were compiled from; under build/, which git ignores.
CACHE = ROOT / "build" / "triton_cache"

needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="no triton")

# name -> backend, architecture, threads a warp
TARGETS = {
    "sm_80": ("cuda", 80, 32),
    "sm_90": ("cuda", 90, 32),
    "sm_100": ("cuda", 100, 32),
    "gfx942": ("hip", "gfx942", 64),
}


class Build(NamedTuple):
    """One kernel with one set of compile-time arguments; tensors and numbers by the names of Triton's types."""

    name: str
    module: str
    kernel: str
    signature: Mapping[str, str]  # argument -> '*bf16', 'i32', 'fp32', ...; arguments in ``constants`` are left out
    constants: Mapping[str, Any]
    options: Mapping[str, Any]
    target: str
    aligned: Sequence[str] = ()  # arguments that are multiples of 16: lets loads be vectors


class Resources(NamedTuple):
    """What one build needs: registers a thread, spills (instructions; AMD: registers and bytes), shared bytes."""

    registers: int
    spills: int
    shared: int
    text: Mapping[str, str]  # 'ttir', 'ttgir', 'ptx' or 'amdgcn'
    seconds: float


def compile_build(build: Build) -> Resources:
    """Compiles without a device: Triton's own compiler, and the assembler it brings."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    os.environ["TRITON_CACHE_DIR"] = str(CACHE)
    start = time.perf_counter()
    kernel = getattr(import_module(build.module), build.kernel)
    names = list(kernel.arg_names)
    missing = set(names) - set(build.signature) - set(build.constants)
    assert not missing, f"{build.name}: no type for {sorted(missing)}"
    signature = {name: build.signature.get(name, "constexpr") for name in names}
    signature |= {name: "constexpr" for name in build.constants}
    attrs = {(names.index(name),): [["tt.divisibility", 16]] for name in build.aligned if name not in build.constants}
    constants = {(names.index(name),): value for name, value in build.constants.items()}
    compiled = triton.compile(
        ASTSource(kernel, signature, constants, attrs),
        target=GPUTarget(*TARGETS[build.target]),
        options=dict(build.options),
    )
    if TARGETS[build.target][0] == "cuda":
        registers, spills = cuda_registers(compiled.asm["cubin"])
    else:
        registers, spills = hip_registers(compiled.asm["amdgcn"])
    text = {name: compiled.asm[name] for name in ("ttir", "ttgir", "ptx", "amdgcn") if name in compiled.asm}
    return Resources(registers, spills, compiled.metadata.shared, text, time.perf_counter() - start)


def cuda_registers(cubin: bytes) -> tuple[int, int]:
    """Registers, and instructions that touch the stack; an empty frame is reserved at times and costs nothing."""
    from triton import knobs

    path = CACHE / f"resources-{os.getpid()}.cubin"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(cubin)

    def listing(tool: str, option: str) -> str:
        return subprocess.run([tool, option, str(path)], check=True, capture_output=True, text=True).stdout

    try:
        usage = listing(knobs.nvidia.cuobjdump.path, "--dump-resource-usage")
        ((registers, stack, local),) = re.findall(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", usage)
        if int(stack) + int(local) == 0:
            return int(registers), 0
        instructions = listing(knobs.nvidia.nvdisasm.path, "--print-code")
        return int(registers), len(re.findall(r"\b(?:STL|LDL)\b", instructions))
    finally:
        path.unlink()


def hip_registers(assembly: str) -> tuple[int, int]:
    def number(name: str) -> int:
        (value,) = re.findall(rf"\.{name}:\s*(\d+)", assembly)
        return int(value)

    spills = number("vgpr_spill_count") + number("sgpr_spill_count") + number("private_segment_fixed_size")
    return number("vgpr_count"), spills


_compiled: dict[str, Resources] = {}  # by all a build is made of: several tests look at the same ones


def compile_all(builds: Iterable[Build], workers: int = 2) -> dict[str, Resources]:
    """All builds, by name, in ``workers`` processes."""
    builds = list(builds)
    keys = {build.name: repr(build) for build in builds}
    assert len(keys) == len(builds), "two builds of one name"
    missing = {key: build for build in builds if (key := keys[build.name]) not in _compiled}
    if missing:
        # Spawned: a fork would copy the locks of PyTorch's threads.
        with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
            _compiled.update(zip(missing, pool.map(compile_build, missing.values()), strict=True))
    return {name: _compiled[key] for name, key in keys.items()}


def report(resources: dict[str, Resources]) -> str:
    lines = [
        f"{r.registers:4d} registers {r.shared:6d} bytes shared {r.spills:3d} spills  {n}" for n, r in resources.items()
    ]
    return "\n".join(lines)


def loops(ptx: str) -> list[str]:
    """The bodies of innermost loops: from a label to the branch back to it."""
    found = []
    for match in re.finditer(r"^(\$L__BB\w+):", ptx, re.MULTILINE):
        body = ptx[match.end() :]
        back = re.search(rf"\bbra(?:\.uni)?\s+{re.escape(match[1])};", body)
        if back and not re.search(r"^\$L__BB\w+:", body[: back.start()], re.MULTILINE):
            found.append(body[: back.start()])
    return found


class Record(NamedTuple):
    """What a file made the interpreter run."""

    launches: Mapping[str, Sequence[Mapping[str, Any]]]  # kernel -> compile-time arguments of its launches
    outcomes: Mapping[str, Set[tuple[int, bool]]]  # source file -> (line, outcome) of what branches


@cache
def run_in_interpreter(path: str, *arguments: str) -> Record:
    """The tests of file ``path`` (relative to tests/ops) in a process of their own, kernels interpreted on the CPU."""
    with TemporaryDirectory() as folder:
        written = Path(folder) / "record.json"
        run_alone(path, *arguments, TRITON_INTERPRET="1", KDFAST_RECORD=str(written))
        record = json.loads(written.read_text())
    launches = {kernel: [json.loads(text) for text in texts] for kernel, texts in record["launches"].items()}
    return Record(
        launches, {file: {(line, seen) for line, seen in pairs} for file, pairs in record["outcomes"].items()}
    )


def run_alone(path: str, *arguments: str, **variables: str) -> None:
    """The tests of file ``path`` (relative to tests/ops) in a process of their own."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), **variables}
    file = str(ROOT / "tests" / "ops" / path)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", file, *arguments]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, f"{' '.join(command)}\n{result.stdout[-8000:]}\n{result.stderr[-2000:]}"
