"""One small pass of every kernel, for compute-sanitizer: forward and backward, few rows, rows that do not count too."""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "tests" / "cuda")]

import torch  # noqa: E402
from configurations import CALLS  # noqa: E402
from cuda_support import step  # noqa: E402

from kdfast import backends  # noqa: E402
from support import cast  # noqa: E402

SIZES = (40, 64, 1000, 8192, 16000)  # a width for each way to lay rows on programs; the sanitizers are slow


def forced(op: str) -> tuple[str, ...]:
    """Backends that run where they are asked for, of an op whose every call they take."""
    able = op == "graph" and backends.can_run(backends.CUDA, op, "cuda")[0]
    return (backends.CUDA,) if able else ()


def main() -> int:
    done = 0
    for op, calls in CALLS.items():
        for call in calls():
            if call.width not in SIZES:
                continue
            inputs, options = call.arguments()
            for backend in (backends.AUTO, *forced(op)):
                with backends.use(backend):
                    results = step(call.function, cast({**inputs, **options}, torch.bfloat16, device="cuda"))()
                torch.cuda.synchronize()
                assert all(result.isfinite().all() for result in results), f"{op}, {backend}: {call}"
                done += 1
    print(f"{done} calls")
    return 0 if done else 1


if __name__ == "__main__":
    raise SystemExit(main())
