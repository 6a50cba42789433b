"""Which backend runs an op: CPU kernels, Triton kernels, or the reference.

``use('reference')`` (a context manager) or the environment variable ``KDFAST_BACKEND`` force one for the whole
process; by default each op takes the fastest backend that can run the tensors at hand. ``python -m kdfast`` prints
what that is and why anything is missing.
"""

from __future__ import annotations

import importlib.util
import inspect
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from kdfast import checks

AUTO = "auto"
REFERENCE = "reference"
CPU = "cpu"
TRITON = "triton"
CUDA = "cuda"
NAMES = (AUTO, CPU, TRITON, CUDA, REFERENCE)

# op -> backends that have a kernel for it, in order of preference; the reference has every op.
KERNELS: dict[str, tuple[str, ...]] = {
    "kl": (CPU, TRITON),
    "topk_kl": (CPU, TRITON),
    "relation": (CPU, TRITON),
    "features": (CPU, TRITON),
    "graph": (CPU, TRITON),
    "rkd": (CPU, TRITON),
    "rkd_sequence": (CPU, TRITON),
    "scale": (TRITON,),  # a part of backward, chosen by no function
}
# op -> the public functions that run it; all others run the reference alone.
FUNCTIONS: dict[str, tuple[str, ...]] = {
    "kl": (
        "kl_divergence",
        "js_divergence",
        "kd_loss",
        "dkd_loss",
        "standardized_kl_divergence",
        "linear_kl_divergence",
    ),
    "topk_kl": ("topk_kl_divergence",),
    "relation": ("crd_loss", "pkt_loss", "similarity_preserving_loss", "kernel_alignment_loss"),
    "features": ("feature_mse_loss", "attention_transfer_loss"),
    "graph": ("similarity_graph", "graph_distillation_loss", "hardest_negatives"),
    "rkd": ("rkd_loss", "rkd_distance_loss", "rkd_angle_loss"),
    "rkd_sequence": ("rkd_sequence_angle_loss",),
}
# Kernels beside those, which run where they are asked for by name; what they cannot run then raises. Not asked, they
# take from Triton what a measurement says they are faster at: docs/gpu.md.
BY_NAME: dict[str, tuple[str, ...]] = {
    "kl": (CUDA,),  # forward and reverse KL by thread-block clusters
    "graph": (CUDA,),  # the selection from tiles of cuBLAS
}

MEASURED = (9, 0)  # compute capability of the GPU that their measurements are of, an H100

try:
    import kdfast._C  # noqa: F401  (registers torch.ops.kdfast)

    _missing_extension = None
except ImportError as error:
    _missing_extension = f"the C++ extension is not built ({error})"


_missing_triton = None if importlib.util.find_spec("triton") else "triton is not installed"
# Its launchers take some steps from Triton's. One op stands for all: what is built is all of csrc/cuda or nothing.
_missing_cuda = _missing_triton or (
    None if hasattr(torch.ops.kdfast, "graph_select") else "the C++ extension was built without csrc/cuda"
)


def _from_environment() -> str:
    name = os.environ.get("KDFAST_BACKEND", AUTO)
    if name not in NAMES:
        raise ValueError(f"environment variable KDFAST_BACKEND must be one of {', '.join(NAMES)}, got {name!r}")
    return name


_forced = _from_environment()
_warned: set[str] = set()


@contextmanager
def use(name: str) -> Iterator[None]:
    """Forces backend ``name`` inside the ``with`` block, for all threads; ``'auto'`` lifts an outer one.

    Forcing a backend that cannot run the tensors raises; the reference can run everything. Functions without a
    kernel (the README's table says which) run the reference under any name.
    """
    global _forced
    checks.check_option("backend", name, NAMES)
    outer, _forced = _forced, name
    try:
        yield
    finally:
        _forced = outer


def is_forced(backend: str) -> bool:
    """Whether ``backend`` was asked for by name; 'auto': whether none was."""
    return _forced == backend


def prefers_cuda(op: str, tensor: Tensor, faster: bool) -> bool:
    """Whether ``op``'s kernel in CUDA C++ runs on ``tensor``: where it is asked for, or measured to be ``faster``."""
    if not is_forced(AUTO):
        return is_forced(CUDA)
    able = faster and can_run(CUDA, op, "cuda", tensor.dtype)[0]
    return able and torch.cuda.get_device_capability(tensor.device) == MEASURED


def on_gpu(tensor: Tensor) -> bool:
    """Whether ``tensor`` is on a GPU."""
    return tensor.is_cuda


def on_nvidia(tensor: Tensor) -> bool:
    """Whether ``tensor`` is on an NVIDIA GPU; PyTorch calls AMD's 'cuda' too."""
    return tensor.device.type == "cuda" and torch.version.hip is None


