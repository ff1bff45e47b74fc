"""The executor is built by a C++ compiler; kernels are compiled and executed where that is asked for."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

from sadcl._backends import triton_interprets
from tests.ptx.ptxemu.native import compiler

_KERNELS = ["test_every_op.py", "test_mutants.py"]  # minutes: ``SADCL_EXECUTE_PTX=1 pytest tests/ptx``
_CUDA = sorted(path.name for path in Path(__file__).parent.glob("test_cuda*.py"))  # a minute or two
collect_ignore: list[str] = []
if not os.environ.get("SADCL_EXECUTE_PTX") or triton_interprets():
    collect_ignore = [*_KERNELS, *_CUDA]
elif importlib.util.find_spec("triton") is None:
    collect_ignore = _KERNELS
collect_ignore_glob = ["test_*.py"] if compiler() is None else []
