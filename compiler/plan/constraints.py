"""From tactics and user constraints to what each port may be on each axis; conflicts name both sides."""

from __future__ import annotations

import difflib
import fnmatch
import itertools
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ...runtime.mesh import Mesh
from ..errors import PlanError
from ..layout import Partial, Placement, Replicate, Shard, chunk_size, format_placement, parse_placement
from ..program import RoleKind
from .pricing import fits
from .tactics import Auto, Placements, Port, Promises, Tactic
from .view import STORED, Site, TensorType, View, weight_uses

_PLACEMENT = re.compile(r"R|S\(-?\d+\)|P\(\w+\)")
_NAMED = (*STORED, RoleKind.INPUT)


@dataclass(frozen=True)
class Restriction:
    """Placements that a port may have on one axis, and who says so."""

    allowed: Placements
    origin: str

    def met_with(self, other: Restriction, where: str) -> Restriction:
        """Both at once. Raises PlanError when nothing is left."""
        common = tuple(p for p in self.allowed if p in other.allowed)
        if not common:
            raise PlanError(
                f"{where}: {self.origin} asks for {_listed(self.allowed)}, but {other.origin} asks for {_listed(other.allowed)}"
            )
        if len(common) == len(self.allowed):
            return self
        return other if len(common) == len(other.allowed) else Restriction(common, f"{self.origin} and {other.origin}")


def tactics_by_axis(tactics: Sequence[Tactic] | str, mesh: Mesh, promises: Promises) -> tuple[Tactic, ...]:
    """One tactic per mesh axis, ``Auto`` where none is given. Raises PlanError for unknown axes, two on one axis, or objections."""
    if isinstance(tactics, str):
        if tactics != "auto":
            raise PlanError(f'tactics must be "auto" or a list such as [TensorParallel("tp")]; found {tactics!r}')
        tactics = ()
    chosen: dict[str, Tactic] = {}
    for tactic in tactics:
        _known_axis(tactic.axis, mesh, repr(tactic))
        if tactic.axis in chosen:
            raise PlanError(f"two tactics for axis {tactic.axis}: {chosen[tactic.axis]!r} and {tactic!r}; give each axis one")
        objection = tactic.objection(promises)
        if objection:
            raise PlanError(f"{tactic!r}: {objection}")
        chosen[tactic.axis] = tactic
    return tuple(chosen.get(name, Auto(name)) for name in mesh.names)


def possible_placements(kind: RoleKind, shape: Sequence[int], parts: int) -> Placements:
    """Whole, or cut along any dimension of which every rank gets a piece. Seeds stay whole."""
    cuttable = [] if kind is RoleKind.SEED or parts == 1 else range(len(shape))
    return (Replicate(), *(Shard(d) for d in cuttable if (parts - 1) * chunk_size(shape[d], parts) < shape[d]))


def port_restrictions(
    view: View,
    mesh: Mesh,
    tactics: Sequence[Tactic],
    constraints: Mapping[str, Any],
    outputs: str,
    cut_weights: Sequence[frozenset[int]],
) -> list[dict[int, Restriction]]:
    """Per axis: site -> what that port may be.

    cut_weights: per axis the sites of parameters that some dense product can take cut. Raises PlanError for conflicts.
    """
    asked = _user_restrictions(view, mesh, constraints)
    batch = batch_size(view)
    found: list[dict[int, Restriction]] = []
    for axis, (name, parts) in enumerate(mesh.axes):
        of_axis: dict[int, Restriction] = {}
        for index, site in enumerate(view.sites):
            if site.role is None or port_type(view, site) is None:
                continue
            of_axis[index] = _restricted(
                view, site, name, parts, (tactics[axis], asked, outputs, batch, index in cut_weights[axis])
            )
        found.append(of_axis)
    return _reconciled(view, mesh, tactics, found) if len(found) > 1 else found


def _reconciled(
    view: View, mesh: Mesh, tactics: Sequence[Tactic], restrictions: Sequence[Mapping[int, Restriction]]
) -> list[dict[int, Restriction]]:
    """Restrictions less what no choice on the other axes goes with.

    Where the axes leave nothing together (a bias of 13 that both would cut in two), a tactic that cuts only to save memory yields.
    """
    found = [dict(of_axis) for of_axis in restrictions]
    known: dict[object, list[Placements]] = {}
    for index in found[0]:
        tensor = port_type(view, view.sites[index])
        assert tensor is not None
        asked = [of_axis[index].allowed for of_axis in found]
        key = (tensor.shape, *asked)
        if key not in known:
            known[key] = _compatible(tensor.shape, asked, mesh, tactics)
        for of_axis, before, after in zip(found, asked, known[key], strict=True):
            if before != after:
                of_axis[index] = Restriction(after, f"{of_axis[index].origin}, beside what the other axes cut")
    return found


def _compatible(shape: Sequence[int], asked: Sequence[Placements], mesh: Mesh, tactics: Sequence[Tactic]) -> list[Placements]:
    """Per axis the placements that go with some choice on the other axes; as asked where nothing does."""
    current = list(asked)
    yielding = [axis for axis, tactic in enumerate(tactics) if tactic.cuts_to_save_memory]
    for axis in (None, *yielding):
        if axis is not None:
            current[axis] = (Replicate(),)
        joint = [choice for choice in itertools.product(*current) if fits(shape, choice, mesh)]
        if joint:
            return [tuple(p for p in allowed if any(c[i] == p for c in joint)) for i, allowed in enumerate(current)]
    return list(asked)


