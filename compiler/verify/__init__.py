"""Proof: every rewritten program is checked against the one before it."""
