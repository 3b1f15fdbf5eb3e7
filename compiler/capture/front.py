"""``capture``: from an ordinary module or function and example inputs to a Program.

user's call -> make_fx under fake tensors -> flat functional graph -> Program
               else torch.export -> its graph through the same trace
               else dynamo       -> its graph through the same trace
"""

from __future__ import annotations

import dataclasses
import linecache
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import nn
from torch._subclasses import FakeTensorMode

from ...runtime.collector import without_collector
from ..errors import HocketError
from ..program import Decision, Literal, Program, Role, RoleKind, Signature, check_program
from .blocks import BlockGroup, find_blocks
from .dtypes import check_dtypes
from .failures import FATAL, capture_error, explain, without_torchs_log
from .fallback import GraphCall, dynamo_graph, export_graph
from .flatten import Flat, flatten, lazy_module
from .hidden import Attributes, check_counting, checked_arguments, with_attributes
from .leaves import Leaf, check_call, check_target, check_tensors, flatten_inputs
from .lift import ModuleTensors, Snapshot, fake_like, tensors_of
from .regions import Regions, mark_regions
from .sizes import name_sizes
from .sources import SourceFinder
from .trace import Aim, Raw, Request, Tracer

Target = nn.Module | Callable[..., Any]

log = logging.getLogger("hocket")


@without_collector()
def capture(
    target: Target,
    args: tuple[Any, ...] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    train: bool = True,
    sizes: Mapping[str, Sequence[str | None]] | None = None,
) -> Program:
    """Trace a module, or a plain function of tensors, into one flat functional graph.

    train=True: the joint graph of forward and backward. Inputs: PARAM, BUFFER, INPUT, SEED (if the step draws random numbers),
    CONSTANT, TANGENT (one for each differentiable output). Outputs: OUTPUT, GRADIENT (for each parameter and input that requires
    one; None where unused), UPDATE (changed buffers and inputs). train=False: OUTPUT and UPDATE only, under no_grad. The modes of
    the submodules (``module.train()``, ``module.eval()``) are taken as they are, and the module is left exactly as found.

    sizes: names for the dimensions of inputs, ``{"args[0]": ("B", "S")}``.
    Raises InputError for a bad target or example inputs, CaptureError where the function has no single graph.
    """
    example = Example.of(target, args, dict(kwargs or {}))
    return example.capture(Aim(train=train), sizes)


