"""The record of what every kernel needs of a GPU: registers, spills, shared memory. In resources/<op>.txt the Triton
kernels of an op, in resources/cuda_<name>.txt those of csrc/cuda/<name>.cu.

``python tests/ops/resources.py [op or cuda_<name> ...]`` compiles for every target, no GPU needed, and writes it anew.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path

if __name__ == "__main__":  # run as a script: what pytest puts on the path
    sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parents[2])]

from cuda_sources import ARCHITECTURES, NVCC, SOURCES, kernels_of
from kernels import OPS, every_build
from triton_support import TARGETS, Build, Resources, compile_all

FOLDER = Path(__file__).parent / "resources"
HEADER = (
    "# triton {triton}; each cell: registers a thread, spills, bytes of shared memory. Written by `make resources`."
)
Numbers = tuple[int, int, int]
Record = dict[str, dict[str, Numbers]]  # build without its target -> target -> numbers


def label(build: Build) -> str:
    """A build's name without its target."""
    assert build.name.startswith(build.target + " "), f"the name of a build begins with its target: {build.name}"
    return build.name.removeprefix(build.target + " ")


def numbers(resources: Resources) -> Numbers:
    return resources.registers, resources.spills, resources.shared


def record_of(builds: list[Build], compiled: Mapping[str, Resources]) -> Record:
    record: Record = {}
    for build in builds:
        record.setdefault(label(build), {})[build.target] = numbers(compiled[build.name])
    return record


def to_text(record: Record) -> str:
    width = max(map(len, record))
    rows = [["build".ljust(width), *(target.ljust(13) for target in TARGETS)]]
    for name, targets in record.items():
        cells = [" ".join(map(str, targets[target])) if target in targets else "-" for target in TARGETS]
        rows.append([name.ljust(width), *(cell.ljust(13) for cell in cells)])
    lines = [HEADER.format(triton=version("triton")), *("  ".join(row).rstrip() for row in rows)]
    return "\n".join(lines) + "\n"


def from_text(text: str) -> Record:
    _, header, *lines = text.splitlines()
    starts = [0, *(header.index(f"  {target}") + 2 for target in TARGETS)]
    record: Record = {}
    for line in lines:
        name, *cells = (line[a:b].strip() for a, b in zip(starts, [*starts[1:], None], strict=True))
        record[name] = {
            target: tuple(map(int, cell.split()))  # type: ignore[misc]
            for target, cell in zip(TARGETS, cells, strict=True)
            if cell != "-"
        }
    return record


def path_of(name: str) -> Path:
    return FOLDER / f"{name}.txt"


def read(name: str) -> Record:
    return from_text(path_of(name).read_text())


def compare(old: Record, new: Record) -> tuple[list[str], list[str]]:
    """What is worse (more spills, or not in the record), and what merely changed."""
    worse, changed = [], []
    for name, targets in new.items():
        for target, now in targets.items():
            before = old.get(name, {}).get(target)
            if before is None:
                worse.append(f"{target} {name}: not in the record")
            elif now != before:
                text = ", ".join(
                    f"{what} {a} -> {b}"
                    for what, a, b in zip(("registers", "spills", "shared"), before, now, strict=True)
                    if a != b
                )
                (worse if now[1] > before[1] else changed).append(f"{target} {name}: {text}")
    return worse, changed


def write(name: str) -> None:
    record: Record = {}
    if name.startswith("cuda_"):
        for target in ARCHITECTURES:
            for kernel, needs in kernels_of(SOURCES[name.removeprefix("cuda_")], target).items():
                record.setdefault(kernel, {})[target] = needs
    else:
        builds = every_build(name)
        record = record_of(builds, compile_all(builds))
    FOLDER.mkdir(exist_ok=True)
    path_of(name).write_text(to_text(record))
    print(path_of(name))


if __name__ == "__main__":
    for name in sys.argv[1:] or [*OPS, *(f"cuda_{name}" for name in SOURCES if NVCC)]:
        write(name)
