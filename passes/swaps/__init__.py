"""Trade a collective for one of fewer bytes by the algebra of products (``passes.swaps.swap``)."""
