"""Threads that help the one that calls; where none can be had, it does the work itself."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from threading import Barrier
from typing import TypeVar

T = TypeVar("T")


def helpers(threads: int, name: str) -> ThreadPoolExecutor | None:
    """So many threads that run already: where memory is scarce, CPython may wait for ever for one to start.

    None if no threads are wanted, or the system gives no more: who calls then does the work.
    """
    if not threads:
        return None
    pool, all_here = ThreadPoolExecutor(threads, name), Barrier(threads)
    try:
        for _ in range(threads):
            pool.submit(all_here.wait)
    except RuntimeError:
        all_here.abort()  # those that are here would wait for ever
        pool.shutdown(cancel_futures=True)
        return None
    return pool


def start_task(helpers: Executor | None, call: Callable[[], T]) -> Future[T]:
    """Let a helper make the call, or make it here if there is none to be had."""
    if helpers is not None:
        try:
            return helpers.submit(call)
        except RuntimeError:  # no thread could start, or the interpreter is at its end and waits for this one
            pass
    done: Future[T] = Future()
    try:
        done.set_result(call())
    except Exception as error:
        done.set_exception(error)
    return done
