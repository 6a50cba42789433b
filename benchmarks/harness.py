"""The one harness of all benchmarks: parity first, then interleaved times and peak memory of every candidate.

A benchmark describes its cases and calls :func:`main`. On the CPU they run in a fresh process with PyTorch's default
allocator and in another with ``THP_MEM_ALLOC_ENABLE=1`` (huge pages for every candidate): page faults of fresh memory
are a large part of what is measured. Within a case the candidates take turns in random order, so that a
machine that slows down slows all of them. Nothing is measured where a candidate disagrees with the float64 reference.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import tables

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
sys.path[:0] = [str(ROOT / "tests"), str(ROOT)]  # this tree's kdfast, also where it is not installed

import kdfast  # noqa: E402
from support import assert_within_rule  # noqa: E402  (the rule for errors is written once, beside the tests)

Loss = Callable[..., Tensor]
Step = Callable[[], tuple[Tensor, tuple[Tensor, ...]]]

HUGE_PAGES = "THP_MEM_ALLOC_ENABLE"
ALLOCATORS = {"default": None, "huge pages": "1"}  # name -> value of that variable
MIN_ROUNDS, MAX_ROUNDS = 5, 300
BUDGET = 6.0  # seconds to measure a case, where its script has no other
SAMPLE_SECONDS = 0.01  # a sample repeats a short step this long, so that what ran before it cools nothing it needs
SLOW_SECONDS, SLOW_ROUNDS = 0.8, 2  # one call of a slow candidate takes that long or more: it is measured in few rounds
PACKAGES = ("kdfast", "torch", "triton", "liger-kernel", "speculators", "fast-llm")  # whose versions matter
UNMEASURED = (":!benchmarks/results", ":!README.md")  # files whose changes no measurement sees
L2_FLUSH_BYTES = 256 * 2**20  # larger than the cache of any GPU


class ParityError(AssertionError):
    """A candidate computes something else, so its speed means nothing."""


@dataclass(frozen=True)
class Case:
    """One loss at one shape. A candidate is a :func:`step`: forward and backward on inputs prepared beforehand."""

    name: str
    shape: tuple[int, ...]
    inputs: dict[str, Tensor]  # by argument name; those that require a gradient get one
    reference: Loss  # takes ``inputs``; in float64 it is the truth, of rows ``sampled`` where those are given
    candidates: dict[str, Step]
    baselines: dict[str, tuple[str, ...]]  # column -> candidates; the fastest of them is what ours is compared with
    floors: dict[str, Callable[[], object]]  # what no implementation can be faster than, timed in the same rounds
    floor_bytes: int  # what has to be read and written at least
    ours: tuple[str, ...] = ("kdfast",)
    # Other libraries, and of our own what has not been proven yet: one that is wrong or fails is left out, and why is
    # written down.
    peers: frozenset[str] = frozenset()
    term_size: float = 1.0  # size of the summed terms of the value, where they may cancel
    sampled: Tensor | None = None  # rows of the value that are checked, where the truth of all takes too long
    matrix_bytes: int | None = None  # of one N x N matrix, where that is what a loss may or may not hold
    needs_bytes: dict[str, int] = field(default_factory=dict)  # column -> memory it would take, where none is measured


@dataclass
class Options:
    """What a benchmark's ``cases`` are built for."""

    device: torch.device
    dtype: torch.dtype
    shapes: list[tuple[int, ...]] = field(default_factory=list)  # empty: all
    quick: bool = False


def step(loss: Loss, inputs: dict[str, Tensor]) -> Step:
    """Forward and backward of ``loss(**inputs)``; the gradient goes to the caller, as to a layer below.

    Where no input requires a gradient it is the forward alone.
    """
    leaves = [tensor for tensor in inputs.values() if tensor.requires_grad]

    def run() -> tuple[Tensor, tuple[Tensor, ...]]:
        value = loss(**inputs)
        return value, torch.autograd.grad(value, leaves) if leaves else ()

    return run


