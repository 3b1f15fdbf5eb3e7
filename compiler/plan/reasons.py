"""Why the plan is as it is: a Decision per parameter, per op that no rule cuts, and per value that goes over the wire."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import torch
import torch.fx as fx

from ..cost.estimate import redistributions
from ..layout import Layout, Shard, format_layout, format_placement, local_shape
from ..program import Decision, RoleKind, note
from ..redistribute import StepKind
from ..rules.rule import Rule
from .constraints import Restriction, port_type, possible_placements
from .elimination import INFINITE
from .plan import NodePlan
from .pricing import AVOIDED, UNIT, Choice, Pricing, Rules, fits, input_layout, output_layout
from .problem import AxisProblem
from .view import Site, TensorType, View

aten = torch.ops.aten

BY = "plan"

_SAME_ENTRIES = frozenset(
    (aten.view.default, aten._unsafe_view.default, aten.reshape.default, aten._to_copy.default, aten.slice.Tensor)
)


def parameter_decisions(
    pricing: Pricing,
    problems: Sequence[AxisProblem],
    solutions: Sequence[Sequence[int]],
    restrictions: Sequence[Mapping[int, Restriction]],
    choices: Sequence[Choice],
) -> Iterator[Decision]:
    """One per parameter: its placements, and per axis by how much they beat the next best, or who ruled the others out and what the
    cheapest of those would cost; everything else as planned. The source is where the parameter is first used.
    """
    wanted = {i for i, site in enumerate(pricing.view.sites) if site.is_input and site.role and site.role.kind is RoleKind.PARAM}
    touching = [_touching(problem, wanted) for problem in problems]
    for index in sorted(wanted):
        site = pricing.view.sites[index]
        if site.makes[0] is None:
            continue
        reasons: list[str] = []
        gains: list[float] = []
        for axis, (name, parts) in enumerate(pricing.mesh.axes):
            problem, solution = problems[axis], solutions[axis]
            rules, label = problem.labels[index].rules, solution[index]
            reason = f"{format_placement(rules[label].outputs[0])} on {name}"
            other, gain = _next_best(problem, solution, index, touching[axis][index])
            if parts > 1 and other is not None:
                gains.append(gain)
                versus = format_placement(rules[other].outputs[0])
                reason += f", {gain:.3g} s a step better than {versus} with everything else as planned"
            if parts > 1:
                reason += _ruled_out(pricing, choices, index, axis, restrictions[axis][index])
            reasons.append(reason)
        assert site.role is not None
        cut = any(isinstance(rule.outputs[0], Shard) for rule in choices[index])
        reason = f"{site.role.name}: {'; '.join(reasons)}"
        yield Decision(BY, site.name, cut, reason, min(gains) if gains else None, _first_use(pricing.view, index))


def _ruled_out(pricing: Pricing, choices: Sequence[Choice], index: int, axis: int, restriction: Restriction) -> str:
    """Who narrowed what a parameter may be on an axis, and the cheapest placement that this rules out."""
    view, parts = pricing.view, pricing.mesh.shape[axis]
    site = view.sites[index]
    assert site.role is not None
    tensor = port_type(view, site)
    assert tensor is not None
    others = [p for p in possible_placements(site.role.kind, tensor.shape, parts) if p not in restriction.allowed]
    verb = "fixed by" if len(restriction.allowed) == 1 else "within what is allowed by"
    planned = output_layout(choices[index], 0)
    assert planned is not None
    own = _port_seconds(pricing, choices, index, planned)
    priced = []
    for placement in others:
        layout = (*planned[:axis], placement, *planned[axis + 1 :])
        seconds = _port_seconds(pricing, choices, index, layout) if fits(tensor.shape, layout, pricing.mesh) else None
        if seconds is not None and own is not None:
            priced.append((seconds - own, _held(pricing, tensor, layout) - _held(pricing, tensor, planned), placement))
    if not priced:
        return f", {verb} {restriction.origin}" if len(restriction.allowed) == 1 or others else ""
    seconds, held, placement = min(priced, key=lambda found: found[:2])
    return (
        f", {verb} {restriction.origin}; without that the cheapest, {format_placement(placement)}, would take "
        f"{_more_or_less(f'{abs(seconds):.3g}', 's a step', seconds)} and {_more_or_less(f'{abs(held):,}', 'bytes a rank', held)} "
        "with everything else as planned"
    )


def _more_or_less(amount: str, unit: str, difference: float) -> str:
    return f"{amount} {unit} {'more' if difference > 0 else 'less'}" if difference else f"as many {unit}"


def _held(pricing: Pricing, tensor: TensorType, layout: Layout) -> int:
    return math.prod(local_shape(tensor.shape, layout, pricing.mesh)) * tensor.itemsize


def _port_seconds(pricing: Pricing, choices: Sequence[Choice], index: int, layout: Layout) -> float | None:
    """What an input in some layout costs in redistributions of it, and of what must lie as it does; None where it cannot be."""
    view, site = pricing.view, pricing.view.sites[index]
    assert site.makes[0] is not None
    moves: list[tuple[Layout, Layout, int]] = []
    for user, slot in view.values[site.makes[0]].uses:
        moves.append((layout, layout if user == index else input_layout(choices[user], slot), site.makes[0]))
    for value in site.uses:
        maker, output = view.values[value].maker
        made = layout if maker == index else output_layout(choices[maker], output)
        wanted = {input_layout(choices[user], slot) for user, slot in view.values[value].uses if user != index}
        if made is not None and layout not in wanted:
            moves.append((made, layout, value))
    total = 0.0
    for source, target, value in dict.fromkeys(moves):
        tensor = view.values[value].type
        if source != target:
            transfer = pricing.transfers.price(source, target, tensor.shape, tensor.itemsize)
            if transfer is None:
                return None
            total += transfer.seconds
    return total


def _first_use(view: View, index: int) -> str:
    """Line and module of the first op that reads an input: ``"model.py:41 self.o(h), in layers.0.attention.o"``."""
    value = view.sites[index].makes[0]
    users = sorted(user for user, _ in view.values[value].uses) if value is not None else []
    notes = [note(node) for user in users if (node := view.sites[user].node) is not None and view.sites[user].is_op]
    first = next((found for found in notes if found.source), None)
    if first is None:
        return ""
    return f"{first.source}, in {first.module}" if first.module else first.source


def _touching(problem: AxisProblem, wanted: set[int]) -> dict[int, list[int]]:
    found: dict[int, list[int]] = {index: [] for index in wanted}
    for number, factor in enumerate(problem.factors):
        for variable in factor.variables:
            if variable in found:
                found[variable].append(number)
    return found


def _next_best(problem: AxisProblem, solution: Sequence[int], index: int, touching: Sequence[int]) -> tuple[int | None, float]:
    """The best other label with all others fixed, and how much dearer it is in seconds; None when no other goes with them."""
    row = np.zeros(problem.domains[index], dtype=np.int64)
    for number in touching:
        factor = problem.factors[number]
        row = np.minimum(row + factor.table[tuple(slice(None) if v == index else solution[v] for v in factor.variables)], INFINITE)
    own = int(row[solution[index]])
    row[solution[index]] = INFINITE
    other = int(row.argmin())
    if row[other] >= AVOIDED:
        return None, 0.0
    return other, (int(row[other]) - own) * UNIT


def uncut_decisions(
    pricing: Pricing, rules: Rules, candidates: Sequence[Sequence[tuple[Rule, ...]]], choices: Sequence[Choice]
) -> Iterator[Decision]:
    """One per op with real work that no rule cuts on some axis, with the time that a cut would have saved."""
    for index, site in enumerate(pricing.view.sites):
        if not site.is_op or site.node is None:
            continue
        axes = [
            (name, parts)
            for axis, (name, parts) in enumerate(pricing.mesh.axes)
            if parts > 1 and all(rule.is_replicate for rule in candidates[axis][index])
        ]
        if not axes or not _could_be_cut(pricing, site):
            continue
        busy = max(0.0, pricing.site_seconds(site, choices[index]) - pricing.cluster.op_overhead)
        lost = sum(busy * (1 - 1 / parts) for _, parts in axes)
        if lost > 0:
            names = ", ".join(name for name, _ in axes)
            why = rules.explain(site.node, axes[0][1]) or f"no rule of {site.node.target} fits what comes before it"
            reason = f"{why}; every rank of {names} computes all of it"
            yield Decision(BY, site.name, applied=False, reason=reason, gain=-lost, source=pricing.view.source_of(site))


def _becomes_log_softmax(node: fx.Node) -> bool:
    """Whether a value, or one that views, casts or slices of it make, is what a fused log-softmax reads."""
    pending = [node]
    while pending:
        for user in pending.pop().users:
            if user.target is aten._log_softmax.default:
                return True
            if user.target in _SAME_ENTRIES:
                pending.append(user)
    return False


def _could_be_cut(pricing: Pricing, site: Site) -> bool:
    values = [v for v in (*site.uses, *site.makes) if v is not None]
    return any(size > 1 for v in values for size in pricing.view.values[v].type.shape)


def redistribution_decisions(
    pricing: Pricing, nodes: Mapping[str, NodePlan], results: Sequence[Layout | None]
) -> Iterator[Decision]:
    """One per value and layout that is made by collectives, with bytes and predicted seconds."""
    view = pricing.view
    for move in redistributions(view, nodes, results):
        value = view.values[move.value]
        transfer = pricing.transfers.price(move.source, move.target, value.type.shape, value.type.itemsize)
        assert transfer is not None
        kinds = [f"{step.kind} on {pricing.mesh.names[step.axis]}" for step in transfer.steps if step.kind is not StepKind.SLICE]
        if not kinds:
            continue
        names = [view.sites[user].name for user in move.users]
        shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
        reason = (
            f"{' then '.join(kinds)}: {format_layout(move.source)} -> {format_layout(move.target)}, "
            f"{transfer.bytes_on_wire:.0f} bytes on the wire, {transfer.seconds:.3g} s, for {shown}"
        )
        to_port = any(not view.sites[user].is_op for user, _ in value.uses)
        avoided = pricing.avoided(move.source, move.target, value, to_port=to_port)
        if avoided:
            reason += f"; {', '.join(map(repr, avoided))} would do without it, but no rule allows that"
        maker = view.sites[value.maker[0]]
        if maker.node is not None and _becomes_log_softmax(maker.node):
            axes = {pricing.mesh.names[step.axis]: None for step in transfer.steps if step.kind is not StepKind.SLICE}
            reason += f"; {' or '.join(f'VocabularyParallel({axis!r})' for axis in axes)} would leave these logits cut"
        yield Decision(BY, maker.name, applied=True, reason=reason, gain=-transfer.seconds, source=view.source_of(maker))
