"""``capture_step``: forward, scalar loss, backward and optimizer update as one Program."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch
import torch.fx as fx
from torch import nn
from torch.optim import Optimizer

from ...runtime.collector import without_collector
from ..errors import InputError
from ..program import Note, Phase, Program, Role, RoleKind, annotate, check_program, note, output_node
from .clip import trace_clip
from .flatten import identifier, lazy_module
from .front import Example
from .optimizer import Update, check_optimizer, grouped, trace_update
from .trace import Aim


@without_collector()
def capture_step(
    model: nn.Module,
    optimizer: Optimizer,
    args: tuple[Any, ...] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    loss: Callable[[Any], torch.Tensor] | None = None,
    sizes: Mapping[str, Sequence[str | None]] | None = None,
    clip_norm: float | None = None,
) -> Program:
    """Trace a whole training step into one flat functional graph.

    The scalar loss is ``loss(output)``, or the model's result, or its ``.loss`` or ``["loss"]``. Inputs are those of ``capture``
    (no tangents) and STATE: the optimizer's tensors by name (``exp_avg:layers.0.weight``, ``step:layers.0.weight``) and every
    group's learning rate (``lr:0``); ``initial_state`` gives their values. Outputs: ``loss``, then UPDATE for changed buffers,
    parameters and optimizer tensors. Parameters without a gradient are left alone, as in torch; other settings are baked in.
    clip_norm: gradients whose norm over all parameters is larger are scaled down to it before the update.
    Raises InputError, CaptureError, and UnsupportedError for optimizers that couple parameters.
    """
    if not isinstance(model, nn.Module):
        raise InputError(f"expected an nn.Module; found {type(model).__name__}")
    check_optimizer(model, optimizer)
    example = Example.of(model, args, dict(kwargs or {}))
    program = example.capture(Aim(train=True, loss_of=lambda result: scalar_loss(result, loss)), sizes)
    return with_updates(program, model, optimizer, clip_norm=clip_norm)


def scalar_loss(result: Any, loss: Callable[[Any], torch.Tensor] | None) -> torch.Tensor:
    """The loss in a model's result. Raises InputError where there is none that can be differentiated."""
    found, kind = result, type(result).__name__
    if loss is not None:
        found = loss(result)
    elif not isinstance(result, torch.Tensor):
        found = result.get("loss") if isinstance(result, Mapping) else getattr(result, "loss", None)
    if not isinstance(found, torch.Tensor):
        raise InputError(
            f'expected a loss: the model returns {kind} without one; pass loss=..., or return a tensor, .loss or ["loss"]'
        )
    if found.numel() != 1 or not found.requires_grad:
        raise InputError(
            f"expected a scalar loss that needs a gradient; found shape {tuple(found.shape)}, requires_grad={found.requires_grad}"
        )
    return found


def with_updates(
    program: Program, model: nn.Module, optimizer: Optimizer, *, clip_norm: float | None = None, keep_gradients: bool = False
) -> Program:
    """The program with the optimizer's graph behind every gradient.

    clip_norm: see ``capture_step``; keep_gradients: whether the gradients, as they are before they are clipped, stay outputs.
    """
    signature = program.signature
    gradients = {
        role.name: value
        for role, value in zip(signature.outputs, program.results, strict=True)
        if role.kind is RoleKind.GRADIENT and value is not None
    }
    traced: dict[Any, Update] = {}
    plan: list[tuple[str, int, Update]] = []
    for name, parameter, index in grouped(model, optimizer):
        if name not in gradients:
            continue
        value = gradients[name].meta["val"]
        form = (index, parameter.shape, parameter.stride(), parameter.dtype, parameter.device, value.stride(), value.dtype)
        if form not in traced:
            traced[form] = trace_update(optimizer, index, parameter, value)
        plan.append((name, index, traced[form]))
    kept = {RoleKind.OUTPUT, RoleKind.UPDATE} | ({RoleKind.GRADIENT} if keep_gradients else set())
    return _Assembly(program, type(optimizer).__name__, frozenset(kept)).build(plan, gradients, clip_norm)


