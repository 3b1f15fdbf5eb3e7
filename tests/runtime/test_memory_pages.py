"""Pages of ranks say what the ranks entered, and disagreements between them are found at the right collective."""

from __future__ import annotations

import mmap

import pytest

from hocket.runtime.mesh import Mesh
from hocket.runtime.monitor import PAGE_BYTES, RING, PageWriter, State, find_disagreement, read_page


def pages(ranks, axes=1):
    maps = [mmap.mmap(-1, PAGE_BYTES) for _ in range(ranks)]
    writers = [PageWriter(page, axes) for page in maps]
    for writer in writers:
        writer.begin(1, 1, 0, {3: 0, 4: axes - 1})
    return maps, writers


@pytest.mark.parametrize("count", [0, 1, RING - 3, RING - 2, RING, RING + 1, 2 * RING, 5 * RING + 17])
def test_the_last_entries_are_read_in_order(count):
    (page,), (writer,) = pages(1)
    for k in range(count):
        writer.issue(3, k)
    found = read_page(page, 1)
    kept = min(count, RING - 2)
    assert [entry.fingerprint for entry in found.entries] == list(range(count - kept, count))
    assert [entry.number for entry in found.entries] == list(range(count - kept + 1, count + 1))
    assert found.counts == (count,)
    assert found.state is State.RUNNING


def test_progress_changes_the_mark_and_repeated_looks_do_not():
    (page,), (writer,) = pages(1)
    seen = {read_page(page, 1).mark}
    for hook, index in ((writer.at, 2), (writer.at, 3), (writer.wait, 3), (writer.at, 4)):
        hook(index)
        assert read_page(page, 1).mark == read_page(page, 1).mark
        seen.add(read_page(page, 1).mark)
    assert len(seen) == 5


def test_ranks_that_agree_and_ranks_that_are_behind_do_not_disagree():
    mesh = Mesh.parse("tp=3")
    maps, writers = pages(3)
    for rank, writer in enumerate(writers):
        for k in range(5 + 40 * rank):
            writer.issue(3, k)
    assert find_disagreement([read_page(page, 1) for page in maps], mesh) is None


def test_the_first_different_collective_of_a_group_names_the_minority():
    mesh = Mesh.parse("tp=3")
    maps, writers = pages(3)
    for rank, writer in enumerate(writers):
        for k in range(10):
            writer.issue(3, 99 if (rank, k) in ((1, 6), (1, 8)) else k)
    found = find_disagreement([read_page(page, 1) for page in maps], mesh)
    assert (found.axis, found.number, found.odd) == ("tp", 7, (1,))


def test_groups_of_one_axis_need_not_agree_with_each_other():
    mesh = Mesh.parse("dp=2,tp=2")
    maps, writers = pages(4, axes=2)
    for rank, writer in enumerate(writers):
        writer.issue(4, 5 if rank < 2 else 6)  # tp groups are (0, 1) and (2, 3)
    assert find_disagreement([read_page(page, 2) for page in maps], mesh) is None
    for rank, writer in enumerate(writers):
        writer.issue(3, rank % 2)  # dp groups are (0, 2) and (1, 3)
    assert find_disagreement([read_page(page, 2) for page in maps], mesh) is None
    writers[3].issue(3, 7)
    writers[1].issue(3, 8)
    assert find_disagreement([read_page(page, 2) for page in maps], mesh).axis == "dp"


def test_messages_between_two_ranks_are_not_compared():
    maps, writers = pages(2)
    writers[0].issue(9, 1)  # instruction 9 is no collective of the program
    assert read_page(maps[0], 1).entries == ()
