"""One stage of a pipeline on its rank: its parts as callables, the tensors it holds, and one dictionary of values per micro-batch.

    F, I, W         read held tensors and the micro-batch's values, and add to its values
    gradients       are added to one accumulator per parameter, in the order in which the schedule runs the parts that make them
    weights         are inputs of the parts: a kept version is a dictionary of references, no copy of anything
    products        a weight gradient that is a product a @ b may be given as its two factors: it is then added by one call of
                    ``addmm_``, which is the sum of the product without a buffer for it

The parts' ports are named by role, as ``compiler.stages`` describes them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch

from ..errors import InputError, RunError
from .code import HELD, ONCE, Part, Port, Run, StageCode, ValueSpec, named

__all__ = ["HELD", "ONCE", "Part", "Port", "Run", "StageCode", "StageState", "ValueSpec", "named"]


@dataclass
class StageState:
    """A stage at work.

    held: port -> tensor; gradients: parameter -> accumulator (kept from step to step, so that its memory is); values, outputs: per
    micro-batch; kept: per micro-batch, the weights that it must see where they are not the newest; before: per micro-batch, the
    buffers as its forward saw them, where that forward is run again; waiting: per (micro-batch, piece), gradients not added yet;
    filled: accumulators with a sum; finished: gradients that part O has made of the sums; variants: micro-batches of another size
    -> their code; joined: of how many micro-batches the products of a weight gradient are made together; factors: of products
    that are still to be made, by parameter.
    """

    code: StageCode
    held: dict[Port, torch.Tensor]
    gradients: dict[str, torch.Tensor] = field(default_factory=dict)
    values: dict[int, dict[str, torch.Tensor]] = field(default_factory=dict)
    given: dict[int, Mapping[str, torch.Tensor]] = field(default_factory=dict)
    outputs: dict[int, dict[str, torch.Tensor]] = field(default_factory=dict)
    kept: dict[int, dict[Port, torch.Tensor]] = field(default_factory=dict)
    before: dict[int, dict[Port, torch.Tensor]] = field(default_factory=dict)
    waiting: dict[tuple[int, int], list[tuple[str, tuple[torch.Tensor, ...]]]] = field(default_factory=dict)
    filled: set[str] = field(default_factory=set)
    finished: dict[str, torch.Tensor] = field(default_factory=dict)
    variants: Mapping[int, StageCode] = field(default_factory=dict)
    joined: int = 1
    factors: dict[str, list[tuple[torch.Tensor, torch.Tensor]]] = field(default_factory=dict)

    def at(self, micro_batch: int) -> StageCode:
        """The code for a micro-batch."""
        return self.variants.get(micro_batch, self.code)

    def begin(self, given: Sequence[Mapping[str, torch.Tensor]]) -> None:
        """Forget the last step; accumulators keep their memory, not their sums.

        given: per micro-batch, its inputs, tangents and seeds by name.
        """
        self.values = {}
        self.outputs = {}
        self.kept = {}
        self.before = {}
        self.waiting = {}
        self.given = dict(enumerate(given))
        self.filled = set()
        self.finished = {}
        self.factors = {}

    def receive(self, micro_batch: int, specs: Sequence[ValueSpec], tensors: Sequence[torch.Tensor]) -> None:
        """Take a message into the values of its micro-batch."""
        mine = self.values.setdefault(micro_batch, {})
        mine.update((spec.name, tensor) for spec, tensor in zip(specs, tensors, strict=True))

    def message(self, micro_batch: int, specs: Sequence[ValueSpec]) -> list[torch.Tensor]:
        """The tensors of a message to send."""
        mine = self.values[micro_batch]
        return [mine[spec.name] for spec in specs]

    def run(self, part: Part, micro_batch: int, piece: int | None = None) -> None:
        """Run one part for one micro-batch. piece: its gradients wait for ``add`` under that number, None: they are added at once.

        Raises RunError where a port has nothing behind it.
        """
        self.take(part, micro_batch, part.run(self.arguments(part, micro_batch)), piece)

    def take(self, part: Part, micro_batch: int, results: Sequence[torch.Tensor | None], piece: int | None = None) -> None:
        """Put the results of a part where they belong."""
        mine = self.values.setdefault(micro_batch, {})
        found: list[tuple[str, tuple[torch.Tensor, ...]]] = []
        left: torch.Tensor | None = None
        for port, result in zip(part.outputs, results, strict=True):
            if result is None:
                continue
            match port.kind:
                case "value":
                    mine[port.name] = result
                case "gradient":
                    found.append((port.name, (result,)))
                case "left":
                    left = result
                case "right" if left is not None:
                    found.append((port.name, (left, result)))
                case "output":
                    self.outputs.setdefault(micro_batch, {})[port.name] = result
                case "update":
                    self._update(port.name, result)
                case _:
                    raise RunError(f"stage {self.code.stage}: {port.kind} is no kind of output of a part")
        if piece is None:
            self._gather(micro_batch, found)
        else:
            self.waiting.setdefault((micro_batch, piece), []).extend(found)

    def add(self, micro_batch: int, piece: int) -> None:
        """Add gradients that wait."""
        self._gather(micro_batch, self.waiting.pop((micro_batch, piece), []))

    def forward_for_later(self, micro_batch: int) -> None:
        """The forward of a micro-batch that will be run again: what it saw of the buffers is kept for that."""
        self.keep_buffers(micro_batch)
        self.run(self.at(micro_batch).forward, micro_batch)

    def keep_buffers(self, micro_batch: int) -> None:
        """Keep what a forward sees of the buffers."""
        self.before[micro_batch] = {port: tensor for port, tensor in self.held.items() if port.kind == "buffer"}

    def forget_forward(self, micro_batch: int) -> None:
        """Keep nothing of a forward but what came in."""
        came_in = {spec.name for spec in self.at(micro_batch).receives}
        mine = self.values[micro_batch]
        self.values[micro_batch] = {name: value for name, value in mine.items() if name in came_in}

    def recompute(self, micro_batch: int) -> None:
        """Run the forward again, for its values only."""
        part = self.at(micro_batch).forward
        self.take_again(micro_batch, part.run(self.arguments(part, micro_batch)))

    def take_again(self, micro_batch: int, results: Sequence[torch.Tensor | None]) -> None:
        """Put the values of a forward that was run again where they belong."""
        mine = self.values.setdefault(micro_batch, {})
        part = self.at(micro_batch).forward
        for port, result in zip(part.outputs, results, strict=True):
            if port.kind == "value" and result is not None:
                mine[port.name] = result
        del self.before[micro_batch]
        self.drop(part, micro_batch)

    def drop(self, part: Part, micro_batch: int) -> None:
        """Forget what nobody needs after the part and its message."""
        mine = self.values.get(micro_batch, {})
        for name in part.drops:
            mine.pop(name, None)

    def stash(self, micro_batch: int) -> None:
        """Keep the weights of now for a micro-batch."""
        self.kept[micro_batch] = dict(self.held)

    def unstash(self, micro_batch: int) -> None:
        """Forget them."""
        self.kept.pop(micro_batch, None)

    def summands(self, name: str | None = None) -> list[torch.Tensor]:
        """The accumulator of a parameter, one for each rank that this stands for; without a name as many entries of no meaning."""
        return [self.gradients[name] if name is not None else torch.empty(0)]

    def share(self) -> list[dict[str, torch.Tensor]]:
        """Run part S on the gradients gathered so far: what every stage must learn, by name, for each rank that this stands for."""
        part = self.code.share
        assert part is not None, "only a stage with a part S shares something"
        return [named(part, part.run(self.arguments_once(part)))]

    def learn(self, found: Sequence[Mapping[str, torch.Tensor]]) -> None:
        """Take what a stage has shared, for part O."""
        (mine,) = found
        self.values.setdefault(ONCE, {}).update(mine)

    def optimize(self) -> None:
        """Run part O on the gradients gathered so far; the next one starts a new sum."""
        part = self.code.optimizer
        self.finish(() if part is None else part.run(self.arguments_once(part)))

    def finish(self, results: Sequence[torch.Tensor | None]) -> None:
        """Take what part O gives: new weights and states, and gradients that are more than sums over micro-batches."""
        outputs = self.code.optimizer.outputs if self.code.optimizer is not None else ()
        for port, result in zip(outputs, results, strict=True):
            if result is not None and port.kind == "update":
                self._update(port.name, result)
            elif result is not None and port.kind == "gradient":
                self.finished[port.name] = result
        self.values.pop(ONCE, None)
        self.filled = set()

    def gradient(self, name: str) -> torch.Tensor | None:
        """The sum of a parameter's gradients, None where nothing was added."""
        return self.gradients[name] if name in self.filled else None

    def arguments(self, part: Part, micro_batch: int) -> list[torch.Tensor]:
        """What a part reads for a micro-batch. RunError where a port has nothing behind it."""
        mine = self.values.setdefault(micro_batch, {})
        weights = self.kept.get(micro_batch, self.held)
        buffers = self.before.get(micro_batch, self.held)
        arguments = []
        for port in part.inputs:
            kind, name = port
            if kind == "value":
                found = mine.get(name)
            elif kind in HELD:
                found = (weights if kind == "param" else buffers if kind == "buffer" else self.held).get(port)
            else:
                found = self.given.get(micro_batch, {}).get(name)
            if found is None:
                raise RunError(f"stage {self.code.stage}, micro-batch {micro_batch}: {kind} {name!r} is not there")
            arguments.append(found)
        return arguments

    def arguments_once(self, part: Part) -> list[torch.Tensor]:
        """What part S or O reads. RunError where a port has nothing behind it."""
        return [self._once(port) for port in part.inputs]

    def _once(self, port: Port) -> torch.Tensor:
        if port.kind == "gradient":
            found = self.gradient(port.name)
        else:
            found = self.values.get(ONCE, {}).get(port.name) if port.kind == "value" else self.held.get(port)
        if found is None:
            raise RunError(f"stage {self.code.stage}: the optimizer reads {port.kind} {port.name!r}, which is not there")
        return found

    def _update(self, name: str, value: torch.Tensor) -> None:
        """A new value of a buffer, parameter or state. Held tensors are replaced, never written: kept versions stay."""
        for kind in ("buffer", "param", "state"):
            if Port(kind, name) in self.held:
                self.held[Port(kind, name)] = value
                return
        raise InputError(f"stage {self.code.stage} updates {name!r}, which it does not hold")

    def _gather(self, micro_batch: int, found: Sequence[tuple[str, tuple[torch.Tensor, ...]]]) -> None:
        """Add gradients; products of a group of micro-batches only with its last one, as one product over all their rows."""
        if self.joined == 1:
            self._accumulate(found)
            return
        ready = [entry for entry in found if len(entry[1]) != 2]
        for name, factors in found:
            if len(factors) == 2:
                self.factors.setdefault(name, []).append((factors[0], factors[1]))
        if (micro_batch + 1) % self.joined == 0 or micro_batch + 1 == len(self.given):
            for name in [name for name, factors in found if len(factors) == 2]:
                pairs = self.factors.pop(name)
                ready.append((name, (torch.cat([left for left, _ in pairs], 1), torch.cat([right for _, right in pairs]))))
        self._accumulate(ready)

    def _accumulate(self, found: Sequence[tuple[str, tuple[torch.Tensor, ...]]]) -> None:
        for name, factors in found:
            sum_ = self.gradients.get(name)
            if sum_ is None:
                self.gradients[name] = torch.mm(*factors) if len(factors) == 2 else factors[0].clone()
            elif name not in self.filled:
                torch.mm(*factors, out=sum_) if len(factors) == 2 else sum_.copy_(factors[0])
            elif len(factors) == 2:
                sum_.addmm_(*factors)
            else:
                sum_.add_(factors[0])
            self.filled.add(name)
