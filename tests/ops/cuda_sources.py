"""Compiling csrc/cuda/*.cu for GPUs that are not here, and what their kernels need."""

from __future__ import annotations

import re
import runpy
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
SOURCES = {path.stem: path for path in sorted((ROOT / "csrc" / "cuda").glob("*.cu"))}
NVCC = shutil.which("nvcc")
# The targets of the Triton kernels, with the instructions that only these architectures have.
ARCHITECTURES = {"sm_80": "sm_80", "sm_90": "sm_90a", "sm_100": "sm_100a"}
TORCH = Path(torch.__file__).parent / "include"
# What setup.py passes, and every warning an error.
FLAGS = ["-O3", "-std=c++17", "-Werror", "all-warnings", "-Xcompiler", "-Wall,-Wextra,-Wno-unused-parameter,-Werror"]
ABI = "TORCH_TARGET_VERSION=" + runpy.run_path(str(ROOT / "setup.py"), run_name="flags")["TORCH_TARGET_VERSION"]
USAGE = re.compile(r"Function (\S+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)")


def kernels_of(source: Path, target: str) -> dict[str, tuple[int, int, int]]:
    """Kernel -> registers, bytes of stack and local memory (spills), bytes of shared memory. Raises on any warning."""
    from triton import knobs  # brings cuobjdump

    assert NVCC is not None
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernels.cubin"
        include = [f"-I{ROOT / 'csrc'}", "-isystem", str(TORCH), "-isystem", str(TORCH / "torch/csrc/api/include")]
        command = [NVCC, "-cubin", f"-arch={ARCHITECTURES[target]}", *FLAGS, *include, "-DUSE_CUDA", f"-D{ABI}"]
        result = subprocess.run([*command, str(source), "-o", str(cubin)], capture_output=True, text=True)
        if result.returncode != 0:
            raise RuntimeError(f"{source.name} for {target}:\n{result.stdout}{result.stderr}")
        tool = [knobs.nvidia.cuobjdump.path, "--dump-resource-usage", str(cubin)]
        usage = subprocess.run(tool, check=True, capture_output=True, text=True).stdout
    found = {name: tuple(map(int, numbers)) for name, *numbers in USAGE.findall(usage)}
    return {demangled(name): (reg, stack + local, shared) for name, (reg, stack, shared, local) in found.items()}


def demangled(name: str) -> str:
    filt = shutil.which("c++filt")
    if filt is None:
        return name
    text = subprocess.run([filt, name], check=True, capture_output=True, text=True).stdout.strip()
    return re.sub(r"\(.*\)$", "", text.replace("(anonymous namespace)::", "").removeprefix("void "))
