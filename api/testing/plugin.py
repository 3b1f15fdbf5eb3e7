"""The pytest plugin: the fixture ``assert_equivalent`` and the option ``--hocket-verify``."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    """The option that sets how much ``assert_equivalent`` proves."""
    group = parser.getgroup("hocket", "proofs of parallel programs")
    group.addoption(
        "--hocket-verify",
        default="full",
        choices=("types", "float", "ring", "full"),
        help="how much the assert_equivalent fixture proves (default: full)",
    )


@pytest.fixture(name="assert_equivalent")
def assert_equivalent_fixture(request: pytest.FixtureRequest) -> Callable[..., Any]:
    """``hocket.testing.assert_equivalent`` at the level of --hocket-verify."""
    from .equivalence import assert_equivalent  # torch is loaded only by tests that ask for it

    return partial(assert_equivalent, level=request.config.getoption("--hocket-verify"))
