"""One small pass of every kernel, for compute-sanitizer: forward and backward, few rows, rows that do not count too."""

from __future__ import annotations

import sys
from contextlib import AbstractContextManager
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "tests" / "cuda")]

import torch  # noqa: E402
from configurations import CALLS, Call  # noqa: E402
from cuda_support import graphs_by, step  # noqa: E402

from kdfast import backends  # noqa: E402
from support import cast  # noqa: E402

SIZES = (4, 40, 64, 300, 1000, 8192, 16000)  # a width for each way to lay rows on programs; the sanitizers are slow
AT_SOME_ROWS = Call("rkd_loss", (150,), 40, {"triplets": 60})  # drawn: nothing that parity could be asked of


def ways(op: str) -> dict[str, AbstractContextManager[None]]:
    """The kernels that run by default, and those that take every call of ``op`` where they are asked for."""
    found = {"default": backends.use(backends.AUTO)}
    if op == "graph" and backends.can_run(backends.CUDA, op, "cuda")[0]:
        found |= {launcher: graphs_by(launcher) for launcher in ("select", "product")}
    return found


def main() -> int:
    done = 0
    for op, calls in CALLS.items():
        for call in [*calls(), *([AT_SOME_ROWS] if op == "rkd" else [])]:
            if call.width not in SIZES:
                continue
            inputs, options = call.arguments()
            for name, way in ways(op).items():
                with way:
                    results = step(call.function, cast({**inputs, **options}, torch.bfloat16, device="cuda"))()
                torch.cuda.synchronize()
                assert all(result.isfinite().all() for result in results), f"{op}, {name}: {call}"
                done += 1
    print(f"{done} calls")
    return 0 if done else 1


if __name__ == "__main__":
    raise SystemExit(main())
