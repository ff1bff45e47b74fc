"""Eager oracles: the docstrings are the spec, the code is the equation. For tests and ``backend="reference"``."""

from .asl import asl
from .bank import bank_update
from .group_classifier import group_classifier
from .mlc import mlc
from .pscl import pscl
from .sscl import sscl
from .supcon import supcon
from .two_way import two_way
from .zlpr import zlpr

__all__ = ["asl", "bank_update", "group_classifier", "mlc", "pscl", "sscl", "supcon", "two_way", "zlpr"]
