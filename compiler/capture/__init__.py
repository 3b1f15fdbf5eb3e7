"""From an ordinary module or function to a Program."""

from .front import capture

__all__ = ["capture"]
