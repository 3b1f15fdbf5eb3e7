"""``hocket doctor``: what this machine has, and what will work on it."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import sys
from dataclasses import dataclass

import torch
import torch.distributed

from ...runtime.exchange import why_unavailable
from ...runtime.transports import cuda, mpi


@dataclass(frozen=True)
class Finding:
    """One line of the examination. state: "ok", "absent" (works without) or "broken" (something will not work)."""

    topic: str
    state: str
    detail: str


def examine() -> list[Finding]:
    """Look at the interpreter, torch, cores, memory passing, back ends and optional libraries. Starts no process."""
    return [
        _python(),
        _torch(),
        _cores(),
        _shared_memory(),
        _process_watching(),
        *_backends(),
        *_transports(),
        *_extras(),
        _launcher(),
    ]


def _python() -> Finding:
    good = sys.version_info >= (3, 11)
    return Finding(
        "Python", "ok" if good else "broken", f"{platform.python_version()} on {platform.system()}; 3.11 or newer needed"
    )


def _torch() -> Finding:
    version = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])
    good = (2, 13) <= version < (2, 14)
    return Finding("torch", "ok" if good else "broken", f"{torch.__version__}; hocket is tested with 2.13")


def _cores() -> Finding:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    detail = f"{cores} cores: up to {cores} local ranks run at full speed; more are fine for checking results"
    return Finding("CPU", "ok", detail)


def _shared_memory() -> Finding:
    if not hasattr(os, "memfd_create"):
        return Finding("shared memory", "broken", "no memfd_create here: engine='local' needs Linux; engine='sim' works")
    handle = os.memfd_create("hocket-doctor")
    try:
        os.ftruncate(handle, 1 << 20)
    finally:
        os.close(handle)
    return Finding("shared memory", "ok", "anonymous memory files work: parameters and activations cross no socket")


def _process_watching() -> Finding:
    if hasattr(os, "pidfd_open"):
        return Finding("process watching", "ok", "pidfd works: a dead rank is noticed at once")
    return Finding("process watching", "broken", "no pidfd_open here: engine='local' needs Linux 5.3 or newer")


def _backends() -> list[Finding]:
    distributed = torch.distributed
    if not distributed.is_available():
        return [Finding("torch.distributed", "broken", "this torch was built without it: only engine='sim' works")]
    found = [
        Finding("gloo", "ok", "ranks find each other; broadcasts, unequal exchanges and groups of more than 8 ranks go through it")
        if distributed.is_gloo_available()
        else Finding("gloo", "broken", "absent: engine='local' on CPU needs it"),
        _exchange(),
    ]
    if torch.cuda.is_available():
        names = ", ".join(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count()))
        state = "ok" if distributed.is_nccl_available() else "broken"
        found.append(
            Finding("CUDA", state, f"{torch.cuda.device_count()} devices ({names}); NCCL {'found' if state == 'ok' else 'absent'}")
        )
    else:
        found.append(Finding("CUDA", "absent", "no device: ranks run on CPU cores"))
    return found


def _exchange() -> Finding:
    """How local CPU ranks hand each other tensors."""
    reason = why_unavailable(torch.device("cpu"))
    if reason:
        return Finding("collectives", "absent", f"local CPU ranks use gloo, not shared memory: {reason}")
    detail = "local CPU ranks exchange tensors in shared memory, which took less time than gloo for every size that was measured"
    return Finding("collectives", "ok", f"{detail} (4 KiB to 64 MiB)")


def _transports() -> list[Finding]:
    """One-sided transports that this machine may not have."""
    reasons = {"MPI": mpi.why_unavailable(), "symmetric memory": cuda.why_unavailable()}
    details = {
        "MPI": "a launcher and mpi4py are here: MpiTransport joins ranks that mpirun or srun starts",
        "symmetric memory": "CudaTransport joins ranks whose devices see each other's memory; not run on devices yet",
    }
    return [Finding(name, "absent" if why else "ok", why or details[name]) for name, why in reasons.items()]


def _extras() -> list[Finding]:
    uses = {
        "transformers": "the public models of the test suite",
        "hypothesis": "hocket.testing",
        "scipy": "an independent solver in tests",
    }
    found = []
    for name, use in uses.items():
        present = importlib.util.find_spec(name) is not None
        detail = f"{importlib.metadata.version(name)}, for {use}" if present else f"not installed; only needed for {use}"
        found.append(Finding(name, "ok" if present else "absent", detail))
    return found


def _launcher() -> Finding:
    launched = [name for name in ("RANK", "SLURM_PROCID") if name in os.environ]
    if launched:
        return Finding("launcher", "ok", f"{launched[0]} is set: engine='attach' takes this process for one rank")
    return Finding("launcher", "absent", "no torchrun or SLURM variables: engine='local' starts its own ranks")
