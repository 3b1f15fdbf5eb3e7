"""Region tracing: of blocks that are built alike, one is traced, and its nodes are copied for the others.

    forward of copy k   -> the template's forward nodes, with k's parameters and inputs in place of the template's
    backward of copy k  -> its backward nodes, when autograd reaches the block, with the gradients that arrive there

Autograd sees each block as one function, so the order of the graph is that of ordinary tracing. Only where a value enters a block
and is also used outside may the sum of its gradients associate differently. A block that draws random numbers, changes something in
place or in Python, closes over other tensors, or is called with anything but tensors and plain values is traced in full.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.fx as fx
import torch.utils._pytree as pytree
from torch import nn
from torch.fx.experimental.proxy_tensor import get_proxy_mode, get_proxy_slot, track_tensor_tree
from torch.utils._python_dispatch import _disable_current_modes

from ..errors import HocketError
from ..program import NOTE, Decision, Literal, Note, Phase, Region, Role, RoleKind, annotate, note, output_node
from .blocks import BlockGroup, Poison, tensor_form
from .failures import FATAL
from .flatten import Flat, flatten, mutates
from .lift import Snapshot, fake_like, tensors_of
from .recorder import in_backward
from .sources import SourceFinder
from .trace import Request, Tracer

_PREFIX = "\0"
"""Stands for the block's qualified name in the notes of a template."""

_PLAIN = (bool, int, float, str, type(None), torch.dtype, torch.device)


class RegionMismatch(HocketError):
    """The copies of a block cannot be traced as one; capture starts again without regions."""


class _Unsafe(Exception):
    """This block must be traced in full."""


@dataclass
class Template:
    """A traced block. inputs: one placeholder for each tensor given; tangents: index of the output each belongs to."""

    flat: Flat
    out_spec: pytree.TreeSpec
    out_leaves: list[int | Literal]
    request: Request
    count: int
    tangents: list[int]

    def __post_init__(self) -> None:
        nodes = list(self.flat.graph.nodes)
        placeholders = [n for n in nodes if n.op == "placeholder"]
        self.inputs, self.tangent_nodes = placeholders[: self.count], placeholders[self.count :]
        calls = [n for n in nodes if n.op == "call_function"]
        self.forward = [n for n in calls if note(n).phase is Phase.FORWARD]
        self.backward = [n for n in calls if note(n).phase is not Phase.FORWARD]
        results = list(output_node(self.flat.graph).args[0])  # type: ignore[arg-type]
        outputs = sum(role.kind is RoleKind.OUTPUT for role in self.flat.outputs)
        self.outputs: list[fx.Node] = results[:outputs]
        names = [role.name for role in self.request.roles]
        self.gradients: list[tuple[int, fx.Node | None]] = [
            (names.index(role.name), value) for role, value in zip(self.flat.outputs[outputs:], results[outputs:], strict=True)
        ]


