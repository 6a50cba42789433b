"""csrc/math: the errors its headers state, against long double."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

pytestmark = pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler")

# name -> the largest error that csrc/math states: in ulp, in eps times the ratio of distances, or relative
BOUNDS = {
    "huber_float": 1.5,
    "huber_double": 1.5,
    "cosine_float": 3.0,
    "cosine_double": 3.0,
    "apex_gradient": 1e-9,  # of the differences it is compared with
    "apex_gradient_at_limit": 1e-15,
    "turn": 4e-16,
    "turn_slope": 1e-15,
    "turn_stretch": 1e-10,  # of the differences it is compared with
}


@pytest.fixture(scope="module")
def output(tmp_path_factory) -> dict[str, list[str]]:
    program = tmp_path_factory.mktemp("math") / "check"
    command = [
        "c++",
        "-O1",
        "-std=c++17",
        f"-I{ROOT / 'csrc'}",
        str(ROOT / "tests/ops/math_check.cpp"),
        "-o",
        str(program),
    ]
    subprocess.run(command, check=True)
    lines = subprocess.run([str(program)], check=True, capture_output=True, text=True).stdout.splitlines()
    return {line.split()[0]: line.split()[1:] for line in lines}


@pytest.mark.parametrize("name", BOUNDS)
def test_errors_are_within_what_is_stated(output, name):
    assert float(output[name][0]) <= BOUNDS[name], output[name]


def test_slopes_are_cut_and_keep_nan(output):
    assert output["edges"][:2] == ["1", "-1"] and output["edges"][2].lstrip("-") == "nan"


def test_straight_and_opposite_vectors_have_exact_angles_and_no_slope(output):
    assert [float(x) for x in output["turn_ends"]] == [0, 0, 0, 0]


def test_every_function_of_the_headers_is_checked():
    check, emulated = ((ROOT / "tests/ops" / name).read_text() for name in ("math_check.cpp", "cuda_emulation.cpp"))
    for header in (ROOT / "csrc/math").glob("*.h"):
        if f'#include "math/{header.name}"' in emulated:
            continue  # test_kl_cluster.py compares the whole kernel made of it with the reference
        for function in re.findall(r"KDFAST_HOST_DEVICE (?!inline)\w+ (\w+)\(", header.read_text()):
            assert re.search(rf"\b{function}\(", check), f"{header.name}: {function}"
