"""Lowerings of others through ``hocket.verify``: what is proven of them, and the traps that are found."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as funcol
import torch.nn.functional as F
from torch import Tensor, nn
from torch._decomp import core_aten_decompositions
from torch._functorch.aot_autograd import aot_export_module
from torch.distributed.tensor.experimental._context_parallel import _attention as context_parallel
from torch.nn.parallel import DistributedDataParallel

import hocket
from hocket.compiler.cli.main import main
from hocket.compiler.errors import InputError
from hocket.compiler.verify.report import Status, Verdict
from hocket.compiler.verify.tracing import fake_group, trace_function, trace_ranks

aten = torch.ops.aten


# ---- DistributedDataParallel --------------------------------------------------------------------------------------------------


class Classifier(nn.Module):
    """A loss over rows; the last rows may be ignored."""

    def __init__(self, reduction: str = "mean", ignored: int = -100, *, norm: bool = False) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(6, 5), nn.Linear(5, 3)
        self.norm = nn.BatchNorm1d(5) if norm else nn.Identity()
        self.reduction, self.ignored = reduction, ignored

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        scores = self.down(self.norm(self.up(x)).tanh())
        return F.cross_entropy(scores, y, reduction=self.reduction, ignore_index=self.ignored)


@pytest.fixture
def two_ranks() -> Iterator[None]:
    with fake_group(0, 2):
        yield


def _averaged(rows: int = 4, out: str = "P(avg)", **settings: Any) -> Verdict:
    args = (torch.randn(rows, 6), torch.randint(0, 3, (rows,)))
    layouts = {"args[0]": "S(0)", "args[1]": "S(0)", "output:out": out}
    wrapped = DistributedDataParallel(Classifier(**settings))
    return hocket.verify(Classifier(**settings), wrapped, example_args=args, layouts=layouts, level="ring")


@pytest.mark.usefixtures("two_ranks")
def test_averaged_gradients_of_a_mean_loss_are_equal() -> None:
    verdict = _averaged()
    assert verdict.status is Status.EQUAL, str(verdict)
    assert "on all 2 ranks" in str(verdict)


@pytest.mark.usefixtures("two_ranks")
def test_averaged_gradients_of_a_summed_loss_are_half_of_the_true_ones() -> None:
    verdict = _averaged(out="P(sum)", reduction="sum")
    assert verdict.status is Status.DIFFERENT
    assert "is 1/2 times the original's: it is divided by the 2 ranks of dp once too often" in verdict.divergence


@pytest.mark.usefixtures("two_ranks")
@pytest.mark.parametrize("settings", [{"rows": 5}, {"ignored": 1}, {"norm": True}], ids=["uneven", "ignored rows", "batch norm"])
def test_a_mean_of_means_over_ranks_is_not_the_mean(settings: dict[str, Any]) -> None:
    verdict = _averaged(**settings)
    assert verdict.status is Status.DIFFERENT
    assert "test_foreign_lowerings.py" in verdict.divergence


@pytest.mark.usefixtures("two_ranks")
def test_a_wrapped_module_is_refused_where_its_meaning_is_not_known() -> None:
    args = (torch.randn(4, 6), torch.randint(0, 3, (4,)))
    with pytest.raises(InputError, match="wrapped in DistributedDataParallel: swap the two sides"):
        hocket.verify(DistributedDataParallel(Classifier()), Classifier(), example_args=args)
    with pytest.raises(InputError, match=r"other parameters and buffers: norm\.bias"):
        hocket.verify(Classifier(), DistributedDataParallel(Classifier(norm=True)), example_args=args)
    with pytest.raises(InputError, match="brings its own ranks"):
        hocket.verify(Classifier(), DistributedDataParallel(Classifier()), example_args=args, mesh=2)
    hooked = DistributedDataParallel(Classifier())
    hooked.register_comm_hook(None, lambda state, bucket: None)
    with pytest.raises(InputError, match="communication hook"):
        hocket.verify(Classifier(), hooked, example_args=args)


# ---- context parallelism ------------------------------------------------------------------------------------------------------

LENGTH = 12


def _attention(query: Tensor, key: Tensor, value: Tensor, is_causal: bool = False, **_: Any) -> Any:
    return aten._scaled_dot_product_flash_attention_for_cpu(query, key, value, 0.0, is_causal)


def _attention_backward(*, grad_out: Tensor, query: Tensor, key: Tensor, value: Tensor, **saved: Any) -> Any:
    return aten._scaled_dot_product_flash_attention_for_cpu_backward(
        grad_out, query, key, value, saved["out"], saved["logsumexp"], 0.0, saved["is_causal"]
    )


def _whole(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> list[Tensor]:
    out, lse = _attention(q, k, v, True)
    return [out, *_attention_backward(grad_out=g, query=q, key=k, value=v, out=out, logsumexp=lse, is_causal=True)]


def _ring(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> list[Tensor]:
    """Torch's own algorithm, with the CPU kernel in place of the CUDA one."""
    group = dist.group.WORLD
    assert group is not None
    out, lse = context_parallel._templated_ring_attention(group, 2, _attention, q, k, v, is_causal=True)
    back = context_parallel._templated_ring_attention_backward
    return [out, *back(group, 2, _attention_backward, g, "grad_out", q, k, v, out, lse, True)]


def _balanced(ranks: int) -> Any:
    """The attention of sequences in the order in which balanced ranks hold them: chunks r and 2 ranks - 1 - r."""
    chunks = torch.arange(LENGTH).chunk(2 * ranks)
    held = torch.cat([chunks[i] for r in range(ranks) for i in (r, 2 * ranks - 1 - r)]).tolist()
    back = [held.index(i) for i in range(LENGTH)]

    def ordered(x: Tensor, order: list[int]) -> Tensor:
        return torch.cat([x[:, :, i : i + 1] for i in order], 2)

    return lambda *args: [ordered(x, held) for x in _whole(*(ordered(x, back) for x in args))]


