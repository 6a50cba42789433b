"""``python -m kdfast``: versions, the CPU level chosen, and what each function would run here, and why not more."""

from __future__ import annotations

import importlib.metadata
import platform
import textwrap
from collections.abc import Iterable

import torch

from kdfast import backends, reference
from kdfast.ops import nodes

WIDTH = 100


def report() -> str:
    """The text ``python -m kdfast`` prints."""
    lines = [
        f"kdfast {_version()}",
        f"python {platform.python_version()}",
        f"torch {torch.__version__} (cuda {torch.version.cuda or 'not in this build'})",
        f"cpu kernels: {_cpu_line()}",
        f"autograd nodes: {_nodes_line()}",
        f"cuda device: {torch.cuda.get_device_name() if torch.cuda.is_available() else 'none'}",
    ]
    forced = next(filter(backends.is_forced, backends.NAMES))
    if forced != backends.AUTO:
        lines.append(f"forced: {forced} (KDFAST_BACKEND)")
    title = "on CUDA" if torch.cuda.is_available() else "on CUDA (no device)"
    lines += ["", *_row("op", "on CPU", title, ["functions"])]
    notes = []
    for op, functions in backends.FUNCTIONS.items():
        chosen = [_chosen(op, device, forced) for device in ("cpu", "cuda")]
        lines += _row(op, chosen[0][0], chosen[1][0], functions)
        notes += [f"{forced} raises: {reason}" for _, reason in chosen if reason]
        for backend in (*backends.KERNELS[op], *backends.BY_NAME.get(op, ())):
            able, reason = backends.can_run(backend, op, "cpu" if backend == backends.CPU else "cuda")
            if not able:
                notes.append(f"no {backend} kernels here: {reason}")
            elif backend not in backends.KERNELS[op]:
                notes.append(f"{op}: kdfast.backends.use({backend!r}) runs its kernel; what that cannot run raises")
    with_kernels = {"SimilarityGraph"}.union(*backends.FUNCTIONS.values())  # the former is what two of them return
    others = [name for name in reference.__all__ if name not in with_kernels]
    lines += _row("none", backends.REFERENCE, backends.REFERENCE, others)
    lines += ["", "reference: plain PyTorch", *dict.fromkeys(notes)]
    return "\n".join(textwrap.fill(line, WIDTH, subsequent_indent="  ", break_long_words=False) for line in lines)


def _row(op: str, on_cpu: str, on_cuda: str, functions: Iterable[str]) -> list[str]:
    """Lines of the table, more than one where the functions do not fit."""
    row = f"{op:<14}{on_cpu:<11}{on_cuda:<21}"
    return textwrap.wrap(row + ", ".join(functions), WIDTH, subsequent_indent=" " * len(row))


def _version() -> str:
    try:
        return importlib.metadata.version("kdfast")
    except importlib.metadata.PackageNotFoundError:
        return "(not installed: run from its sources)"


def _cpu_line() -> str:
    if backends.extension_problem() is not None:
        return f"missing: {backends.extension_problem()}"
    return f"{backends.cpu_level()} (this processor and build can run {', '.join(backends.cpu_levels())})"


def _nodes_line() -> str:
    return "in C++" if nodes.problem() is None else f"in Python: {nodes.problem()}"


def _chosen(op: str, device_type: str, forced: str) -> tuple[str, str]:
    """The backend that runs ``op`` on float32 tensors, as ``backends.select`` finds it; or 'raises', and why."""
    candidates = (*backends.KERNELS[op], backends.REFERENCE) if forced == backends.AUTO else (forced,)
    for backend in candidates:
        able, reason = backends.can_run(backend, op, device_type)
        if able:
            return backend, ""
    return "raises", reason


if __name__ == "__main__":
    print(report())
