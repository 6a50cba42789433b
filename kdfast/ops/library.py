"""Where ops are defined: ``torch.ops.kdfast``, from Python, so that they exist where the C++ extension does not."""

from __future__ import annotations

import torch

LIBRARY = torch.library.Library("kdfast", "FRAGMENT")


def define(schema: str) -> None:
    """Defines an op that is differentiated by a ``torch.autograd.Function`` around it."""
    LIBRARY.define(schema)
    # Nothing for autograd to do inside: its fallback would cost as much as a short row's arithmetic.
    LIBRARY.impl(schema.split("(", 1)[0], torch.library.fallthrough_kernel, "Autograd")
