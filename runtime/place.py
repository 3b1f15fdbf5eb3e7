"""Which rank this process is, as its launcher says in the environment: torchrun and Kubernetes, SLURM, Open MPI."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from .errors import InputError

_LAUNCHERS = (
    ("torchrun", "RANK", "WORLD_SIZE", "LOCAL_RANK"),
    ("SLURM", "SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID"),
    ("Open MPI", "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK"),
)


@dataclass(frozen=True)
class Place:
    """rank of world; local_rank: number of the process on its machine; address, port: where rank 0 listens; launcher: its name."""

    rank: int
    world: int
    local_rank: int
    address: str
    port: int
    launcher: str


def find_place(environment: Mapping[str, str]) -> Place:
    """Read the environment; without any launcher the process is alone. InputError when what it says is incomplete or wrong."""
    for launcher, rank_name, world_name, local_name in _LAUNCHERS:
        if rank_name in environment and world_name in environment:
            rank, world = _integer(environment, rank_name), _integer(environment, world_name)
            if not 0 <= rank < world:
                raise InputError(f"{rank_name}={rank} must be below {world_name}={world}")
            local = _integer(environment, local_name) if local_name in environment else 0
            return Place(rank, world, local, _address(environment, world), _port(environment), launcher)
    return Place(0, 1, 0, "127.0.0.1", 0, "")


def first_host(nodes: str) -> str:
    """The first host of a SLURM node list: ``gpu[007-009,12],login`` -> ``gpu007``."""
    match = re.match(r"([^,\[]+)(?:\[(\w+)[^\]]*\])?([^,\[]*)", nodes)
    if match is None:
        raise InputError(f"{nodes!r} is no SLURM node list")
    head, number, tail = match.groups()
    return f"{head}{number or ''}{tail or ''}"


def _integer(environment: Mapping[str, str], name: str) -> int:
    text = environment[name]
    if not re.fullmatch(r"[0-9]+", text):
        raise InputError(f"environment variable {name} must be a number, found {text!r}")
    return int(text)


def _address(environment: Mapping[str, str], world: int) -> str:
    if "MASTER_ADDR" in environment:
        return environment["MASTER_ADDR"]
    nodes = environment.get("SLURM_STEP_NODELIST") or environment.get("SLURM_JOB_NODELIST")
    if nodes:
        return first_host(nodes)
    if world == 1:
        return "127.0.0.1"
    raise InputError("set MASTER_ADDR to the host name of rank 0 (torchrun does)")


def _port(environment: Mapping[str, str]) -> int:
    """MASTER_PORT; under SLURM one derived from the job, so that two jobs on a node do not meet."""
    if "MASTER_PORT" in environment:
        return _integer(environment, "MASTER_PORT")
    return 20000 + int(environment.get("SLURM_JOB_ID", "9500")) % 20000
