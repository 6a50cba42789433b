"""A result file as tables, for the terminal and for the README. Ratios only: milliseconds are in the file."""

from __future__ import annotations

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
    headers = ["loss", "shape", "type"]
    for allocator in allocators:
        suffix = "" if allocator == "default" else f", {allocator}"
        headers += [f"vs {column}{suffix}" for column in columns] + [f"time over floor{suffix}"]
    headers.append("peak extra MiB: " + " / ".join(["kdfast", *columns]))
    rows = []
    for records in _by_case(result).values():
        record = records[allocators[0]]
        for ours in record["speedup"]:
            row = [record["name"] + ours.removeprefix("kdfast"), shape(record), record["dtype"]]
            for allocator in allocators:
                measured = records[allocator]
                row += [_times(measured["speedup"][ours].get(column)) for column in columns]
                row.append(_over_floor(measured, ours))
            peaks = record["peak_bytes"]
            best = [min(_memory(peaks, record, column), default=None) for column in columns]
            row.append(" / ".join(_mebibytes(peak) for peak in (peaks[ours], *best)))
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
            [first["name"], shape(first), name, *("left out: wrong" for _ in allocators), ""]
            for name in first["refused"]
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
    console.Console().print(shown)


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
    name = min(floors, key=floors.__getitem__)
    return f"{floors[name]:.2f} ({name})"


def _times(ratio: float | None) -> str:
    return "" if ratio is None else f"{ratio:.1f}x"


def _mebibytes(count: int | None) -> str:
    if count is None:
        return "-"
    return "< 1" if count < 2**20 else f"{count / 2**20:.0f}"
