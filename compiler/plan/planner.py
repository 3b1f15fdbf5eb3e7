"""Choose where everything lies: rules x mesh x cost -> a Plan with its reasons and its certificate.

One axis: the exact minimum, by variable elimination. Several axes: one axis after the other, each exactly given the rest, until
no axis improves (coordinate descent on whole layouts); the certificate then bounds what that may have missed by what computing
alone costs. A memory limit is met by charging for what is held (``memory``).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from ...runtime.collector import without_collector
from ...runtime.mesh import Mesh
from ..cost.cluster import COLLECTIVES, Cluster
from ..cost.estimate import estimate
from ..cost.transfer import TransferPrices
from ..errors import InputError, PlanError
from ..layout import Partial, Placement, Shard, format_layout
from ..program import Program, RoleKind
from ..rules.rule import Rule
from . import reasons
from .constraints import Restriction, port_restrictions, products_cutting, tactics_by_axis
from .elimination import LARGE, LARGEST, SMALL, Infeasible, Solution, minimise
from .memory import plan_within
from .plan import Certificate, NodePlan, Plan
from .pricing import (
    AVOIDED,
    UNIT,
    Choice,
    Labels,
    MemoryCharge,
    Pricing,
    Rules,
    input_layout,
    output_layout,
    whole_rule,
)
from .problem import AxisProblem, ProblemBuilder
from .tactics import Auto, Promises, Tactic
from .view import Site, View, view_program

MAX_ROUNDS = 6
Candidates = list[list[tuple[Rule, ...]]]
"""Per axis and site, the rules that may be chosen."""


@without_collector()
def plan(
    program: Program,
    mesh: Mesh,
    rules: Rules,
    cluster: Cluster,
    tactics: Sequence[Tactic] | Literal["auto"] | str = "auto",
    constraints: Mapping[str, Any] | None = None,
    *,
    outputs: str = "any",
    gradients: str = "any",
    memory_limit: int | None = None,
) -> Plan:
    """Plan a logical program for a mesh.

    tactics: at most one per axis, axes without one are the solver's; constraints: parameter, buffer or input name, or a pattern
    such as ``"layers.*.w1.weight"`` -> ``{"tp": Shard(0)}``, ``"tp:S(0)"`` or one placement per axis; outputs: "any", or
    "replicate" if every rank needs all of them; gradients: "any", or "like-params" if a gradient must lie as its parameter;
    memory_limit: most bytes that a rank may hold at once. The same arguments give the same plan on every machine.

    Raises PlanError for conflicts (naming both sides), unknown names or axes, and limits that cannot be met.
    """
    for name, value, allowed in (("outputs", outputs, ("any", "replicate")), ("gradients", gradients, ("any", "like-params"))):
        if value not in allowed:
            raise InputError(f"{name} must be {' or '.join(map(repr, allowed))}; found {value!r}")
    if program.mesh is not None:
        raise PlanError(f"expected a logical program; this one is already lowered to mesh {program.mesh}")
    view = view_program(program, gradients_like_parameters=gradients == "like-params")
    promises = Promises(gradients == "like-params", any(role.kind is RoleKind.STATE for role in program.signature.inputs))
    chosen = tactics_by_axis(tactics, mesh, promises)
    of_ops = _op_candidates(view, mesh, rules, chosen)
    cut_weights = [_cut_weights(view, of_axis) for of_axis in of_ops]
    restrictions = port_restrictions(view, mesh, chosen, constraints or {}, outputs, cut_weights)
    candidates = [_without_unmade(view, _with_ports(view, *pair)) for pair in zip(of_ops, restrictions, strict=True)]
    search = _Search(view, mesh, cluster, rules, chosen, restrictions, candidates)
    if memory_limit is None:
        return search.charged(None)
    return plan_within(memory_limit, search.charged, view, TransferPrices(mesh, cluster))


def _op_candidates(view: View, mesh: Mesh, rules: Rules, tactics: Sequence[Tactic]) -> Candidates:
    """The rule table's answer for every op, asked once per signature; ports get their uncut rule for now."""
    found: Candidates = []
    known: dict[tuple[int, int, Tactic, int], tuple[Rule, ...]] = {}
    for parts, tactic in zip(mesh.shape, tactics, strict=True):
        of_axis = []
        for site in view.sites:
            key = (site.signature, len(site.uses), tactic if type(tactic).rules is not Tactic.rules else Tactic(""), parts)
            if key not in known:
                ask = site.is_op and parts > 1 and any(v is not None for v in (*site.uses, *site.makes))
                of_op = rules.rules(site.node, parts) if ask and site.node is not None else (whole_rule(site),)
                known[key] = of_op if site.node is None else tactic.rules(site.node.target, of_op)
            of_axis.append(known[key])
        found.append(of_axis)
    return found


