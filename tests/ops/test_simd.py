"""csrc/cpu/simd.h at every instruction set this processor runs: exp2 and log to 2 ulp, half types bit for bit."""

from __future__ import annotations

import runpy
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from kdfast import backends

ROOT = Path(__file__).resolve().parents[2]
MAX_ULP = 2.0  # the bound simd.h states

pytestmark = pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler")


@pytest.fixture(scope="module", params=backends.cpu_levels())
def output(request, tmp_path_factory, level_flags) -> dict[str, list[str]]:
    program = tmp_path_factory.mktemp("simd") / f"check_{request.param}"
    source = ROOT / "tests/ops/simd_check.cpp"
    flags = ["-O2", "-std=c++17", "-ffp-contract=fast", "-Wno-psabi", f"-I{ROOT / 'csrc'}", *level_flags[request.param]]
    subprocess.run(["c++", *flags, str(source), "-o", str(program)], check=True)
    lines = subprocess.run([str(program)], check=True, capture_output=True, text=True).stdout.splitlines()
    return {line.split()[0]: line.split()[1:] for line in lines}


@pytest.fixture(scope="module")
def level_flags() -> dict[str, list[str]]:
    """The flags setup.py builds each level with."""
    return runpy.run_path(str(ROOT / "setup.py"), run_name="flags")["levels"]()


@pytest.mark.parametrize(
    "name", ["exp2_float", "exp2_double", "log_float", "log_double", "log1p_float", "log1p_double"]
)
def test_exp2_and_logs_are_within_the_stated_ulp(output, name):
    assert 0 < float(output[name][0]) <= MAX_ULP


def test_exp2_of_zero_infinity_nan_and_the_very_small(output):
    assert output["edges"] == ["1", "0", "nan", "0"] or output["edges"] == ["1", "0", "-nan", "0"]


@pytest.mark.parametrize("name", ["half", "bfloat16"])
def test_every_half_widens_exactly(output, name):
    dtype = torch.float16 if name == "half" else torch.bfloat16
    expected = torch.arange(65536, dtype=torch.int32).to(torch.uint16).view(dtype).double()
    got = torch.tensor([float.fromhex(word) if "nan" not in word else float("nan") for word in output[name]])
    torch.testing.assert_close(got.double(), expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("name", ["to_half", "to_bfloat16"])
def test_rounding_to_half_matches_torch(output, name):
    dtype = torch.float16 if name == "to_half" else torch.bfloat16
    patterns = (torch.arange(65536, dtype=torch.int64) * 65537 + 4099) & 0xFFFFFFFF
    values = patterns.to(torch.uint32).view(torch.float32)
    expected = values.to(dtype)
    got = torch.tensor([int(word) for word in output[name]], dtype=torch.int32).to(torch.uint16).view(dtype)
    torch.testing.assert_close(got, expected, rtol=0, atol=0, equal_nan=True)
