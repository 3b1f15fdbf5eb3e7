"""Plans within a memory limit, by charging for bytes.

    min over plans of  seconds + charge x bytes held at the peak,   at the lowest charge tried whose plan is within the limit

Held are inputs, parameters, the optimizer state of the program, activations saved for the backward, and gradients, each with its
time of life in program order (``cost.estimate``); copies that redistributions make count too, but are not charged. The peak moves
when what was held there shrinks, so every charge is for all values that some plan before held at its peak.
"""

from __future__ import annotations

from collections.abc import Callable

from ..cost.estimate import Estimator
from ..cost.transfer import TransferPrices
from ..errors import PlanError
from ..program import RoleKind
from .plan import Certificate, Plan
from .pricing import MemoryCharge
from .view import View

_CHARGES = tuple(10.0**exponent for exponent in range(-14, -5))
"""Seconds charged per held byte, tried from low to high until a memory limit is met."""

_HELD = {RoleKind.PARAM: "parameters", RoleKind.BUFFER: "buffers", RoleKind.STATE: "optimizer state"}
"""Names of what stays from step to step."""


def plan_within(limit: int, plan_at: Callable[[MemoryCharge | None], Plan], view: View, prices: TransferPrices) -> Plan:
    """A plan that holds at most ``limit`` bytes a rank at once.

    plan_at: the best plan under a charge. Raises PlanError with the least that was found, and what it consists of.
    """
    free = least = plan_at(None)
    if free.cost.peak_bytes <= limit:
        return free
    held = _estimator(free, view, prices).held_at_peak()
    for per_byte in _CHARGES:
        found = plan_at(MemoryCharge(per_byte, held))
        least = min(least, found, key=lambda one: one.cost.peak_bytes)
        if found.cost.peak_bytes <= limit:
            bound = min(free.certificate.lower_bound, found.cost.seconds)
            certificate = Certificate(found.cost.seconds, bound, "charge per held byte; bound: without the limit")
            return Plan(found.mesh, found.nodes, found.results, found.cost, certificate, found.decisions)
        held |= _estimator(found, view, prices).held_at_peak()
    raise PlanError(
        f"memory_limit is {limit} bytes a rank, but the least that a plan on mesh {least.mesh} was found to hold is "
        f"{least.cost.peak_bytes:.0f} ({_breakdown(least, view, prices)}): use more ranks, smaller inputs, or leave axes and "
        "parameters free of tactics and constraints"
    )


def _estimator(plan: Plan, view: View, prices: TransferPrices) -> Estimator:
    return Estimator(view, plan.nodes, plan.results, prices)


def _breakdown(plan: Plan, view: View, prices: TransferPrices) -> str:
    """What the bytes of a plan's peak are: each kind of input, and the rest."""
    sizes = _estimator(plan, view, prices).sizes
    found: dict[str, int] = {}
    for site in view.inputs():
        layout, value = plan.nodes[site.name].outputs[0], site.makes[0]
        assert layout is not None
        assert value is not None
        assert site.role is not None
        kind = _HELD.get(site.role.kind, "inputs")
        found[kind] = found.get(kind, 0) + int(sizes.local(value, layout).nbytes)
    found["activations, gradients and copies"] = int(plan.cost.peak_bytes) - sum(found.values())
    return ", ".join(f"{name} {size}" for name, size in found.items())