class Regions:
    """The blocks of one trace. ``install`` is called once the module holds its fakes."""

    def __init__(self, groups: list[BlockGroup], request: Request) -> None:
        self.groups = groups
        self.request = request
        self.templates: dict[Hashable, Template | None] = {}
        self.others: dict[Hashable, Template] = {}
        self.copied: dict[str, int] = {}
        self.refusals: dict[str, list[str]] = {}

    def install(self) -> None:
        """Route every block's forward through its template. ``holding`` puts the blocks back."""
        for group in self.groups:
            for copy, block in group.blocks.items():
                block.__dict__["forward"] = self._forward_of(group, copy, block)

    def decisions(self) -> list[Decision]:
        """What was traced once, and what could not be."""
        found = []
        for group in self.groups:
            done = self.copied.get(group.pattern, 0)
            if done:
                reason = f"{group.pattern}: {done} calls of {len(group.blocks)} blocks copied from one trace"
                found.append(Decision("capture", group.pattern, applied=True, reason=reason))
            refusals = [f"{group.pattern} traced in full: {why}" for why in dict.fromkeys(self.refusals.get(group.pattern, ()))]
            found += [Decision("capture", group.pattern, applied=False, reason=why) for why in refusals]
        return found

    def _forward_of(self, group: BlockGroup, copy: int, block: nn.Module) -> Callable[..., Any]:
        original = type(block).forward.__get__(block)

        def forward(*args: Any, **kwargs: Any) -> Any:
            tensors = self._given(block, args, kwargs)
            template = None if tensors is None else self._template(group, block, original, args, kwargs)
            if tensors is None or template is None:
                return original(*args, **kwargs)
            self.copied[group.pattern] = self.copied.get(group.pattern, 0) + 1
            return self._apply(template, tensors, group, copy)

        return forward

    def _given(self, block: nn.Module, args: Any, kwargs: Any) -> list[torch.Tensor] | None:
        """Parameters, buffers and tensor arguments; None if the call has a part that a template cannot speak for."""
        if in_backward() or torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda") or _saving_is_hooked():
            return None
        if not all(_plain(value) for value in (*args, *kwargs.values())):
            return None
        held = tensors_of(block)
        leaves = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        tensors = [*held.params.values(), *held.buffers.values(), *leaves]
        mode = get_proxy_mode()
        if mode is None or any(get_proxy_slot(t, mode.tracer, None) is None for t in tensors):
            return None
        return tensors if len({id(t) for t in tensors}) == len(tensors) else None

    def _template(self, group: BlockGroup, block: nn.Module, original: Any, args: Any, kwargs: Any) -> Template | None:
        leaves, spec = pytree.tree_flatten((args, kwargs))
        form = tuple(tensor_form(leaf) if isinstance(leaf, torch.Tensor) else (type(leaf), leaf) for leaf in leaves)
        key = (group.pattern, id(group), str(spec), form, torch.is_grad_enabled())
        if key not in self.templates:
            try:
                self.templates[key] = self._trace(group, block, original, leaves, spec)
            except FATAL:
                raise
            except Exception as error:  # whatever the block does, its plain trace will show it
                self.templates[key] = None
                self.refusals.setdefault(group.pattern, []).append(str(error))
        return self.templates[key]

    def _trace(self, group: BlockGroup, block: nn.Module, original: Any, leaves: list[Any], spec: pytree.TreeSpec) -> Template:
        held, mode = tensors_of(block), self.request.mode
        given = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
        tensors = [*held.params.items(), *held.buffers.items(), *((f"\0{i}", t) for i, t in enumerate(given))]
        kinds = [RoleKind.PARAM] * len(held.params) + [RoleKind.BUFFER] * len(held.buffers) + [RoleKind.INPUT] * len(given)
        unsafe: list[str] = []

        def call(*inputs: torch.Tensor) -> Any:
            values = iter(inputs)
            args, kwargs = pytree.tree_unflatten(
                [next(values) if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves], spec
            )
            with _poisoned(block, group):
                before = Snapshot(block)
                result = original(*args, **kwargs)
                if before.changed():
                    unsafe.append("it changes Python state")
            if any(value is given for value in pytree.tree_leaves(result) for given in inputs if isinstance(value, torch.Tensor)):
                unsafe.append("it returns an input")
            return result

        with _disable_current_modes():
            fakes = [fake_like(tensor, mode) for _, tensor in tensors]
            request = Request(
                call=call,
                module=block,
                roles=[Role(kind, name) for kind, (name, _) in zip(kinds, tensors, strict=True)],
                fakes=fakes,
                replacements={id(t): fake for (_, t), fake in zip(tensors, fakes, strict=True)},
                mode=mode,
                aim=replace(self.request.aim, train=torch.is_grad_enabled(), loss_of=None),
                finder=_finder(block, self.request.finder),
            )
            template = _build(request)
        if unsafe:
            raise _Unsafe(unsafe[0])
        return template

    def _apply(self, template: Template, tensors: list[torch.Tensor], group: BlockGroup, copy: int) -> Any:
        run = _Run(self, template, tensors, group, copy)
        trains = torch.is_grad_enabled() and bool(template.tangents)
        values = _Block.apply(run, *tensors) if trains else run.forward()  # type: ignore[no-untyped-call]
        leaves = [leaf.value if isinstance(leaf, Literal) else values[leaf] for leaf in template.out_leaves]
        return pytree.tree_unflatten(leaves, template.out_spec)

    def for_tangents(self, template: Template, gradients: list[torch.Tensor]) -> Template:
        """The template for gradients that arrive in these forms; its forward part is the same."""
        key = (id(template), tuple(tensor_form(g)[:4] for g in gradients))
        if key not in self.others:
            names = [self._tangent_name(template, i) for i in range(len(template.tangents))]
            with _disable_current_modes(), torch.enable_grad():
                other = _build(replace(template.request, tangents=dict(zip(names, gradients, strict=True))))
            if [n.target for n in other.forward] != [n.target for n in template.forward]:
                raise RegionMismatch("the forward part of a block depends on the layout of its gradient")
            self.others[key] = other
        return self.others[key]

    def _tangent_name(self, template: Template, index: int) -> str:
        return template.flat.inputs[template.count + index].name