def fresh(inputs: dict[str, Tensor], dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """Copies of ``inputs``, the floating ones in ``dtype``."""
    return {
        name: tensor.detach()
        .to(dtype if tensor.is_floating_point() else None, copy=True)
        .requires_grad_(tensor.requires_grad)
        for name, tensor in inputs.items()
    }


def measured(inputs: dict[str, Tensor]) -> Tensor:
    """The input whose dtype and device are the case's: the first that gets a gradient, or the first."""
    return next((tensor for tensor in inputs.values() if tensor.requires_grad), next(iter(inputs.values())))


def check(case: Case) -> dict[str, str]:
    """Value and gradients of each candidate's first call against float64. Returns the peers that failed, and why."""
    truth = step(case.reference, fresh(case.inputs, torch.float64))()
    plain = step(case.reference, case.inputs)()
    names = [name for name, tensor in case.inputs.items() if tensor.requires_grad]
    first = measured(case.inputs)
    refused = {}
    for candidate, run in case.candidates.items():
        try:
            value, gradients = run()
        except Exception as error:  # a kernel of another library may not compile here, or not fit
            if candidate not in case.peers:
                raise
            refused[candidate] = f"{type(error).__name__}: {error}"
            continue
        try:
            value = value if case.sampled is None else value[case.sampled]
            rule = first.dtype, max(tensor.numel() for tensor in case.inputs.values())
            assert_within_rule("value", value.detach(), plain[0].detach(), truth[0].detach(), *rule, case.term_size)
            for name, *tensors in zip(names, gradients, plain[1], truth[1], strict=True):
                assert_within_rule(f"gradient of {name}", *tensors, *rule)
        except AssertionError as error:
            if candidate not in case.peers:
                shape = "x".join(map(str, case.shape))
                raise ParityError(f"nothing is measured, {case.name} {shape}, {candidate}: {error}") from None
            refused[candidate] = str(error)
    return refused


def seconds(run: Callable[[], object], calls: int, flush: Tensor | None, cuda: bool) -> float:
    """Time of one call. With ``flush`` the device's own time, from a cold L2; else the host's, over ``calls`` calls."""
    if flush is not None:
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize()
        flush.zero_()
        start.record()
        run()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end) / 1000
    if cuda:
        torch.cuda.synchronize()
    begin = time.perf_counter()
    for _ in range(calls):
        run()
    if cuda:
        torch.cuda.synchronize()
    return (time.perf_counter() - begin) / calls


def interleaved(
    runs: dict[str, Callable[[], object]], budget: float, device: torch.device, size: int
) -> dict[str, list[float]]:
    """Samples of every run, in rounds of random order, for about ``budget`` seconds. ``size``: bytes a run touches.

    A slow run takes part in the first rounds alone.
    """
    cuda = device.type == "cuda"
    # What is bound by launches is timed by the host's clock: behind a flush the launches would hide.
    flush = torch.empty(L2_FLUSH_BYTES, dtype=torch.int8, device=device) if cuda and size > 8 * 2**20 else None
    calls, slow = {}, set()
    for name, run in runs.items():
        once = seconds(run, 1, flush, cuda)
        if once < SLOW_SECONDS:  # else the first call has said enough
            once = seconds(run, 1, flush, cuda)
        calls[name] = max(1, round(SAMPLE_SECONDS / once))
        if calls[name] > 1:  # one call alone takes longer than one of many
            calls[name] = max(1, round(SAMPLE_SECONDS / seconds(run, calls[name], flush, cuda)))
        if once >= SLOW_SECONDS:
            slow.add(name)
    samples: dict[str, list[float]] = {name: [] for name in runs}
    order, shuffle = list(runs), random.Random(0).shuffle
    gc.collect()
    gc.disable()
    try:
        deadline = time.perf_counter() + budget
        for done in range(MAX_ROUNDS):
            if done >= MIN_ROUNDS and time.perf_counter() > deadline:
                break
            shuffle(order)
            for name in order:
                if name in slow and done >= SLOW_ROUNDS:
                    continue
                samples[name].append(seconds(runs[name], calls[name], flush, cuda))
    finally:
        gc.enable()
    return samples


def summary(samples: list[float]) -> dict[str, float]:
    p20, p50, p80 = (statistics.quantiles(samples, n=10, method="inclusive")[i] for i in (1, 4, 7))
    return {"p20": p20, "p50": p50, "p80": p80, "samples": len(samples)}


