"""The rule table: for any node, what may be cut and what that makes of its outputs.

Sources in order: torch's tables, hocket's annotations and families, discovery by execution. Every rule handed out has been
executed on pieces (``validate``) at small sizes of the same structure, unless the table was made with ``validate=False``. An op
for which nothing holds gets the one rule that every op has, all tensors whole, and ``explain`` says why.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.fx as fx

from ..errors import RuleError
from ..layout import Placement, Replicate, Shard
from ..program import tensor_inputs, tensor_leaves
from .annotations import hocket_annotations
from .answer import Answer, answer_from_json, answer_to_json
from .chains import chain_rules
from .discover import discover
from .families import family_rules
from .linear import linear_rules
from .localise import names_sizes
from .rule import Rule
from .shrink import Trial, shrink
from .signature import OpSignature, signature_of, spec_of, target_name
from .store import RuleStore, default_cache_dir
from .torch_rules import torch_rules
from .validate import failure, fits

USER_CACHE = default_cache_dir()
"""Where answers are kept between runs unless told otherwise."""


POSITIONAL = frozenset(
    {
        torch.ops.aten.arange.default,
        torch.ops.aten.arange.start,
        torch.ops.aten.arange.start_step,
        torch.ops.aten.linspace.default,
        torch.ops.aten.eye.default,
        torch.ops.aten.eye.m,
        torch.ops.aten.tril_indices.default,
        torch.ops.aten.triu_indices.default,
        torch.ops.prims.iota.default,
    }
)
"""Ops whose values are functions of the position alone."""


class RuleTable:
    """Rules for nodes, remembered by op signature in memory and on disk."""

    def __init__(self, cache_dir: Path | None = USER_CACHE, *, validate: bool = True) -> None:
        """cache_dir: None keeps answers in memory only. validate: False hands out unjudged candidates and stores nothing."""
        self._store = RuleStore(cache_dir if validate else None)
        self._validate = validate
        self._answers: dict[tuple[str, int], Answer] = {}
        self._trials: dict[tuple[str, int], Trial | str] = {}
        self._verdicts: dict[tuple[str, int, tuple[Placement | None, ...]], str] = {}
        self._discoveries: dict[tuple[str, int], tuple[Rule, ...]] = {}

    def rules(self, node: fx.Node, parts: int) -> tuple[Rule, ...]:
        """All rules that fit the node's global sizes cut in ``parts``, the all-replicate rule first, none twice, in a fixed order.

        Placeholders may lie in any way that fits. Raises RuleError if parts < 1.
        """
        return self.answer(node, parts).rules

    def explain(self, node: fx.Node, parts: int = 2) -> str:
        """Why the node has only the replicate rule, such as ``"no rule for aten.nonzero.default: ..."``; "" if it has others."""
        return self.answer(node, parts).reason

    def answer(self, node: fx.Node, parts: int) -> Answer:
        """Rules, the reason where there is only one, and the candidates that were turned down."""
        if parts < 1:
            raise RuleError(f"cannot cut {node.name} in {parts} parts; expected at least 1")
        if node.op == "placeholder":
            return _free(node, parts)
        if node.op != "call_function" or node.target is operator.getitem:
            return Answer((_replicate(node),), f"{node.name} follows the node that computes it")
        if parts == 1:
            return Answer((_replicate(node),), "one part is no cut")
        try:
            signature = signature_of(node)
        except RuleError as problem:
            return Answer((_replicate(node),), _no_rule(node.target, str(problem)))
        key = (signature.key, parts)
        if key not in self._answers:
            self._answers[key] = self._stored(signature, parts) or self._work_out(signature, parts)
        return self._answers[key]

    def _stored(self, signature: OpSignature, parts: int) -> Answer | None:
        found = self._store.get(f"{signature.key} / {parts}")
        answer = None if found is None else answer_from_json(found)
        if answer is None or not all(fits(rule, signature, parts) for rule in answer.rules):
            return None
        return answer

    def _work_out(self, signature: OpSignature, parts: int) -> Answer:
        answer = self._judged(signature, parts)
        self._store.put(f"{signature.key} / {parts}", answer_to_json(answer))
        return answer

    def _judged(self, signature: OpSignature, parts: int) -> Answer:
        whole = _replicate_rule(signature)
        obstacle = _obstacle(signature)
        if obstacle:
            return Answer((whole,), _no_rule(signature.target, obstacle))
        problems: list[str] = []
        candidates = list(_candidates(signature, parts, problems))
        creates = not signature.tensors or names_sizes(signature.target)
        fitting = [rule for rule in _distinct(candidates) if fits(rule, signature, parts) and (creates or _cuts_inputs(rule))]
        if not self._validate:
            reason = "" if fitting else _no_rule(signature.target, "no source names one that fits")
            return Answer((whole, *fitting), reason)
        trial = self._trial(signature, parts)
        if isinstance(trial, str):
            return Answer((whole,), _no_rule(signature.target, f"its rules cannot be checked by execution ({trial})"))
        rejected: list[tuple[Rule, str]] = []
        accepted = self._accept(trial, fitting, rejected)
        if not accepted and not any(rule.is_replicate is False for rule in candidates):
            found = [rule for rule in self._discovered(trial) if fits(rule, signature, parts)]
            accepted = self._accept(trial, found, rejected)
        if accepted:
            return Answer((whole, *accepted), "", tuple(rejected))
        return Answer(
            (whole,), _no_rule(signature.target, _why_none(signature, candidates, rejected, problems, parts)), tuple(rejected)
        )

    def _accept(self, trial: Trial, rules: list[Rule], rejected: list[tuple[Rule, str]]) -> list[Rule]:
        accepted = []
        for rule in rules:
            key = (trial.signature.key, trial.parts, rule.inputs + rule.outputs)
            if key not in self._verdicts:
                self._verdicts[key] = failure(trial, rule)
            if self._verdicts[key]:
                rejected.append((rule, self._verdicts[key]))
            else:
                accepted.append(rule)
        return accepted

    def _trial(self, signature: OpSignature, parts: int) -> Trial | str:
        """The trial of a signature, shared between signatures that shrink to the same small one."""
        found = shrink(signature, parts)
        if isinstance(found, str):
            return found
        return self._trials.setdefault((found.signature.key, found.parts), found)

    def _discovered(self, trial: Trial) -> tuple[Rule, ...]:
        key = (trial.signature.key, trial.parts)
        if key not in self._discoveries:
            self._discoveries[key] = tuple(discover(trial))
        return self._discoveries[key]


def _candidates(signature: OpSignature, parts: int, problems: list[str]) -> Iterator[Rule]:
    try:
        yield from torch_rules(signature, parts)
    except Exception as problem:  # torch's tables are foreign code: any failure only means that they have no answer
        problems.append(f"torch's table fails with {type(problem).__name__}: {str(problem).strip().splitlines()[:1]}")
    yield from hocket_annotations(signature)
    yield from family_rules(signature, parts)
    yield from linear_rules(signature)
    yield from chain_rules(signature)


def _distinct(rules: list[Rule]) -> list[Rule]:
    """The first rule of each kind, without the one that every op has."""
    seen: dict[tuple[Placement | None, ...], Rule] = {}
    for rule in rules:
        if not rule.is_replicate:
            seen.setdefault(rule.inputs + rule.outputs, rule)
    return list(seen.values())


def _cuts_inputs(rule: Rule) -> bool:
    """Whether pieces go in. Pieces can come out of whole inputs only where the op is told the size to make."""
    return not all(isinstance(placement, Replicate) for placement in rule.inputs)


def _obstacle(signature: OpSignature) -> str:
    """A reason to look for no rule at all."""
    target = signature.target
    if not isinstance(target, torch._ops.OpOverload):
        return "it is not an operator with a schema"
    made = [spec for spec in signature.outputs if spec is not None]
    if not made:
        return "it computes no tensor"
    if target._schema.is_mutable:
        return "it changes its input in place"
    tags = target.tags
    if target in POSITIONAL:
        return "its values depend on where they stand; make them whole and cut them"
    if torch.Tag.nondeterministic_seeded in tags and signature.arguments.get("dropout_p") != 0.0:
        return "it draws random numbers, and pieces would draw different ones"
    return ""


def _why_none(
    signature: OpSignature, candidates: list[Rule], rejected: list[tuple[Rule, str]], problems: list[str], parts: int
) -> str:
    if all(size <= 1 for spec in (*signature.tensors, *signature.outputs) if spec is not None for size in spec.shape):
        return "there is no dimension to cut, and it is not linear"
    if rejected:
        rule, why = rejected[0]
        return f"all {len(rejected)} candidates fail on pieces, the first of them {rule}: {why}"
    if any(not rule.is_replicate for rule in candidates):
        return f"no size that could be cut has {parts} non-empty parts"
    if problems:
        return problems[0]
    return "neither torch's tables nor hocket's know one, and trying cuts found none"


def _no_rule(target: object, why: str) -> str:
    return f"no rule for {target_name(target)}: {why}"


def _replicate_rule(signature: OpSignature) -> Rule:
    outputs = tuple(None if spec is None else Replicate() for spec in signature.outputs)
    return Rule((Replicate(),) * len(signature.tensors), outputs, "replicate")


def _replicate(node: fx.Node) -> Rule:
    inputs = () if node.op == "placeholder" else tuple(Replicate() for _ in tensor_inputs(node))
    leaves = tensor_leaves(node.meta.get("val"))
    return Rule(inputs, tuple(Replicate() if isinstance(leaf, torch.Tensor) else None for leaf in leaves), "replicate")


def _free(node: fx.Node, parts: int) -> Answer:
    """An input lies as the plan says: whole, or cut in any dimension that leaves no rank without a piece."""
    whole = _replicate(node)
    value = node.meta.get("val")
    if not isinstance(value, torch.Tensor) or parts == 1:
        return Answer((whole,), "one part is no cut" if parts == 1 else f"{node.name} is no tensor")
    try:
        signature = OpSignature(node.target, (), (), (spec_of(value),))
    except RuleError as problem:
        return Answer((whole,), f"{node.name}: {problem}")
    cuts = (Rule((), (Shard(dim),), "input") for dim in range(value.ndim))
    fitting = tuple(rule for rule in cuts if fits(rule, signature, parts))
    return Answer((whole, *fitting), "" if fitting else f"no dimension of {node.name} has {parts} non-empty parts")