def _build(request: Request) -> Template:
    """Trace a block. Raises _Unsafe where its nodes cannot be copied."""
    tracer = Tracer(request)
    raw = tracer.run()
    odd = raw.dropped or not all(_plain(leaf.value) for leaf in raw.out_leaves if isinstance(leaf, Literal))
    if tracer.random.drawn or tracer.updates or odd:
        raise _Unsafe("it draws random numbers, replaces a buffer, or returns an object")
    if any(mutates(node) for node in raw.graph.graph.nodes):
        raise _Unsafe("it changes a tensor in place")
    if any(node.op == "get_attr" for node in raw.graph.graph.nodes):
        raise _Unsafe("it uses a tensor that is neither its own nor an argument")
    flat = flatten(raw, request.mode)
    names = [role.name for role in flat.outputs if role.kind is RoleKind.OUTPUT]
    tangents = [names.index(role.name) for role in flat.inputs if role.kind is RoleKind.TANGENT]
    assert raw.out_spec is not None
    return Template(flat, raw.out_spec, raw.out_leaves, request, len(request.roles), tangents)


class _Run:
    """One copy of a template in the outer graph."""

    def __init__(self, regions: Regions, template: Template, tensors: list[torch.Tensor], group: BlockGroup, copy: int) -> None:
        mode = get_proxy_mode()
        assert mode is not None
        self.regions, self.template, self.tracer = regions, template, mode.tracer
        self.name, self.region = group.name(copy), Region(group.pattern, copy)
        self.mapping = {inner: self._node_of(t) for inner, t in zip(template.inputs, tensors, strict=True)}

    def forward(self) -> tuple[torch.Tensor, ...]:
        """Copy the forward nodes; fresh fake tensors for the outputs."""
        self._copy(self.template.forward, {})
        return tuple(self._tensor_of(node) for node in self.template.outputs)

    def backward(self, gradients: list[torch.Tensor | None]) -> list[torch.Tensor | None]:
        """Copy the backward nodes for the gradients of the differentiable outputs; the gradient of each input."""
        given = [g for g in gradients if g is not None]
        if len(given) != len(gradients):
            raise RegionMismatch("an output of a block has no gradient here")
        template, sources = self.template, {}
        forms = [tensor_form(node.meta["val"])[:4] for node in template.tangent_nodes]
        if [tensor_form(g)[:4] for g in given] != forms:
            other = self.regions.for_tangents(template, given)
            pairs = list(zip(other.forward, template.forward, strict=True))
            sources = {(note(a).source, note(a).module): note(b) for a, b in pairs}
            self.mapping.update({a: self.mapping[b] for a, b in (*pairs, *zip(other.inputs, template.inputs, strict=True))})
            template = other
        self.mapping.update({inner: self._node_of(g) for inner, g in zip(template.tangent_nodes, given, strict=True)})
        self._copy(template.backward, sources)
        found: list[torch.Tensor | None] = [None] * template.count
        for position, node in template.gradients:
            found[position] = None if node is None else self._tensor_of(node)
        return found

    def _copy(self, nodes: list[fx.Node], sources: dict[Any, Any]) -> None:
        graph, mapping = self.tracer.graph, self.mapping
        renamed: dict[Any, Note] = {}
        for old in nodes:
            new = mapping[old] = graph.node_copy(old, mapping.__getitem__)
            said = note(old)
            key = (said.source, said.module, said.phase)
            if key not in renamed:
                better = sources.get(key[:2], said)
                source, module = better.source.replace(_PREFIX, self.name), better.module.replace(_PREFIX, self.name)
                renamed[key] = replace(said, source=source, module=module, region=self.region)
            new.meta[NOTE] = renamed[key]

    def _node_of(self, tensor: torch.Tensor) -> fx.Node:
        slot = get_proxy_slot(tensor, self.tracer, None)
        if slot is None:
            raise RegionMismatch("a value that enters a block is not part of the trace")
        node: fx.Node = slot.proxy.node
        return node

    def _tensor_of(self, inner: fx.Node) -> torch.Tensor:
        node, value = self.mapping[inner], inner.meta["val"]
        with _disable_current_modes(), self.regions.request.mode:
            fake = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=value.device)
        track_tensor_tree(fake, fx.Proxy(node, self.tracer), constant=None, tracer=self.tracer)
        return fake


