"""Pipeline schedules as data: typed instructions per rank, their text, their verifier, and the loop that runs them."""
