"""The steps of our own product for similarity graphs on a GPU: both tiles, every stride, number of bins and buffer.

``python benchmarks/graph_kernels.py`` writes ``benchmarks/results/<gpu>-graph-kernels.json``, from which ``ROWS``,
``SELECTIONS`` and ``FASTER`` in kdfast/ops/graph/product.py are chosen: the launcher's time and that of each of its
kernels, the hits of a row, and how many rows have more than there is room for, beside the bare product and the other
launchers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from itertools import product as combinations
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import harness
from graph import floors
from harness import milliseconds
from kdfast.ops.graph import METRICS, product, select, triton_kernels
from kdfast.ops.graph.product import Selection

SHAPES = ((4096, 512), (8192, 128), (16384, 512), (65536, 128))
ROWS = (128, 256)
NEIGHBOURS = (20, 64, 128)
STRIDES = (2, 4, 8)
BINS = (128, 256, 512)
CAPACITIES = (256, 512, 1024)
COUNTS = 6  # which argument of graph_hits they are
MOST_IN_PLACE = 0.999


def graph(launcher: Any, features: Tensor, k: int) -> Any:
    return launcher.graph(features, None, None, k, METRICS["cosine"], False, True)


def lines(k: int) -> list[Selection]:
    """Buffers with room for half as many hits again as are expected."""
    tables = combinations(STRIDES, BINS, CAPACITIES)
    return [Selection(k, *line) for line in tables if line[1] >= 2 * k and line[2] >= 1.5 * line[0] * k]


class Steps(TorchDispatchMode):
    """Notes the kernels of a launch, to be run again each on its own, on what the others left."""

    def __init__(self) -> None:
        super().__init__()
        self.found: dict[str, Callable[[], object]] = {}
        self.counts: Tensor | None = None

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), named: Any = None) -> Any:
        if function is torch.ops.kdfast.graph_bounds.default:
            self.found["bounds"] = partial(function, *arguments)
        if function is torch.ops.kdfast.graph_hits.default:
            self.counts = arguments[COUNTS]
            self.found["zeros and hits"] = lambda: (self.counts.zero_(), function(*arguments))
        return function(*arguments, **(named or {}))

    def noted(self, name: str) -> Callable[..., object]:
        function = getattr(triton_kernels, name)

        def note(*arguments: Any) -> object:
            self.found[name] = partial(function, *arguments)
            return function(*arguments)

        return note


def steps(features: Tensor, k: int) -> Steps:
    made = Steps()
    names = ("coefficients", "limit", "finish")
    with mock.patch.multiple(triton_kernels, **{name: made.noted(name) for name in names}), made:
        graph(product, features, k)
    return made


def record(features: Tensor, rows: int, line: Selection) -> dict[str, Any]:
    with mock.patch.multiple(product, ROWS=rows, SELECTIONS=(line,)):
        made = steps(features, line.k)
        counts = made.counts
        assert counts is not None
        return {
            "rows of a tile": rows,
            **line._asdict(),
            "stride": product.selection(line.k, len(features)).stride,
            "ms": milliseconds(partial(graph, product, features, line.k)),
            "hits of a row": float(counts.float().mean()),
            "rows without room": int((counts > line.capacity).sum()),
            "steps": {name: milliseconds(step) for name, step in made.found.items()},
        }


def agreement(features: Tensor, k: int) -> float:
    """The share of neighbours that Triton's kernels find in the same place; near ties may change theirs."""
    (_, found), (_, expected) = (graph(launcher, features, k) for launcher in (product, triton_kernels))
    return float((found == expected).float().mean())


def measure() -> Iterator[dict[str, Any]]:
    records: list[dict[str, Any]] = []
    for n, width in SHAPES:
        features = torch.randn(n, width, device="cuda", dtype=torch.bfloat16)
        for k in NEIGHBOURS:
            if (same := agreement(features, k)) < MOST_IN_PLACE:
                raise harness.ParityError(f"{n} x {width}, k = {k}: {same:.4f} of the neighbours are Triton's")
            others = {"select": select, "triton": triton_kernels}
            entry: dict[str, Any] = {"shape": (n, width), "k": k}
            entry["x @ x.T ms"] = milliseconds(floors(features)["x @ x.T"])
            entry |= {f"{name} ms": milliseconds(partial(graph, other, features, k)) for name, other in others.items()}
            found = [record(features, rows, line) for rows in ROWS for line in lines(k)]
            entry["product"] = sorted(found, key=lambda one: one["ms"])
            records.append(entry)
            yield {"shapes": records}


if __name__ == "__main__":
    harness.main_of_kernels(__file__, __doc__, measure)
