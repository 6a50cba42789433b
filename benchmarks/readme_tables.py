"""Writes the README's benchmark tables from the newest result files; ``--check`` only says whether they are current.

The table of op ``kl`` stands between ``<!-- benchmarks:kl -->`` and ``<!-- /benchmarks:kl -->``; what the newest run of
`make gpu` found, between ``<!-- gpu -->`` and ``<!-- /gpu -->``.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gpu_report
import tables

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
RESULTS = ROOT / "benchmarks" / "results"
DEVICES = {"cpu": "CPU", "cuda": "GPU"}
BLOCK = re.compile(r"(<!-- benchmarks:(\w+) -->\n).*?(<!-- /benchmarks:\2 -->)", re.DOTALL)
GPU_BLOCK = re.compile(r"(<!-- gpu -->\n).*?(<!-- /gpu -->)", re.DOTALL)


def updated(readme: str, results: Path) -> str:
    """``readme`` with every table written anew."""
    readme = GPU_BLOCK.sub(lambda block: block[1] + gpu_section(results) + block[2], readme)
    return BLOCK.sub(lambda block: block[1] + section(block[2], results) + block[3], readme)


def section(op: str, results: Path) -> str:
    """What stands between the markers of ``op``: a table for each kind of device, or that there is none."""
    return "\n".join(device_section(op, device, results) for device in DEVICES)


def device_section(op: str, device: str, results: Path) -> str:
    found = newest(op, device, results)
    if found is None:
        alone = device == "cuda" and newest(f"{op}-kernels", device, results) is not None
        elsewhere = " as a whole; its kernels alone: [docs/gpu.md](docs/gpu.md)" if alone else ""
        return f"**{DEVICES[device]}**: not yet measured{elsewhere}.\n"
    path, result = found
    return (
        f"**{DEVICES[device]}**: {description(result['environment'])}. "
        f"Raw times: [{path.name}](benchmarks/results/{path.name}).\n\n{tables.markdown(*tables.summary(result))}\n"
    )


def gpu_section(results: Path) -> str:
    """What the newest run on a GPU built, proved and measured, or that there was none."""
    run = max(gpu_runs(results), key=lambda pair: pair[1]["environment"]["date"], default=None)
    if run is None:
        return "**GPU**: not yet measured. No result file of `make gpu` is in `benchmarks/results`.\n"
    path, result = run
    raw = f"[{path.name}](benchmarks/results/{path.name})"
    parts = [f"{gpu_report.description(result)} Everything: {raw}.", gpu_report.stage_table(result)]
    parts += [
        f"`{op}`\n\n{tables.markdown(*tables.summary(measured))}"
        for op, measured in gpu_report.benchmarks(result).items()
    ]
    return "\n\n".join(parts) + "\n"


def gpu_runs(results: Path) -> list[tuple[Path, dict[str, Any]]]:
    """Result files of `make gpu`."""
    found = [(path, json.loads(path.read_text())) for path in sorted(results.glob("*.json"))]
    return [(path, result) for path, result in found if "stages" in result and result["environment"]["gpu"]]


def newest(op: str, device: str, results: Path) -> tuple[Path, dict[str, Any]] | None:
    found = [(path, json.loads(path.read_text())) for path in sorted(results.glob(f"*-{op}.json"))]
    found = [(path, result) for path, result in found if result["environment"]["device"] == device]
    if device == "cuda":
        runs = ((path, gpu_report.benchmarks(run)) for path, run in gpu_runs(results))
        found += [(path, measured[op]) for path, measured in runs if op in measured]
    return max(found, key=lambda pair: pair[1]["environment"]["date"], default=None)


def description(env: dict[str, Any]) -> str:
    """Machine, versions, day and commit in half a line."""
    chip = env["gpu"] or f"{env['processor']}, {env['threads']} threads, {env['cpu_level'] or 'no kernels'}"
    state = f"commit {env['commit']}" + (" with changes" if env["dirty"] else "")
    return f"{chip}; torch {env['versions']['torch']}; {env['date'][:10]}, {state}"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if the README is not current")
    parser.add_argument("--readme", type=Path, default=README)
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args(arguments)
    text = options.readme.read_text()
    current = updated(text, options.results)
    if options.check:
        if current != text:
            print(f"{options.readme} is not what the result files say: run python benchmarks/readme_tables.py")
        return int(current != text)
    options.readme.write_text(current)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
