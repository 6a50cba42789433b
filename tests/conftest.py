"""Fixtures and hypothesis profiles of all tests."""

from __future__ import annotations

import os

import hypothesis
import pytest
import torch

hypothesis.settings.register_profile(
    "ci",
    max_examples=25,
    deadline=None,
    derandomize=True,
    print_blob=True,
    suppress_health_check=list(hypothesis.HealthCheck),
)
hypothesis.settings.register_profile("long", parent=hypothesis.settings.get_profile("ci"), max_examples=1000)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))


torch.set_num_threads(1)  # the inputs are small; what depends on threads sets their number itself


@pytest.fixture(autouse=True)
def same_numbers_on_every_run():
    """What draws from PyTorch's own generator: of ten thousand pairs of floats two are equal now and then."""
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def fresh_memory_is_nan():
    """Fresh memory holds NaN in every test, so an element a kernel forgets to write shows."""
    deterministic, warn_only = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    fill = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.utils.deterministic.fill_uninitialized_memory = fill
    torch.use_deterministic_algorithms(deterministic, warn_only=warn_only)
