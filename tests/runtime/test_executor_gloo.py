import multiprocessing
from fractions import Fraction
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from hand_lowered import data_parallel_training, tensor_parallel_mlp, uneven_windows
from test_executor_lockstep import ring_program

from hocket.compiler.emit import emit
from hocket.runtime.executors.flat import FlatExecutor
from hocket.runtime.executors.lockstep import run_lockstep
from hocket.runtime.executors.strands import StrandExecutor
from hocket.runtime.gloo import GlooCommunicator
from hocket.runtime.load import load
from hocket.runtime.pieces import cut
from hocket.runtime.program import RankProgram


def rank_main(rank: int, texts: list[str], folder: str) -> None:
    """One real rank: runs every program on its pieces of the same seeded inputs and stores results and bytes on the wire."""
    torch.set_num_threads(1)
    first = RankProgram.from_json(texts[0])
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=first.mesh.size)
    found = []
    for text in texts:
        program = RankProgram.from_json(text)
        communicator = GlooCommunicator(program.mesh, timeout=60)
        executor = FlatExecutor(load(program, rank), communicator)
        row = rows(program)[rank]
        frame = executor.open(row)
        results = []
        for segment in program.segments:
            results += executor.run(frame, segment.name, [row[port] for port in segment.inputs])
        found.append((results, {kind: (sent.numerator, sent.denominator) for kind, sent in communicator.wire.sent.items()}))
        communicator.barrier()
    torch.save(found, f"{folder}/rank{rank}.pt")
    dist.destroy_process_group()


def rows(program: RankProgram):
    generator = torch.Generator().manual_seed(3)
    pieces = [cut(torch.randn(p.shape, generator=generator), p.layout, program.mesh) for p in program.inputs]
    return [[piece[rank] for piece in pieces] for rank in range(program.mesh.size)]


@pytest.fixture(scope="module")
def real_and_simulated(tmp_path_factory):
    folder = Path(tmp_path_factory.mktemp("gloo"))
    programs = [
        emit(tensor_parallel_mlp("dp=2,tp=2")),
        emit(data_parallel_training("dp=4", rows=10)),
        emit(uneven_windows("tp=4", 6)),
        ring_program(4),
    ]
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "torch.distributed"])
    ranks = [context.Process(target=rank_main, args=(r, [p.to_json() for p in programs], str(folder))) for r in range(4)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join(120)
    assert [rank.exitcode for rank in ranks] == [0] * 4
    return programs, [torch.load(folder / f"rank{r}.pt") for r in range(4)]


def test_real_ranks_compute_what_lockstep_computes(real_and_simulated):
    programs, real = real_and_simulated
    for i, program in enumerate(programs):
        simulated = run_lockstep(program, rows(program))
        for rank in range(4):
            ports = [port for segment in program.segments for port in program.segment_outputs(segment.name)]
            for port, value in zip(ports, real[rank][i][0], strict=True):
                assert (value is None) == (simulated[rank][port] is None)
                if value is not None:
                    torch.testing.assert_close(value, simulated[rank][port])


def test_bytes_on_the_wire_follow_the_formulas_and_lockstep_counts_the_same(real_and_simulated):
    programs, real = real_and_simulated
    sent = [{kind: Fraction(*value) for kind, value in rank[0][1].items()} for rank in real]
    part, cut_piece, columns = 4 * 4 * 4, 2 * 4 * 4, 4 * 4
    for rank in range(4):
        assert sent[rank]["reduce_scatter"] == Fraction(part, 2)
        assert sent[rank]["all_gather"] == cut_piece
        assert sent[rank]["all_reduce"] == 2 * columns
        assert sent[rank]["all_to_all"] == cut_piece // 2
        assert sent[rank]["broadcast"] == (columns if rank % 2 == 1 else 0)
    for i, program in enumerate(programs):
        executor = StrandExecutor([program] * 4)
        frame = executor.open(rows(program))
        for segment in program.segments:
            executor.run(frame, segment.name, [[row[p] for p in segment.inputs] for row in rows(program)])
        for rank, strand in enumerate(frame.strands):
            assert strand.end.wire.sent == {kind: Fraction(*value) for kind, value in real[rank][i][1].items()}
