"""What `make gpu` runs: everything that needs an NVIDIA GPU, offline, within 9 minutes. Build, prove, measure, report.

``python benchmarks/gpu.py [stage ...]`` runs all stages or those named, each within its own budget of time (fewer
stages have more of it); one that fails or runs out of time does not stop the next. Results are written as they come, to
``benchmarks/results/<gpu>-<date>.json`` (environment variable ``KDFAST_GPU_RESULTS`` names another folder), beside it
a summary in Markdown and a PNG. Stages run again on the same day and commit replace their part of the file; where git
does not say which commit this is, ``KDFAST_COMMIT`` does.

Nothing is downloaded or installed: this interpreter's torch, triton, ninja, pytest and hypothesis are used, nvcc where
there are CUDA sources, compute-sanitizer, matplotlib and peers where they exist.

Exit code: 0 all is well; 2 wrong arguments; 3 no CUDA device; else the sum of what failed or ran out of time:
build 4, parity 8, sanitizer 16, benchmarks 32, report 64.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
BENCHMARKS = ROOT / "benchmarks"
sys.path[:0] = [str(BENCHMARKS), str(ROOT)]

NO_DEVICE = "no CUDA device"
PASSED, FAILED, TIMED_OUT, SKIPPED = "passed", "failed", "timed out", "not available"
EXIT_NO_DEVICE = 3
KEPT_LINES = 60  # of the output of what fails
PROCESSES = min(15, os.cpu_count() or 1)  # share the parity tests: most of their time is compiling, on the CPU
COMPILING = 0.35  # of a benchmark stage's time, at most
SANITIZERS = ("memcheck", "racecheck", "synccheck", "initcheck")


@dataclass
class Run:
    """The result so far, and the file it is kept in."""

    path: Path
    result: dict[str, Any]

    def save(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        partial = self.path.with_suffix(".json.partial")  # never half a file
        partial.write_text(json.dumps(self.result, indent=1) + "\n")
        partial.replace(self.path)


@dataclass
class Job:
    """A process, its output line by line, and how it ended: an exit status, or None where time ran out."""

    command: list[str]
    on_line: Callable[[str], None] = lambda line: None
    variables: dict[str, str] = field(default_factory=dict)
    lines: list[str] = field(default_factory=list)
    status: int | None = None

    @property
    def tail(self) -> list[str]:
        return self.lines[-KEPT_LINES:]


def run_jobs(jobs: Sequence[Job], seconds: float) -> None:
    """All jobs side by side, for so long at most; what then still runs is ended, with the processes it started."""
    deadline = time.monotonic() + seconds
    started = []
    for job in jobs:
        paths = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
        environment = {**os.environ, "PYTHONUNBUFFERED": "1", "PYTHONPATH": paths, **job.variables}
        process = subprocess.Popen(
            job.command,
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,
        )
        reader = threading.Thread(target=_read, args=(process, job), daemon=True)
        reader.start()
        started.append((job, process, reader))
    for job, process, reader in started:
        try:
            job.status = process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        reader.join(5)


def _read(process: subprocess.Popen[str], job: Job) -> None:
    for line in process.stdout or ():
        job.lines.append(line.rstrip("\n"))
        job.on_line(job.lines[-1])


def verdict(jobs: Sequence[Job]) -> str:
    if any(job.status not in (0, None) for job in jobs):
        return FAILED
    return TIMED_OUT if any(job.status is None for job in jobs) else PASSED


Record = dict[str, Any]  # what a stage found; "status" is one of the words above
StageFunction = Callable[[Run, Record, float], None]


def build(run: Run, record: Record, budget: float) -> None:
    """The extension, for the card that is present."""
    major, minor = run.result["environment"]["capability"]
    architecture = f"{major}.{minor}" + ("a" if major >= 9 else "")
    command = [sys.executable, "setup.py", "build_ext", "--inplace"]
    make = Job(command, variables={"TORCH_CUDA_ARCH_LIST": architecture, "MAX_JOBS": str(os.cpu_count() or 1)})
    run_jobs([make], budget - 15)
    see = Job([sys.executable, "-m", "kdfast"])
    run_jobs([see], 15)
    record.update(status=verdict([make, see]), architecture=architecture, report=see.lines)
    if record["status"] != PASSED:
        record["output"] = make.tail


# A line of `pytest -v`: test, outcome, the reason of a skip in parentheses, and how far the run is.
OUTCOME = re.compile(r"(tests/cuda/\S+?::.+?) (PASSED|FAILED|ERROR|SKIPPED)(?: \((.*)\))?\s+\[ *\d+%\]$")


def parity(run: Run, record: Record, budget: float) -> None:
    """tests/cuda, in several processes."""
    record.update(passed=0, failed=[], skipped={})
    lock = threading.Lock()

    def note(line: str) -> None:
        if (found := OUTCOME.match(line)) is None:
            return
        test, outcome, reason = found.groups()
        with lock:
            if outcome == "PASSED":
                record["passed"] += 1
            elif outcome == "SKIPPED":
                record["skipped"][test] = reason or ""
            else:
                record["failed"].append(test)
            run.save()

    # Skips with their whole reason on the line; cuBLAS promises the same bits with workspaces of one size.
    variables = {"COLUMNS": "400", "CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-v", "--tb=short", "-p", "no:cacheprovider", "tests/cuda"]
    jobs = [Job(command, note, {**variables, "KDFAST_SHARD": f"{index}/{PROCESSES}"}) for index in range(PROCESSES)]
    run_jobs(jobs, budget)
    record["status"] = verdict(jobs)
    if record["status"] == PASSED and (record["failed"] or not record["passed"]):
        record["status"] = FAILED  # a run that proved nothing is no proof
    record["processes out of time"] = sum(job.status is None for job in jobs)
    record["output"] = [line for job in jobs if job.status != 0 for line in job.tail]


def sanitizer(run: Run, record: Record, budget: float) -> None:
    """compute-sanitizer's tools over one small pass of every kernel, side by side."""
    tool = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    if not Path(tool).exists():
        record.update(status=SKIPPED, reason="compute-sanitizer is not installed")
        return
    small_pass = [sys.executable, str(ROOT / "tests" / "cuda" / "small_pass.py")]
    first = Job(small_pass)  # without the tool: whether the pass works, and Triton's cache is filled
    run_jobs([first], budget / 3)
    record["plain"] = {"status": verdict([first]), "output": [] if first.status == 0 else first.tail}
    run.save()
    if first.status != 0:
        record["status"] = verdict([first])
        return
    # Without PyTorch's caching an access beyond a tensor is an access beyond an allocation.
    variables = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    jobs = {
        name: Job([tool, "--tool", name, "--error-exitcode", "9", *small_pass], variables=variables)
        for name in SANITIZERS
    }
    run_jobs(list(jobs.values()), budget * 2 / 3)
    for name, job in jobs.items():
        summary = [line for line in job.lines if "SUMMARY" in line]
        record[name] = {"status": verdict([job]), "summary": summary, "output": [] if job.status == 0 else job.tail}
    record["status"] = verdict(list(jobs.values()))


