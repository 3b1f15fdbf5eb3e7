"""The text of a schedule: a header, then one instruction a line under each ``rank N``. ``parse(format_schedule(s)) == s``.

schedule ZB-H1
placement 0 1
micro-batches 2
pieces 1 1
rank 0
  F s0 m0 cost 0.0013 memory 4096
  SEND activation s0 m0 to 1 tag 3
"""

from __future__ import annotations

import re

from ..errors import InputError
from .instruction import Flow, Instr, Op, Schedule, ScheduleError

_LINE = re.compile(
    r"(?P<op>[A-Z]+)(?: (?P<flow>activation|gradient))? s(?P<stage>\d+) m(?P<micro>\d+)(?: p(?P<piece>\d+))?"
    r"(?: (?:to|from) (?P<peer>\d+) tag (?P<tag>\d+))?(?: cost (?P<cost>\S+))?(?: memory (?P<memory>\S+))?"
)
_HEADER = ("schedule", "placement", "micro-batches", "pieces", "sizes", "inference")


def format_schedule(schedule: Schedule) -> str:
    """The text; floats keep all their digits."""
    lines = [f"schedule {schedule.name}".rstrip(), "placement " + _words(schedule.placement)]
    lines += [f"micro-batches {schedule.micro_batches}", "pieces " + _words(schedule.pieces)]
    if schedule.sizes:
        lines.append("sizes " + " ".join(map(repr, schedule.sizes)))
    if not schedule.training:
        lines.append("inference")
    for rank, instructions in enumerate(schedule.ranks):
        lines.append(f"rank {rank}")
        lines += ["  " + _format(instr) for instr in instructions]
    return "\n".join(lines) + "\n"


def parse_schedule(text: str) -> Schedule:
    """Read the text again. ScheduleError names the first line that is not part of the language."""
    header: dict[str, str] = {}
    ranks: list[list[Instr]] = []
    for number, raw in enumerate(text.splitlines(), 1):
        line = raw.strip()
        if not line:
            continue
        word, _, rest = line.partition(" ")
        if word == "rank" and rest == str(len(ranks)):
            ranks.append([])
        elif word in _HEADER and not ranks:
            header[word] = rest
        elif ranks:
            ranks[-1].append(_parse(line, number))
        else:
            raise ScheduleError(f"line {number} of a schedule: expected a header or 'rank {len(ranks)}', found {line!r}")
    return _assemble(header, ranks)


def _assemble(header: dict[str, str], ranks: list[list[Instr]]) -> Schedule:
    missing = [word for word in ("schedule", "placement", "micro-batches", "pieces") if word not in header]
    if missing:
        raise ScheduleError(f"a schedule needs the header line {missing[0]!r}; it has {sorted(header)}")
    try:
        return Schedule(
            placement=tuple(int(word) for word in header["placement"].split()),
            micro_batches=int(header["micro-batches"]),
            pieces=tuple(int(word) for word in header["pieces"].split()),
            ranks=tuple(tuple(instructions) for instructions in ranks),
            sizes=tuple(float(word) for word in header.get("sizes", "").split()),
            name=header["schedule"],
            training="inference" not in header,
        )
    except InputError:
        raise
    except ValueError as error:
        raise ScheduleError(f"the header of a schedule holds something that is no number: {error}") from error


def _words(numbers: tuple[int, ...]) -> str:
    return " ".join(str(number) for number in numbers)


def _format(instr: Instr) -> str:
    text = str(instr)
    if instr.cost:
        text += f" cost {instr.cost!r}"
    if instr.memory:
        text += f" memory {instr.memory!r}"
    return text


def _parse(line: str, number: int) -> Instr:
    match = _LINE.fullmatch(line)
    op = match["op"] if match else ""
    if match is None or op not in Op.__members__ or (op in ("SEND", "RECV", "COPY")) != bool(match["flow"]):
        raise ScheduleError(f"line {number} of a schedule: expected an instruction such as 'F s0 m3', found {line!r}")
    if (op in ("SEND", "RECV")) != (match["peer"] is not None):
        raise ScheduleError(f"line {number} of a schedule: SEND and RECV, and only they, name a peer and a tag; found {line!r}")
    try:
        return Instr(
            Op[op],
            int(match["stage"]),
            int(match["micro"]),
            int(match["piece"] or 0),
            Flow(match["flow"] or ""),
            int(match["peer"]) if match["peer"] is not None else -1,
            int(match["tag"]) if match["tag"] is not None else -1,
            float(match["cost"] or 0.0),
            float(match["memory"] or 0.0),
        )
    except ValueError as error:
        raise ScheduleError(f"line {number} of a schedule: {error}") from error
