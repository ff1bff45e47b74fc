"""Eager oracles: the docstrings are the spec, the code is the equation. For tests and ``backend="reference"``."""

from .asl import asl
from .pscl import pscl
from .sscl import sscl
from .supcon import supcon

__all__ = ["asl", "pscl", "sscl", "supcon"]