def benchmarks(run: Run, record: Record, budget: float) -> None:
    """benchmarks/<op>.py for every op with a Triton kernel, one after the other: each has the machine to itself.

    Before, all side by side and as short as can be, so that what has to be compiled is in the caches: that takes most
    of a run's time, on the CPU. What is left of the time is shared in proportion to the cases to come.
    """
    names, deadline = ops_with_benchmark(), time.monotonic() + budget
    fill_caches(run, names, budget * COMPILING)
    counts = {name: count_cases(name) for name in names}
    results = run.result.setdefault("benchmarks", {})
    record["status"] = PASSED
    for index, name in enumerate(names):
        share = (deadline - time.monotonic()) * counts[name] / sum(counts[later] for later in names[index:])
        output = run.path.with_name(f"{run.path.stem}-{name}.partial.json")
        output.unlink(missing_ok=True)
        seconds = str(max(0.2, share / counts[name] / 6))  # a case: what is left goes to compiling
        options = ["--device", "cuda", "--budget", seconds, "--output", str(output)]
        job = Job([sys.executable, str(BENCHMARKS / f"{name}.py"), *options])
        run_jobs([job], share)
        if output.exists():
            results[name] = json.loads(output.read_text())
            output.unlink()
        record[name] = {"status": verdict([job]), "output": [] if job.status == 0 else job.tail}
        if job.status != 0 and record["status"] != FAILED:
            record["status"] = verdict([job])
        run.save()


def fill_caches(run: Run, names: Sequence[str], seconds: float) -> None:
    """Runs every benchmark for what it compiles. What fails here fails again where it is measured, and says so."""
    outputs = {name: run.path.with_name(f"{run.path.stem}-{name}.compiled.json") for name in names}
    options = ["--device", "cuda", "--budget", "0.01", "--output"]
    run_jobs(
        [Job([sys.executable, str(BENCHMARKS / f"{name}.py"), *options, str(path)]) for name, path in outputs.items()],
        seconds,
    )
    for path in outputs.values():
        path.unlink(missing_ok=True)


def ops_with_benchmark() -> list[str]:
    from kdfast import backends

    triton = [op for op, kernels in backends.KERNELS.items() if backends.TRITON in kernels]
    return [op for op in triton if (BENCHMARKS / f"{op}.py").exists()]


def count_cases(name: str) -> int:
    import torch

    from harness import Options

    return len(importlib.import_module(name).cases(Options(torch.device("cuda"), torch.bfloat16)))


def report(run: Run, record: Record, budget: float) -> None:
    """Markdown and PNG of what is in the file."""
    record["status"] = PASSED  # the summary shows the stage that writes it
    write_summary(run)


