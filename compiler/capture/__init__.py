"""From an ordinary module or function to a Program."""

from .front import capture
from .specialise import Specialisations

__all__ = ["Specialisations", "capture"]
