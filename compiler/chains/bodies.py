"""The body of a chain as an FX graph, and as the data that travels in a program (``runtime.fixedpoint.body``).

A body graph has one placeholder per carry, shared value and stream slice, in this order, functional ATen calls, and one output
``((next carries), (emits))``. Every node carries ``meta["val"]``.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.fx as fx
from torch._subclasses import FakeTensorMode
from torch.fx.passes.fake_tensor_prop import FakeTensorProp

from ...runtime.errors import ProgramError
from ...runtime.fixedpoint.body import Body, Call, check_body, read_body
from ...runtime.fixedpoint.how import How, read_how
from ...runtime.fixedpoint.op import chain_op
from ...runtime.fixedpoint.resume import resume_op
from ...runtime.ops import NAMESPACES, op_name, overload_of
from ...runtime.templates import encode_constant
from ..errors import UnsupportedError
from ..program import graph_module, note, output_node

__all__ = ["BodyGraph", "How", "body_graph", "chain_op", "read_body", "read_how", "refuse", "resume_op"]


@dataclass
class BodyGraph:
    """One step. carries, shared: how many placeholders of each kind (the rest are streams)."""

    graph: fx.Graph
    carries: int
    shared: int
    rows: bool = False

    @property
    def placeholders(self) -> list[fx.Node]:
        """All inputs, in order."""
        return [n for n in self.graph.nodes if n.op == "placeholder"]

    @property
    def calls(self) -> list[fx.Node]:
        """All ops, in order."""
        return [n for n in self.graph.nodes if n.op == "call_function"]

    @property
    def following(self) -> list[fx.Node]:
        """The next value of each carry."""
        return list(output_node(self.graph).args[0][0])  # type: ignore[index,arg-type]

    @property
    def emits(self) -> list[fx.Node]:
        """What a step gives out."""
        return list(output_node(self.graph).args[0][1])  # type: ignore[index,arg-type]

    @property
    def carry_inputs(self) -> list[fx.Node]:
        """The carries."""
        return self.placeholders[: self.carries]

    @property
    def shared_inputs(self) -> list[fx.Node]:
        """The values that every step sees."""
        return self.placeholders[self.carries : self.carries + self.shared]

    @property
    def stream_inputs(self) -> list[fx.Node]:
        """The slices of the streams."""
        return self.placeholders[self.carries + self.shared :]

    def function(self) -> Callable[..., tuple[list[Any], list[Any]]]:
        """The body as a Python function of all its inputs, for tracing."""
        module = graph_module(self.graph)

        def step(*inputs: Any) -> tuple[list[Any], list[Any]]:
            after, emits = fx.Interpreter(module).run(*inputs, enable_io_processing=False)
            return list(after), list(emits)

        return step

    def copy(self) -> BodyGraph:
        """A deep copy."""
        graph = fx.Graph()
        found: dict[fx.Node, fx.Node] = {}
        output = graph.graph_copy(self.graph, found)
        graph.output(output)
        return BodyGraph(graph, self.carries, self.shared, self.rows)

    def reorder_shared(self, order: Sequence[int]) -> None:
        """Take the shared values in another order: the one that was at place ``order[i]`` comes i-th."""
        old = self.shared_inputs
        anchor = self.carry_inputs[-1]
        for place in order:
            anchor.append(old[place])
            anchor = old[place]

    def data(self) -> Body:
        """The body as data. UnsupportedError, with the user's line, for a call that cannot be in a program."""
        return _Encoder(self).body()

    def propagate(self, mode: FakeTensorMode) -> None:
        """Set ``meta["val"]`` of every call from those of the placeholders."""
        module = fx.GraphModule(torch.nn.Module(), self.graph)
        FakeTensorProp(module, mode).propagate_dont_convert_inputs(*[n.meta["val"] for n in self.placeholders])


def refuse(node: fx.Node, why: str) -> UnsupportedError:
    """An error about a call in a body."""
    return UnsupportedError(f"{node.target} cannot be in a step that repeats: {why}, from {note(node).source or 'the step'}")


