"""Solve recurrences in parallel (Jacobi feedforward, Song et al., ICML 2021, arXiv 2002.03629).

    x[t+1] = f(x[t], u[t])  for t = 0 .. T-1      a triangular system; any of its fixed-point iterations ends at the loop's own
    values

The pass finds chains in unrolled graphs and lifts each into one ``hocket::chain`` node; takes the chain nodes that capture made of
recurrent layers and ``hocket.sequential``; splits off what needs no step-by-step order; and hands the rest to a solver. The node
means the sequential loop, so the program is equal by definition of the node, and that is what the verifier evaluates; how it is
solved, and how exactly, is part of the instruction.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch.fx as fx

from ...compiler.chains.bodies import How, chain_op, read_how
from ...compiler.contract import Context, Contract, Equal
from ...compiler.program import Decision, Program, copy_program, note
from .batch import Inserter
from .canonical import merge_equal
from .find import find_chains
from .lift import lift
from .segments import cut_in_time
from .split import ChainNode, Split, split
from .whole import keep_whole


@dataclass(frozen=True)
class JacobiFeedforward:
    """Find, lift, split and solve chains.

    solver: "auto" measures at the first call and decides; or "blocks:64", "jacobi", "windows:32", "shooting:32", "newton",
    "sequential". exact: "bitwise", "rounding" or a relative tolerance. find: look for chains in unrolled graphs; shortest: of at
    least so many steps. axis: a mesh axis; chains are cut in time into as many segments as it has ranks (``segments``), and the
    solver is that of a segment in its first sweep.
    """

    name: ClassVar[str] = "jacobi"
    contract: ClassVar[Contract] = Equal()
    solver: str = "auto"
    exact: str | float = "rounding"
    find: bool = True
    shortest: int = 24
    axis: str = ""

    def __call__(self, program: Program, context: Context) -> Program:
        """See the class."""
        chain_op()
        how = How.parse(self.solver, self.exact)
        after, _ = copy_program(program)
        graph = after.graph.graph
        parts = context.mesh.axis_size(self.axis) if self.axis else 1
        how = _in_segments(how) if parts > 1 else _on_ranks(how, context.mesh.size)
        decisions = self._lifted(graph) if self.find else []
        decisions += [self._chain(graph, node, how, parts) for node in [n for n in graph.nodes if n.target is chain_op()]]
        graph.eliminate_dead_code(is_impure_node=lambda n: n.op in ("placeholder", "output"))
        return after.decided(*decisions)

    def _lifted(self, graph: fx.Graph) -> list[Decision]:
        """Lift what is found; one decision for every segment that repeats and is no chain."""
        merge_equal(graph)
        chains, refused = find_chains(graph, self.shortest)
        names: dict[fx.Node, fx.Node] = {}
        for chain in chains:
            names |= lift(graph, chain.renamed(names), self.name)[1]
        return [
            Decision(
                self.name, r.node.name, applied=False, reason=f"repeats {r.steps} times, but {r.reason}", source=note(r.node).source
            )
            for r in refused
        ]

    def _chain(self, graph: fx.Graph, node: fx.Node, how: How, parts: int) -> Decision:
        inserter = Inserter(graph, node, self.name)
        chain = ChainNode.of(node, inserter)
        chosen, reason = _choice(chain, how)
        made = None
        if chain.how.native and chosen.solver == "auto":
            made = keep_whole(chain, replace(chosen, native=chain.how.native), inserter)
            reason = f"{reason}, torch's own {chain.how.native} among what is tried" if made else reason
        made = made or split(chain, chosen, inserter)
        for index, getters in chain.uses.items():
            for getter in getters:
                getter.replace_all_uses_with(made.replaced[index])
                graph.erase_node(getter)
        graph.erase_node(node)
        what, name, applied = _what(chain, made), made.node.name, chosen.solver != "sequential"
        if parts > 1:
            cut, why = cut_in_time(graph, made, (chain.count, parts), chosen, self.name)
            applied = bool(cut)
            what = f"{what}; cut over {self.axis} into {cut}" if cut else f"{what}; not cut over {self.axis}: {why}"
        return Decision(self.name, name, applied, f"{what}; {reason}", None, note(node).source)


def _choice(chain: ChainNode, how: How) -> tuple[How, str]:
    """The solver of one chain, and why."""
    dtypes = [n.meta["val"].dtype for n in chain.init]
    floating = any(d.is_floating_point for d in dtypes)
    if how.exact == "bitwise" and floating and how.solver == "auto":
        why = 'a loop: exact="bitwise" of a floating point state, whose rounding never settles'
        return replace(how, solver="sequential", window=0), why
    classes = {how.exactness(d) for d in dtypes}
    exact = "ROUNDING" if "ROUNDING" in classes else classes.pop()
    measured = "decided at the first call by a measured step and the length of its memory" if how.solver == "auto" else "as asked"
    return how, f"solver {how}, {exact}, {measured}"


def _on_ranks(how: How, ranks: int) -> How:
    """On several ranks nothing may depend on measured time: ranks that hold copies must take the same way."""
    return replace(how, solver="blocks", window=how.window or 32) if how.solver == "auto" and ranks > 1 else how


def _in_segments(how: How) -> How:
    """The segments of all ranks are long: each is a loop, unless another solver is asked for."""
    return replace(how, solver="sequential") if how.solver == "auto" else how


def _what(chain: ChainNode, made: Split) -> str:
    layout = "steps folded into rows" if made.rows else "steps vectorised"
    if made.hoisted == 0 and read_how(str(made.node.args[-1])).native:
        return f"a chain of {chain.count} steps of {made.kept} ops (kept whole; {layout})"
    sums = f", {made.summed} sums taken after it" if made.summed else ""
    return f"a chain of {chain.count} steps of {made.kept} ops ({made.hoisted} more hoisted{sums}; {layout})"
