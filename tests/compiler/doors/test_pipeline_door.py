"""The door for pipelines: a training step on stages is that of the plain model, micro-batch by micro-batch."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from pipeline_support import Block, one_thread
from torch import Tensor, nn

import hocket
from hocket.compiler.doors.module import session_of
from hocket.compiler.doors.pipeline.batch import Batch, rows_of
from hocket.compiler.doors.pipeline.options import parse_bytes
from hocket.compiler.errors import InputError
from hocket.errors import RunError

__all__ = ["one_thread"]

STEPS = 2


pytestmark = pytest.mark.usefixtures("one_thread")


class Net(nn.Module):
    def __init__(self, layers: int = 4, width: int = 8) -> None:
        super().__init__()
        self.embed = nn.Embedding(16, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(layers))
        self.norm = nn.BatchNorm1d(4)  # positions are its channels
        self.head = nn.Linear(width, 16)

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        h = self.embed(x)
        for block in self.blocks:
            h = block(h)
        logits = self.head(self.norm(h))
        return logits if y is None else F.cross_entropy(logits.flatten(0, 1), y.flatten())


@pytest.fixture
def batch() -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    return torch.randint(16, (8, 4)), torch.randint(16, (8, 4))


def plain_step(model: nn.Module, x: Tensor, y: Tensor, count: int) -> Tensor:
    losses = [model(*rows) / count for rows in zip(x.chunk(count), y.chunk(count), strict=True)]
    for loss in losses:
        loss.backward()
    return torch.stack([loss.detach() for loss in losses]).sum()


@pytest.mark.parametrize(
    ("schedule", "engine"),
    [
        ("auto", "sim"),
        ("1f1b-2bp", "sim"),
        ("zb-v", "sim"),
        ("auto", "local"),
        pytest.param("zb-h1", "local", marks=pytest.mark.slow),
    ],
)
def test_gradients_loss_and_buffers_are_those_of_the_plain_model_bitwise(
    schedule: str, engine: str, batch: tuple[Tensor, Tensor]
) -> None:
    torch.manual_seed(1)
    model = Net()
    plain = copy.deepcopy(model)
    tactic = hocket.PipelineParallel(microbatches=4, schedule=schedule, pieces=2 if schedule == "1f1b-2bp" else 1)
    optimizers = [torch.optim.SGD(one.parameters(), 0.1) for one in (model, plain)]
    with hocket.parallelize(model, "pp=2", tactics=[tactic], engine=engine) as stages:
        for _ in range(STEPS):
            for optimizer in optimizers:
                optimizer.zero_grad()
            assert torch.equal(stages.train_step(*batch), plain_step(plain, *batch, 4))
            for (name, found), expected in zip(model.named_parameters(), plain.parameters(), strict=True):
                assert torch.equal(found.grad, expected.grad), name
            for optimizer in optimizers:
                optimizer.step()
        for (name, found), expected in zip(model.named_buffers(), plain.buffers(), strict=True):
            assert torch.equal(found, expected), name
        assert "stage 0 sends" in stages.explain()
        assert str(stages.verify("ring").status) == "equal"
        stages.eval()
        plain.eval()
        with torch.no_grad():
            assert torch.equal(stages(batch[0]), torch.cat([plain(rows) for rows in batch[0].chunk(4)]))


def test_gradients_are_added_to_those_that_are_there(batch: tuple[Tensor, Tensor]) -> None:
    model = Net(layers=2)
    with hocket.parallelize(model, "pp=2", engine="sim") as stages:
        stages.train_step(*batch)
        once = [parameter.grad.clone() for parameter in model.parameters()]
        stages.train_step(*batch)
    for parameter, value in zip(model.parameters(), once, strict=True):
        torch.testing.assert_close(parameter.grad, 2 * value)


def test_a_loss_of_the_users_own_and_sums_instead_of_means(batch: tuple[Tensor, Tensor]) -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))
    plain = copy.deepcopy(model)
    x = torch.randn(8, 4)
    tactic = hocket.PipelineParallel(microbatches=2, loss=lambda out: out.square().sum(), reduction="sum")
    with hocket.parallelize(model, "pp=2", tactics=[tactic], engine="sim") as stages:
        loss = stages.train_step(x)
    expected = plain(x).square().sum()
    expected.backward()
    torch.testing.assert_close(loss, expected.detach())
    for one, other in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad)


def test_rows_that_do_not_divide_are_spread_with_the_small_micro_batches_at_both_ends() -> None:
    assert rows_of(18, 4, 2) == (4, 5, 5, 4)
    assert rows_of(8, 3, 2) == (2, 3, 3)
    assert rows_of(7, "auto", 2) == (2, 3, 2)
    assert rows_of(3, "auto", 2) == (1, 1, 1)
    assert rows_of(16, (5, 4, 4, 3), 2) == (5, 4, 4, 3)
    assert rows_of(12, 4, 2, replicas=2) == (2, 4, 4, 2)


@pytest.mark.parametrize(
    ("rows", "wanted", "replicas", "message"),
    [
        (3, 4, 1, "no 4 micro-batches: ask for at most microbatches=3"),
        (6, 4, 2, "of at least 2 rows, one for each replica: ask for at most microbatches=3"),
        (16, (5, 4, 4), 1, r"are 13 rows, the batch has 16: 3 micro-batches of it could be \[5, 6, 5\]"),
        (7, "auto", 2, "cannot be shared by 2 replicas of each stage: use a batch of 8 rows, or of 6"),
        (8, (5, 3), 2, "a micro-batch of 5 rows cannot be shared by 2 replicas"),
    ],
)
def test_micro_batches_that_cannot_be_are_refused_with_a_way_out(rows: int, wanted: object, replicas: int, message: str) -> None:
    with pytest.raises(InputError, match=message):
        rows_of(rows, wanted, 2, replicas)


def test_micro_batches_are_rows_of_every_tensor_of_the_batch() -> None:
    x, flag = torch.arange(6), torch.tensor(1.0)
    calls = Batch((x, 3), {"flag": flag}).cut(rows_of(6, "auto", 2))
    assert [call[0][0].tolist() for call in calls] == [[0, 1], [2, 3], [4, 5]]
    assert all(call[0][1] == 3 and call[1]["flag"] is flag for call in calls)
    with pytest.raises(InputError, match="no tensor with a dimension"):
        Batch((flag,), {})
    with pytest.raises(InputError, match="at least one row"):
        Batch((torch.empty(0, 3),), {})


def test_more_stages_than_layers_is_refused_with_the_most_that_would_work() -> None:
    tactic = hocket.PipelineParallel(loss=lambda out: out.square().sum())
    with (
        hocket.parallelize(nn.Linear(4, 4), "pp=8", tactics=[tactic], engine="sim") as stages,
        pytest.raises(InputError, match="fewer than the 8 stages asked for: ask for at most"),
    ):
        stages.train_step(torch.randn(8, 4))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"microbatches": 0}, "positive number"),
        ({"schedule": "2f2b"}, 'schedule must be "auto" or one of'),
        ({"pieces": 0}, "pieces must be a positive number"),
        ({"reduction": "max"}, 'must be "mean" or "sum"'),
        ({"memory": "lots"}, 'such as "8GB"'),
        ({"axis": "tp"}, "which mesh"),
    ],
)
def test_senseless_options_are_refused_at_the_door(options: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        hocket.parallelize(Net(), "pp=2", tactics=[hocket.PipelineParallel(**options)], engine="sim")


def test_stages_are_of_equal_work_and_no_call_is_torn_from_its_results() -> None:
    torch.manual_seed(0)
    attention = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    model = nn.Sequential(attention, copy.deepcopy(attention))
    tactic = hocket.PipelineParallel(microbatches=2, loss=lambda out: out.square().mean())
    with hocket.parallelize(model, "pp=2", tactics=[tactic], engine="sim") as stages:
        stages.train_step(torch.randn(4, 6, 8))
        owners = [{name.split(".")[0] for name in stage.parameters} for stage in session_of(stages).compiled.pipeline.stages]
    assert set().union(*owners) == {"0", "1"}
    assert len(owners) == 2
    assert "0" in owners[0]
    assert "1" in owners[1]


def test_a_chain_of_equal_layers_is_cut_between_any_two() -> None:
    """The same number of bytes crosses everywhere, so that no place is narrower than another."""
    model = nn.Sequential(*(nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in range(4)))
    tactic = hocket.PipelineParallel(microbatches=2, loss=lambda out: out.square().mean())
    with hocket.parallelize(model, "pp=2", tactics=[tactic], engine="sim", verify="off") as stages:
        stages.train_step(torch.randn(4, 8))
        owners = [{name.split(".")[0] for name in stage.parameters} for stage in session_of(stages).compiled.pipeline.stages]
    assert owners[0] | owners[1] == {"0", "1", "2", "3"}
    assert not owners[0] & owners[1]
    assert len(owners[1]) >= 1
    assert len(owners[0]) >= 2


def test_what_a_pipeline_cannot_do_is_refused_by_name(batch: tuple[Tensor, Tensor]) -> None:
    with pytest.raises(InputError, match="a pipeline takes no memory_limit"):
        hocket.parallelize(Net(), "pp=2", engine="sim", memory_limit=10**6)
    with pytest.raises(InputError, match="no SplitBackward beside it"):
        hocket.parallelize(Net(), "pp=2", engine="sim", tactics=[hocket.PipelineParallel(), hocket.SplitBackward()])
    with pytest.raises(InputError, match="an axis 'tp' beside the pipeline's"):
        hocket.parallelize(Net(), "pp=2", engine="sim", tactics=[hocket.TensorParallel("tp")])
    with (
        hocket.parallelize(Net(layers=2), "pp=2", engine="sim") as stages,
        pytest.raises(InputError, match="train with train_step"),
    ):
        stages(*batch)
    with hocket.parallelize(nn.Linear(2, 2), "pp=2", engine="sim") as stages, pytest.raises(InputError, match="not of inputs"):
        stages.train_step(torch.randn(4, 2, requires_grad=True))
    with hocket.parallelize(Net(layers=2), "d=2", engine="sim") as ranks, pytest.raises(InputError, match="is for pipelines"):
        ranks.train_step(*batch)


@pytest.mark.slow
def test_a_failure_in_a_stage_reaches_the_caller_as_one_error(batch: tuple[Tensor, Tensor]) -> None:
    with hocket.parallelize(Net(layers=2), "pp=2", engine="local") as stages:
        stages.train_step(*batch)
        with pytest.raises(RunError) as caught:
            stages.train_step(batch[0] + 100, batch[1])
        assert "rank 0" in str(caught.value)
        with pytest.raises(RunError, match="closed"):
            stages.train_step(*batch)


def test_sizes_of_memory() -> None:
    assert (parse_bytes("8GB"), parse_bytes("1.5 MiB"), parse_bytes(7), parse_bytes(None)) == (8 * 10**9, 1572864, 7, None)
