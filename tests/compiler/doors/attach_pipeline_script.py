"""Run by torchrun in test_attach_pipeline.py: pipelines on ranks of their own, beside the same training in one process, bitwise."""

import copy
import sys
import tempfile
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp

sys.path.insert(0, str(Path(__file__).parent))
from pipeline_support import Language, plain_step, tokens

import hocket
from hocket.errors import InputError
from hocket.runtime.engines.attach import AttachEngine
from hocket.runtime.mesh import Mesh

ROWS = (3, 3, 2)


def same(one: torch.Tensor, other: torch.Tensor, name: str = "") -> None:
    assert torch.equal(one, other), f"{name} differs by {(one - other).abs().max()}"


def gradients(schedule: str, *, tied: bool, layers: int = 2) -> None:
    """``train_step`` with the optimizer in the script: gradients of this rank's stages, then the whole checkpoint."""
    torch.manual_seed(dist.get_rank() if dist.is_initialized() else 0)  # the values of rank 0 count
    model = Language(layers, tied=tied)
    torch.manual_seed(0)
    twin = Language(layers, tied=tied)
    tactic = hocket.PipelineParallel(microbatches=ROWS, schedule=schedule)
    with hocket.parallelize(model, "pp=2", engine="attach", tactics=[tactic], example_args=tokens()) as stages:
        optimizers = [torch.optim.AdamW(one.parameters(), 0.01) for one in (model, twin)]
        for _ in range(2):
            for optimizer in optimizers:
                optimizer.zero_grad()
            same(stages.train_step(*tokens()), plain_step(twin, tokens(), ROWS))
            mine = model.state_dict()
            for (name, one), other in zip(model.named_parameters(), twin.parameters(), strict=True):
                assert (one.grad is not None) == (name in mine), name
                if name in mine:
                    (torch.testing.assert_close if tied else same)(one.grad, other.grad)
            for optimizer in optimizers:
                optimizer.step()
        assert 0 < len(mine) < len(twin.state_dict())
        elsewhere = [one for name, one in model.named_parameters() if name not in mine]
        assert all(one.isnan().all() for one in elsewhere)
        assert all(one.untyped_storage().nbytes() == one.element_size() for one in elsewhere)
        check_checkpoint(model, twin, exact=not tied)
        if schedule != "zb-v":
            with torch.no_grad():
                found = stages(tokens()[0])
                wanted = torch.cat([twin(rows) for rows in tokens()[0].split(ROWS)])
                (torch.testing.assert_close if tied else same)(found, wanted)
        else:
            with torch.no_grad(), pytest.raises(InputError, match="4 stages, this one has 2"):
                stages(tokens()[0])
    print("equal gradients", flush=True)


def check_checkpoint(model: torch.nn.Module, twin: torch.nn.Module, *, exact: bool) -> None:
    """What all ranks save together loads into the plain model; a whole checkpoint loads into each rank's part."""
    box = [tempfile.mkdtemp() if dist.get_rank() == 0 else ""]
    dist.broadcast_object_list(box)
    dcp.save({"model": model.state_dict()}, checkpoint_id=box[0])
    plain = copy.deepcopy(twin)
    with torch.no_grad():
        for parameter in plain.parameters():
            parameter.fill_(7.0)
    state = {"model": plain.state_dict()}
    dcp.load(state, checkpoint_id=box[0])
    plain.load_state_dict(state["model"])
    for (name, one), other in zip(plain.named_parameters(), twin.parameters(), strict=True):
        (same(one, other, name) if exact else torch.testing.assert_close(one, other, msg=name))
    model.load_state_dict(twin.state_dict())
    for name, one in model.state_dict().items():
        same(one, twin.state_dict()[name], name)


def optimizer_on_stages(mesh: str, *, tied: bool) -> None:
    """``hocket.train_step``: parameters and AdamW's state on the stages, with clipping."""
    torch.manual_seed(0)
    model = Language(2, tied=tied)
    twin = copy.deepcopy(model)
    ours, theirs = (torch.optim.AdamW(one.parameters(), 0.01) for one in (model, twin))
    tactic = hocket.PipelineParallel(microbatches=(4, 4), schedule="1f1b-2bp")
    clip = 0.3 if tied else None
    close = torch.testing.assert_close if tied or "dp" in mesh else same
    with hocket.train_step(model, mesh, ours, engine="attach", tactics=[tactic], clip_norm=clip) as step:
        for _ in range(3):
            loss = step(*tokens())
            theirs.zero_grad()
            expected = plain_step(twin, tokens(), (4, 4))
            torch.testing.assert_close(loss, expected)
            if clip is not None:
                torch.nn.utils.clip_grad_norm_(twin.parameters(), clip)
            theirs.step()
        mine = model.state_dict()
        assert 0 < len(mine) < len(twin.state_dict())
        for (name, one), other in zip(model.named_parameters(), twin.parameters(), strict=True):
            if name in mine:
                close(one.detach(), other.detach())
            if one in ours.state:
                close(ours.state[one]["exp_avg"], theirs.state[other]["exp_avg"])
            assert name in mine or one not in ours.state
            assert one in ours.state or name not in mine or tied, "the first stage that reads a tied weight has its state"
    print("equal training", flush=True)


def main() -> None:
    torch.set_num_threads(1)
    match sys.argv[1]:
        case "both":
            dist.init_process_group("gloo")
            gradients("auto", tied=False)
            optimizer_on_stages("pp=2", tied=True)
        case "failure":
            with hocket.parallelize(Language(), "pp=2", engine="attach", example_args=tokens()) as stages:
                stages.train_step(tokens()[0] + 100, tokens()[1])
        case "gradients":
            dist.init_process_group("gloo")
            gradients("auto", tied=False)
            gradients("zb-v", tied=False)
            gradients("1f1b-2bp", tied=True)
        case "training":
            optimizer_on_stages("pp=2", tied=False)
            optimizer_on_stages("pp=2", tied=True)
        case "worlds":
            for number in range(6):
                engine = AttachEngine(Mesh.parse("pp=2"), device="cpu", timeout=60)
                assert engine.settle(f"world {number} of rank {engine.rank}") == f"world {number} of rank 0"
                engine.close()
                assert not dist.is_initialized()
            print("equal worlds", flush=True)
        case "replicas":
            optimizer_on_stages("pp=2,dp=2", tied=True)


main()
