"""``assert_equivalent``: the proof as an assertion."""

from __future__ import annotations

from typing import Any

from ..compiler.verify.report import Status, Verdict
from ..compiler.verify.standalone import Side, verify


def assert_equivalent(original: Side, transformed: Side, *, level: str = "full", **options: Any) -> Verdict:
    """Assert that two programs compute the same function, and return the verdict.

    options: those of ``hocket.verify``. Raises AssertionError with the first place where they part, or with the reason why
    nothing could be shown; InputError for sides that cannot be compared.
    """
    verdict = verify(original, transformed, level=level, **options)
    if verdict.status is not Status.EQUAL:
        raise AssertionError(f"expected equal programs, found {verdict}")
    return verdict
