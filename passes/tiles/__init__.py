"""Fuse matrix products with the collectives around them into tile loops (``passes.tiles.fuse``)."""
