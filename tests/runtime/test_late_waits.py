"""Waits move down to the first reader and change nothing else."""

from __future__ import annotations

from hand_lowered import data_parallel_training, tensor_parallel_mlp
from local_support import mlp

from hocket.compiler.emit import emit
from hocket.runtime.late import late_waits
from hocket.runtime.load import WAITING, load
from hocket.runtime.mesh import Mesh
from hocket.runtime.program import RankProgram


def check(program: RankProgram) -> int:
    """Every step once, others in order, every value there before it is read and until its last reader; how many waits moved."""
    loaded, moved = load(program, 0), 0
    for segment in program.segments:
        before = loaded.steps[segment.start : segment.stop]
        after = late_waits(loaded, segment)
        assert sorted(step.index for step in after) == [step.index for step in before]
        assert [s for s in after if s.kind != WAITING] == [s for s in before if s.kind != WAITING]
        alive = set(range(program.slots)) - {slot for step in after for slot in (step.output, *step.spread)}
        for place, step in enumerate(after):
            assert all(position in alive or position >= program.slots for position in step.inputs)
            alive |= {step.output, *step.spread}
            alive -= set(step.frees)
            if step.kind == WAITING:
                readers = [later for later in after[place + 1 :] if step.output in later.inputs]
                assert not readers or step.output in after[place + 1].inputs or after[place + 1].kind == WAITING
                moved += step.index != segment.start + place
    return moved


def test_values_are_waited_for_before_they_are_read_and_not_earlier() -> None:
    assert check(mlp(Mesh.parse("tp=2"))) == 0  # each is needed at once, or is the last
    assert check(emit(tensor_parallel_mlp("dp=2,tp=2"))) > 0
    assert check(emit(data_parallel_training("dp=4", rows=10))) > 0
