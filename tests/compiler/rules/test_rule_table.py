"""The table around the rules: order, memory, disk, and reasons."""

import json
import operator

import pytest
import torch
import torch.fx as fx
from rule_helpers import aten, op_node, rule_texts

from hocket.compiler.errors import RuleError
from hocket.compiler.layout import Partial, Replicate, Shard
from hocket.compiler.rules import table as table_module
from hocket.compiler.rules.answer import Answer, answer_from_json, answer_to_json
from hocket.compiler.rules.rule import Rule
from hocket.compiler.rules.table import RuleTable


def some_nodes() -> list[fx.Node]:
    x, w = torch.randn(8, 6), torch.randn(6, 4)
    return [
        op_node(aten.mm.default, x, w),
        op_node(aten.add.Tensor, x, x),
        op_node(aten.native_layer_norm.default, x, [6], None, None, 1e-5),
        op_node(aten.cumsum.default, x, -1),
        op_node(aten.nonzero.default, x),
    ]


@pytest.mark.parametrize("parts", [2, 3, 4])
def test_the_replicate_rule_comes_first_and_no_rule_twice(parts):
    table = RuleTable(None)
    for node in some_nodes():
        rules = table.rules(node, parts)
        assert rules[0].is_replicate
        assert rules[0].origin == "replicate"
        assert not any(rule.is_replicate for rule in rules[1:])
        assert len({(rule.inputs, rule.outputs) for rule in rules}) == len(rules)


def test_order_is_the_same_every_time():
    first, second = RuleTable(None), RuleTable(None)
    assert [first.rules(node, 2) for node in some_nodes()] == [second.rules(node, 2) for node in some_nodes()]


def test_a_second_table_reads_from_disk_and_executes_nothing(tmp_path, monkeypatch):
    cold = RuleTable(tmp_path)
    expected = [cold.answer(node, 2) for node in some_nodes()]
    monkeypatch.setattr(table_module, "shrink", lambda *_: pytest.fail("asked to execute"))
    monkeypatch.setattr(table_module, "torch_rules", lambda *_: pytest.fail("asked torch"))
    warm = RuleTable(tmp_path)
    assert [warm.answer(node, 2) for node in some_nodes()] == expected


@pytest.mark.parametrize("rubbish", [b"", b"{", b"[]", b"\xff\xfe", b'{"key": 1}', b'{"value": {"rules": 3}}'])
def test_rubbish_on_disk_is_worked_out_again(tmp_path, rubbish):
    node = some_nodes()[0]
    expected = RuleTable(tmp_path).rules(node, 2)
    for file in tmp_path.iterdir():
        file.write_bytes(rubbish)
    assert RuleTable(tmp_path).rules(node, 2) == expected
    assert RuleTable(tmp_path).rules(node, 2) == expected


def test_a_stored_rule_that_does_not_fit_is_not_believed(tmp_path):
    node = some_nodes()[0]
    expected = RuleTable(tmp_path).rules(node, 2)
    for file in tmp_path.iterdir():
        data = json.loads(file.read_text())
        data["value"]["rules"].append([["S(7)", "R"], ["R"], "planted"])
        file.write_text(json.dumps(data))
    assert RuleTable(tmp_path).rules(node, 2) == expected


def test_a_folder_that_cannot_be_written_costs_nothing_but_time(tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("in the way")
    assert len(RuleTable(blocked / "rules").rules(some_nodes()[0], 2)) > 1


def test_answers_survive_json():
    rule = Rule((Shard(0), Replicate(), Partial("avg")), (Partial("max"), None), "test")
    whole = Rule((Replicate(),) * 3, (Replicate(), None), "replicate")
    answer = Answer((whole, rule), "", ((rule, "why"),))
    assert answer_from_json(json.loads(json.dumps(answer_to_json(answer)))) == answer
    assert answer_from_json({"rules": []}) is None


REASONS = {
    "random": (lambda: op_node(aten.bernoulli.p, torch.rand(4, 4), 0.5), "random"),
    "in place": (lambda: op_node(aten.add_.Tensor, torch.rand(4), torch.rand(4)), "in place"),
    "position": (lambda: op_node(aten.arange.default, 8), "where they stand"),
    "scalar": (lambda: op_node(aten.sin.default, torch.tensor(1.0)), "no dimension to cut"),
    "nothing known": (lambda: op_node(aten.nonzero.default, torch.ones(4, 4)), "nonzero"),
    "too many parts": (lambda: op_node(aten.sin.default, torch.ones(4, 4)), "5 non-empty parts"),
}


@pytest.mark.parametrize("name", REASONS)
def test_an_op_with_only_the_replicate_rule_says_why(name):
    make, words = REASONS[name]
    node = make()
    table = RuleTable(None)
    assert len(table.rules(node, 5)) == 1
    assert words in table.explain(node, 5)
    assert table.explain(node, 5).startswith("no rule for aten.")


def test_a_size_that_depends_on_the_data_is_a_reason():
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

    with FakeTensorMode(shape_env=ShapeEnv()) as mode:
        found = aten.nonzero.default(mode.from_tensor(torch.ones(4, 4)))
        node = op_node(aten.neg.default, found)
    assert "depends on the data" in RuleTable(None).explain(node)


def test_placeholders_lie_anywhere_that_fits():
    node = op_node(aten.neg.default, torch.randn(4, 3, 1)).args[0]
    assert rule_texts(RuleTable(None).rules(node, 2)) == {" -> R", " -> S(0)", " -> S(1)"}


def test_getitem_follows_its_producer():
    node = op_node(aten.split.Tensor, torch.randn(4, 4), 2)
    item = node.graph.call_function(operator.getitem, (node, 0))
    item.meta["val"] = node.meta["val"][0]
    assert len(RuleTable(None).rules(item, 2)) == 1


def test_parts_are_checked_at_the_door():
    node = some_nodes()[0]
    assert len(RuleTable(None).rules(node, 1)) == 1
    with pytest.raises(RuleError, match="at least 1"):
        RuleTable(None).rules(node, 0)


def test_discovery_finds_the_batch_of_an_op_that_no_table_knows():
    node = op_node(aten._cdist_forward.default, *CDIST)
    rules = RuleTable(None).rules(node, 2)
    assert any(rule.origin == "discovered" for rule in rules)
    assert {"S(0), S(0) -> S(0)", "S(1), R -> S(1)", "R, S(1) -> S(2)"} <= rule_texts(rules)


CDIST = (torch.randn(4, 6, 3), torch.randn(4, 8, 3), 2.0, None)


def test_without_validation_candidates_are_handed_out_as_told():
    node = op_node(aten.cumsum.default, torch.randn(4, 8), -1)
    assert "S(1) -> S(1)" in rule_texts(RuleTable(None, validate=False).rules(node, 2))