def _cut_weights(view: View, of_axis: Sequence[tuple[Rule, ...]]) -> frozenset[int]:
    """Parameters that a dense product can take cut."""
    return frozenset(
        index
        for index, site in enumerate(view.sites)
        if any(isinstance(rule.inputs[slot], Shard) for op, slot in products_cutting(view, site) for rule in of_axis[op])
    )


def _with_ports(view: View, of_ops: Sequence[tuple[Rule, ...]], restrictions: Mapping[int, Restriction]) -> list[tuple[Rule, ...]]:
    """Candidates with a rule per allowed placement for every port. Equal candidates are one object."""
    known: dict[object, tuple[Rule, ...]] = {}
    found = list(of_ops)
    for index, restriction in restrictions.items():
        site = view.sites[index]
        key = (restriction.allowed, len(site.uses), site.is_input)
        if key not in known:
            made = 1 if site.is_input else 0
            known[key] = tuple(Rule((p,) * len(site.uses), (p,) * made, "port") for p in restriction.allowed)
        found[index] = known[key]
    return found


def _without_unmade(view: View, candidates: Sequence[tuple[Rule, ...]]) -> list[tuple[Rule, ...]]:
    """Candidates less those that want a kind of partial value which nothing before them makes. Equal candidates stay one object."""
    partial: list[frozenset[Placement]] = [frozenset()] * len(view.values)
    known: dict[object, tuple[tuple[Rule, ...], list[frozenset[Placement]]]] = {}
    found = []
    for site, rules in zip(view.sites, candidates, strict=True):
        key = (id(rules), *(partial[value] for value in site.uses))
        if key not in known:
            kept = tuple(
                rule
                for rule in rules
                if all(not isinstance(p, Partial) or p in partial[v] for p, v in zip(rule.inputs, site.uses, strict=True))
            )
            makes = [_partials(kept, output) for output in range(len(site.makes))]
            known[key] = (rules if len(kept) == len(rules) else kept, makes)
        kept, makes = known[key]
        for value, kinds in zip(site.makes, makes, strict=True):
            if value is not None:
                partial[value] = kinds
        found.append(kept)
    return found


def _partials(rules: Sequence[Rule], output: int) -> frozenset[Placement]:
    return frozenset(p for rule in rules if isinstance(p := rule.outputs[output], Partial))


@dataclass(frozen=True)
class _Found:
    """Choices for every site. objective in units; problems and solutions per axis; is_exact: proven optimal on its one axis."""

    pricing: Pricing
    choices: list[Choice]
    objective: int
    problems: list[AxisProblem]
    solutions: list[list[int]]
    lower_bound: float
    method: str


