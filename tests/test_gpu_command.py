"""`make gpu` without a GPU: what it says then, and that its stages are run, timed, kept and shown as promised."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from test_benchmarks import record_of, result_of

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))

import gpu  # noqa: E402
import gpu_report  # noqa: E402
import readme_tables  # noqa: E402

ENVIRONMENT = {
    "date": "2026-01-02T03:04:05+00:00",
    "commit": "abc1234",
    "dirty": False,
    "device": "cuda",
    "gpu": "NVIDIA H100 80GB HBM3",
    "driver": "580.1",
    "capability": [9, 0],
    "versions": {"torch": "2.11.0", "triton": "3.6.0", "liger-kernel": None},
}


def run_of(folder: Path) -> gpu.Run:
    return gpu.start(folder, dict(ENVIRONMENT))


def written(run: gpu.Run) -> dict:
    return json.loads(run.path.read_text())


def test_without_a_device_every_stage_says_so_and_the_exit_code_too(tmp_path):
    environment = {**os.environ, "KDFAST_GPU_RESULTS": str(tmp_path), "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, str(ROOT / "benchmarks" / "gpu.py")]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=tmp_path)
    assert result.returncode == gpu.EXIT_NO_DEVICE == 3, result.stdout + result.stderr
    (path,) = tmp_path.glob("no-cuda-device-*.json")
    stages = json.loads(path.read_text())["stages"]
    assert {name: record["status"] for name, record in stages.items()} == dict.fromkeys(gpu.STAGES, "no CUDA device")
    assert all("is_available() is False" in record["reason"] for record in stages.values())
    assert result.stdout.count("no CUDA device") == len(gpu.STAGES)
    assert "nothing was built, proven or measured" in path.with_suffix(".md").read_text()
    assert "EXIT_NO_DEVICE" not in result.stderr


def test_an_unknown_stage_is_an_error_that_lists_the_known(capsys):
    with pytest.raises(SystemExit) as stop:
        gpu.main(["build", "prove"])
    assert stop.value.code == 2
    assert "unknown stage prove; there are build, parity" in capsys.readouterr().err


@pytest.mark.skipif(shutil.which("make") is None, reason="no make")
def test_make_passes_the_stages_on():
    command = ["make", "-n", "gpu", "STAGES=build parity", "GPU_PYTHON=python3"]
    # these tests may themselves run under make, whose flags and level a second make would take over (and announce)
    environment = {
        name: value for name, value in os.environ.items() if name not in ("MAKEFLAGS", "MAKELEVEL", "MFLAGS")
    }
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "python3 benchmarks/gpu.py build parity"


def test_all_stages_fit_in_nine_minutes_and_fewer_have_more_time():
    everything = gpu.chosen(list(gpu.STAGES))
    assert sum(stage.budget for stage in everything.values()) == gpu.SECONDS
    assert gpu.SECONDS + 30 <= 9 * 60  # 30: looking for the device
    assert gpu.chosen(["benchmarks"])["benchmarks"].budget == gpu.SECONDS
    assert len({stage.bit for stage in gpu.STAGES.values()} | {1, 2, gpu.EXIT_NO_DEVICE}) == len(gpu.STAGES) + 3


def test_what_fails_does_not_stop_what_follows_and_the_exit_code_names_it(tmp_path):
    seen = []

    def raises(run, record, budget):
        seen.append(written(run)["stages"]["raises"]["status"])
        raise RuntimeError("broken")

    def sleeps(run, record, budget):
        job = gpu.Job([sys.executable, "-c", "import time; print('begun', flush=True); time.sleep(60)"])
        gpu.run_jobs([job], budget)
        record.update(status=gpu.verdict([job]), output=job.tail)

    def passes(run, record, budget):
        seen.append(written(run)["stages"]["sleeps"])
        record["status"] = gpu.PASSED

    run = run_of(tmp_path)
    stages = {
        "raises": gpu.Stage(raises, 5, 4),
        "sleeps": gpu.Stage(sleeps, 1.5, 8),
        "passes": gpu.Stage(passes, 5, 16),
    }
    begin = time.monotonic()
    assert gpu.run_stages(run, stages, None) == 4 + 8
    assert time.monotonic() - begin < 30
    assert seen[0] == "running"
    assert (seen[1]["status"], seen[1]["output"]) == ("timed out", ["begun"])  # written before the next stage began
    records = written(run)["stages"]
    assert records["raises"]["reason"] == "RuntimeError: broken"
    assert records["passes"]["status"] == "passed"


def test_out_of_time_ends_the_processes_a_job_started(tmp_path):
    mark = tmp_path / "alive"
    child = f"import time; time.sleep(3); open({str(mark)!r}, 'w')"
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    job = gpu.Job([sys.executable, "-c", parent])
    gpu.run_jobs([job], 1)
    assert job.status is None and gpu.verdict([job]) == gpu.TIMED_OUT
    time.sleep(3)
    assert not mark.exists()


TESTS = """
import pytest
pytestmark = pytest.mark.gpu
@pytest.mark.parametrize("call", ["kl 5x16 T=3.0", "b [c] PASSED"])
def test_passes(call): pass
def test_fails(): assert 1 == 2
def test_skips(): pytest.skip("one CUDA device only")
@pytest.fixture
def broken(): raise RuntimeError
def test_errs(broken): pass
"""


def test_the_parity_stage_counts_what_pytest_says(tmp_path, monkeypatch):
    tests = tmp_path / "tests" / "cuda"
    tests.mkdir(parents=True)
    (tests / "test_made_up.py").write_text(TESTS)
    shards = (ROOT / "tests" / "cuda" / "conftest.py").read_text()
    (tests / "conftest.py").write_text(shards.replace("if not torch.cuda.is_available()", "if False"))
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = gpu: x\n")
    monkeypatch.setattr(gpu, "ROOT", tmp_path)
    monkeypatch.setattr(gpu, "PROCESSES", 2)
    run, record = run_of(tmp_path / "results"), {}
    run.result["stages"]["parity"] = record
    gpu.parity(run, record, 60)
    assert record["status"] == gpu.FAILED
    assert record["passed"] == 2
    assert sorted(record["failed"]) == [f"tests/cuda/test_made_up.py::test_{name}" for name in ("errs", "fails")]
    assert record["skipped"] == {"tests/cuda/test_made_up.py::test_skips": "one CUDA device only"}
    assert any("assert 1 == 2" in line for line in record["output"])
    assert written(run)["stages"]["parity"]["passed"] == 2

    (tests / "test_made_up.py").write_text("def test_not_marked(): pass\n")
    gpu.parity(run, record, 60)
    assert record["status"] == gpu.FAILED  # nothing ran


BENCHMARK = """
import json, pathlib, sys, time
assert sys.argv[1:3] == ["--device", "cuda"]
pathlib.Path(sys.argv[sys.argv.index("--output") + 1]).write_text(json.dumps({"cases": ["first"]}))
time.sleep(60)
"""


def test_a_benchmark_out_of_time_keeps_what_it_measured_and_the_next_one_runs(tmp_path, monkeypatch):
    (tmp_path / "slow.py").write_text(BENCHMARK)
    (tmp_path / "quick.py").write_text(BENCHMARK.replace("time.sleep(60)", ""))
    (tmp_path / "wrong.py").write_text("raise SystemExit('nothing is measured: value')")
    monkeypatch.setattr(gpu, "BENCHMARKS", tmp_path)
    monkeypatch.setattr(gpu, "ops_with_benchmark", lambda: ["slow", "wrong", "quick"])
    monkeypatch.setattr(gpu, "count_cases", lambda name: 1)
    run, record = run_of(tmp_path / "results"), {}
    run.save()
    gpu.benchmarks(run, record, 9)
    assert {name: record[name]["status"] for name in ("slow", "wrong", "quick")} == {
        "slow": gpu.TIMED_OUT,
        "wrong": gpu.FAILED,
        "quick": gpu.PASSED,
    }
    assert record["status"] == gpu.FAILED
    assert record["wrong"]["output"] == ["nothing is measured: value"]
    assert run.result["benchmarks"] == {"slow": {"cases": ["first"]}, "quick": {"cases": ["first"]}}
    assert [path.name for path in (tmp_path / "results").iterdir()] == [run.path.name]


def test_every_op_with_a_triton_kernel_and_a_benchmark_is_measured():
    names = gpu.ops_with_benchmark()
    assert "kl" in names
    assert all((ROOT / "benchmarks" / f"{name}.py").exists() for name in names)
    assert all(gpu.count_cases(name) > 0 for name in names)


SANITIZER = """#!/bin/sh
echo "========= ERROR SUMMARY: $2"
test "$2" != racecheck || exit 9
"""


def test_each_sanitizer_has_a_verdict_of_its_own(tmp_path, monkeypatch):
    tool = tmp_path / "compute-sanitizer"
    tool.write_text(SANITIZER)
    tool.chmod(0o755)
    (tmp_path / "tests" / "cuda").mkdir(parents=True)
    (tmp_path / "tests" / "cuda" / "small_pass.py").write_text("print('a pass')")
    monkeypatch.setattr(gpu, "ROOT", tmp_path)
    monkeypatch.setattr(gpu.shutil, "which", lambda name: str(tool))
    record: dict = {}
    gpu.sanitizer(run_of(tmp_path / "results"), record, 30)
    assert record["status"] == gpu.FAILED
    assert {name: record[name]["status"] for name in gpu.SANITIZERS} == {
        name: gpu.FAILED if name == "racecheck" else gpu.PASSED for name in gpu.SANITIZERS
    }
    assert record["memcheck"]["summary"] == ["========= ERROR SUMMARY: memcheck"]
    monkeypatch.setattr(gpu.shutil, "which", lambda name: None)
    monkeypatch.setattr(gpu.Path, "exists", lambda path: False)
    gpu.sanitizer(run_of(tmp_path), record, 30)
    assert record["status"] == gpu.SKIPPED


def made_up_result() -> dict:
    measured = result_of(record_of("default", 9.0))
    measured["environment"] |= ENVIRONMENT
    measured["cases"][0]["seconds"] = {ours: {"p50": 0.0123} for ours in measured["cases"][0]["speedup"]}
    return {
        "environment": dict(ENVIRONMENT),
        "stages": {
            "build": {"status": "passed", "architecture": "9.0a"},
            "parity": {
                "status": "failed",
                "passed": 7,
                "failed": ["tests/cuda/a.py::b"],
                "skipped": {"c": "one device"},
            },
            "sanitizer": {"status": "not available", "reason": "compute-sanitizer is not installed"},
            "benchmarks": {"status": "passed", "kl": {"status": "passed", "output": []}},
        },
        "benchmarks": {"kl": measured, "rkd": {"cases": []}},
    }


def test_the_summary_names_what_failed_and_what_was_skipped(tmp_path):
    text = gpu_report.markdown(made_up_result(), "nvidia-h100")
    for part in (
        "NVIDIA H100 80GB HBM3, driver 580.1; torch 2.11.0, triton 3.6.0; 2026-01-02, commit abc1234.",
        "| parity | failed | 7 tests passed, 1 failed, 1 skipped |",
        "| sanitizer | not available | compute-sanitizer is not installed |",
        "- `tests/cuda/a.py::b`",
        "- 1 tests: one device",
        "| forward KL | 512x32000 | float32 | 12.3 ms | 9.0x |",
    ):
        assert part in text, part
    pytest.importorskip("matplotlib")
    assert gpu_report.picture(made_up_result(), tmp_path / "a.png") is None
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    assert gpu_report.picture({"environment": ENVIRONMENT}, tmp_path / "b.png") == "nothing was measured"


def test_the_readme_shows_the_newest_run_and_says_where_there_is_none(tmp_path):
    readme = "before\n<!-- gpu -->\nold\n<!-- /gpu -->\n<!-- benchmarks:kl -->\n<!-- /benchmarks:kl -->\n"
    text = readme_tables.updated(readme, tmp_path)
    assert text.startswith("before\n<!-- gpu -->\n**GPU**: not yet measured.")
    older, newer = made_up_result(), made_up_result()
    older["environment"]["date"], older["environment"]["gpu"] = "2025-01-01", "NVIDIA A100"
    (tmp_path / "z.json").write_text(json.dumps(older))
    (tmp_path / "nvidia-h100.json").write_text(json.dumps(newer))
    (tmp_path / "no-cuda-device.json").write_text(
        json.dumps({"environment": {"gpu": None, "date": "2027"}, "stages": {}})
    )
    text = readme_tables.updated(readme, tmp_path)
    assert "NVIDIA H100" in text and "A100" not in text
    assert "[nvidia-h100.json](benchmarks/results/nvidia-h100.json)" in text
    assert (
        text.count("| forward KL | 512x32000 | float32 | 12.3 ms | 9.0x |") == 2
    )  # the run's own section, and the op's
    assert "`rkd`" not in text  # nothing of it was measured


def test_a_second_run_keeps_the_stages_it_does_not_repeat(tmp_path):
    run = run_of(tmp_path)
    run.result["stages"]["build"] = {"status": "passed"}
    run.save()
    assert run_of(tmp_path).result["stages"] == {"build": {"status": "passed"}}
    other = gpu.start(tmp_path, {**ENVIRONMENT, "commit": "def5678"})
    assert other.result["stages"] == {}
