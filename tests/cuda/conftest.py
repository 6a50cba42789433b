"""Tests that need a CUDA device: skipped with the reason where there is none.

``KDFAST_SHARD=i/n`` runs every n-th test beginning with the i-th, so that several processes can share the compiling; in
an order of its own, so that what time runs out for is a sample of everything and not the last file.
"""

from __future__ import annotations

import os
import random
from pathlib import Path

import pytest
import torch


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        for item in items:
            if Path(__file__).parent in item.path.parents:
                item.add_marker(pytest.mark.skip(reason="no CUDA device"))
    if "KDFAST_SHARD" in os.environ:
        index, count = map(int, os.environ["KDFAST_SHARD"].split("/"))
        random.Random(0).shuffle(items)
        items[:] = items[index::count]