@dataclass(frozen=True)
class _Search:
    view: View
    mesh: Mesh
    cluster: Cluster
    rules: Rules
    tactics: tuple[Tactic, ...]
    restrictions: list[dict[int, Restriction]]
    candidates: Candidates

    def best(self, charge: MemoryCharge | None) -> _Found:
        """The best choices found; exact on one axis."""
        pricing = Pricing(self.view, self.mesh, self.cluster, self.tactics, charge or MemoryCharge())
        builder = ProblemBuilder(pricing)
        axes = range(len(self.mesh.axes))
        told = [axis for axis in axes if not isinstance(self.tactics[axis], Auto)]
        free = [axis for axis in axes if axis not in told]
        orders = list(dict.fromkeys([(*told, *free), (*told, *reversed(free))]))
        if len(free) == 2 and self._are_alike(*free):
            orders = orders[:1]  # the other order gives the mirror image
        return min((self._descend(pricing, builder, order) for order in orders), key=lambda found: found.objective)

    def _are_alike(self, one: int, other: int) -> bool:
        """Whether two axes could change their names: as many ranks, as fast, and the same allowed everywhere."""
        (name, parts), (other_name, other_parts) = self.mesh.axes[one], self.mesh.axes[other]
        if parts != other_parts or any(self.cluster.line(k, name) != self.cluster.line(k, other_name) for k in COLLECTIVES):
            return False
        return self.candidates[one] == self.candidates[other]

    def _descend(self, pricing: Pricing, builder: ProblemBuilder, order: Sequence[int]) -> _Found:
        choices: list[Choice] = [(pricing.whole(site),) * len(self.mesh.axes) for site in self.view.sites]
        problems: dict[int, AxisProblem] = {}
        solutions: dict[int, Solution] = {}
        objective: int | None = None
        unchanged = changes = 0
        solved: dict[int, int] = {}  # axis -> how many changes the choices had seen when it had been solved
        for turn, axis in enumerate(itertools.islice(itertools.cycle(order), MAX_ROUNDS * len(order))):
            if solved.get(axis) == changes:
                break  # nothing has changed since, on this axis or any other
            problem = builder.build(self._labels(pricing, axis, choices))
            is_first = turn < len(order)
            solution = self._solve(problem, axis, is_first=is_first)
            if is_first or objective is None or solution.objective < objective:
                unchanged, objective = 0, solution.objective
                changes += 1
                problems[axis], solutions[axis] = problem, solution
                rules = problem.chosen(solution.labels)
                choices = [(*c[:axis], rule, *c[axis + 1 :]) for c, rule in zip(choices, rules, strict=True)]
            else:
                unchanged += 1
            solved[axis] = changes
            if turn >= len(order) - 1 and (len(order) == 1 or unchanged >= len(order)):
                break
        assert objective is not None
        lower, method = self._bound(pricing, problems, solutions, objective)
        ordered = [problems[axis] for axis in range(len(order))]
        labels = [solutions[axis].labels for axis in range(len(order))]
        return _Found(pricing, choices, objective, ordered, labels, lower, method)

    def _labels(self, pricing: Pricing, axis: int, choices: list[Choice]) -> list[Labels]:
        found = []
        for index, site in enumerate(self.view.sites):
            labels = pricing.labels(site, axis, self.candidates[axis][index], choices[index])
            if labels is None:
                raise PlanError(self._no_label(index, site, axis, choices[index]))
            found.append(labels)
        return found

    def _no_label(self, index: int, site: Site, axis: int, choice: Choice) -> str:
        name = str(site.role) if site.role is not None else site.name
        layout = output_layout(choice, 0) if site.is_input else input_layout(choice, 0)
        mine = self.restrictions[axis].get(index)
        others = [r[index].origin for i, r in enumerate(self.restrictions) if i != axis and index in r]
        return (
            f"{name}: {mine.origin if mine else 'its rules'} on axis {self.mesh.names[axis]} does not go with "
            f"{format_layout(layout)} of {' and '.join(others)}: a dimension cut over two axes must divide evenly"
        )

    def _solve(self, problem: AxisProblem, axis: int, *, is_first: bool) -> Solution:
        try:
            return self._minimised(problem, is_first=is_first)
        except Infeasible as error:
            index = error.variable
            site = self.view.sites[index] if index < len(self.view.sites) else None
            where = f"{site.role or site.name}" if site else "a shared value"
            if not error.is_proven:
                where = "the program, in the search that its size allows,"
            said = sorted({r.origin for r in self.restrictions[axis].values() if not r.origin.startswith("its shape")})
            raise PlanError(
                f"no plan on axis {self.mesh.names[axis]}: {where} has no placement left under {'; '.join(said)}"
            ) from error

    def _minimised(self, problem: AxisProblem, *, is_first: bool) -> Solution:
        """On several axes small tables, and at an axis's first turn large ones too where the small ones leave a move that some
        tactic avoids; the better of both. Before it is said that nothing is possible, the largest.
        """
        if len(self.mesh.axes) == 1:
            sizes: tuple[int, ...] = (LARGE,)
        else:
            sizes = (SMALL, LARGE) if is_first else (SMALL,)
        best: Solution | None = None
        for size in sizes:
            try:
                found = minimise(problem.domains, problem.factors, max_table=size)
            except Infeasible as error:
                if error.is_proven:
                    raise
                continue
            best = found if best is None or found.objective < best.objective else best
            if best.objective - found.lower_bound < AVOIDED:
                break
        return best or minimise(problem.domains, problem.factors, max_table=LARGEST)

    def _bound(
        self, pricing: Pricing, problems: Mapping[int, AxisProblem], solutions: Mapping[int, Solution], objective: int
    ) -> tuple[float, str]:
        if len(problems) == 1 and problems[0].is_exact:
            solution = solutions[0]
            return solution.lower_bound * UNIT, "elimination" if solution.is_exact else "elimination with mini-buckets"
        known: dict[object, float] = {}
        bound = sum(self._least_seconds(pricing, index, known) for index in range(len(self.view.sites)))
        method = "coordinate descent over axes" if len(problems) > 1 else "elimination over some sets of layouts"
        return min(bound, objective * UNIT), f"{method}; bound: computing with free communication"

    def _least_seconds(self, pricing: Pricing, index: int, known: dict[object, float]) -> float:
        """The cheapest way to run an op under any choice on all axes."""
        site = self.view.sites[index]
        if not site.is_op:
            return 0.0
        combinations = [self.candidates[axis][index] for axis in range(len(self.mesh.axes))]
        key = (site.signature, tuple(map(id, combinations)))
        if key not in known:
            if math.prod(map(len, combinations)) > 512:
                seconds = pricing.site_seconds(site, (pricing.whole(site),) * len(combinations)) - self.cluster.op_overhead
                known[key] = max(0.0, seconds) / self.mesh.size
            else:
                known[key] = min(pricing.site_seconds(site, choice) for choice in itertools.product(*combinations))
        return known[key]

    def charged(self, charge: MemoryCharge | None) -> Plan:
        """The plan under a charge for held bytes."""
        return self.plan(self.best(charge), charged=charge is not None)

    def plan(self, found: _Found, *, charged: bool = False) -> Plan:
        """The Plan of some choices, with its cost and reasons."""
        nodes: dict[str, NodePlan] = {}
        known: dict[object, NodePlan] = {}
        for site, choice in zip(self.view.sites, found.choices, strict=True):
            if site.node is not None:
                key = (site.signature, len(site.uses), *map(id, choice))
                if key not in known:
                    known[key] = _node_plan(site, choice)
                nodes[site.name] = known[key]
        results = tuple(None if use is None else input_layout(found.choices[use[0]], use[1]) for use in self.view.results)
        cost = estimate(self.view, nodes, results, found.pricing.transfers)
        bound = (
            cost.seconds if found.lower_bound >= found.objective * UNIT and not charged else min(found.lower_bound, cost.seconds)
        )
        decisions = (
            *reasons.parameter_decisions(found.pricing, found.problems, found.solutions, self.restrictions, found.choices),
            *reasons.uncut_decisions(found.pricing, self.rules, self.candidates, found.choices),
            *reasons.redistribution_decisions(found.pricing, nodes, results),
        )
        return Plan(self.mesh, nodes, results, cost, Certificate(cost.seconds, bound, found.method), decisions)


def _node_plan(site: Site, choice: Choice) -> NodePlan:
    inputs = tuple(input_layout(choice, slot) for slot in range(len(site.uses))) if site.is_op else ()
    outputs = tuple(output_layout(choice, output) for output in range(len(site.makes)))
    return NodePlan(inputs, outputs, tuple(rule.origin for rule in choice))
