"""Plan a pipeline for four ranks on paper: find a schedule within a memory limit, check it, compare it, and draw it."""

from pathlib import Path
from tempfile import gettempdir

from hocket.compiler.plan.pipeline.chain import Chain
from hocket.compiler.plan.pipeline.costs import LinkCosts, StageCosts
from hocket.compiler.plan.pipeline.forms import closed_form
from hocket.compiler.plan.pipeline.improve import Effort
from hocket.compiler.plan.pipeline.joint import Space, search_jointly
from hocket.compiler.plan.pipeline.picture import gantt
from hocket.compiler.plan.pipeline.simulate import simulate
from hocket.runtime.schedule.text import format_schedule
from hocket.runtime.schedule.verify import verify_schedule

RANKS, MICRO_BATCHES = 4, 8

# Sixteen layers and a large head, in milliseconds and megabytes for one micro-batch; 1 ms of latency between ranks.
layer = StageCosts(forward=5, backward_input=6, backward_weight=(3,), recompute=5, activation=40, held=(29,), stash=4, boundary=4)
head = StageCosts(forward=9, backward_input=9, backward_weight=(9,), recompute=9, activation=20, held=(20,), stash=4)
model = Chain((layer,) * 16 + (head,), LinkCosts(latency=1), fixed=0.2)

# What 1F1B takes and needs, with stages balanced by their work.
costs = model.cut(model.balanced(RANKS))
by_hand = simulate(closed_form("1f1b", RANKS, MICRO_BATCHES), costs)
limit = max(by_hand.peaks)

# The same memory, but free to choose cuts, placement, micro-batch sizes (eight samples each) and order.
plan = search_jointly(model, RANKS, MICRO_BATCHES, (limit,) * RANKS, Space(granularity=8), Effort(seconds=2.0))
found = simulate(plan.synthesis.schedule, plan.synthesis.problem.costs)
verify_schedule(found.schedule, memory_limit=[limit * (1 + 1e-9)] * RANKS)

print(f"1F1B takes {by_hand.seconds:.0f} ms and {limit:.0f} MB; found {found.seconds:.0f} ms and {max(found.peaks):.0f} MB")
print(f"no schedule of these stages is faster than {plan.synthesis.bound:.0f} ms; chosen: {plan.choice}")
print(format_schedule(found.schedule).splitlines()[0])
assert found.seconds < by_hand.seconds

picture = Path(gettempdir()) / "hocket-schedule.svg"
picture.write_text(gantt(found))
picture.unlink()
