"""Chains, x[t+1] = f(x[t], u[t]): found in unrolled graphs, lifted into one node each, split and handed to a solver."""
