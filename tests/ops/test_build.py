"""What the built binary promises: the stable ABI only, and no instruction above the baseline outside its level.

All but the autograd nodes, which are a binary of their own (test_nodes.py).
"""

from __future__ import annotations

import re
import runpy
import shutil
import subprocess
from pathlib import Path

import pytest

from kdfast import backends

ROOT = Path(__file__).resolve().parents[2]

pytestmark = pytest.mark.skipif(backends.extension_problem() is not None, reason="the extension is not built")

# What PyTorch keeps stable across versions: the C shims.
STABLE = re.compile(r"^(aoti_torch_|torch_)\w+$")
# Anything of libtorch's C++ side, mangled or not.
LIBTORCH = re.compile(r"torch|c10|aten|at\d|THP|2at|caffe", re.IGNORECASE)


def imported_symbols(binary: Path) -> list[str]:
    listing = subprocess.run(["nm", "-D", "--undefined-only", str(binary)], check=True, capture_output=True, text=True)
    return [line.split()[-1].split("@")[0] for line in listing.stdout.splitlines()]


def unstable(symbols: list[str]) -> list[str]:
    """Symbols of libtorch that are not part of its stable ABI."""
    return [name for name in symbols if LIBTORCH.search(name) and not STABLE.match(name)]


@pytest.mark.skipif(shutil.which("nm") is None, reason="no nm")
def test_the_binary_imports_only_stable_symbols():
    import kdfast._C

    symbols = imported_symbols(Path(kdfast._C.__file__))
    assert "torch_parallel_for" in symbols  # the listing is not empty
    assert unstable(symbols) == []


def test_an_unstable_symbol_would_be_noticed():
    assert unstable(["_ZN2at5emptyEv", "_ZNK3c1010TensorImpl4sizeEl", "aoti_torch_get_size"]) == [
        "_ZN2at5emptyEv",
        "_ZNK3c1010TensorImpl4sizeEl",
    ]


def test_sources_include_only_stable_headers():
    for path in (ROOT / "csrc").rglob("*"):
        if path.is_file() and path.name != "autograd.cpp":
            includes = re.findall(r'#include\s*[<"]([^>"]+)', path.read_text())
            foreign = [name for name in includes if re.match(r"(ATen|c10|torch)/", name)]
            assert all(re.match(r"torch/(csrc/stable|headeronly)/", name) for name in foreign), (path, foreign)


@pytest.mark.skipif(shutil.which("c++") is None or shutil.which("nm") is None, reason="no C++ compiler")
def test_no_level_exports_a_symbol_another_could_be_linked_to(tmp_path):
    """A weak (inline, template) symbol compiled for AVX-512 might be the copy the linker keeps for everyone."""
    setup = runpy.run_path(str(ROOT / "setup.py"), run_name="flags")
    for level, flags in setup["levels"]().items():
        for source in setup["PER_LEVEL"]:
            out = tmp_path / f"{level}.o"
            base = ["c++", "-O3", "-fPIC", "-std=c++17", "-Wno-psabi", f"-I{ROOT / 'csrc'}", f"-DKDFAST_LEVEL={level}"]
            defines = [f"-DKDFAST_HAS_{name.upper()}=1" for name in setup["levels"]()]
            subprocess.run([*base, *defines, *flags, "-c", str(ROOT / source), "-o", str(out)], check=True)
            listing = subprocess.run(["nm", "-C", str(out)], check=True, capture_output=True, text=True).stdout
            exported = [line.split(maxsplit=2)[1:] for line in listing.splitlines() if len(line.split()) > 2]
            outside = [name for kind, name in exported if kind.isupper() or kind in "vw"]
            assert outside, "the listing is not empty"
            assert all(name.startswith(f"kdfast::{level}::") for name in outside), outside


def test_the_binary_is_for_every_python_from_3_10():
    import kdfast._C

    assert kdfast._C.__file__.endswith(".abi3.so")
