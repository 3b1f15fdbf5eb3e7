"""Say what you know about the placement, and leave the rest to the planner."""

import torch
from torch import nn

import hocket

torch.manual_seed(0)
model = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 64))
x = torch.randn(32, 64)

# data parallel on one axis; on the other the first weight is cut by rows, everything else is the planner's choice
with hocket.parallelize(
    model,
    "dp=2,tp=2",
    example_args=(x,),
    tactics=[hocket.DataParallel("dp")],
    constraints={"0.weight": "tp:S(0)"},
) as parallel:
    print(parallel.explain("0.weight"))
    print("predicted bytes on the wire, per rank and step:", int(parallel.plan.cost.bytes_on_wire))
    parallel(x).sum().backward()

# a constraint that contradicts a tactic is refused, and both sides are named
try:
    hocket.parallelize(model, "dp=2", example_args=(x,), tactics=[hocket.DataParallel("dp")], constraints={"0.weight": "dp:S(0)"})
except hocket.errors.PlanError as error:
    print("PlanError:", error)
else:
    raise SystemExit("the contradiction was not noticed")
