"""The demonstration's model ships with hocket and is still a user's model: its lines are named like any other's."""

import torch

from hocket.compiler.capture import capture
from hocket.compiler.demo.llama import Llama, LlamaConfig
from hocket.compiler.program import note


def test_nodes_of_the_demonstration_name_its_lines() -> None:
    model = Llama(LlamaConfig(vocabulary=8, width=8, layers=1, heads=2, kv_heads=1, hidden=16, context=4))
    tokens = torch.zeros(2, 4, dtype=torch.int64)
    program = capture(model, (tokens, tokens))
    calls = [node for node in program.nodes if node.op == "call_function"]
    assert all(note(node).source.startswith("llama.py:") for node in calls)