class _Encoder:
    def __init__(self, body: BodyGraph) -> None:
        self.source = body
        self.values: dict[fx.Node, Any] = {node: {"slot": i} for i, node in enumerate(body.placeholders)}
        self.slots = len(self.values)

    def body(self) -> Body:
        source = self.source
        calls = [self._call(node) for node in source.calls if node.target is not operator.getitem]
        floats = [v.dtype for v in (n.meta["val"] for n in source.placeholders) if v.is_floating_point()]
        body = Body(
            carries=source.carries,
            shared=source.shared,
            streams=len(source.placeholders) - source.carries - source.shared,
            calls=tuple(calls),
            following=tuple(self._slot(n) for n in source.following),
            emits=tuple(self._slot(n) for n in source.emits),
            rows=source.rows,
            floating=str(floats[0] if floats else torch.float32).removeprefix("torch."),
        )
        try:
            check_body(body)
        except ProgramError as error:
            raise UnsupportedError(str(error)) from error
        return body

    def _slot(self, node: fx.Node) -> int:
        found = self._value(node)
        if not isinstance(found, dict):
            raise refuse(node, "a carry and an emit are one tensor each")
        slot: int = found["slot"]
        return slot

    def _value(self, node: fx.Node) -> Any:
        if node.target is operator.getitem:
            return self._value(node.args[0])[node.args[1]]  # type: ignore[arg-type]
        return self.values[node]

    def _call(self, node: fx.Node) -> Call:
        target = node.target
        if not isinstance(target, torch._ops.OpOverload) or target.namespace not in NAMESPACES:
            raise refuse(node, f"a program holds ops of {', '.join(NAMESPACES)} only")
        args = [self._encode(arg, node) for arg in node.args]
        kwargs = {name: self._encode(arg, node) for name, arg in sorted(node.kwargs.items())}
        value = node.meta["val"]
        if not isinstance(value, (tuple, list)):
            self.values[node] = {"slot": self.slots}
            self.slots += 1
            return Call(op_name(target), args, kwargs, (self.slots - 1,), spread=False)
        read = {user.args[1] if user.target is operator.getitem else None for user in node.users}
        outputs = []
        for i in range(len(value)):
            is_read = None in read or bool({i, i - len(value)} & read)
            outputs.append(self.slots if is_read else -1)
            self.slots += is_read
        self.values[node] = [{"slot": slot} if slot >= 0 else None for slot in outputs]
        return Call(op_name(target), args, kwargs, tuple(outputs), spread=True)

    def _encode(self, arg: Any, node: fx.Node) -> Any:
        if isinstance(arg, fx.Node):
            return self._value(arg)
        if isinstance(arg, (list, tuple)):
            return [self._encode(item, node) for item in arg]
        try:
            return encode_constant(arg)
        except TypeError as error:
            raise refuse(node, str(error)) from error


def body_graph(body: Body, examples: Sequence[torch.Tensor], mode: FakeTensorMode) -> BodyGraph:
    """The graph of a body. examples: fake tensors for its inputs, one slice of every stream among them."""
    from ...runtime.templates import Site, fold

    site = Site.of(body.as_program(()).mesh, 0)
    graph = fx.Graph()
    values: dict[int, fx.Node] = {}
    for slot, example in enumerate(examples):
        values[slot] = graph.placeholder(f"input_{slot}")
        values[slot].meta["val"] = example

    def decode(template: Any) -> Any:
        if isinstance(template, dict) and "slot" in template:
            return values[template["slot"]]
        if isinstance(template, list):
            return [decode(item) for item in template]
        return fold(template, site)

    for call in body.calls:
        kwargs = {name: decode(value) for name, value in call.kwargs.items()}
        node = graph.call_function(overload_of(call.op), tuple(map(decode, call.args)), kwargs)
        if not call.spread:
            values[call.outputs[0]] = node
            continue
        for i, slot in enumerate(call.outputs):
            if slot >= 0:
                values[slot] = graph.call_function(operator.getitem, (node, i))
    graph.output((tuple(values[s] for s in body.following), tuple(values[s] for s in body.emits)))
    found = BodyGraph(graph, body.carries, body.shared, body.rows)
    found.propagate(mode)
    return found
