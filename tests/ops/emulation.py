"""CUDA kernels on the CPU: their own source, compiled with an emulation of the instructions of csrc/cuda/warp.cuh."""

from __future__ import annotations

import ctypes
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[2]
MISSING = None if shutil.which("c++") else "no C++ compiler"


@cache
def library(name: str) -> ctypes.CDLL:
    """What tests/ops/<name>.cpp exports."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"{name}.so"
        flags = ["-std=c++20", "-O2", "-fno-strict-aliasing", "-shared", "-fPIC", "-w", f"-I{ROOT / 'csrc'}"]
        source = str(Path(__file__).with_name(f"{name}.cpp"))
        subprocess.run(["c++", *flags, source, "-o", str(path)], check=True)
        return ctypes.CDLL(str(path))


def pointer(x: Tensor | None) -> ctypes.c_void_p:
    return ctypes.c_void_p(None if x is None else x.data_ptr())


def schemas(source: str) -> dict[str, str]:
    """Op -> schema, of those that csrc/cuda/<source>.cu defines."""
    text = (ROOT / "csrc" / "cuda" / f"{source}.cu").read_text()
    found = ["".join(re.findall(r'"(.*?)"', strings)) for strings in re.findall(r'm\.def\(((?:\s*".*?")+)\)', text)]
    assert found and text.count("m.def(") == len(found)
    return {schema.split("(")[0]: schema for schema in found}


def registered(source: str, functions: dict[str, Callable[..., None]]) -> torch.library.Library:
    """``functions`` as the ops of csrc/cuda/<source>.cu on the CPU, for as long as the result is kept."""
    made = torch.library.Library("kdfast", "FRAGMENT")
    defined = schemas(source)
    assert defined.keys() == functions.keys()
    for name, function in functions.items():
        if not hasattr(torch.ops.kdfast, name):
            made.define(defined[name])
        made.impl(name, function, "CPU")
    return made
