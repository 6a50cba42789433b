"""The result of a GPU run (benchmarks/gpu.py) as Markdown, for its summary and the README, and as a picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import tables

Result = dict[str, Any]


def markdown(result: Result, title: str) -> str:
    """The whole summary."""
    parts = [f"# {title}", description(result), stage_table(result), *failures(result)]
    parts += [f"## {op}\n\n{tables.markdown(*tables.summary(measured))}" for op, measured in benchmarks(result).items()]
    return "\n\n".join(parts) + "\n"


def description(result: Result) -> str:
    env = result["environment"]
    if not env["gpu"]:
        return f"No CUDA device, {env['date'][:10]}: nothing was built, proven or measured."
    versions = ", ".join(f"{name} {version}" for name, version in env["versions"].items() if version)
    changes = " with changes" if env["dirty"] else ""
    return f"{env['gpu']}, driver {env['driver']}; {versions}; {env['date'][:10]}, commit {env['commit']}{changes}."


def stage_table(result: Result) -> str:
    rows = [[name, record["status"], details(name, record)] for name, record in result["stages"].items()]
    return tables.markdown(["stage", "result", "what"], rows)


def details(name: str, record: Result) -> str:
    """Half a line on what a stage did."""
    if "reason" in record:
        return record["reason"]
    if name == "build":
        return f"for {record['architecture']}"
    if name == "parity":
        counts = f"{record['passed']} tests passed, {len(record['failed'])} failed, {len(record['skipped'])} skipped"
        unfinished = record.get("processes out of time", 0)
        return counts + (f", {unfinished} of the processes did not finish" if unfinished else "")
    if name in ("sanitizer", "benchmarks"):
        parts = [f"{key} {value['status']}" for key, value in record.items() if isinstance(value, dict)]
        return ", ".join(parts)
    return ""


def failures(result: Result) -> list[str]:
    """What failed and what was skipped, by name: a summary that only counts hides both."""
    parity = result["stages"].get("parity", {})
    parts = []
    if parity.get("failed"):
        parts.append("Failed:\n\n" + "\n".join(f"- `{test}`" for test in parity["failed"]))
    if parity.get("skipped"):
        reasons: dict[str, int] = {}
        for reason in parity["skipped"].values():
            reasons[reason] = reasons.get(reason, 0) + 1
        parts.append("Skipped:\n\n" + "\n".join(f"- {count} tests: {reason}" for reason, count in reasons.items()))
    return parts


def benchmarks(result: Result) -> dict[str, Result]:
    """Those with a case measured to its end."""
    return {op: measured for op, measured in result.get("benchmarks", {}).items() if measured["cases"]}


def picture(result: Result, path: Path) -> str | None:
    """Time of each candidate over kdfast's, one bar each. Returns why there is no picture, or None."""
    bars = [
        (f"{op}: {record['name']} {tables.shape(record)}, {column}", ratio)
        for op, measured in benchmarks(result).items()
        for record in measured["cases"]
        for column, ratio in record["speedup"]["kdfast"].items()
    ]
    if not bars:
        return "nothing was measured"
    try:
        import matplotlib
    except ImportError:
        return "matplotlib is not installed: `make gpu STAGES=report` draws it where it is"
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(9, 1 + 0.28 * len(bars)), layout="constrained")
    labels, ratios = zip(*reversed(bars), strict=True)
    drawn = axes.barh(labels, ratios, color=["#2a7f62" if ratio >= 1 else "#b3423a" for ratio in ratios])
    axes.bar_label(drawn, fmt="%.1fx", padding=3)
    axes.axvline(1, color="black", linewidth=1)
    axes.set_xscale("log")
    axes.set_xlabel("time of the alternative over time of kdfast, forward and backward")
    axes.set_title(result["environment"]["gpu"])
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
    return None
