"""Calls that reach every line of the tables from which launchers choose: tiles, warps and compile-time arguments.

tests/ops/launches_public.py shows, without a GPU, that none is left out; an op that is not listed is red there.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from typing import Any, NamedTuple

import torch
from torch import Tensor

from samples import SAMPLES, Inputs, stored_teacher


class Call(NamedTuple):
    """One call of a public function; options are as given, whatever the sample draws."""

    function: str
    leading: tuple[int, ...]
    width: int
    options: dict[str, Any]
    inputs: Callable[[torch.Generator, tuple[int, ...], int], Inputs] | None = None  # else the sample's

    def arguments(self, seed: int = 0) -> tuple[dict[str, Tensor], dict[str, Any]]:
        generator = torch.Generator().manual_seed(seed)
        sample = SAMPLES[self.function]
        inputs = (self.inputs or sample.inputs)(generator, self.leading, self.width)
        return inputs, {**sample.fixed, **self.options}

    def __str__(self) -> str:
        options = ", ".join(f"{name}={value}" for name, value in self.options.items())
        return f"{self.function} {'x'.join(map(str, (*self.leading, self.width)))} {options}"


def kl() -> list[Call]:
    kinds: list[tuple[str, dict[str, Any]]] = [
        ("kl_divergence", {"temperature": 3.0, "direction": "forward"}),
        ("kl_divergence", {"temperature": 3.0, "direction": "reverse"}),
        ("js_divergence", {"temperature": 3.0, "beta": 0.3}),
        ("dkd_loss", {"temperature": 3.0}),
        ("standardized_kl_divergence", {"temperature": 3.0}),
        ("kd_loss", {"temperature": 3.0, "label_smoothing": 0.1}),
        ("kd_loss", {"temperature": 4.0, "label_smoothing": 0.0}),
    ]
    widths = (16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 32000, 128256)
    calls = [Call(name, (5,), width, options) for width in widths for name, options in kinds]
    for width, temperature, smoothing in product((8192, 128256), (1.0, 2.0, 3.0, 4.0), (0.0, 0.1)):
        calls.append(Call("kd_loss", (5,), width, {"temperature": temperature, "label_smoothing": smoothing}))
    return calls


def topk_kl() -> list[Call]:
    def inputs(generator: torch.Generator, leading: tuple[int, ...], width: int) -> Inputs:
        return stored_teacher(generator, leading, width, k=64)

    kinds: list[dict[str, Any]] = [
        {"values": "logits", "tail": "drop"},
        {"values": "logprobs", "tail": "drop"},
        {"values": "logprobs", "tail": "bucket"},
        {"values": "logprobs", "tail": "renormalize"},
    ]
    widths = (1000, 8192, 32000, 128256)
    return [Call("topk_kl_divergence", (5,), width, options, inputs) for width in widths for options in kinds]


CALLS: dict[str, Callable[[], list[Call]]] = {"kl": kl, "topk_kl": topk_kl}
DTYPES = (torch.bfloat16, torch.float32)
