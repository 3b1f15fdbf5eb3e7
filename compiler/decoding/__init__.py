"""Exact Jacobi decoding: several tokens of an autoregressive model from one call, the same tokens as one at a time.

Greedy decoding solves y[t] = argmax lm(y[<t]) for t = 1..N, a triangular system. A Jacobi sweep evaluates a window of it at once
from a guess; by induction the first equation of the window is exact, and every further one whose guess was right, so each sweep
settles at least one token, whatever the guess. (Song et al., ICML 2021, arXiv 2002.03629; Santilli et al., ACL 2023, arXiv
2305.10427.)
"""
