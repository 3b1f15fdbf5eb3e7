"""Random programs that hold one unrolled recurrence on integers, where every equality is exact."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

import torch
import torch.fx as fx
from torch._subclasses import FakeTensorMode

from hocket.compiler.contract import Context
from hocket.compiler.cost.cluster import Cluster
from hocket.compiler.program import Note, Program, Role, RoleKind, Signature, graph_module
from hocket.compiler.rules.table import RuleTable
from hocket.runtime.mesh import Mesh

aten = torch.ops.aten
BINARY = (aten.add.Tensor, aten.sub.Tensor, aten.bitwise_xor.Tensor, aten.minimum.default, aten.maximum.default, aten.mul.Tensor)
UNARY = (aten.neg.default, aten.bitwise_not.default, aten.abs.default)


def context(mesh: str = "one=1") -> Context:
    """A context without disk caches."""
    return Context(Mesh.parse(mesh), RuleTable(None), Cluster.current())


@dataclass
class Writer:
    """A graph of int64 tensors [rows, 3], written call by call."""

    rows: int
    mode: FakeTensorMode = field(default_factory=FakeTensorMode)
    graph: fx.Graph = field(default_factory=fx.Graph)
    inputs: list[fx.Node] = field(default_factory=list)

    def input(self, *shape: int) -> fx.Node:
        node = self.graph.placeholder(f"input_{len(self.inputs)}")
        with self.mode:
            node.meta["val"] = torch.empty(shape, dtype=torch.int64)
        node.meta["hocket"] = Note()
        self.inputs.append(node)
        return node

    def call(self, target: object, *args: object) -> fx.Node:
        node = self.graph.call_function(target, args)
        values = fx.node.map_arg(args, lambda n: n.meta["val"])
        with self.mode:
            node.meta["val"] = target(*values)
        node.meta["hocket"] = Note()
        return node

    def program(self, *results: fx.Node) -> Program:
        self.graph.output(tuple(results))
        roles = tuple(Role(RoleKind.INPUT, f"args[{i}]") for i in range(len(self.inputs)))
        return Program(
            graph_module(self.graph), Signature(roles, tuple(Role(RoleKind.OUTPUT, f"out[{i}]") for i in range(len(results))))
        )


@dataclass(frozen=True)
class Recipe:
    """Drawn once: what the steps of a random chain do."""

    seed: int
    steps: int
    carries: int
    streams: int
    ops: int
    rows: int
    distance: int = 1
    peeled: bool = False

    @classmethod
    def draw(cls, seed: int) -> Recipe:
        choose = random.Random(seed)
        return cls(
            seed,
            choose.randint(24, 34),
            choose.randint(1, 3),
            choose.randint(0, 2),
            choose.randint(2, 5),
            choose.randint(1, 3),
            choose.choice((1, 1, 1, 2, 3)),
            choose.random() < 0.3,
        )


def chain_program(recipe: Recipe) -> Program:
    """The unrolled program: inputs are the first states, one shared value and the streams; results depend on every step."""
    choose = random.Random(recipe.seed)
    write = Writer(recipe.rows)
    states = [write.input(recipe.rows, 3) for _ in range(recipe.carries + recipe.distance - 1)]
    shared = write.input(recipe.rows, 3)
    streams = [write.input(recipe.steps, recipe.rows, 3) for _ in range(recipe.streams)]
    plan = [
        (choose.choice(BINARY), choose.random(), choose.random(), choose.choice((*UNARY, None, None))) for _ in range(recipe.ops)
    ]
    shape = choose.choice(("stack", "last", "middle"))
    older = states[recipe.carries :]
    state, given = states[: recipe.carries], []
    for t in range(recipe.steps):
        slices = [write.call(aten.select.int, stream, 0, t) for stream in streams]
        made = [*state, shared, *slices, *older[-1:]]
        if recipe.peeled and t == 0:
            made[0] = write.call(aten.abs.default, made[0])
        value = state[0]
        for op, left, right, unary in plan:
            value = write.call(op, value, made[int(right * len(made))])
            value = value if unary is None else write.call(unary, value)
            made.append(value)
            del left
        older = [state[0], *older][: recipe.distance - 1]
        state = [*state[1:], value]
        given.append(value)
    wanted = {"stack": given, "last": given[-1:], "middle": [given[recipe.steps // 2], given[-1]]}[shape]
    return write.program(
        write.call(aten.stack.default, wanted) if shape == "stack" else write.call(aten.sum.default, wanted[0]), *state
    )


def run(program: Program, values: list[torch.Tensor]) -> list[torch.Tensor]:
    """The results of a program."""
    found = fx.Interpreter(program.graph).run(*values, enable_io_processing=False)
    return list(found)


def values_of(program: Program, seed: int) -> list[torch.Tensor]:
    """Random inputs."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(-50, 50, tuple(n.meta["val"].shape), generator=generator) for n in program.placeholders]


def chains_of(program: Program) -> list[fx.Node]:
    """The chain nodes."""
    return [n for n in program.nodes if "hocket.chain" in str(n.target)]
