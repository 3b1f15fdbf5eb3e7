"""Ways to run an instruction list: ``flat``, one rank in this process; ``lockstep``, all ranks in this process."""
