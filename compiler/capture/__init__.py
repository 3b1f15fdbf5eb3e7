"""From an ordinary module or function to a Program."""

from .front import capture
from .optimizer import initial_state
from .specialise import Specialisations
from .step import capture_step

__all__ = ["Specialisations", "capture", "capture_step", "initial_state"]
