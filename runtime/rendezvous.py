"""How the ranks of an engine find each other and set up their groups.

Local ranks meet in an anonymous file that all of them inherit, so there is no port to be in use, no stale file, and nothing to
clean up. They talk through the loopback interface only.
"""

from __future__ import annotations

import datetime
import os
import sys
from typing import cast

import torch
import torch.distributed as dist

from .communicator import Communicator, SingleCommunicator
from .exchange import SPIN_ALONE, SPIN_CROWDED, Exchange, is_available
from .gloo import GlooCommunicator
from .link import over_link
from .mesh import Mesh
from .shm import ShmCommunicator
from .wire import close_all


def backend_for(device: torch.device) -> str:
    """``gloo`` for the CPU, ``nccl`` for CUDA."""
    return "nccl" if device.type == "cuda" else "gloo"


def connect_local(
    mesh: Mesh, rank: int, shared: tuple[int, int], device: torch.device, timeout: float, *, link: str = ""
) -> Communicator:
    """Join the ranks that inherited the same files. On the CPU they talk through shared memory where that is possible.

    shared: descriptors of the file in which they find each other, and of the one through which tensors travel (``exchange``).
    timeout: seconds for the meeting and for any single collective; link: a network to emulate in that memory, such as
    ``link:20us,1GB/s`` (``transports.link``), "" for none.
    """
    store_fd, exchange_fd = shared
    if mesh.size == 1:
        close_all(shared)
        return SingleCommunicator(mesh)
    loopback = "lo" if sys.platform == "linux" else "lo0"
    os.environ["GLOO_SOCKET_IFNAME"] = os.environ["NCCL_SOCKET_IFNAME"] = loopback
    limit = datetime.timedelta(seconds=timeout)
    store = torch._C._distributed_c10d.FileStore(f"/proc/self/fd/{store_fd}", mesh.size)
    store.set_timeout(limit)
    dist.init_process_group(backend_for(device), store=store, rank=rank, world_size=mesh.size, timeout=limit)
    gloo = GlooCommunicator(mesh, timeout)
    if not is_available(device):
        os.close(exchange_fd)
        return cast(Communicator, over_link(gloo, link) if link else gloo)
    crowded = mesh.size * torch.get_num_threads() > len(os.sched_getaffinity(0))
    exchange = Exchange(exchange_fd, mesh, rank, SPIN_CROWDED if crowded else SPIN_ALONE)
    shm = ShmCommunicator(gloo, exchange, timeout)
    return over_link(shm, link) if link else shm
