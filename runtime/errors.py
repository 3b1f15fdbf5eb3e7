"""The one family of exceptions that hocket raises.

Every message says, in this order: what was expected, what was found, where in the user's code, and what to do. The rooms above
(compiler, passes) add their own subclasses in ``compiler/errors.py``; users import all of them from ``hocket.errors``.
"""

from __future__ import annotations


class HocketError(Exception):
    """Base of everything hocket raises on purpose."""


class InputError(HocketError, ValueError):
    """An argument was refused at the door, before any work was done."""


class ProgramError(HocketError):
    """A stored program is corrupt, too new, or asks for an op outside the allow-list."""


class RunError(HocketError):
    """A run failed on some rank. Subclasses say how.

    rank: the culprit, or None where no single rank is to blame; instruction: its text in the program; source: the line of the
    user's model it came from; remote: the traceback on that rank, when there is one.
    """

    def __init__(self, message: str, *, rank: int | None = None, instruction: str = "", source: str = "", remote: str = "") -> None:
        super().__init__(message)
        self.rank = rank
        self.instruction = instruction
        self.source = source
        self.remote = remote
        if remote:
            self.add_note(f"traceback on rank {rank}:\n{remote.rstrip()}")


class RankFailed(RunError):
    """A rank raised an exception (out of memory included)."""


class RankDied(RunError):
    """The process of a rank is gone."""


class RankHung(RunError):
    """A rank made no progress within the timeout."""


class CollectiveMismatch(RunError):
    """The ranks do not agree on the next collective: operation, shape, dtype or order."""