class _Block(torch.autograd.Function):
    """A block as autograd sees it while a region is traced."""

    @staticmethod
    def forward(ctx: Any, run: _Run, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:  # noqa: ARG004
        ctx.run = run
        ctx.set_materialize_grads(False)
        with torch._C.DisableTorchFunction():  # a trace's mode would look at every size and stride that is read
            values = run.forward()
        ctx.mark_non_differentiable(*(v for i, v in enumerate(values) if i not in run.template.tangents))
        return values

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        with torch._C.DisableTorchFunction():
            return None, *ctx.run.backward([gradients[i] for i in ctx.run.template.tangents])


def mark_regions(graph: fx.Graph, groups: list[BlockGroup]) -> None:
    """Note the region of every node that belongs to a block, however it was traced."""
    places = {group.name(copy): Region(group.pattern, copy) for group in groups for copy in group.blocks}
    found: dict[str, Region | None] = {}
    for node in graph.nodes:
        module = note(node).module
        if module and module not in found:
            parts = module.split(".")
            prefixes = (".".join(parts[:end]) for end in range(1, len(parts) + 1))
            found[module] = next((places[prefix] for prefix in prefixes if prefix in places), None)
        if module and found[module] is not note(node).region:
            annotate(node, region=found[module])


def _finder(block: nn.Module, outer: SourceFinder) -> SourceFinder:
    names = {id(m): _PREFIX + (f".{n}" if n else "") for n, m in block.named_modules()}
    kinds = {names[id(m)]: type(m).__name__ for m in block.modules()}
    return SourceFinder(names, kinds, set(outer.entry), outer=1)


@contextlib.contextmanager
def _poisoned(block: nn.Module, group: BlockGroup) -> Iterator[None]:
    """The block with its own numbers out of reach."""
    parts = [(block.get_submodule(path), name) for path, name in group.poisoned]
    saved = [part.__dict__[name] for part, name in parts]
    for part, name in parts:
        part.__dict__[name] = Poison()
    try:
        yield
    finally:
        for (part, name), value in zip(parts, saved, strict=True):
            part.__dict__[name] = value


def _plain(value: Any) -> bool:
    """A tensor, a plain value, or a tuple of those: nothing that a block could change."""
    return isinstance(value, (torch.Tensor, *_PLAIN)) or (type(value) is tuple and all(_plain(item) for item in value))


def _saving_is_hooked() -> bool:
    """True inside ``saved_tensors_hooks``, of which activation checkpointing is one."""
    return torch._C._autograd._top_saved_tensors_default_hooks(True) is not None  # noqa: FBT003