def _context_parallel(ranks: int, rotation: str, original: Any, *, balance: bool) -> Verdict:
    args = [torch.randn(2, 2, LENGTH, 4) for _ in range(4)]
    layouts = {f"args[{i}]": "S(2)" for i in range(4)}
    options = context_parallel._cp_options
    before = options.enable_load_balance, options.rotate_method
    try:
        options.enable_load_balance = balance
        context_parallel.set_rotate_method(rotation)
        graphs = trace_ranks(_ring, args, f"cp={ranks}", layouts=layouts)
    finally:
        options.enable_load_balance, options.rotate_method = before
    layouts |= {f"out[{i}]": "S(2)" for i in range(4)}
    one = trace_function(original, args)
    return hocket.verify(one, graphs, example_args=tuple(args), mesh=f"cp={ranks}", layouts=layouts, level="ring")


CASES = [
    pytest.param(ranks, rotation, balance, marks=() if (ranks, rotation, balance) == (2, "alltoall", True) else pytest.mark.slow)
    for ranks in (2, 3)
    for rotation in ("allgather", "alltoall")
    for balance in (False, True)
]


@pytest.mark.parametrize(("ranks", "rotation", "balance"), CASES)
def test_torchs_context_parallel_attention_is_equal_with_its_backward(ranks: int, rotation: str, balance: bool) -> None:
    original = _balanced(ranks) if balance else _whole
    verdict = _context_parallel(ranks, rotation, original, balance=balance)
    assert verdict.status is Status.EQUAL, str(verdict)
    assert f"on all {ranks} ranks, each with a program of its own" in str(verdict)


def test_balanced_ranks_that_are_fed_plain_chunks_compute_something_else() -> None:
    verdict = _context_parallel(2, "alltoall", _whole, balance=True)
    assert verdict.status is Status.DIFFERENT
    assert "out[0]" in verdict.divergence


def test_only_one_axis_and_no_random_numbers_can_be_traced() -> None:
    with pytest.raises(InputError, match="one axis"):
        trace_ranks(torch.sin, [torch.ones(2)], "a=2,b=2")
    with pytest.raises(InputError, match="draws random numbers"):
        trace_ranks(F.dropout, [torch.ones(2)], 2)
    with fake_group(0, 2), pytest.raises(InputError, match="a process group exists already"):
        trace_ranks(torch.sin, [torch.ones(2)], 2)


def test_a_change_in_place_is_made_functional() -> None:
    def summed(x: Tensor) -> Tensor:
        y = x * 1
        y += funcol.all_reduce(x, "sum", dist.group.WORLD)
        return y

    graphs = trace_ranks(summed, [torch.ones(4)], "d=2")
    twice = trace_function(lambda x: 3 * x, [torch.ones(4)])
    assert hocket.verify(twice, graphs, example_args=(torch.ones(4),), mesh="d=2", level="ring").status is Status.EQUAL


RANK = """
import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as funcol
from torch import nn

class Whole(nn.Module):
    def forward(self, x):
        return x.softmax(-1)

class Piece(nn.Module):
    def forward(self, x):
        e = x.exp()
        return e / funcol.all_reduce(e.sum(-1, keepdim=True), "sum", dist.group.WORLD)

class Forgetful(nn.Module):
    def forward(self, x):
        return x.softmax(-1)
"""


def test_the_command_line_compares_a_module_with_what_one_rank_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "softmax.py"
    file.write_text(RANK)
    layouts = ["--ranks", "d=2", "--layout", "args[0]=S(1)", "--layout", "out=S(1)"]
    common = ["verify", f"{file}:Whole", "--input", "3x6", "--json", "--inference", "--level", "ring", *layouts, "--against"]
    assert main([*common, f"{file}:Piece"]) == 0
    assert json.loads(capsys.readouterr().out)["status"] == "equal"
    assert main([*common, f"{file}:Forgetful"]) == 1
    assert "softmax.py:18" in json.loads(capsys.readouterr().out)["divergence"]
    assert main([*common, f"{file}:Piece", "--layout", "S(1)"]) == 2
    assert "expected NAME=PLACEMENT" in capsys.readouterr().err


# ---- decompositions -----------------------------------------------------------------------------------------------------------


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(8, 8) for _ in range(3))

    def forward(self, x: Tensor) -> tuple[Tensor]:
        q, k, v = (m(x).view(2, 4, 2, 4).transpose(1, 2) for m in (self.q, self.k, self.v))
        return (F.scaled_dot_product_attention(q, k, v).square().sum(),)


def test_decomposing_attention_without_its_backward_is_found() -> None:
    """The forward then saves the attention matrix where the backward reads the logsumexp: wrong gradients, and no error."""
    kernel = aten._scaled_dot_product_flash_attention_for_cpu.default
    whole = core_aten_decompositions()
    without = {op: rule for op, rule in whole.items() if op is not kernel}
    assert kernel in whole
    joint = [
        aot_export_module(Attention(), (torch.randn(2, 4, 8),), trace_joint=True, output_loss_index=0, decompositions=table)[0]
        for table in ({}, without, whole)
    ]
    assert hocket.verify(joint[0], joint[1], level="ring").status is Status.EQUAL
    verdict = hocket.verify(joint[0], joint[2], level="ring")
    assert verdict.status is Status.DIFFERENT
    assert "_scaled_dot_product_flash_attention_for_cpu_backward" in str(verdict)
