"""A memory fence in plain Python.

Processes that look at each other's words in shared memory need one between "I changed this" and "does the other one sleep", and
between "I go to sleep" and "has the other one changed it": else both may read the old value (Dekker's problem).
"""

from __future__ import annotations

import threading
from collections.abc import Callable


def new_fence() -> Callable[[], None]:
    """A function; everything written before its call is seen before everything read or written after it.

    Taking a lock is an atomic exchange, which orders memory. The lock is its caller's own, so that nobody ever waits for it, and a
    forked child does not inherit it taken.
    """
    lock = threading.Lock()
    take, give = lock.acquire, lock.release

    def fence() -> None:
        take()
        give()

    return fence
