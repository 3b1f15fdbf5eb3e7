"""Choices made for a program and made again for the same program at other sizes.

A pass that chooses by predicted cost would choose otherwise for the small copy of a program on which it is proven; but what is
proven must be what runs. So it keeps its choice under the names and ops of the nodes, which both copies share.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Generic, TypeVar

from ..compiler.program import Program

Choice = TypeVar("Choice")


class Remembered(Generic[Choice]):
    """Choices by the skeleton of a program."""

    def __init__(self) -> None:
        self._known: dict[tuple[Any, ...], Choice] = {}

    def choose(self, program: Program, make: Callable[[], Choice]) -> Choice:
        """The choice made for this skeleton before, else a new one."""
        key = (str(program.mesh), *((node.name, str(node.target)) for node in program.nodes))
        if key not in self._known:
            self._known[key] = make()
        return self._known[key]

    def __repr__(self) -> str:
        return f"{len(self._known)} remembered"
