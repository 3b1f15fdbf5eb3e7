"""A compiled program on an engine, with the bookkeeping between the user's call and the program's ports."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.fx as fx
import torch.utils._pytree as pytree
from torch import Tensor

from ...runtime.engines.base import Engine
from ...runtime.regions import Report
from ..errors import HocketError
from ..program import Literal, Program, RoleKind
from .hall import Compiled

log = logging.getLogger("hocket")

BOUND = frozenset({RoleKind.PARAM, RoleKind.BUFFER, RoleKind.STATE, RoleKind.CONSTANT})
"""Kinds of inputs that keep their tensor from call to call."""


class Leftovers:
    """Programs on the ranks of an engine that nobody can call any more, and that leave them before the next one comes.

    A form that is forgotten may still have a backward to come, so it stays until its last call is gone. Its end may be noticed in
    any thread and at any time, which is no moment to talk to the ranks.
    """

    def __init__(self) -> None:
        self._handles: list[Any] = []

    def expect(self, loaded: Loaded) -> None:
        """Remember the handle of this program once nobody holds it."""
        weakref.finalize(loaded, self._handles.append, loaded.handle).atexit = False

    def unload(self, engine: Engine) -> None:
        """Take what is left off the ranks."""
        forget = getattr(engine, "unload", None)
        while self._handles:
            handle = self._handles.pop()
            if forget is not None:
                forget(handle)


class Loaded:
    """See the module.

    fusion: what became of the regions between collectives, where the engine compiles them; parameters: name -> the user's tensor
    that the ranks read in place; has_tangent: per OUTPUT port of the first segment, whether its tangent is an input of the
    second; differentiable: (kind, name) of what gets a gradient, in the order in which ``gradients`` returns them.
    """

    def __init__(self, engine: Engine, compiled: Compiled, tensors: Mapping[tuple[str, str], Tensor]) -> None:
        """Place ``compiled`` on ``engine``. tensors: parameters, buffers and states by (kind, name)."""
        signature = compiled.program.signature
        self.compiled = compiled
        self.bindings: dict[tuple[str, str], Tensor] = {}
        for role in signature.inputs:
            if role.kind in BOUND:
                key = (str(role.kind), role.name)
                self.bindings[key] = compiled.program.constants[role.name] if role.kind is RoleKind.CONSTANT else tensors[key]
        self.handle = engine.load(compiled.instructions, self.bindings)
        self.fusion: Report | None = getattr(self.handle, "fusion", None)
        if self.fusion is not None and self.fusion.failures:
            log.warning("hocket: %s", self.fusion)
        self.parameters = {name: tensor for (kind, name), tensor in self.bindings.items() if kind == RoleKind.PARAM}

        segments = compiled.instructions.segments
        ports = compiled.instructions.segment_outputs(segments[0].name)
        leaf_of = {place: leaf for leaf, place in enumerate(signature.in_leaves) if not isinstance(place, Literal)}
        updated = {i: signature.inputs_of(RoleKind.INPUT).get(signature.outputs[port].name) for i, port in enumerate(ports)}
        self._changed_leaves = {
            i: leaf_of[port]
            for i, port in updated.items()
            if port is not None and signature.outputs[ports[i]].kind is RoleKind.UPDATE
        }
        self._output_ports = [port for port in ports if signature.outputs[port].kind is RoleKind.OUTPUT]
        self._output_places = [i for i, port in enumerate(ports) if signature.outputs[port].kind is RoleKind.OUTPUT]
        tangents = signature.inputs_of(RoleKind.TANGENT)
        self.has_tangent = [signature.outputs[port].name in tangents for port in self._output_ports]
        self._tangent_of = [self._place_of_output(signature.inputs[port].name) for port in segments[-1].inputs] if tangents else []

        wanted = signature.outputs_of(RoleKind.GRADIENT)
        later = compiled.instructions.segment_outputs(segments[-1].name) if len(segments) > 1 else ()
        place = {port: i for i, port in enumerate(later)}
        self.differentiable = [
            (role.kind, role.name)
            for role in signature.inputs
            if role.kind in (RoleKind.PARAM, RoleKind.INPUT) and role.name in wanted
        ]
        self._gradient_places = [place.get(wanted[name]) for _, name in self.differentiable]
        self._gradient_needs = _tangents_behind(compiled.program, [name for _, name in self.differentiable])
        self.takes_gradients = len(segments) > 1

    def _place_of_output(self, name: str) -> int:
        names = [self.compiled.program.signature.outputs[port].name for port in self._output_ports]
        return names.index(name)

    def inputs(self, leaves: Sequence[Any], seed: int) -> list[Tensor]:
        """Values of the unbound ports of the first segment from the leaves of the user's (args, kwargs)."""
        signature = self.compiled.program.signature
        by_port = {place: i for i, place in enumerate(signature.in_leaves) if not isinstance(place, Literal)}
        changed = set(self._changed_leaves.values())
        values = []
        for port in self.compiled.instructions.segments[0].inputs:
            role = signature.inputs[port]
            if role.kind is RoleKind.INPUT:
                leaf = by_port[port]
                value = leaves[leaf].detach()
                values.append(value.clone() if leaf in changed else value)  # the backward needs it as it was
            elif role.kind is RoleKind.SEED:
                values.append(torch.tensor(seed, dtype=torch.int64))
            elif role.kind not in BOUND:
                raise HocketError(f"the first segment asks for {role}, which no caller can give")
        return values

    def write_back(self, results: Sequence[Tensor | None], leaves: Sequence[Any]) -> None:
        """Give the user's own tensors the values that the model wrote into its inputs."""
        with torch.no_grad():
            for place, leaf in self._changed_leaves.items():
                value = results[place]
                assert value is not None, "an updated input has a value"
                leaves[leaf].detach().copy_(value)

    @property
    def needs_seed(self) -> bool:
        """Whether the program draws random numbers."""
        return bool(self.compiled.program.signature.inputs_of(RoleKind.SEED))

    def differentiable_tensors(self, leaves: Sequence[Any], parameter: Callable[[str], Tensor]) -> list[Tensor]:
        """The user's tensors behind ``differentiable``; ``parameter`` gives those of parameters by name."""
        signature = self.compiled.program.signature
        by_name = {signature.inputs[p].name: leaves[i] for i, p in enumerate(signature.in_leaves) if not isinstance(p, Literal)}
        return [parameter(name) if kind is RoleKind.PARAM else by_name[name] for kind, name in self.differentiable]

    def outputs(self, results: Sequence[Tensor | None]) -> list[Tensor]:
        """The OUTPUT ports among the results of the first segment."""
        found = [results[i] for i in self._output_places]
        assert all(value is not None for value in found), "an OUTPUT port has no value"
        return [value for value in found if value is not None]

    def tangents(self, given: Sequence[Tensor | None]) -> list[Tensor | None]:
        """From one tangent per OUTPUT port (None where it has none) to the inputs of the second segment."""
        return [given[place] for place in self._tangent_of]

    def gradients(self, results: Sequence[Tensor | None], given: Sequence[Tensor | None]) -> list[Tensor | None]:
        """From the results of the second segment to one gradient per entry of ``differentiable``.

        given: the tangents; what only depends on outputs that the loss does not use has no gradient, as in eager torch.
        """
        here = {
            self.compiled.program.signature.outputs[p].name for p, t in zip(self._output_ports, given, strict=True) if t is not None
        }
        return [
            None if place is None or here.isdisjoint(needs) else results[place]
            for place, needs in zip(self._gradient_places, self._gradient_needs, strict=True)
        ]

    def rebuild(self, outputs: Sequence[Tensor]) -> Any:
        """The user's own output structure."""
        signature = self.compiled.program.signature
        place = {port: i for i, port in enumerate(self._output_ports)}
        leaves = [leaf.value if isinstance(leaf, Literal) else outputs[place[leaf]] for leaf in signature.out_leaves]
        assert signature.out_spec is not None, "a captured program has the tree of its outputs"
        return pytree.tree_unflatten(leaves, signature.out_spec)


def _tangents_behind(program: Program, names: Sequence[str]) -> list[frozenset[str]]:
    """Per gradient of these names, the outputs whose tangents it is computed from."""
    signature = program.signature
    behind: dict[fx.Node, frozenset[str]] = {}
    for node, role in zip(program.placeholders, signature.inputs, strict=True):
        behind[node] = frozenset({role.name} if role.kind is RoleKind.TANGENT else ())
    for node in program.nodes:
        if node not in behind:
            found = {behind[one] for one in node.all_input_nodes}
            behind[node] = next(iter(found)) if len(found) == 1 else frozenset[str]().union(*found)
    place, results = signature.outputs_of(RoleKind.GRADIENT), program.results
    gradients = [results[place[name]] for name in names]
    return [frozenset() if node is None else behind[node] for node in gradients]
