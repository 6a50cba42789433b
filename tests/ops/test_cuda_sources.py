"""CUDA C++ without a GPU: compiled for every NVIDIA target without a warning, resources as recorded."""

from __future__ import annotations

import re
import runpy
import warnings

import pytest
import resources
from cuda_sources import ARCHITECTURES, NVCC, ROOT, SOURCES, kernels_of
from triton_support import needs_triton

needs_nvcc = pytest.mark.skipif(NVCC is None, reason="no nvcc")


@needs_nvcc
@needs_triton  # for its cuobjdump
@pytest.mark.parametrize("name", SOURCES)
def test_every_source_compiles_without_a_warning_and_spills_no_more_than_recorded(name):
    new: resources.Record = {}
    for target in ARCHITECTURES:
        for kernel, numbers in kernels_of(SOURCES[name], target).items():
            new.setdefault(kernel, {})[target] = numbers
    assert new, f"{name}.cu has no kernel"
    old = resources.read(f"cuda_{name}")
    worse, changed = resources.compare(old, new)
    if changed:
        warnings.warn("resources differ from the record (`make resources`):\n" + "\n".join(changed), stacklevel=1)
    assert not worse, "\n".join(worse)
    assert old.keys() == new.keys()


def test_setup_compiles_the_sources_that_are_tested():
    setup = runpy.run_path(str(ROOT / "setup.py"), run_name="flags")
    assert sorted(setup["CUDA"]) == [str(path.relative_to(ROOT)) for path in SOURCES.values()]


@pytest.mark.parametrize("name", SOURCES)
def test_launches_know_their_device_and_stream(name):
    """A launch outside a device guard runs on whatever device is current; one on stream 0 races with the others."""
    text = SOURCES[name].read_text()
    launches = re.findall(r"<<<(.*?)>>>|cudaLaunchKernelEx\w*\(", text, re.DOTALL)
    assert launches
    assert "DeviceGuard" in text and "current_cuda_stream" in text
    assert "cudaDeviceSynchronize" not in text and "cudaMalloc" not in text and "atomicAdd" not in text


SOURCE = """
#include <cuda_fp16.h>
__global__ void doubled(const float* x, float* y, int n) {
  __shared__ float tile[256];
  %s
  int i = blockIdx.x * blockDim.x + threadIdx.x;
  tile[threadIdx.x] = i < n ? x[i] : 0.f;
  __syncthreads();
  if (i < n) y[i] = 2 * tile[255 - threadIdx.x];
}
"""


@needs_nvcc
@needs_triton
def test_the_gate_reads_resources_and_sees_warnings(tmp_path):
    path = tmp_path / "doubled.cu"
    path.write_text(SOURCE % "")
    registers, spills, shared = kernels_of(path, "sm_90")["doubled"]
    assert registers > 0 and spills == 0 and shared >= 1024  # from sm_90 on the system has its own share
    path.write_text(SOURCE % "int unused = 3;")
    with pytest.raises(RuntimeError, match="unused"):
        kernels_of(path, "sm_90")
