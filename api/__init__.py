"""hocket: an ordinary PyTorch module, rewritten to run on many devices, and proven to compute the same function."""

__version__ = "0.1.0"