def peak_bytes(run: Callable[[], object], device: torch.device) -> int | None:
    """The most memory one call holds above what was held before it, its result included. None where nobody counts."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return torch.cuda.max_memory_allocated() - before
    if not Path("/proc/self/clear_refs").exists():
        return None
    # Pages a freed buffer left behind, in malloc or in a pool, would be reused without being seen.
    kdfast.empty_cache()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # 5: the high-water mark starts again at what is resident now
    before = _status("VmRSS")
    run()
    return max(0, _status("VmHWM") - before)


def _status(key: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key + ":"))
    return int(line.split()[1]) * 1024


def compare(p50: dict[str, float], case: Case) -> dict[str, Any]:
    """For each of our candidates: how many times faster than each baseline's best, and its time over each floor's."""
    fastest = {}
    for column, group in case.baselines.items():
        present = [name for name in group if name in p50]
        if present:
            fastest[column] = min(present, key=p50.__getitem__)
    ours = [name for name in case.ours if name in p50]
    return {
        "fastest": fastest,
        "speedup": {o: {column: p50[name] / p50[o] for column, name in fastest.items()} for o in ours},
        "over_floor": {o: {floor: p50[o] / p50[floor] for floor in case.floors} for o in ours},
    }


def measure(case: Case, budget: float) -> dict[str, Any]:
    """The record of one case, as the result file holds it."""
    refused = check(case)
    tensor = measured(case.inputs)
    runs = {name: run for name, run in case.candidates.items() if name not in refused}
    samples = interleaved({**runs, **case.floors}, budget, tensor.device, case.floor_bytes)
    times = {name: summary(values) for name, values in samples.items()}
    return {
        "name": case.name,
        "shape": list(case.shape),
        "dtype": str(tensor.dtype).removeprefix("torch."),
        "floor_bytes": case.floor_bytes,
        "seconds": times,
        "peak_bytes": {name: peak_bytes(run, tensor.device) for name, run in runs.items()},
        "refused": refused,
        "matrix_bytes": case.matrix_bytes,
        "needs_bytes": case.needs_bytes,
        **compare({name: time["p50"] for name, time in times.items()}, case),
    }


def environment(device: torch.device) -> dict[str, Any]:
    """Machine, versions and commit: everything needed to read the numbers later."""
    cuda = device.type == "cuda"
    thp = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    named = os.environ.get("KDFAST_COMMIT")  # of a copy, whose git knows another or none
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": named or _output("git", "rev-parse", "--short", "HEAD"),
        "dirty": named is None and bool(_output("git", "status", "--porcelain", "--", ".", *UNMEASURED)),
        "device": device.type,
        "processor": _processor(),
        "threads": torch.get_num_threads(),
        "cpu_level": kdfast.backends.cpu_level(),
        "gpu": torch.cuda.get_device_name(device) if cuda else None,
        "driver": _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader") if cuda else None,
        "cuda": torch.version.cuda,
        "transparent_hugepage": thp.read_text().strip() if thp.exists() else None,
        "versions": {name: _version(name) for name in PACKAGES},
    }


def machine(env: dict[str, Any]) -> str:
    """The machine's part of the result file's name."""
    if env["gpu"]:
        return "-".join(env["gpu"].lower().split())
    return f"cpu-{env['threads']}core-{env['cpu_level'] or 'reference'}"


def _output(*command: str) -> str | None:
    try:
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def _processor() -> str | None:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), None)


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def parse(arguments: Sequence[str], budget: float = BUDGET) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few shapes, short: whether it works, not how fast it is")
    parser.add_argument("--shapes", nargs="+", type=_shape, default=[], metavar="ROWSxCLASSES", help="only these")
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"), help="cpu or cuda")
    parser.add_argument("--dtype", help="default: float32 on the CPU, bfloat16 on a GPU")
    parser.add_argument("--budget", type=float, help="seconds to measure each case (default: the script's, or 0.5)")
    parser.add_argument("--output", type=Path, help="result file; the default takes whole runs only")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    options.dtype = getattr(torch, options.dtype or ("float32" if options.device.type == "cpu" else "bfloat16"))
    options.budget = options.budget or (0.5 if options.quick else budget)
    return options


def _shape(text: str) -> tuple[int, ...]:
    return tuple(int(size) for size in text.split("x"))


def measured_here(builders: list[Callable[[], Case]], budget: float) -> Iterator[dict[str, Any]]:
    """Records of this process, with the allocator that it has."""
    value = os.environ.get(HUGE_PAGES)
    name = next((name for name, variable in ALLOCATORS.items() if variable == value), "default")
    for build in builders:
        try:
            yield {"allocator": name, HUGE_PAGES: value, **measure(build(), budget)}
        except ParityError as error:
            raise SystemExit(str(error)) from None
        torch.compiler.reset()


def run_workers(command: list[str], allocators: dict[str, str | None]) -> Iterator[dict[str, Any]]:
    """Records of one process per allocator, as they come."""
    for name, value in allocators.items():
        variables = {key: text for key, text in os.environ.items() if key != HUGE_PAGES}
        if value is not None:
            variables[HUGE_PAGES] = value
        with subprocess.Popen(command, env=variables, stdout=subprocess.PIPE, text=True) as process:
            for line in process.stdout or ():
                if line.startswith("{"):
                    yield json.loads(line)
        if process.returncode != 0:
            raise SystemExit(f"the measurement with {name} allocation failed; nothing is saved")


def main(script: str, cases: Callable[[Options], list[Callable[[], Case]]], budget: float = BUDGET) -> None:
    """Command line of the benchmark in file ``script``; ``cases`` lists how to build each, one at a time.

    ``budget``: seconds to measure each case, where the command line does not say.
    """
    arguments, op = sys.argv[1:], Path(script).stem
    options = parse(arguments, budget)
    builders = cases(Options(options.device, options.dtype, options.shapes, options.quick))
    if options.worker:
        for record in measured_here(builders, options.budget):
            print(json.dumps(record), flush=True)
        return
    huge_pages_matter = options.device.type == "cpu" and not options.quick
    allocators = ALLOCATORS if huge_pages_matter else {"default": None}
    result: dict[str, Any] = {"op": op, "environment": environment(options.device), "cases": []}
    with progress(op, len(builders) * len(allocators)) as advance:
        command = [sys.executable, script, *arguments, "--worker"]
        alone = options.device.type == "cuda"  # no other allocator: this process will do
        for record in measured_here(builders, options.budget) if alone else run_workers(command, allocators):
            result["cases"].append(record)
            advance(f"{op}: {record['name']} {tables.shape(record)}")
            if options.output is not None:  # as it happens: whoever stops the run keeps what is measured
                save(result, options.output)
    tables.show(f"{op}: all candidates", *tables.candidates(result))
    tables.show(f"{op}: kdfast", *tables.summary(result))
    path = options.output
    if path is None and not options.quick and not options.shapes:
        path = RESULTS / f"{machine(result['environment'])}-{op}.json"
    if path is not None:
        save(result, path)
        print(f"Written: {path}")


def milliseconds(run: Callable[[], object]) -> float:
    """What a kernel alone takes on a GPU."""
    from triton.testing import do_bench

    return float(do_bench(run, warmup=4, rep=14, return_mode="median"))


def main_of_kernels(script: str, description: str | None, measure: Callable[[], Iterator[dict[str, Any]]]) -> None:
    """Command line of ``script``, which measures kernels alone on a GPU: saves all that ``measure`` has each time."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("there is no CUDA device")
    result = environment(torch.device("cuda"))
    path = options.output or RESULTS / f"{machine(result)}-{Path(script).stem.replace('_', '-')}.json"
    for found in measure():
        save({"environment": result, **found}, path)
        print(f"Written: {path}", flush=True)


def save(result: dict[str, Any], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n")


@contextmanager
def progress(title: str, total: int) -> Iterator[Callable[[str], None]]:
    """A bar on the terminal; a line a step where rich is not installed."""
    try:
        from rich.progress import Progress
    except ImportError:
        yield lambda text: print(text, flush=True)
        return
    with Progress() as bar:
        task = bar.add_task(title, total=total)
        yield lambda text: bar.update(task, advance=1, description=text)
