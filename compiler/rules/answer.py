"""What the rule table knows of one signature, and its JSON form."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..layout import Placement, format_placement, parse_placement
from .rule import Rule


@dataclass(frozen=True)
class Answer:
    """Rules of one signature at one number of parts.

    rules: the all-replicate rule first; reason: why there is no other, or ""; rejected: candidates that the judge turned down,
    and why.
    """

    rules: tuple[Rule, ...]
    reason: str = ""
    rejected: tuple[tuple[Rule, str], ...] = ()


def answer_to_json(answer: Answer) -> dict[str, Any]:
    """Plain lists and strings."""
    return {
        "rules": [_rule_to_json(rule) for rule in answer.rules],
        "reason": answer.reason,
        "rejected": [[_rule_to_json(rule), why] for rule, why in answer.rejected],
    }


def answer_from_json(data: Mapping[str, Any]) -> Answer | None:
    """Inverse of ``answer_to_json``; None when the data is anything else."""
    try:
        rules = tuple(_rule_from_json(rule) for rule in data["rules"])
        rejected = tuple((_rule_from_json(rule), str(why)) for rule, why in data["rejected"])
        reason = data["reason"]
    except (KeyError, TypeError, ValueError, IndexError, AttributeError):
        return None
    if not rules or not rules[0].is_replicate or not isinstance(reason, str):
        return None
    return Answer(rules, reason, rejected)


def _rule_to_json(rule: Rule) -> list[Any]:
    return [[format_placement(p) for p in rule.inputs], [format_placement(p) for p in rule.outputs], rule.origin]


def _rule_from_json(data: Any) -> Rule:
    inputs, outputs, origin = data
    return Rule(tuple(map(parse_placement, inputs)), tuple(map(_output, outputs)), str(origin))


def _output(text: str) -> Placement | None:
    return None if text == "-" else parse_placement(text)