class _Assembly:
    """Builds the graph of the whole step from the joint graph and the updates. kept: kinds of outputs that stay."""

    def __init__(self, program: Program, optimizer: str, kept: frozenset[RoleKind]) -> None:
        self.program = program
        self.kept = kept
        self.source = f"{optimizer}.step"
        self.graph = fx.Graph()
        self.inputs: dict[Role, fx.Node] = {}
        self.mapping: dict[fx.Node, fx.Node] = {}

    def build(
        self, plan: list[tuple[str, int, Update]], gradients: Mapping[str, fx.Node], clip_norm: float | None = None
    ) -> Program:
        """plan: (parameter, its group, its update), in the optimizer's order."""
        self._placeholders(plan)
        for old in self.program.nodes:
            if old.op == "call_function":
                self.mapping[old] = self.graph.node_copy(old, lambda n: self.mapping[n])
        outputs = [
            (role, self.mapping[value])
            for role, value in zip(self.program.signature.outputs, self.program.results, strict=True)
            if role.kind in self.kept and value is not None
        ]
        used = {name: self.mapping[gradients[name]] for name, _, _ in plan}
        if clip_norm is not None and used:
            used = self._clipped(used, clip_norm)
        for name, index, update in plan:
            outputs += self._inline(name, index, update, used[name])
        self.graph.output(tuple(value for _, value in outputs))
        signature = self.program.signature
        place = {role: i for i, role in enumerate(self.inputs)}
        moved = [leaf if not isinstance(leaf, int) else place[signature.inputs[leaf]] for leaf in signature.in_leaves]
        changes = {"inputs": tuple(self.inputs), "outputs": tuple(role for role, _ in outputs), "in_leaves": tuple(moved)}
        program = self.program.replace(graph=lazy_module(self.graph), signature=type(signature)(**{**vars(signature), **changes}))
        check_program(program)
        return program

    def _clipped(self, gradients: Mapping[str, fx.Node], clip_norm: float) -> dict[str, fx.Node]:
        """The gradients scaled to a norm of at most ``clip_norm``, all by one factor."""
        flat = trace_clip([node.meta["val"] for node in gradients.values()], clip_norm)
        given = iter(gradients.values())
        mapping: dict[fx.Node, fx.Node] = {}
        for old in flat.graph.nodes:
            if old.op == "placeholder":
                mapping[old] = next(given)
            elif old.op == "call_function":
                mapping[old] = node = self.graph.node_copy(old, mapping.__getitem__)
                node.meta["hocket"] = Note(phase=Phase.OPTIMIZER, source="clip_norm", origin=node.name)
        scaled = cast("tuple[fx.Node, ...]", output_node(flat.graph).args[0])
        return {name: mapping[value] for name, value in zip(gradients, scaled, strict=True)}

    def _placeholders(self, plan: list[tuple[str, int, Update]]) -> None:
        states: dict[Role, torch.Tensor] = {}
        for name, index, update in plan:
            fakes = dict(
                zip(
                    (role for role in update.flat.inputs),
                    (n for n in update.flat.graph.nodes if n.op == "placeholder"),
                    strict=True,
                )
            )
            for role, node in fakes.items():
                if role.kind is RoleKind.STATE:
                    states.setdefault(_state_role(role.name, name, index), node.meta["val"])
        early = (RoleKind.PARAM, RoleKind.BUFFER, RoleKind.INPUT)
        given = list(zip(self.program.signature.inputs, self.program.placeholders, strict=True))
        for role, old in [entry for entry in given if entry[0].kind in early]:
            self._copy_placeholder(role, old)
        for role, value in states.items():
            node = self.inputs[role] = self.graph.placeholder(identifier(role))
            node.meta["val"] = value
            annotate(node, role=role, origin=node.name, phase=Phase.OPTIMIZER)
        for role, old in [entry for entry in given if entry[0].kind not in early]:
            self._copy_placeholder(role, old)

    def _copy_placeholder(self, role: Role, old: fx.Node) -> None:
        self.inputs[role] = self.mapping[old] = self.graph.node_copy(old)

    def _inline(self, name: str, index: int, update: Update, gradient: fx.Node) -> list[tuple[Role, fx.Node]]:
        """One parameter's update behind its gradient; returns the new values."""
        mapping: dict[fx.Node, fx.Node] = {}
        roles = iter(update.flat.inputs)
        results: list[tuple[Role, fx.Node]] = []
        for old in update.flat.graph.nodes:
            if old.op == "placeholder":
                role = next(roles)
                mapping[old] = gradient if role.kind is RoleKind.INPUT else self.inputs[self._role_of(role, name, index)]
            elif old.op == "call_function":
                mapping[old] = node = self.graph.node_copy(old, lambda n: mapping[n])
                node.meta["hocket"] = Note(
                    phase=Phase.OPTIMIZER, source=self.source, module=name.rpartition(".")[0], origin=node.name
                )
            else:
                values = [mapping[value] for value in old.args[0]]
                results = [(self._role_of(role, name, index), v) for role, v in zip(update.flat.outputs, values, strict=True)]
        return [(Role(RoleKind.UPDATE, role.name), value) for role, value in results if note(value).phase is Phase.OPTIMIZER]

    def _role_of(self, role: Role, name: str, index: int) -> Role:
        if role.name == "param":
            return Role(RoleKind.PARAM, name)
        return _state_role(role.name, name, index)


def _state_role(key: str, name: str, index: int) -> Role:
    return Role(RoleKind.STATE, f"lr:{index}" if key == "lr" else f"{key}:{name}")
