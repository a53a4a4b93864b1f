"""Threads that run batches at once: one each, as many as there are cores for."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


class Workers:
    """A pool of threads, started when it first has two things to do; many threads may hand work to one.

    Args:
        n: threads at most.
    """

    def __init__(self, n: int) -> None:
        self.n = n
        self._lock = threading.Lock()
        self._pool: ThreadPoolExecutor | None = None

    def map(self, function: Callable[[Item], Result], items: Sequence[Item]) -> list[Result]:
        """Return ``function`` of every item, in their order; the first items are begun first.

        An exception ends what has not begun, waits for what has, and is raised.
        """
        if self.n == 1 or len(items) < 2:
            return [function(item) for item in items]
        with self._lock:
            if self._pool is None:
                self._pool = ThreadPoolExecutor(self.n, thread_name_prefix="hf_bucket")
            futures: list[Future[Result]] = [self._pool.submit(function, item) for item in items]
        try:
            wait(futures, return_when=FIRST_EXCEPTION)
        finally:  # an interrupt too
            for future in futures:
                future.cancel()
            wait(futures)
        failed = [future for future in futures if not future.cancelled() and future.exception() is not None]
        return [future.result() for future in failed or futures]

    def close(self) -> None:
        """End the threads; a later ``map`` starts new ones."""
        with self._lock:
            pool, self._pool = self._pool, None
        if pool is not None:
            pool.shutdown(wait=True)
