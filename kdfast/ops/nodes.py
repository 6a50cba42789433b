"""Autograd nodes in C++ (csrc/autograd.cpp), which losses on CPU tensors have where they were built with this PyTorch.

They are what the classes in kdfast/ops/autograd.py are, in less time: the same bits, so nobody has to know.
"""

from __future__ import annotations

import importlib
import re

import torch
from torch import Tensor

from kdfast import backends

MODULE = "kdfast._autograd_" + re.sub(r"\W", "_", torch.__version__)


def _load() -> str | None:
    if backends.extension_problem() is not None:
        return backends.extension_problem()
    try:
        importlib.import_module(MODULE)
    except ImportError as error:
        return f"not built with torch {torch.__version__} ({error})"
    return None


_missing = _load()


def problem() -> str | None:
    """Why autograd nodes are in Python, or None where they are in C++."""
    return _missing


def differentiate(tensor: Tensor) -> bool:
    """Whether the ops of losses are differentiable by themselves for ``tensor``. A compiler traces nodes in Python."""
    return tensor.is_cpu and _missing is None and not torch.compiler.is_compiling()
