"""A tile loop as what it stands for: the collective before, the region on all rows at once, the collective after."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..communicator import Communicator
from ..templates import Site
from ..tile_loop import TileLoop
from .tile_body import TileBody


def run_whole(loop: TileLoop, body: TileBody, operands: Sequence[torch.Tensor], communicator: Communicator) -> list[torch.Tensor]:
    """Run it; for ranks that share no memory."""
    given = list(operands)
    if loop.fetches is not None:
        operand = given[loop.fetches].contiguous()
        if loop.reads[loop.fetches].kind == "gather":
            pending = communicator.all_gather(operand, loop.axis)
        else:
            each = [operand.shape[0] // loop.parts] * loop.parts
            pending = communicator.all_to_all(operand, each, each, loop.axis)
        given[loop.fetches] = communicator.wait(pending)
    found = body.run(given, {})
    if loop.delivers is not None:
        result, value = loop.results[loop.delivers], found[loop.delivers].contiguous()
        match result.kind:
            case "all_reduce":
                pending = communicator.all_reduce(value, result.reduce_op, loop.axis)
            case "reduce_scatter":
                pending = communicator.reduce_scatter(value, result.reduce_op, loop.axis)
            case _:
                each = [value.shape[0] // loop.parts] * loop.parts
                pending = communicator.all_to_all(value, each, each, loop.axis)
        found[loop.delivers] = communicator.wait(pending)
    return [found[number] for number in range(len(loop.results))]


def forms_of_loop(loop: TileLoop, site: Site, operands: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """What a loop makes of operands without values."""
    given = list(operands)
    if loop.fetches is not None and loop.reads[loop.fetches].kind == "gather":
        operand = given[loop.fetches]
        given[loop.fetches] = operand.new_empty((loop.parts * operand.shape[0], *operand.shape[1:]))
    found = TileBody(loop, site, loop.rows).run(given, {})
    results = []
    for number, result in enumerate(loop.results):
        shape = list(found[number].shape)
        if result.kind == "reduce_scatter":
            shape[0] //= loop.parts
        results.append(found[number].new_empty(shape))
    return results
