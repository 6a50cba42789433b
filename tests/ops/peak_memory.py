"""Peak memory of one forward and backward, in a process of its own: what earlier tests freed decides what malloc takes.

``python tests/ops/peak_memory.py FUNCTION ROWS WIDTH`` prints the bytes beyond what was held before.
"""

from __future__ import annotations

import inspect
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def peak_memory(function: str, rows: int, width: int) -> int:
    command = [sys.executable, __file__, function, str(rows), str(width)]
    return int(subprocess.run(command, check=True, capture_output=True, text=True, cwd=ROOT).stdout)


def main(function: str, rows: int, width: int) -> None:
    sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]
    import torch

    import kdfast
    from harness import peak_bytes

    torch.set_num_threads(1)
    student = torch.randn(rows, width, requires_grad=True)
    inputs = {"student": student, "teacher": torch.randn(rows, width)}
    if "labels" in inspect.signature(getattr(kdfast, function)).parameters:
        inputs["labels"] = torch.arange(rows) % 10

    def step() -> object:
        return torch.autograd.grad(getattr(kdfast, function)(**inputs), student)

    step()
    print(peak_bytes(step, torch.device("cpu")))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