def extension_problem() -> str | None:
    """Why the compiled extension is missing, or None where it is loaded."""
    return _missing_extension


def can_run(backend: str, op: str, device_type: str, dtype: torch.dtype = torch.float32) -> tuple[bool, str]:
    """Whether ``backend`` has a kernel of ``op`` for tensors of ``dtype`` on ``device_type``, and if not, why."""
    if backend == REFERENCE:
        return True, ""
    if backend not in KERNELS.get(op, ()) and backend not in BY_NAME.get(op, ()):
        return False, f"{op} has no {backend} kernel"
    missing = _missing_extension if backend == CPU else _missing_triton if backend == TRITON else _missing_cuda
    wanted = "cpu" if backend == CPU else "cuda"
    if missing is not None:
        return False, missing
    if device_type != wanted:
        return False, f"the {backend} backend runs on {wanted} tensors, these are on {device_type}"
    if backend != CPU and dtype == torch.float64:
        return False, f"the {backend} kernels take float16, bfloat16 or float32, these are torch.float64"
    return True, ""


def select(op: str, tensor: Tensor) -> str:
    """The backend that runs ``op`` on tensors like ``tensor``."""
    device_type = "cpu" if tensor.is_cpu else tensor.device.type  # the latter makes a string, which takes microseconds
    dtype = tensor.dtype
    if _forced != AUTO:
        able, reason = can_run(_forced, op, device_type, dtype)
        if not able:
            raise RuntimeError(f"backend {_forced!r} was asked for but cannot run: {reason}")
        return _forced
    for backend in KERNELS.get(op, ()):
        if can_run(backend, op, device_type, dtype)[0]:
            return backend
    default = {"cpu": CPU, "cuda": TRITON}.get(device_type)
    if default is not None and op in KERNELS:
        reason = can_run(default, op, device_type, dtype)[1]
        _warn_once(f"kdfast runs the plain PyTorch reference on {device_type.upper()} tensors: {reason}")
    return REFERENCE


def has_kernel(op: str, tensor: Tensor, *, inplace_backward: bool = False, limit: str = "") -> bool:
    """Whether ``op`` runs a kernel on ``tensor``. Says so once where an option thereby loses its effect.

    ``limit``: what of the arguments is beyond every kernel of ``op``, if anything.
    """
    # Not is_exporting(), which for the compiler of torch 2.11 is true whatever it compiles for.
    if torch.compiler._is_exporting_flag:
        limit = "torch.export drops the gradient of an autograd function without a word"
    if select(op, tensor) != REFERENCE:
        if not limit:
            return True
        if _forced != AUTO:
            raise RuntimeError(f"backend {_forced!r} was asked for but cannot run: {limit}")
        _warn_once(f"kdfast runs the plain PyTorch reference: {limit}")
    if inplace_backward:
        _warn_once("inplace_backward=True saves no memory: the plain PyTorch reference runs here")
    return False


def cpu_level() -> str | None:
    """The instruction set of the CPU kernels: 'avx512', 'avx2' or 'baseline'; None without the extension."""
    return None if _missing_extension is not None else torch.ops.kdfast.cpu_level()


def cpu_levels() -> tuple[str, ...]:
    """The instruction sets this binary holds and this processor runs, lowest first."""
    return () if _missing_extension is not None else tuple(torch.ops.kdfast.cpu_levels().split(","))


@contextmanager
def use_cpu_level(name: str) -> Iterator[None]:
    """Runs the CPU kernels at a lower instruction set, for tests and measurements."""
    checks.check_option("cpu level", name, cpu_levels())
    outer = torch.ops.kdfast.cpu_level()
    torch.ops.kdfast.set_cpu_level(name)
    try:
        yield
    finally:
        torch.ops.kdfast.set_cpu_level(outer)


def empty_cache() -> int:
    """Gives the memory of freed gradients that kdfast keeps for the next ones, at most 2 GiB, back to the system.

    CPU only: on a GPU memory is PyTorch's own (``torch.cuda.empty_cache``). Returns the bytes released.
    """
    return 0 if _missing_extension is not None else int(torch.ops.kdfast.empty_cache())


def _warn_once(message: str) -> None:
    """Warns of the line that called kdfast, directly or through a module."""
    if message not in _warned and not torch.compiler.is_compiling():
        _warned.add(message)
        frame, level = inspect.currentframe(), 1
        while frame is not None and frame.f_globals.get("__name__", "").partition(".")[0] in ("kdfast", "torch"):
            frame, level = frame.f_back, level + 1
        warnings.warn(message, RuntimeWarning, stacklevel=level)
