"""What `hocket verify` concludes from the verdicts of the passes."""

import itertools

import pytest

from hocket.compiler.cli.conclusion import conclude
from hocket.compiler.verify.report import LevelResult, Outcome, Status, combine

PASSED = LevelResult("types", Outcome.PASSED, "holds")
PROVED = LevelResult("ring", Outcome.PROVED, "equal")
ILL = LevelResult("types", Outcome.FAILED, "a partial sum is used whole", failure=Status.ILL_TYPED)
SKIPPED = LevelResult("types", Outcome.SKIPPED, "the program is not lowered to a mesh")
UNTYPED = LevelResult("types", Outcome.UNSUPPORTED, "1 of 3 ops cannot be typed")


def test_types_that_hold_are_a_success_that_says_what_is_open() -> None:
    found = conclude("types", {"shard": combine([PASSED])})
    assert str(found) == (
        "shown: the distribution is right on all ranks at once: every partial sum is completed, every collective is there once\n"
        "not shown: that the values are the same: nothing was computed (--level ring or full does)"
    )
    assert found.ok


def test_a_proof_says_what_no_proof_covers() -> None:
    found = conclude("ring", {"shard": combine([PASSED, PROVED])})
    assert found.ok
    assert "equal over the ring" in found.shown
    assert found.not_shown.startswith("rounding")


@pytest.mark.parametrize("fault", [ILL, UNTYPED])
def test_a_fault_is_no_success_at_any_level(fault: LevelResult) -> None:
    for level in ("types", "ring", "float", "full"):
        found = conclude(level, {"shard": combine([fault])})
        assert not found.ok
        assert "shard is" in found.not_shown


def test_only_the_level_types_is_content_with_types() -> None:
    assert not conclude("ring", {"shard": combine([PASSED])}).ok
    assert not conclude("types", {"mine": combine([SKIPPED])}).ok
    assert not conclude("types", {}).ok


def test_one_pass_that_fails_spoils_all() -> None:
    answers = {"good": combine([PASSED, PROVED]), "bad": combine([ILL]), "open": combine([SKIPPED])}
    for names in itertools.product(answers, repeat=2):
        found = conclude("full", {f"{i}{name}": answers[name] for i, name in enumerate(names)})
        assert found.ok == (set(names) == {"good"})