def write_summary(run: Run) -> None:
    import gpu_report

    run.path.with_suffix(".md").write_text(gpu_report.markdown(run.result, run.path.stem))
    problem = gpu_report.picture(run.result, run.path.with_suffix(".png"))
    if problem:
        run.result["picture"] = problem


class Stage(NamedTuple):
    function: StageFunction
    budget: float  # seconds
    bit: int  # of the exit code


SECONDS = 510  # of all stages together; what is left of 9 minutes looks for the device
STAGES = {
    "build": Stage(build, 100, 4),
    "parity": Stage(parity, 190, 8),
    "sanitizer": Stage(sanitizer, 80, 16),
    "benchmarks": Stage(benchmarks, 120, 32),
    "report": Stage(report, 20, 64),
}


def chosen(names: Sequence[str], seconds: float = SECONDS) -> dict[str, Stage]:
    """The stages ``names``, with ``seconds`` shared out in proportion to their budgets."""
    share = seconds / sum(STAGES[name].budget for name in names)
    return {name: STAGES[name]._replace(budget=round(share * STAGES[name].budget)) for name in names}


def run_stages(run: Run, stages: dict[str, Stage], device_problem: str | None) -> int:
    """All of ``stages``, whatever becomes of each. Returns the exit code."""
    code = 0
    for name, stage in stages.items():
        begin = time.monotonic()
        record: Record = {"status": "running", "budget": stage.budget}
        run.result["stages"][name] = record
        run.save()
        if device_problem is not None:
            record.update(status=NO_DEVICE, reason=device_problem)
        else:
            try:
                stage.function(run, record, stage.budget)
            except Exception as error:  # the next stage has its chance
                record.update(status=FAILED, reason=f"{type(error).__name__}: {error}")
        record["seconds"] = round(time.monotonic() - begin, 1)
        run.save()
        spent = f"{record['seconds']} of {record['budget']} s"
        print(f"{name}: {record['status']} ({spent}) {record.get('reason', '')}", flush=True)
        if record["status"] in (FAILED, TIMED_OUT):
            code += stage.bit
    return code if device_problem is None else EXIT_NO_DEVICE


LOOK = """
import json, sys
sys.path[:0] = ["benchmarks", "."]
import torch
if not torch.cuda.is_available():
    raise SystemExit("torch.cuda.is_available() is False")
import harness
environment = harness.environment(torch.device("cuda"))
environment["capability"] = torch.cuda.get_device_capability()
environment["memory"] = torch.cuda.get_device_properties(0).total_memory
environment["devices"] = torch.cuda.device_count()
print("environment " + json.dumps(environment))
"""


def look() -> tuple[dict[str, Any], str | None]:
    """The environment with its GPU, or why there is none; asked in a process that ends, as it holds memory there."""
    job = Job([sys.executable, "-c", LOOK])
    run_jobs([job], 30)
    for line in job.lines:
        if line.startswith("environment "):
            return json.loads(line.removeprefix("environment ")), None
    today = datetime.now(timezone.utc).isoformat(timespec="seconds")
    why = "no answer within 30 seconds" if job.status is None else (job.lines or ["no output"])[-1]
    return {"date": today, "gpu": None, "device": "none", "python": sys.version.split()[0]}, why


def start(folder: Path, environment: dict[str, Any]) -> Run:
    """The file of today, with what this commit already found on this card."""
    gpu = "-".join((environment["gpu"] or NO_DEVICE).lower().split())
    path = folder / f"{gpu}-{environment['date'][:10]}.json"
    result: dict[str, Any] = {"environment": environment, "stages": {}, "benchmarks": {}}
    if path.exists():
        old = json.loads(path.read_text())
        if all(old["environment"].get(key) == environment.get(key) for key in ("commit", "gpu")):
            result["stages"], result["benchmarks"] = old["stages"], old["benchmarks"]
    return Run(path, result)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stages", nargs="*", metavar="stage", help=f"of {', '.join(STAGES)}; default: all")
    parser.add_argument(
        "--seconds", type=float, default=SECONDS, help="for all of them together (default: %(default)s)"
    )
    options = parser.parse_args(arguments)
    names = options.stages or list(STAGES)
    if unknown := [name for name in names if name not in STAGES]:
        parser.error(f"unknown stage {', '.join(unknown)}; there are {', '.join(STAGES)}")
    environment, problem = look()
    folder = Path(os.environ.get("KDFAST_GPU_RESULTS", RESULTS))
    if problem is not None and "KDFAST_GPU_RESULTS" not in os.environ:
        folder = ROOT / "build"  # nothing was measured: not among the results
    run = start(folder, environment)
    code = run_stages(run, chosen(names, options.seconds), problem)
    if problem is not None:
        write_summary(run)
    print(f"Written: {run.path}", flush=True)
    return code


if __name__ == "__main__":
    raise SystemExit(main())
