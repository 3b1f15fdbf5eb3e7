"""Regions of a rank's program as single calls, compiled on the rank itself.

    region of the instruction list  ->  FX graph  ->  ``inductor.compile_graph``  ->  one step of the executor

The program that travels stays data: the rank rebuilds the graph from its own instructions. Regions that differ only in the numbers
of their slots (repeated blocks) are compiled once.

A region that does not compile keeps its instructions, and the report says why. One whose kernel raises is run again instruction by
instruction, so that the error names the instruction and its source line; if that succeeds it stays uncompiled.
"""

from __future__ import annotations

import hashlib
import operator
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.fx as fx

from .errors import RunError
from .executors.failure import rank_failed
from .inductor import Kernel, compile_graph, missing_compiler, taking_turns
from .late import waiting_late
from .load import COMPUTE, LoadedProgram, Step
from .ops import overload_of
from .ports import Piece
from .program import RankProgram, Segment
from .regions import Region, Report, regions
from .shapes import Form, filled, forms


class RegionCall:
    """A region as the executor calls it: the kernel, or the instructions one by one."""

    def __init__(self, loaded: LoadedProgram, region: Region, watch: Callable[[int], None]) -> None:
        self.loaded, self.region, self.watch = loaded, region, watch
        self.kernel: Kernel | None = None
        self.forms: tuple[Form, ...] = ()
        self._restride = False

    def __call__(self, *values: Any) -> Sequence[Any]:
        """The values of ``region.outputs`` from those of ``region.inputs``."""
        if self.kernel is None:
            return self.interpret(values)
        try:
            return self.kernel(*(self._restrided(values) if self._restride else values))
        except AssertionError:
            if self._restride:
                return self._without_kernel(values)
            self._restride = True  # a kernel is made for certain strides, and this value has others
            return self(*values)
        except Exception:  # run again below, where the instruction is known
            return self._without_kernel(values)

    def _without_kernel(self, values: Sequence[Any]) -> Sequence[Any]:
        self.kernel = None
        results = self.interpret(values)
        where = self.loaded.program.source(self.region.start)
        warnings.warn(f"the compiled region at {where} failed, its instructions do not: it stays uncompiled", stacklevel=2)
        return results

    def _restrided(self, values: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        return [
            value if value.stride() == form.stride else form.empty().copy_(value)
            for value, form in zip(values, self.forms, strict=True)
        ]

    def interpret(self, values: Sequence[Any]) -> list[Any]:
        """Run the instructions. Raises RankFailed naming the one that fails."""
        frame: dict[int, Any] = dict(zip(self.region.inputs, values, strict=True))
        base = self.loaded.program.slots
        index = self.region.start
        kept = set(self.region.outputs)
        try:
            for step in self.loaded.steps[self.region.start : self.region.stop]:
                index = step.index
                self.watch(index)
                assert step.call is not None, "a region holds computations only"
                args = [frame[p] if p < base else self.loaded.constants[p - base] for p in step.inputs]
                result = step.call(*args)
                if step.output >= 0:
                    frame[step.output] = result
                else:
                    frame.update((s, element) for s, element in zip(step.spread, result, strict=True) if s >= 0)
                for slot in step.frees:
                    if slot not in kept:
                        frame.pop(slot, None)
        except RunError:
            raise
        except Exception as error:
            raise rank_failed(self.loaded.program, self.loaded.rank, index, error) from error
        return [frame[slot] for slot in self.region.outputs]


class Fusion:
    """The regions of one loaded program, compiled: gives the executor the steps of each segment."""

    def __init__(self, loaded: LoadedProgram, inputs: Mapping[int, Form], watch: Callable[[int], None]) -> None:
        """Compile now. inputs: form of every input port; watch: told the index of an instruction that runs by itself."""
        self.loaded = loaded
        self.calls = {r.start: RegionCall(loaded, r, watch) for r in regions(loaded.program)}
        self.report = Report(len(loaded.program.instructions), len(self.calls))
        with torch.inference_mode(mode=False), torch.no_grad():
            self._compile(inputs)
        done = [call.region for call in self.calls.values() if call.kernel is not None]
        self.report.compiled, self.report.fused = len(done), sum(r.stop - r.start for r in done)

    def steps(self, segment: Segment) -> list[Step]:
        """The steps of a segment, a compiled region as one of them, every wait as late as possible."""
        return waiting_late(self._in_order(segment))

    def _in_order(self, segment: Segment) -> Iterator[Step]:
        index = segment.start
        while index < segment.stop:
            call = self.calls.get(index)
            if call is None or call.kernel is None:
                yield self.loaded.steps[index]
                index += 1
                continue
            region = call.region
            yield Step(region.start, COMPUTE, call, region.inputs, -1, region.outputs, region.frees)
            index = region.stop

    def _compile(self, inputs: Mapping[int, Form]) -> None:
        try:
            known = forms(self.loaded.program, self.loaded.site, inputs)
        except Exception as error:  # an op without a fake implementation: say so, run uncompiled
            self.report.failures.append(("the whole program", _short(error)))
            return
        missing = missing_compiler() if self.loaded.site.device is None else ""
        if missing:
            self.report.failures.append(("the whole program", missing))
            return
        alike: dict[str, list[RegionCall]] = {}
        for call in self.calls.values():
            region = call.region
            if all(slot in known for slot in (*region.inputs, *region.outputs)):
                call.forms = tuple(known[slot] for slot in region.inputs)
                alike.setdefault(self._key(call), []).append(call)
        for key in taking_turns(sorted(alike), self.loaded.rank):
            self._compile_one(alike[key])

    def _compile_one(self, calls: Sequence[RegionCall]) -> None:
        first = calls[0]
        try:
            kernel = compile_graph(self._graph(first.region), first.forms)
        except Exception as error:  # whatever Inductor cannot do stays as it is, and the report says so
            self.report.failures.append((self.loaded.program.source(first.region.start) or "an unknown line", _short(error)))
            return
        self.report.distinct += 1
        for call in calls:
            call.kernel = kernel

    def _key(self, call: RegionCall) -> str:
        """Equal for regions that are the same computation on tensors of the same form."""
        region, numbers = call.region, {slot: i for i, slot in enumerate(call.region.inputs)}
        text = []
        for ins in self.loaded.program.instructions[region.start : region.stop]:
            for slot in ins.outputs:
                if slot >= 0:
                    numbers[slot] = len(numbers)
            args = filled([ins.args, list(ins.kwargs.items())], _Numbers(numbers), self.loaded.site)
            text.append(f"{ins.op} {args} -> {[numbers.get(slot, -1) for slot in ins.outputs]}")
        text += [str(call.forms), str([numbers[slot] for slot in region.outputs]), torch.__version__]
        return hashlib.sha256("\n".join(text).encode()).hexdigest()

    def _graph(self, region: Region) -> fx.GraphModule:
        graph = fx.Graph()
        values: dict[int, Any] = {slot: graph.placeholder(f"slot{slot}") for slot in region.inputs}
        for ins in self.loaded.program.instructions[region.start : region.stop]:
            args = tuple(filled(template, values, self.loaded.site) for template in ins.args)
            kwargs = {name: filled(template, values, self.loaded.site) for name, template in ins.kwargs.items()}
            node = graph.call_function(overload_of(ins.op), args, kwargs)
            if not ins.spread:
                values[ins.outputs[0]] = node
                continue
            for i, slot in enumerate(ins.outputs):
                if slot >= 0:
                    values[slot] = graph.call_function(operator.getitem, (node, i))
        graph.output(tuple(values[slot] for slot in region.outputs))
        return fx.GraphModule(torch.nn.Module(), graph)


def input_forms(program: RankProgram, rank: int, bound: Mapping[int, torch.Tensor], device: torch.device) -> dict[int, Form]:
    """The form of every input port on a rank. bound: values that stay from call to call; the others are views of global tensors."""
    found = {}
    for index, port in enumerate(program.inputs):
        piece = Piece.of(port, program.mesh, rank)
        found[index] = Form(piece.shape, piece.stride, piece.dtype, device)
        if index in bound:
            found[index] = Form.of(bound[index])._replace(device=device)
    return found


class _Numbers(dict[int, Any]):
    """Slots as text."""

    def __init__(self, numbers: Mapping[int, int]) -> None:
        super().__init__({slot: f"%{number}" for slot, number in numbers.items()})


def _short(error: Exception) -> str:
    first = (str(error).strip().splitlines() or [""])[0]
    return f"{type(error).__name__}: {first[:300]}"
