"""Choice of backend: forced, reported, and never silent."""

from __future__ import annotations

import re
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

import kdfast
from kdfast import backends
from kdfast.__main__ import report
from samples import NAMES


def run_python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    import os

    return subprocess.run(
        [sys.executable, "-W", "always", "-c", code], capture_output=True, text=True, env={**os.environ, **environment}
    )


def test_the_cpu_kernel_runs_cpu_tensors_by_default():
    if backends.extension_problem() is not None:
        pytest.skip("the extension is not built")
    assert backends.select("kl", torch.zeros(1)) == backends.CPU


def test_use_forces_a_backend_inside_the_block_only():
    with backends.use("reference"):
        assert backends.select("kl", torch.zeros(1)) == backends.REFERENCE
    assert backends._forced == backends.AUTO


def test_auto_lifts_an_outer_backend():
    if backends.extension_problem() is not None:
        pytest.skip("the extension is not built")
    with backends.use("reference"):
        with backends.use("auto"):
            assert backends.select("kl", torch.zeros(1)) == backends.CPU
        assert backends.select("kl", torch.zeros(1)) == backends.REFERENCE


def test_an_unknown_backend_lists_the_known():
    with (
        pytest.raises(ValueError, match=r"backend must be 'auto', 'cpu'.* or 'reference', got 'gpu'"),
        backends.use("gpu"),
    ):
        pass


def test_a_forced_backend_that_cannot_run_says_why():
    with backends.use("cpu"), pytest.raises(RuntimeError, match="runs on cpu tensors, these are on meta"):
        kdfast.kl_divergence(torch.zeros(2, 3, device="meta"), torch.zeros(2, 3, device="meta"))


def test_the_environment_variable_forces_the_reference():
    code = "import torch; from kdfast import backends; print(backends.select('kl', torch.zeros(1)))"
    assert run_python(code, KDFAST_BACKEND="reference").stdout.strip() == "reference"


def test_a_wrong_environment_variable_is_an_error():
    result = run_python("import kdfast", KDFAST_BACKEND="fast")
    assert result.returncode != 0
    assert "KDFAST_BACKEND must be one of" in result.stderr


WITHOUT_EXTENSION = """
import sys
sys.modules['kdfast._C'] = None  # what an install without a C++ compiler looks like
import torch, kdfast
x = torch.randn(3, 5, requires_grad=True)
for _ in range(3):
    kdfast.kl_divergence(x, torch.randn(3, 5)).backward()
from kdfast.__main__ import report
print(report())
"""


def test_without_the_extension_the_reference_runs_and_warns_once():
    result = run_python(WITHOUT_EXTENSION)
    assert result.returncode == 0, result.stderr
    assert result.stderr.count("kdfast runs the plain PyTorch reference") == 1
    assert "the C++ extension is not built" in result.stdout


@pytest.mark.parametrize(
    "call",
    [
        pytest.param(lambda x: kdfast.kl_divergence(x, x, inplace_backward=True), id="function"),
        pytest.param(lambda x: kdfast.losses.KLDivergence(inplace_backward=True)(x, x), id="module"),
    ],
)
def test_a_warning_is_of_the_line_that_calls(monkeypatch, call):
    monkeypatch.setattr(backends, "_missing_extension", "it is not built")
    monkeypatch.setattr(backends, "_warned", set())
    with pytest.warns(RuntimeWarning) as records:
        call(torch.zeros(2, 3))
    assert [str(record.message).partition(":")[0] for record in records] == [
        "kdfast runs the plain PyTorch reference on CPU tensors",
        "inplace_backward=True saves no memory",
    ]
    assert [record.filename for record in records] == [__file__, __file__]


def chosen(text: str) -> dict[str, list[str]]:
    """op -> what the table of the report says of CPU and of CUDA tensors."""
    rows = [line.split() for line in text.splitlines()]
    return {row[0]: row[1:3] for row in rows if row and row[0] in {*backends.KERNELS, "none"}}


def test_the_report_names_every_op_function_and_the_level():
    text = report()
    assert set(chosen(text)) == {*backends.KERNELS, "none"} - {"scale"}  # which no function chooses
    for name in (*NAMES, "CRDLoss"):
        assert len(re.findall(rf"\b{name}\b", text)) == 1, name
    assert "cpu kernels:" in text
    assert "autograd nodes: in " in text
    assert ("on CUDA (no device)" in text) == (not torch.cuda.is_available())


@pytest.mark.parametrize(
    ("name", "kl", "topk_kl", "reasons"),
    [
        ("auto", ["cpu", "triton"], ["cpu", "triton"], []),
        ("reference", ["reference", "reference"], ["reference", "reference"], []),
        ("cpu", ["cpu", "raises"], ["cpu", "raises"], ["the cpu backend runs on cpu tensors, these are on cuda"]),
        ("triton", ["raises", "triton"], ["raises", "triton"], ["runs on cuda tensors, these are on cpu"]),
        ("cuda", ["raises", "cuda"], ["raises", "raises"], ["these are on cpu", "topk_kl has no cuda kernel"]),
    ],
)
def test_the_report_says_what_a_forced_backend_runs_or_why_it_raises(monkeypatch, name, kl, topk_kl, reasons):
    for missing in ("extension", "triton", "cuda"):
        monkeypatch.setattr(backends, f"_missing_{missing}", None)
    monkeypatch.setattr("kdfast.__main__._cpu_line", lambda: "not of interest")
    with backends.use(name):
        text = report()
    rows = chosen(text)
    assert (rows["kl"], rows["topk_kl"], rows["none"]) == (kl, topk_kl, ["reference", "reference"])
    raised = [line for line in text.splitlines() if line.startswith(f"{name} raises: ")]
    assert bool(raised) == bool(reasons)
    assert all(any(reason in line for line in raised) for reason in reasons)
    assert (f"forced: {name} (KDFAST_BACKEND)" in text) == (name != "auto")
    assert max(map(len, text.splitlines())) <= 100


def test_the_command_reports_the_environment_variable():
    code = "import runpy; runpy.run_module('kdfast', run_name='__main__')"
    printed = run_python(code, KDFAST_BACKEND="reference").stdout
    assert "forced: reference (KDFAST_BACKEND)" in printed
    assert {tuple(row) for row in chosen(printed).values()} == {("reference", "reference")}


def test_an_unavailable_level_is_an_error():
    with pytest.raises(ValueError, match="cpu level must be"), backends.use_cpu_level("avx1024"):
        pass


def test_a_kernel_beside_the_default_runs_where_it_is_asked_for(monkeypatch):
    on_a_gpu = SimpleNamespace(device=torch.device("cuda"), dtype=torch.bfloat16, is_cpu=False, is_cuda=True)
    monkeypatch.setattr(backends, "_missing_triton", None)
    monkeypatch.setattr(backends, "_missing_cuda", None)
    assert backends.BY_NAME
    for op, kernels in backends.BY_NAME.items():
        for backend in kernels:
            assert backends.select(op, on_a_gpu) != backend
            with backends.use(backend):
                assert backends.select(op, on_a_gpu) == backend and backends.is_forced(backend)
            assert f"{op}: kdfast.backends.use({backend!r}) runs its kernel; what that cannot run raises" in report()
    with backends.use("cuda"), pytest.raises(RuntimeError, match="topk_kl has no cuda kernel"):
        backends.select("topk_kl", on_a_gpu)
    monkeypatch.setattr(backends, "_missing_triton", "triton is not installed")
    with pytest.warns(RuntimeWarning, match="triton is not installed"):
        assert backends.select("kl", on_a_gpu) == backends.REFERENCE
