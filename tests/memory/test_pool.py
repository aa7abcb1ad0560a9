"""The pool lends buffers again, and never holds more than was once in use."""

from __future__ import annotations

import weakref

import torch

from zerolith.memory.pool import HostPool


def test_a_buffer_that_came_back_is_lent_again() -> None:
    pool = HostPool(pinned=False)
    first, second = pool.take(100), pool.take(100)
    assert first.dtype == torch.uint8
    assert first.data_ptr() != second.data_ptr()
    pool.give_back(first)
    assert (pool.used_bytes, pool.idle_bytes) == (100, 100)
    assert pool.take(100).data_ptr() == first.data_ptr()
    assert pool.num_allocated == 2


def test_what_is_kept_and_what_is_used_is_never_more_than_was_used_at_once() -> None:
    pool = HostPool(pinned=False)
    for size in range(1, 50):  # a new size each time
        pool.give_back(pool.take(size))
        assert pool.used_bytes + pool.idle_bytes <= size
    lent = [pool.take(10) for _ in range(5)]
    assert (pool.used_bytes, pool.idle_bytes) == (50, 0)
    for buffer in lent:
        pool.give_back(buffer)
    assert (pool.used_bytes, pool.idle_bytes) == (0, 50)


def test_the_size_that_was_not_asked_for_longest_goes_first() -> None:
    pool = HostPool(pinned=False)
    for buffer in [pool.take(3), pool.take(4), pool.take(5)]:
        pool.give_back(buffer)
    pool.give_back(pool.take(3))
    pool.take(6)  # 4 and then 5 go
    assert (pool.used_bytes, pool.idle_bytes) == (6, 3)
    pool.take(3)
    assert pool.num_allocated == 4


def test_a_pool_that_goes_takes_its_idle_buffers_along() -> None:
    pool = HostPool(pinned=False)
    buffer = pool.take(8)
    seen = weakref.ref(buffer)
    pool.give_back(buffer)
    del buffer, pool
    assert seen() is None


def test_a_pool_that_is_cleared_keeps_what_is_lent() -> None:
    pool = HostPool(pinned=False)
    lent, idle = pool.take(8), pool.take(16)
    pool.give_back(idle)
    pool.clear()
    assert (pool.used_bytes, pool.idle_bytes) == (8, 0)
    pool.give_back(lent)
    assert pool.take(8).data_ptr() == lent.data_ptr()


def test_one_that_is_a_little_larger_is_lent_too_and_comes_back_whole() -> None:
    pool = HostPool(pinned=False)
    first = pool.take(100)
    pool.give_back(first)
    for size in (99, 50, 100):
        lent = pool.take(size)
        assert (lent.shape, lent.data_ptr(), pool.used_bytes) == ((size,), first.data_ptr(), 100)
        pool.give_back(lent)
    assert pool.take(49).data_ptr() != first.data_ptr(), "it would be more than twice as large"


def test_a_pool_may_keep_more_than_was_in_use() -> None:
    pool = HostPool(pinned=False, most_kept=2.0)
    for size in (100, 10, 100, 10, 90):
        pool.give_back(pool.take(size))
    assert (pool.num_allocated, pool.used_bytes, pool.idle_bytes) == (2, 0, 110)
    pool.give_back(pool.take(201))
    assert (pool.used_bytes, pool.idle_bytes) == (0, 311)
    pool.give_back(pool.take(300))
    assert (pool.used_bytes, pool.idle_bytes) == (0, 300 + 201), "those of 10 and of 100 bytes had to go"
