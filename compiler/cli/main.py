"""The command line: ``hocket demo | plan | explain | run | verify | doctor | calibrate``."""

from __future__ import annotations

import argparse
import json
import logging
import sys
from collections.abc import Callable, Sequence
from typing import Any

from rich.console import Console

from ..errors import HocketError
from .target import INPUT_HELP

Command = Callable[[argparse.Namespace, Console], dict[str, Any]]
"""Prints for people on the console (silent under --json) and returns the same facts as JSON-ready data."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command. Returns 0 on success, 1 where the answer is no (not proven, something broken), 2 for bad usage or input."""
    arguments = _parser().parse_args(argv)
    logging.basicConfig(format="%(message)s", level=logging.INFO if arguments.verbose else logging.WARNING)
    console = Console(quiet=arguments.json, highlight=False, width=None if sys.stdout.isatty() else 132)
    try:
        facts = _command(arguments.command)(arguments, console)
    except HocketError as error:
        print(f"hocket {arguments.command}: {type(error).__name__}: {error}", file=sys.stderr)  # noqa: T201
        for line in getattr(error, "__notes__", ()):
            print(line, file=sys.stderr)  # noqa: T201
        return 2
    except KeyboardInterrupt:
        print("interrupted; all ranks have ended", file=sys.stderr)  # noqa: T201
        return 130
    if arguments.json:
        print(json.dumps(facts, indent=2))  # noqa: T201
    return 0 if facts.get("ok", True) else 1


def _count(text: str) -> int:
    """A positive number for argparse."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a number of at least 1, found {text!r}")
    return int(text)


def _rate(text: str) -> float:
    """A learning rate for argparse."""
    try:
        rate = float(text)
    except ValueError:
        rate = -1.0
    if not 0 <= rate < float("inf"):
        raise argparse.ArgumentTypeError(f"expected a learning rate of at least 0, found {text!r}")
    return rate


def _command(name: str) -> Command:
    from . import commands

    table: dict[str, Command] = {
        "demo": commands.demo,
        "plan": commands.plan,
        "explain": commands.explain,
        "run": commands.run,
        "verify": commands.verify,
        "doctor": commands.doctor,
        "calibrate": commands.calibrate,
    }
    return table[name]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="hocket",
        description="Run an ordinary PyTorch module on many devices, and prove that it still computes the same function.",
        epilog="example: hocket plan model.py:Net --mesh dp=2,tp=2 --input 8x128:int64:256",
    )
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--json", action="store_true", help="print one JSON object instead of tables")
    common.add_argument("-v", "--verbose", action="store_true", help="also print what is compiled and when")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    demo = commands.add_parser("demo", parents=[common], help="train a small Llama on two local ranks, prove it, show every pass")
    demo.add_argument("--mesh", default="d=2", help="ranks to use (default: %(default)s, the axis left to the planner)")
    demo.add_argument("--steps", type=_count, default=60, help="training steps (default: %(default)s)")
    demo.add_argument("--out", default="artefacts", help="folder for the generated program and the trace (default: %(default)s)")

    model = argparse.ArgumentParser(add_help=False)
    model.add_argument(
        "target", metavar="FILE:NAME", help="an nn.Module class or object, or a function that makes one, in a file or module"
    )
    model.add_argument("--mesh", default="d=2", help="axes of ranks, such as tp=2 or dp=2,tp=2 (default: %(default)s)")
    model.add_argument("--input", action="append", default=[], metavar="SPEC", help=INPUT_HELP)
    model.add_argument(
        "--tactic",
        action="append",
        default=[],
        metavar="T",
        help="DataParallel(dp), TensorParallel(tp), Zero(dp), "
        "SequenceParallel(tp) or Auto(axis); repeat for several; without any, the planner decides",
    )
    model.add_argument("--inference", action="store_true", help="the forward alone, without gradients")
    about = {
        "plan": "where parameters and activations go, and why; runs nothing",
        "explain": "every decision of the planner and of every pass, with the line of the model it is about",
        "run": "train for some steps on real local ranks, beside the same model in one process",
        "verify": "prove that the parallel program computes the same function",
    }
    made = {name: commands.add_parser(name, parents=[common, model], help=text, description=text) for name, text in about.items()}
    _options_of_their_own(made)
    commands.add_parser("doctor", parents=[common], help="what this machine has, and what will work on it")
    calibrate = commands.add_parser("calibrate", parents=[common], help="measure this machine for the cost model (about 15 s)")
    calibrate.add_argument(
        "--ranks", type=_count, default=2, help="local ranks between which collectives are timed (default: %(default)s)"
    )
    return parser


def _options_of_their_own(made: dict[str, argparse.ArgumentParser]) -> None:
    """What one of the commands on a model takes and the others do not."""
    made["plan"].add_argument(
        "--formulas", action="store_true", help="also what the plan costs as formulas of the named sizes, such as B and S"
    )
    made["explain"].add_argument("topic", nargs="?", default="", help="only decisions that mention this")
    made["explain"].add_argument("--code", action="store_true", help="print the program that every rank runs")
    made["run"].add_argument("--steps", type=_count, default=10, help="steps to run (default: %(default)s)")
    made["run"].add_argument("--lr", type=_rate, default=1e-3, help="learning rate of AdamW (default: %(default)s)")
    made["run"].add_argument(
        "--inductor", action="store_true", help="compile what lies between two collectives with torch's Inductor (needs g++)"
    )
    made["run"].add_argument("--trace", default="", metavar="FILE", help="write a Chrome/Perfetto trace of the last step")
    made["verify"].add_argument(
        "--level", default="full", choices=("types", "float", "ring", "full"), help="how much to prove (default: %(default)s)"
    )
    made["verify"].add_argument(
        "--against",
        default="",
        metavar="FILE:NAME",
        help="compare the target with this module, on the target's inputs, instead of with its own sharded program",
    )
    made["verify"].add_argument(
        "--ranks",
        default="",
        metavar="AXIS=N",
        help="the module of --against is what one rank runs, with torch's functional collectives: trace it for each of N ranks",
    )
    made["verify"].add_argument(
        "--layout",
        action="append",
        default=[],
        metavar="NAME=PLACEMENT",
        help="how an input or output of --against lies over the ranks, such as args[0]=S(1); repeat for several; else replicated",
    )

    for name in ("run", "verify"):
        made[name].add_argument(
            "--canary", action="store_true", help="first run one tiny step on the ranks in exact integers, compared bit for bit"
        )
