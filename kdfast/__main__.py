"""``python -m kdfast``: versions, the CPU level chosen, and what each op would run here, and why not more."""

from __future__ import annotations

import importlib.metadata
import platform

import torch

from kdfast import backends


def report() -> str:
    """The text ``python -m kdfast`` prints."""
    lines = [
        f"kdfast {_version()}",
        f"python {platform.python_version()}",
        f"torch {torch.__version__} (cuda {torch.version.cuda or 'not in this build'})",
        f"cpu kernels: {_cpu_line()}",
        f"cuda device: {torch.cuda.get_device_name() if torch.cuda.is_available() else 'none'}",
        "",
        "op            on CPU tensors   on CUDA tensors",
    ]
    missing = []
    for op, kernels in backends.KERNELS.items():
        chosen = [_chosen(op, device) for device in ("cpu", "cuda")]
        lines.append(f"{op:<14}{chosen[0]:<17}{chosen[1]}")
        for backend in (*kernels, *backends.BY_NAME.get(op, ())):
            able, reason = backends.can_run(backend, op, "cpu" if backend == backends.CPU else "cuda")
            if not able:
                missing.append(f"{op}: no {backend} kernel here: {reason}")
    lines.append("every other function runs the reference (plain PyTorch)")
    for op, kernels in backends.BY_NAME.items():
        names = [name for name in kernels if backends.can_run(name, op, "cuda")[0]]
        lines += [f"{op}: kdfast.backends.use({name!r}) runs its kernel on all that it can" for name in names]
    return "\n".join([*lines, *([""] if missing else []), *missing])


def _version() -> str:
    try:
        return importlib.metadata.version("kdfast")
    except importlib.metadata.PackageNotFoundError:
        return "(not installed: run from its sources)"


def _cpu_line() -> str:
    if backends.extension_problem() is not None:
        return f"missing: {backends.extension_problem()}"
    return f"{backends.cpu_level()} (this processor and build can run {', '.join(backends.cpu_levels())})"


def _chosen(op: str, device_type: str) -> str:
    able = [b for b in backends.KERNELS[op] if backends.can_run(b, op, device_type)[0]]
    return able[0] if able else backends.REFERENCE


if __name__ == "__main__":
    print(report())
