"""Tests that need a CUDA device: skipped with the reason where there is none.

``KDFAST_SHARD=i/n`` runs every n-th test beginning with the i-th, so that several processes can share the compiling.
"""

from __future__ import annotations

import os
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
        items[:] = items[index::count]
