"""parallelize under a launcher: this process is one rank, parameters are DTensors."""

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("attach_script.py")


@pytest.mark.parametrize("tactic", ["tp", "zero"])
def test_training_on_attached_ranks_follows_eager(tactic: str) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(SCRIPT), tactic]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.count("equal") == 2
