"""Placement types: is the distribution of a lowered program right, on all ranks at once?"""

from .check import check_types
from .erase import erase, erased_lines
from .findings import Finding, TypeReport
from .matching import match_programs
from .value import Axes, Cut, Dim, Type

__all__ = ["Axes", "Cut", "Dim", "Finding", "Type", "TypeReport", "check_types", "erase", "erased_lines", "match_programs"]
