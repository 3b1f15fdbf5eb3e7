"""Chains before they run: bodies between graph and data, their trace, their adjoint, and the recurrent cells of torch."""