@dataclass(frozen=True)
class Example:
    """A target with its example inputs, checked and taken apart."""

    target: Target
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    leaves: list[tuple[str, Leaf]]
    in_spec: pytree.TreeSpec
    tensors: ModuleTensors

    @classmethod
    def of(cls, target: Target, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Example:
        """Raises InputError."""
        check_target(target)
        if isinstance(args, torch.Tensor):
            args = (args,)
        leaves, in_spec = flatten_inputs(args, kwargs)
        check_call(target, args, kwargs)
        tensors = tensors_of(target if isinstance(target, nn.Module) else None)
        check_tensors(tensors, leaves)
        return cls(target, tuple(args), kwargs, leaves, in_spec, tensors)

    def capture(
        self,
        aim: Aim,
        sizes: Mapping[str, Sequence[str | None]] | None = None,
    ) -> Program:
        """Go down the ladder of front ends until one works."""
        shapes = {name: tuple(leaf.shape) for name, leaf in self.leaves if isinstance(leaf, torch.Tensor)}
        named = name_sizes(shapes, sizes)
        failures: list[tuple[str, Exception]] = []
        for name, prepare in _FRONTS:
            try:
                with without_torchs_log():
                    raw, flat, regions = self._trace(prepare, aim)
                    if raw.moved:
                        self._check_counting(prepare, aim, raw.moved)
            except FATAL:
                raise
            except HocketError:
                raise
            except Exception as error:
                failures.append((name, error))
                continue
            reason = f"traced with {name}" + "".join(f"; {explain(error, front)}" for front, error in failures)
            program = self._program(raw, flat, named)
            check_dtypes(program)
            decisions = [Decision("capture", "", applied=True, reason=reason), *regions, *_dropped(raw)]
            return program.decided(*decisions)
        raise capture_error(failures[0][1], failures[1:]) from failures[0][1]

    def _trace(self, prepare: Prepare, aim: Aim) -> tuple[Raw, Flat, list[Decision]]:
        """Run one front end, with repeated blocks traced once where that works, else in full."""
        groups = find_blocks(self.target) if isinstance(self.target, nn.Module) else []
        decisions = []
        if groups and aim.regions:
            try:
                return self._trace_once(prepare, aim, groups)
            except FATAL:
                raise
            except Exception as error:  # if the blocks are not to blame, the plain trace ends the same way
                decisions.append(Decision("capture", "", applied=False, reason=f"repeated blocks traced one by one: {error}"))
        raw, flat, _ = self._trace_once(prepare, dataclasses.replace(aim, regions=False), groups)
        return raw, flat, decisions

    def _check_counting(self, prepare: Prepare, aim: Aim, values: Attributes) -> None:
        """Trace twice more, the second time as after the first: only where the forward pass has changed attributes."""
        assert isinstance(self.target, nn.Module), "a plain function has no attributes"
        once = dataclasses.replace(aim, regions=False)
        first, second = self._trace_once(prepare, once, [])[1], None
        with with_attributes(self.target, values):
            try:
                second = self._trace_once(prepare, once, [])[1]
            except FATAL:
                raise
            except Exception as error:
                log.debug("hocket: a second call does not trace: %s", error)
        check_counting(first, second, values)

    def _trace_once(self, prepare: Prepare, aim: Aim, groups: list[BlockGroup]) -> tuple[Raw, Flat, list[Decision]]:
        mode = FakeTensorMode(allow_non_fake_inputs=True)
        request = prepare(self, mode, aim)
        regions = Regions(groups, request)
        if aim.regions and request.module is self.target:
            request.blocks = regions.install
        with checked_arguments([(name, leaf) for name, leaf in self.leaves if isinstance(leaf, Literal)]):
            raw = Tracer(request).run()
        flat = flatten(raw, mode)
        mark_regions(flat.graph, groups)
        return raw, flat, regions.decisions()

    def request(
        self,
        call: Target,
        module: nn.Module | None,
        mode: FakeTensorMode,
        aim: Aim,
    ) -> Request:
        """The request to trace ``call`` (the target itself, or what a fallback made of it)."""
        named: list[tuple[Role, torch.Tensor]] = []
        named += [(Role(RoleKind.PARAM, n), t) for n, t in self.tensors.params.items()]
        named += [(Role(RoleKind.BUFFER, n), t) for n, t in self.tensors.buffers.items()]
        lifted = len(named)
        named += [(Role(RoleKind.INPUT, n), t) for n, t in self.leaves if isinstance(t, torch.Tensor)]
        fakes = [fake_like(tensor, mode) for _, tensor in named]

        modules = dict(module.named_modules()) if module is not None else {}
        return Request(
            call=self.on_leaves(call),
            module=module,
            roles=[role for role, _ in named],
            fakes=fakes,
            replacements={id(t): fake for (_, t), fake in zip(named[:lifted], fakes[:lifted], strict=True)},
            mode=mode,
            aim=aim,
            finder=SourceFinder({id(m): n for n, m in modules.items()}, {n: type(m).__name__ for n, m in modules.items()}),
        )

    def on_leaves(self, call: Target) -> Callable[..., Any]:
        """``call`` as a function of the INPUT tensors alone."""

        def function(*inputs: torch.Tensor) -> Any:
            given = iter(inputs)
            tree = [leaf.value if isinstance(leaf, Literal) else next(given) for _, leaf in self.leaves]
            args, kwargs = pytree.tree_unflatten(tree, self.in_spec)
            return call(*args, **kwargs)

        return function

    def _program(self, raw: Raw, flat: Flat, sizes: dict[str, int]) -> Program:
        positions = iter([i for i, role in enumerate(flat.inputs) if role.kind is RoleKind.INPUT])
        signature = Signature(
            inputs=tuple(flat.inputs),
            outputs=tuple(flat.outputs),
            in_spec=self.in_spec,
            in_leaves=tuple(leaf if isinstance(leaf, Literal) else next(positions) for _, leaf in self.leaves),
            out_spec=raw.out_spec,
            out_leaves=tuple(raw.out_leaves),
            tied=self.tensors.tied,
        )
        linecache.checkcache()
        program = Program(graph=lazy_module(flat.graph), signature=signature, constants=flat.constants, sizes=sizes)
        check_program(program)
        return program


def _dropped(raw: Raw) -> Iterator[Decision]:
    for name, kind in raw.dropped:
        reason = f"{name} is a {kind}, which holds tensors in a way that only its class knows: returned as None"
        log.warning("hocket: %s (where it is a cache: use_cache=False makes none)", reason)
        yield Decision("capture", name, applied=False, reason=reason)


Prepare = Callable[[Example, FakeTensorMode, Aim], Request]


def _with_make_fx(example: Example, mode: FakeTensorMode, aim: Aim) -> Request:
    module = example.target if isinstance(example.target, nn.Module) else None
    return example.request(example.target, module, mode, aim)


def _with_graph(front: Callable[..., nn.Module], example: Example, mode: FakeTensorMode, aim: Aim) -> Request:
    """The request to trace what a fallback made of the target."""
    snapshot = Snapshot(example.target)
    try:
        with torch.set_grad_enabled(aim.train):
            graph = front(example.target, example.args, example.kwargs)
    finally:
        snapshot.restore()
    request = example.request(example.target, graph, mode, aim)
    return dataclasses.replace(request, call=example.on_leaves(GraphCall(graph, request.finder)))


_FRONTS: tuple[tuple[str, Prepare], ...] = (
    ("make_fx", _with_make_fx),
    ("torch.export", partial(_with_graph, export_graph)),
    ("dynamo", partial(_with_graph, dynamo_graph)),
)
