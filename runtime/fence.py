"""The order in which processes see each other's writes to shared memory, and a fence for where that is not enough.

Processes that look at each other's words in shared memory need one between "I changed this" and "does the other one sleep", and
between "I go to sleep" and "has the other one changed it": else both may read the old value (Dekker's problem).
"""

from __future__ import annotations

import platform
import threading
from collections.abc import Callable


def writes_stay_in_order() -> bool:
    """Whether other processors see the writes of one in the order in which it made them; x86 does so (Intel SDM 3A, 9.2.2).

    Words that announce data rely on it: plain Python has no weaker fence to put between the two.
    """
    return platform.machine() in ("x86_64", "AMD64")


def new_fence() -> Callable[[], None]:
    """A function; everything written before its call is seen before everything read or written after it, on x86.

    Taking a lock is an atomic exchange, which orders all memory there; elsewhere it lets later reads pass earlier writes. The lock
    is its caller's own, so that nobody ever waits for it, and a forked child does not inherit it taken.
    """
    lock = threading.Lock()
    take, give = lock.acquire, lock.release

    def fence() -> None:
        take()
        give()

    return fence
