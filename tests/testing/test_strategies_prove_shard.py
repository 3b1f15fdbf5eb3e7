"""The published strategies draw programs and plans under which the shard pass is proven exactly; a faulty pass is found."""

from __future__ import annotations

import sys

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from torch import nn

import hocket.testing
from hocket.compiler.errors import PlanError
from hocket.compiler.program import Program, copy_program
from hocket.compiler.verify.levels import Question, ask, ring_level, types_level
from hocket.compiler.verify.report import Status
from hocket.passes.shard import Shard
from hocket.testing import assert_equivalent, meshes, plans, programs
from hocket.testing.random_plans import context

pytest_plugins = ["pytester"]
bounded = settings(
    deadline=None,
    max_examples=12,
    phases=[Phase.explicit, Phase.generate],
    suppress_health_check=list(HealthCheck),
    derandomize=True,
    database=None,
)


@given(programs(), meshes(), st.data())
@bounded
def test_sharding_a_drawn_program_by_a_drawn_plan_is_proven(program: Program, mesh: hocket.Mesh, data: st.DataObject) -> None:
    try:
        lowered = Shard()(program, context(data.draw(plans(program, mesh))))
    except PlanError as error:  # rules are chosen axis by axis: two cuts that each reshape evenly may not do so together
        if len(mesh.axes) == 1 or "the plan reshapes pieces that do not match" not in str(error):
            raise
        return
    verdict = ask(Question(program, lowered), (types_level, ring_level))
    assert verdict.status is Status.EQUAL, str(verdict)


def _without_reductions(program: Program) -> Program:
    broken, _ = copy_program(program)
    for node in broken.nodes:
        if node.target is torch.ops._c10d_functional.all_reduce.default:
            node.replace_all_uses_with(node.args[0])
    return broken


def test_a_pass_that_forgets_reductions_is_found_by_drawn_programs() -> None:
    found: list[str] = []

    @given(programs(), meshes(most_ranks=2), st.data())
    @bounded
    def search(program: Program, mesh: hocket.Mesh, data: st.DataObject) -> None:
        broken = _without_reductions(Shard()(program, context(data.draw(plans(program, mesh)))))
        verdict = ask(Question(program, broken), (types_level, ring_level))
        if verdict.refused:
            found.append(str(verdict))

    search()
    assert found


def test_assert_equivalent_returns_the_verdict_or_says_where_programs_part() -> None:
    x = torch.randn(3, 4)
    assert assert_equivalent(torch.tanh, lambda x: 2 * torch.sigmoid(2 * x) - 1, example_args=(x,), train=False).bound
    with pytest.raises(AssertionError, match="expected equal programs"):
        assert_equivalent(nn.Linear(4, 4), nn.Linear(4, 4, bias=False), example_args=(x,))


def test_without_hypothesis_the_strategies_say_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "hypothesis", None)
    with pytest.raises(ImportError, match=r"hocket\[testing\]"):
        _ = hocket.testing.__getattr__("programs")


def test_the_plugin_gives_a_fixture_that_follows_the_option(pytester: pytest.Pytester, request: pytest.FixtureRequest) -> None:
    if not request.config.pluginmanager.has_plugin("hocket"):  # installed, it is registered by its entry point
        pytester.makeconftest('pytest_plugins = ["hocket.testing.plugin"]')
    pytester.makepyfile(
        "import torch\n"
        "def test_level(assert_equivalent):\n"
        "    verdict = assert_equivalent(torch.exp, torch.exp, example_args=(torch.randn(2),), train=False)\n"
        "    assert [level.level for level in verdict.levels] == ['types', 'float']\n"
    )
    pytester.runpytest_inprocess("--hocket-verify=float", "-p", "no:cacheprovider").assert_outcomes(passed=1)