def _restricted(view: View, site: Site, axis: str, parts: int, context: tuple[Tactic, Any, str, int | None, bool]) -> Restriction:
    tactic, asked, outputs, batch, is_cut_weight = context
    role, tensor = site.role, port_type(view, site)
    assert role is not None
    assert tensor is not None
    possible = possible_placements(role.kind, tensor.shape, parts)
    where = f"{role} on axis {axis}"
    restriction = Restriction(possible, f"its shape {list(tensor.shape)} over {parts} ranks")
    if role.kind is RoleKind.OUTPUT and outputs == "replicate":
        return Restriction((Replicate(),), 'outputs="replicate"')
    cuts = tuple(p for p in possible if isinstance(p, Shard)) if is_cut_weight else ()
    is_batched = bool(tensor.shape) and tensor.shape[0] == batch
    user = asked.get((role.name, axis)) if site.is_input and role.kind in _NAMED else None
    if user is not None:
        restriction = user.met_with(restriction, where)
    if parts > 1:
        wanted = tactic.allowed(Port(role, tensor.shape, possible, is_batched, cuts))
        if wanted is not None:
            restriction = restriction.met_with(Restriction(wanted, repr(tactic)), where)
    return restriction


def port_type(view: View, site: Site) -> TensorType | None:
    """Type of the value that passes a port; None where it is no tensor."""
    value = site.makes[0] if site.is_input else site.uses[0]
    return None if value is None else view.values[value].type


def batch_size(view: View) -> int | None:
    """The program's size named B, else the first dimension that most of its inputs share."""
    if "B" in view.program.sizes:
        return view.program.sizes["B"]
    types = (port_type(view, site) for site in view.inputs() if site.role is not None and site.role.kind is RoleKind.INPUT)
    counted = Counter(t.shape[0] for t in types if t is not None and t.shape)
    return counted.most_common(1)[0][0] if counted else None


def products_cutting(view: View, site: Site) -> list[tuple[int, int]]:
    """Dense products that a parameter is the weight of; none for other ports."""
    return weight_uses(view, site) if site.role is not None and site.role.kind is RoleKind.PARAM else []


def _user_restrictions(view: View, mesh: Mesh, constraints: Mapping[str, Any]) -> dict[tuple[str, str], Restriction]:
    """(name, axis) -> restriction, for every named input that a pattern matches."""
    shapes = {
        site.role.name: tensor.shape
        for site in view.inputs()
        if site.role is not None and site.role.kind in _NAMED and (tensor := port_type(view, site)) is not None
    }
    tied = view.program.signature.tied
    found: dict[tuple[str, str], Restriction] = {}
    for pattern, wanted in constraints.items():
        names = [pattern] if pattern in shapes else [n for n in shapes if fnmatch.fnmatchcase(n, pattern)]
        names += [real for alias, real in tied.items() if fnmatch.fnmatchcase(alias, pattern) and real in shapes]
        if not names:
            close = difflib.get_close_matches(pattern, [*shapes, *tied], n=3, cutoff=0.4)
            hint = f"; close to it: {', '.join(close)}" if close else ""
            raise PlanError(f"constraint {pattern!r} matches no parameter, buffer or input{hint}")
        for axis, placement in _placements(wanted, mesh, pattern).items():
            for name in dict.fromkeys(names):
                fixed = _checked(placement, shapes[name], f"constraint {pattern!r} on {name}")
                origin = f"constraint {pattern!r}: {axis}:{format_placement(fixed)}"
                new = Restriction((fixed,), origin)
                old = found.get((name, axis))
                found[(name, axis)] = old.met_with(new, f"{name} on axis {axis}") if old else new
    return found


def _placements(wanted: object, mesh: Mesh, pattern: str) -> dict[str, Placement]:
    """``{"tp": Shard(0)}``, ``{"tp": "S(0)"}``, ``"tp:S(0),dp:R"``, or one placement per mesh axis -> axis -> placement."""
    where = f"constraint {pattern!r}"
    if isinstance(wanted, str):
        parts = [part.strip() for part in re.split(r",(?![^(]*\))", wanted)]
        bare = [part for part in parts if ":" not in part]
        if bare:
            raise PlanError(f"{where}: expected axis:placement, such as {mesh.names[0]}:S(0); found {bare[0]!r}")
        items = [part.partition(":")[::2] for part in parts]
    elif isinstance(wanted, Mapping):
        items = list(wanted.items())
    elif isinstance(wanted, (tuple, list)) and len(wanted) == len(mesh.axes):
        items = list(zip(mesh.names, wanted, strict=True))
    else:
        raise PlanError(f'{where}: expected {{"axis": Shard(0)}} or "axis:S(0)"; found {wanted!r}')
    found = {}
    for axis, placement in items:
        _known_axis(axis, mesh, where)
        if isinstance(placement, str) and _PLACEMENT.fullmatch(placement):
            placement = parse_placement(placement)
        if not isinstance(placement, Placement):
            raise PlanError(f"{where}: expected R or S(dim) on axis {axis}; found {placement!r}")
        found[axis] = placement
    return found


def _checked(placement: Placement, shape: Sequence[int], where: str) -> Placement:
    if isinstance(placement, Partial):
        raise PlanError(f"{where}: an input cannot be a partial sum; use R or S(dim)")
    if isinstance(placement, Shard):
        if not -len(shape) <= placement.dim < len(shape):
            raise PlanError(f"{where}: S({placement.dim}) is outside its {len(shape)} dimensions {list(shape)}")
        return Shard(placement.dim % len(shape))
    return placement


def _known_axis(axis: object, mesh: Mesh, where: str) -> None:
    if axis not in mesh.names:
        raise PlanError(f"{where}: mesh {mesh} has no axis {axis!r}; it has {', '.join(mesh.names)}")


def _listed(placements: Placements) -> str:
    return " or ".join(map(format_placement, placements)) if placements else "nothing"
