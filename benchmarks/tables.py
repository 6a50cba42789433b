"""A result file as tables, for the terminal and for the README.

Ratios: milliseconds are in the file. Our own time is in the table of a GPU, which has a name, and of losses on all
pairs of N rows, whose time and memory are looked at against N; these have the share of an N x N matrix as well.
"""

from __future__ import annotations

from textwrap import shorten
from typing import Any

try:
    from rich import console, table
except ImportError:  # a GPU machine that has what `make gpu` needs and no more
    console = table = None  # type: ignore[assignment]

Result = dict[str, Any]
Rows = tuple[list[str], list[list[str]]]


def summary(result: Result) -> Rows:
    """One row for each of our variants of a case: speedup over each baseline, time over the floor, peak memory."""
    allocators = _allocators(result)
    columns = list(dict.fromkeys(column for record in result["cases"] for column in record["fastest"]))
    pairs = any(record.get("matrix_bytes") for record in result["cases"])
    timed = pairs or result["environment"]["device"] == "cuda"
    headers = ["loss", "shape", "type", *(["kdfast's time"] if timed else [])]
    for allocator in allocators:
        suffix = "" if allocator == "default" else f", {allocator}"
        headers += [f"vs {column}{suffix}" for column in columns] + [f"time over floor{suffix}"]
    headers.append("peak extra MiB: " + " / ".join(["kdfast", *columns]))
    headers += ["kdfast's memory / N x N matrix"] if pairs else []
    rows = []
    for records in _by_case(result).values():
        record = records[allocators[0]]
        for ours in record["speedup"]:
            row = [record["name"] + ours.removeprefix("kdfast"), shape(record), record["dtype"]]
            row += [f"{record['seconds'][ours]['p50'] * 1e3:.3g} ms"] if timed else []
            for allocator in allocators:
                measured = records[allocator]
                row += [_times(measured, ours, column) for column in columns]
                row.append(_over_floor(measured, ours))
            peaks = record["peak_bytes"]
            best = [min(_memory(peaks, record, column), default=None) for column in columns]
            row.append(" / ".join(_mebibytes(peak) for peak in (peaks[ours], *best)))
            row += [_share(peaks[ours], record["matrix_bytes"])] if pairs else []
            rows.append(row)
    return headers, rows


def candidates(result: Result) -> Rows:
    """One row for each candidate and floor of a case: its time in units of kdfast's, and its peak memory."""
    allocators = _allocators(result)
    headers = [
        "loss",
        "shape",
        "candidate",
        *(f"time / kdfast's, p20 to p80 ({allocator})" for allocator in allocators),
    ]
    rows = []
    for records in _by_case(result).values():
        first = records[allocators[0]]
        for name in first["seconds"]:
            row = [first["name"], shape(first), name]
            for allocator in allocators:
                seconds = records[allocator]["seconds"]
                p20, p50, p80 = (seconds[name][p] / seconds["kdfast"]["p50"] for p in ("p20", "p50", "p80"))
                row.append(f"{p50:.2f} ({p20:.2f} to {p80:.2f})")
            rows.append([*row, _mebibytes(first["peak_bytes"].get(name))])
        rows += [
            [first["name"], shape(first), name, *(f"left out: {shorten(reason, 60)}" for _ in allocators), ""]
            for name, reason in first["refused"].items()
        ]
        rows += [
            [first["name"], shape(first), name, *(f"needs {_gigabytes(count)}" for _ in allocators), ""]
            for name, count in first.get("needs_bytes", {}).items()
        ]
    return [*headers, "peak extra MiB"], rows


def shape(record: Result) -> str:
    return "x".join(map(str, record["shape"]))


def show(title: str, headers: list[str], rows: list[list[str]]) -> None:
    """A table on the terminal, plainer where rich is not installed."""
    if table is None:
        print(f"{title}\n{markdown(headers, rows)}", flush=True)
        return
    shown = table.Table(title=title)
    for header in headers:
        shown.add_column(header)
    for row in rows:
        shown.add_row(*row)
    terminal = console.Console()
    # In a file, as wide as it takes: folded cells cannot be read.
    (terminal if terminal.is_terminal else console.Console(width=250)).print(shown)


def markdown(headers: list[str], rows: list[list[str]]) -> str:
    lines = [headers, ["---"] * len(headers), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _allocators(result: Result) -> list[str]:
    return list(dict.fromkeys(record["allocator"] for record in result["cases"]))


def _by_case(result: Result) -> dict[tuple[object, ...], dict[str, Result]]:
    cases: dict[tuple[object, ...], dict[str, Result]] = {}
    for record in result["cases"]:
        key = (record["name"], *record["shape"], record["dtype"])
        cases.setdefault(key, {})[record["allocator"]] = record
    return cases


def _memory(peaks: dict[str, int | None], record: Result, column: str) -> list[int]:
    """Of the baseline's fastest candidate, the one the speedup is against."""
    peak = peaks.get(record["fastest"].get(column))
    return [] if peak is None else [peak]


def _over_floor(record: Result, ours: str) -> str:
    """Over the floor that binds at this shape: the slowest of them."""
    floors = record["over_floor"][ours]
    if not floors:
        return ""
    name = min(floors, key=floors.__getitem__)
    return f"{floors[name]:.2f} ({name})"


def _times(record: Result, ours: str, column: str) -> str:
    ratio, needed = record["speedup"][ours].get(column), record.get("needs_bytes", {}).get(column)
    if ratio is None:
        return "" if needed is None else f"needs {_gigabytes(needed)}"
    return f"{ratio:.1f}x"


def _share(peak: int | None, matrix: int) -> str:
    return "-" if peak is None else f"{100 * peak / matrix:.1f} %"


def _gigabytes(count: int) -> str:
    return f"{count / 1e9:.0f} GB"


def _mebibytes(count: int | None) -> str:
    if count is None:
        return "-"
    return "< 1" if count < 2**20 else f"{count / 2**20:.0f}"
