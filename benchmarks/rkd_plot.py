"""Draws time and peak memory of RKD against the number of rows, log-log, from a result file of benchmarks/rkd.py.

``python benchmarks/rkd_plot.py benchmarks/results/<machine>-rkd.json`` writes ``<machine>-rkd.png`` beside it.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

NAME = "RKD"
Curve = list[tuple[int, float]]


def curves(result: dict[str, Any], of: str) -> dict[str, Curve]:
    """Candidate -> (N, value) by N, with the default allocator. ``of``: 'seconds' (medians) or 'peak_bytes'."""
    found: dict[str, Curve] = {}
    for record in result["cases"]:
        if record["name"] != NAME or record["allocator"] != "default":
            continue
        for candidate in record["peak_bytes"]:
            value = record[of][candidate]
            value = value["p50"] if of == "seconds" else value
            if value:
                found.setdefault(candidate, []).append((record["shape"][0], value))
    return {candidate: sorted(points) for candidate, points in found.items()}


def draw(result: dict[str, Any], path: Path) -> None:
    width = next(record["shape"][1] for record in result["cases"] if record["name"] == NAME)
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.5))
    panels = (("seconds", "time, s", 1.0), ("peak_bytes", "peak extra memory, MiB", 2**20))
    for axis, (of, label, unit) in zip(axes, panels, strict=True):
        for candidate, points in curves(result, of).items():
            line = {"linewidth": 2.5, "color": "black"} if candidate == "kdfast" else {}
            axis.plot(
                *zip(*((n, value / unit) for n, value in points), strict=True), marker="o", label=candidate, **line
            )
        axis.set(xscale="log", yscale="log", xlabel="rows N", ylabel=label)
        axis.set_xscale("log", base=2)
        axis.grid(True, which="major", alpha=0.3)
    axes[0].legend(fontsize="small")
    env = result["environment"]
    chip = env["gpu"] or f"{env['processor']}, {env['threads']} threads"
    figure.suptitle(
        f"RKD, forward + backward, N x {width}: {chip}; {env['date'][:10]}, commit {env['commit']}", fontsize=9
    )
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("result", type=Path)
    parser.add_argument("--output", type=Path, help="default: the result's name with .png")
    options = parser.parse_args()
    draw(json.loads(options.result.read_text()), options.output or options.result.with_suffix(".png"))


if __name__ == "__main__":
    main()
