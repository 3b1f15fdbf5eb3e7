"""Torch's Inductor as the compiler of a region: whether it can work here, one graph to one kernel, and ranks sharing the work.

Ranks share through Inductor's cache folder (TORCHINDUCTOR_CACHE_DIR): each starts at another region, a lock a region keeps two
from compiling the same one, and who comes second finds the result there.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.fx as fx

from .shapes import Form

Kernel = Callable[..., Sequence[torch.Tensor]]


def missing_compiler() -> str:
    """Why Inductor cannot work on this machine; "" when it can."""
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler:
        wanted = os.environ.get("CXX", "g++ or clang++")
        return f"no C++ compiler works here (looked for {wanted}); install one, or name it in the environment variable CXX"
    return ""


def compile_graph(graph: fx.GraphModule, inputs: Sequence[Form]) -> Kernel:
    """One graph as one callable. Raises whatever Inductor raises where it cannot."""
    from torch._inductor import config, standalone_compile

    examples: list[torch.Tensor | int | torch.SymInt | None] = [form.empty() for form in inputs]
    with config.patch(compile_threads=1):  # no pool of compiler processes that would outlive the rank
        return standalone_compile(graph, examples, dynamic_shapes="from_example_inputs")


def taking_turns(keys: Sequence[str], rank: int) -> Iterator[str]:
    """All keys, those that another rank is at last. The caller holds the lock of a key until it asks for the next."""
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    folder = Path(cache_dir()) / "hocket"
    folder.mkdir(parents=True, exist_ok=True)
    at = rank % len(keys) if keys else 0
    busy = []
    for key in (*keys[at:], *keys[:at]):
        with _locked(folder / f"{key[:32]}.lock", wait=False) as taken:
            if taken:
                yield key
            else:
                busy.append(key)
    for key in busy:
        with _locked(folder / f"{key[:32]}.lock", wait=True):
            yield key


@contextmanager
def _locked(path: Path, *, wait: bool) -> Iterator[bool]:
    """Hold a lock between processes; gives False where another one has it and ``wait`` is off. It falls when its holder dies."""
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            yield False
            return
        yield True
