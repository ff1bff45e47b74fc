"""The executor's C++ part: compiled once, into a folder of its own, and its table of opcodes."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

SOURCES = Path(__file__).resolve().parent
FLAGS = ("-std=c++20", "-O2", "-ftree-vectorize", "-fno-strict-aliasing", "-ffp-contract=off", "-fPIC", "-shared")
# As in machine.h.
EACH_LANE, SELECT, MEMORY, TOGETHER, BRANCH, BARRIER, EXIT = range(7)
OPERANDS = 16


@dataclass(frozen=True)
class Opcode:
    """Place in the table, and the registers of result and operands: p, h, w, d for 1, 16, 32, 64 bits."""

    index: int
    registers: str
    kind: int


def compiler() -> str | None:
    """A C++ compiler, or None."""
    names = (os.environ.get("CXX", "").split()[-1:] or [""])[0], "g++", "clang++"
    return next((found for name in names if name and (found := shutil.which(name))), None)


def _tuned(command: str) -> tuple[str, ...]:
    """Fused multiply-adds and half-precision conversions in hardware make it several times as fast."""
    done = subprocess.run([command, "-march=native", "-E", "-x", "c++", os.devnull], capture_output=True)
    return ("-march=native",) if done.returncode == 0 else ()


@functools.cache
def library() -> ctypes.CDLL:
    """Build, unless a build of these sources is there, and load."""
    command = compiler()
    if command is None:
        raise RuntimeError("the PTX executor needs a C++20 compiler: neither $CXX nor g++ nor clang++ was found")
    files = sorted((*SOURCES.glob("*.cpp"), *SOURCES.glob("*.h")))
    flags = (*FLAGS, *_tuned(command))
    cpu = Path("/proc/cpuinfo").read_text().split("\n\n")[0] if Path("/proc/cpuinfo").exists() else ""
    model = [line for line in cpu.splitlines() if line.startswith(("model name", "flags", "Features"))]
    key = hashlib.sha256(repr((command, flags, model, [f.read_bytes() for f in files])).encode()).hexdigest()[:16]
    folder = Path(os.environ.get("PTXEMU_CACHE") or SOURCES / "__pycache__")
    target = folder / f"ptxemu-{key}.so"
    if not target.exists():
        import fcntl  # which Windows has not

        folder.mkdir(parents=True, exist_ok=True)
        with target.with_suffix(".lock").open("w") as turn, tempfile.TemporaryDirectory(dir=folder) as scratch:
            fcntl.flock(turn, fcntl.LOCK_EX)  # of several test processes one compiles
            if not target.exists():
                made = Path(scratch) / target.name
                sources = [str(f) for f in files if f.suffix == ".cpp"]
                done = subprocess.run([command, *flags, "-o", str(made), *sources], capture_output=True, text=True)
                if done.returncode != 0:
                    raise RuntimeError(f"the PTX executor does not compile with {command}:\n{done.stderr[-4000:]}")
                made.replace(target)  # other processes see all of it or none
    loaded = ctypes.CDLL(str(target))
    loaded.ptx_opcodes.restype = ctypes.c_char_p
    loaded.ptx_program.restype = ctypes.c_void_p
    loaded.ptx_launch.restype = ctypes.c_char_p
    loaded.ptx_free.argtypes = [ctypes.c_void_p]
    return loaded


@functools.cache
def opcodes() -> dict[str, Opcode]:
    """The table, by name."""
    rows = (line.split("\t") for line in library().ptx_opcodes().decode().splitlines())
    return {name: Opcode(index, registers, int(kind)) for index, (name, registers, kind) in enumerate(rows)}
