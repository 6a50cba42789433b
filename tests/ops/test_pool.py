"""csrc/cpu/pool.cpp: large gradients live in memory that is used again, and nothing shows but the speed."""

from __future__ import annotations

import math
import threading

import pytest
import torch

import kdfast
from kdfast import backends

pytestmark = pytest.mark.skipif(backends.extension_problem() is not None, reason="the extension is not built")

KIB, MIB = 2**10, 2**20
WIDTH = 8192  # 64 float32 rows are 2 MiB


@pytest.fixture(autouse=True)
def empty_pool():
    kdfast.empty_cache()
    yield
    kdfast.empty_cache()


def gradient(rows: int, *, mask: torch.Tensor | None = None, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(rows)
    student, teacher = (torch.randn(rows, WIDTH, generator=generator).to(dtype) for _ in range(2))
    student.requires_grad_()
    loss = kdfast.kl_divergence(student, teacher, mask=mask)
    return torch.autograd.grad(loss, student)[0]


def test_a_freed_gradient_is_used_again_and_released_on_request():
    first = gradient(64)
    address = first.data_ptr()
    assert kdfast.empty_cache() == 0  # it is still in use
    del first
    second = gradient(64)
    assert second.data_ptr() == address
    del second
    assert kdfast.empty_cache() == 2 * MIB
    assert kdfast.empty_cache() == 0


def test_two_gradients_at_once_do_not_share_memory():
    kept = gradient(64)
    copy = kept.clone()
    other = gradient(64)
    assert other.data_ptr() != kept.data_ptr()
    other.fill_(math.nan)
    assert torch.equal(kept, copy)


def test_a_view_keeps_the_memory():
    row = gradient(64)[3]
    copy = row.clone()
    gradient(64).fill_(math.nan)
    assert torch.equal(row, copy)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_element_of_used_memory_is_written(dtype):
    mask = torch.arange(128) % 3 > 0
    expected = gradient(128, mask=mask, dtype=dtype)
    copy = expected.clone()
    expected.fill_(math.nan)
    address = expected.data_ptr()
    del expected
    again = gradient(128, mask=mask, dtype=dtype)
    assert again.data_ptr() == address
    assert torch.equal(again, copy)


def test_a_smaller_gradient_takes_a_block_of_at_most_twice_its_size():
    for rows, reused in ((96, True), (65, True), (64, False)):
        large = gradient(192 if rows == 96 else 128)
        address = large.data_ptr()
        del large
        assert (gradient(rows).data_ptr() == address) == reused, rows
        kdfast.empty_cache()


@pytest.mark.parametrize(("rows", "kept"), [(3, 0), (4, 128 * KIB), (5, 256 * KIB), (63, 2 * MIB), (65, 4 * MIB)])
def test_blocks_are_whole_units_and_small_gradients_are_left_to_malloc(rows, kept):
    last = gradient(rows)
    del last
    assert kdfast.empty_cache() == kept


def test_threads_take_and_give_at_once():
    expected, failures = gradient(64).clone(), []

    def work():
        for _ in range(20):
            if not torch.equal(gradient(64), expected):
                failures.append("another thread wrote here")

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert 2 * MIB <= kdfast.empty_cache() <= 8 * MIB


def test_a_gradient_can_be_freed_after_the_pool_was_emptied():
    kept = gradient(64)
    kdfast.empty_cache()
    del kept
    assert kdfast.empty_cache() == 2 * MIB
