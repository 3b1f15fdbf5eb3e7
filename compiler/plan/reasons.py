"""Why the plan is as it is: a Decision per parameter, per op that no rule cuts, and per value that goes over the wire."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from ..cost.estimate import redistributions
from ..layout import Layout, Shard, format_layout, format_placement
from ..program import Decision, RoleKind
from ..redistribute import StepKind
from ..rules.rule import Rule
from .constraints import Restriction
from .elimination import INFINITE
from .plan import NodePlan
from .problem import AVOIDED, UNIT, AxisProblem, Choice, Pricing, Rules
from .view import Site

BY = "plan"


def parameter_decisions(
    pricing: Pricing,
    problems: Sequence[AxisProblem],
    solutions: Sequence[Sequence[int]],
    restrictions: Sequence[Mapping[int, Restriction]],
) -> Iterator[Decision]:
    """One per parameter: its placements, who fixed them, or by how much they beat the next best with everything else as planned."""
    wanted = {i for i, site in enumerate(pricing.view.sites) if site.is_input and site.role and site.role.kind is RoleKind.PARAM}
    touching = [_touching(problem, wanted) for problem in problems]
    for index in sorted(wanted):
        site = pricing.view.sites[index]
        if site.makes[0] is None:
            continue
        reasons: list[str] = []
        gains: list[float] = []
        cut = False
        for axis, (name, parts) in enumerate(pricing.mesh.axes):
            problem, solution = problems[axis], solutions[axis]
            rules, label = problem.labels[index].rules, solution[index]
            placement = rules[label].outputs[0]
            cut |= isinstance(placement, Shard)
            reason = f"{format_placement(placement)} on {name}"
            if parts > 1 and len(rules) == 1:
                reason += f", fixed by {restrictions[axis][index].origin}"
            elif parts > 1:
                other, gain = _next_best(problem, solution, index, touching[axis][index])
                if other is not None:
                    gains.append(gain)
                    versus = format_placement(rules[other].outputs[0])
                    reason += f", {gain:.3g} s a step better than {versus} with everything else as planned"
            reasons.append(reason)
        assert site.role is not None
        yield Decision(BY, site.name, cut, f"{site.role.name}: {'; '.join(reasons)}", min(gains) if gains else None)


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
        yield Decision(BY, maker.name, applied=True, reason=reason, gain=-transfer.seconds, source=view.source_of(maker))
