"""Builds ``kdfast._C`` against PyTorch's stable ABI: one binary for Python >= 3.10 and torch >= 2.11.

And a second one, small, of what is not in that ABI: ``csrc/autograd.cpp``, named after the torch it is built with.

Switches (environment variables):
    KDFAST_BUILD_EXT=0    build nothing: a pure-Python install, CPU tensors run the reference
    KDFAST_CUDA=0|1|auto  compile csrc/cuda too; auto: when nvcc is found and torch is a CUDA build
    KDFAST_DEBUG=1        -O0 -g instead of -O3
    TORCH_CUDA_ARCH_LIST  as in every PyTorch extension
"""

from __future__ import annotations

import os
import platform
import re
from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).resolve().parent

# torch 2.11.0 in the encoding of torch/headeronly/version.h: the oldest libtorch the binary runs with.
TORCH_TARGET_VERSION = "0x020b000000000000"

COMMON = [
    "csrc/ops.cpp",
    "csrc/cpu/levels.cpp",
    "csrc/cpu/pool.cpp",
    "csrc/cpu/row_runner.cpp",
    "csrc/cpu/kl.cpp",
    "csrc/cpu/topk_kl.cpp",
    "csrc/cpu/relation.cpp",
    "csrc/cpu/features.cpp",
    "csrc/cpu/graph.cpp",
    "csrc/cpu/graph_loss.cpp",
    "csrc/cpu/rkd.cpp",
    "csrc/cpu/rkd_sequence.cpp",
]
# Compiled once per instruction set, each with its own flags: see csrc/cpu/levels.h.
PER_LEVEL = [
    "csrc/cpu/kl_rows.cpp",
    "csrc/cpu/relation_panels.cpp",
    "csrc/cpu/relation_rows.cpp",
    "csrc/cpu/feature_rows.cpp",
    "csrc/cpu/graph_tiles.cpp",
    "csrc/cpu/graph_edges.cpp",
    "csrc/cpu/rkd_kernels.cpp",
    "csrc/cpu/rkd_sequence_kernels.cpp",
]
CUDA = ["csrc/cuda/graph.cu", "csrc/cuda/graph_product.cu", "csrc/cuda/kl.cu"]


def levels() -> dict[str, list[str]]:
    """Instruction sets of one binary. csrc/cpu/levels.cpp detects the same features."""
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return {"baseline": []}
    avx2 = ["-mavx2", "-mfma", "-mf16c"]
    avx512 = [*avx2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mprefer-vector-width=512"]
    return {"baseline": [], "avx2": avx2, "avx512": avx512}


def wants_cuda() -> bool:
    """KDFAST_CUDA decides; 'auto' asks for nvcc and a CUDA build of torch."""
    import torch
    from torch.utils.cpp_extension import CUDA_HOME

    choice = os.environ.get("KDFAST_CUDA", "auto")
    if choice not in ("0", "1", "auto"):
        raise ValueError(f"KDFAST_CUDA must be 0, 1 or auto, got {choice!r}")
    return bool(CUDA) and (
        choice == "1" or (choice == "auto" and CUDA_HOME is not None and torch.version.cuda is not None)
    )


def autograd_module() -> str:
    """The name of the binary of csrc/autograd.cpp. kdfast/ops/nodes.py looks for the same."""
    import torch

    return "kdfast._autograd_" + re.sub(r"\W", "_", torch.__version__)


def extension() -> dict[str, object]:
    """What setup() needs to know to build the extensions."""
    from torch.utils.cpp_extension import BuildExtension, CppExtension, CUDAExtension

    debug = os.environ.get("KDFAST_DEBUG", "0") == "1"
    optimise = ["-O0", "-g"] if debug else ["-O3", "-g0"]
    # -ffp-contract=fast: a * b + c is one FMA where the machine has it. Never -ffast-math: NaN and inf carry meaning.
    cxx = [
        *optimise,
        "-ffp-contract=fast",
        "-fvisibility=hidden",
        "-Wall",
        "-Wextra",
        "-Wno-psabi",
        "-Wno-unused-parameter",
        f"-I{ROOT / 'csrc'}",
    ]
    macros = [("TORCH_TARGET_VERSION", TORCH_TARGET_VERSION)]
    macros += [(f"KDFAST_HAS_{level.upper()}", "1") for level in levels()]
    cuda = wants_cuda()
    kernels = (CUDAExtension if cuda else CppExtension)(
        "kdfast._C",
        [*COMMON, *(CUDA if cuda else [])],
        # USE_CUDA: the stable ABI's declarations for it.
        extra_compile_args={"cxx": cxx, "nvcc": ["-O3", "-DUSE_CUDA", f"-I{ROOT / 'csrc'}"]},
        define_macros=macros,
        depends=[str(path) for path in Path("csrc").rglob("*.*h")],
        py_limited_api=True,
    )
    autograd = CppExtension(
        autograd_module(), ["csrc/autograd.cpp"], extra_compile_args={"cxx": cxx}, py_limited_api=True
    )

    class BuildLevels(BuildExtension):
        """Adds the objects of PER_LEVEL, one set per instruction set, to the link of the kernels."""

        def build_extension(self, ext) -> None:
            for level, flags in levels().items() if ext is kernels else ():
                ext.extra_objects += self.compiler.compile(
                    PER_LEVEL,
                    output_dir=str(Path(self.build_temp) / level),
                    include_dirs=ext.include_dirs,
                    macros=[*macros, ("KDFAST_LEVEL", level)],
                    extra_postargs={"cxx": [*cxx, *flags]},
                    depends=ext.depends,
                )
            super().build_extension(ext)

    return {
        "ext_modules": [kernels, autograd],
        "cmdclass": {"build_ext": BuildLevels},
        "options": {"bdist_wheel": {"py_limited_api": "cp310"}},
    }


def announced_extension() -> dict[str, object]:
    """The extension, or nothing and a line that says so."""
    if os.environ.get("KDFAST_BUILD_EXT", "1") == "0":
        print("kdfast: KDFAST_BUILD_EXT=0, no C++ extension: CPU tensors will run the reference")
        return {}
    compiler = os.environ.get("CXX", "c++").split()[0]
    from shutil import which

    if which(compiler) is None:
        print(f"kdfast: no C++ compiler ({compiler!r} not found), no C++ extension: CPU tensors will run the reference")
        return {}
    return extension()


if __name__ != "flags":  # tests read levels() from this file
    setup(**announced_extension())
