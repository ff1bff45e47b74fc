"""The op tests on an extension built with ThreadSanitizer: ``python -m tests.races BUILT LLVM [PYTEST ARGUMENT ...]``.

First, that nothing passes for want of looking: planted races are reported and their right forms are not, and every
parallel region of csrc starts a team (``tests/ops/teams.py`` has the sizes). Then the tests, at each team size; each
report is printed, and one is a failure. ThreadSanitizer understands OpenMP through LLVM's runtime and its tool Archer
alone, and is told to pass over what is not instrumented: Python, torch and its libgomp.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).parent
TEAMS = (2, 3, 8)

PLANTED = """
import ctypes, threading
library, wrong = ctypes.CDLL({library!r}), {wrong}
x, n = (ctypes.c_double * 3000)(), ctypes.c_long(3000)
{call}
"""
CALLS = {
    "within a team": "library.sum.restype = ctypes.c_double; library.sum(x, n, wrong)",
    "between Python threads": """
results = [x, x if wrong else (ctypes.c_double * 3000)()]
meet = threading.Barrier(2)
threads = [threading.Thread(target=lambda r=r: (meet.wait(), library.fill(r, n))) for r in results]
for thread in threads: thread.start()
for thread in threads: thread.join()
""",
}
EVERY_JOB = """
import sys
sys.path[:0] = [{built!r}, {root!r}, {ops!r}]
import torch
torch.set_num_threads(3)
from teams import jobs
from sadcl import _C
assert _C.__file__.startswith({built!r})
for run in (*jobs().values(), *jobs(torch.bfloat16).values()): run()
_C.fma_peak(3)
"""


class Sanitizer:
    """ThreadSanitizer of a version of LLVM, its OpenMP, and the folder that both write into."""

    def __init__(self, version: str, folder: Path) -> None:
        self.clang, self.symbolizer, self.folder = f"clang++-{version}", f"llvm-symbolizer-{version}", folder
        self.runtime = self._said("-print-file-name=libclang_rt.tsan-x86_64.so")
        self.archer = str(Path(self._said("-print-resource-dir")).parents[1] / "libarcher.so")
        for name, path in (("libclang-rt", self.runtime), ("libomp", self.archer)):
            if not Path(path).is_absolute() or not Path(path).exists():
                raise SystemExit(f"{path} is missing: Debian's {name}-{version}-dev has it")
        if shutil.which(self.symbolizer) is None:
            raise SystemExit(f"{self.symbolizer} is missing: Debian's llvm-{version} has it")

    def _said(self, question: str) -> str:
        return subprocess.run([self.clang, question], capture_output=True, text=True, check=True).stdout.strip()

    def library(self, source: str, *flags: str) -> str:
        made = self.folder / Path(source).with_suffix(".so").name
        subprocess.run(
            [self.clang, "-std=c++17", "-O1", "-g", "-fPIC", "-shared", *flags, str(HERE / source), "-o", str(made)],
            check=True,
        )
        return str(made)

    def run(self, *arguments: str, threads: int = 3, tool: str = "", **environment: str) -> tuple[int, str]:
        """Exit status of Python with these arguments, and the reports; without one, what it said when it failed."""
        for old in self.folder.glob("report.*"):
            old.unlink()
        options = f"ignore_noninstrumented_modules=1 exitcode=66 log_path={self.folder}/report"
        environment |= {
            "LD_PRELOAD": self.runtime,
            "OMP_TOOL_LIBRARIES": tool or self.archer,
            "TSAN_OPTIONS": options,
            "OMP_NUM_THREADS": str(threads),
            "SADCL_THREADS": str(threads),
            # Waiting threads leave the processors to those that work.
            "OMP_WAIT_POLICY": "passive",
            "KMP_BLOCKTIME": "0",
        }
        # -R: ThreadSanitizer wants addresses that randomisation may take.
        command = ["setarch", "-R", sys.executable, *arguments]
        done = subprocess.run(
            command, cwd=ROOT, env={**os.environ, **environment}, stderr=subprocess.PIPE, text=True, check=False
        )
        reports = "".join(path.read_text() for path in sorted(self.folder.glob("report.*")))
        return done.returncode, reports or (done.stderr if done.returncode else "")


def check_planted(sanitizer: Sanitizer) -> None:
    library = sanitizer.library("planted.cpp", "-fsanitize=thread", "-fopenmp")
    for where, call in CALLS.items():
        for wrong in (1, 0):
            status, reports = sanitizer.run("-c", PLANTED.format(library=library, wrong=wrong, call=call))
            if (status, "data race" in reports) != ((66, True) if wrong else (0, False)):
                raise SystemExit(f"a {'planted race' if wrong else 'right program'} {where}: exit {status}\n{reports}")
    print("planted races are reported, their right forms are not", flush=True)


def check_teams(sanitizer: Sanitizer, built: Path) -> None:
    out = sanitizer.folder / "teams.txt"
    code = EVERY_JOB.format(built=str(built), root=str(ROOT), ops=str(ROOT / "tests" / "ops"))
    status, reports = sanitizer.run("-c", code, tool=sanitizer.library("teams.cpp"), SADCL_TEAMS=str(out))
    if status not in (0, 66):  # without Archer what is reported means nothing
        raise SystemExit(f"the jobs of tests/ops/teams.py: exit {status}\n{reports}")
    teams = [line.split() for line in out.read_text().splitlines()]
    # The call is before the address to which it returns.
    offsets = [hex(int(offset, 16) - 1) for offset, team in teams if int(team) > 1]
    (extension,) = built.glob("sadcl/_C*.so")
    command = [sanitizer.symbolizer, f"--obj={extension}", "--no-inlines", "--output-style=GNU", *offsets]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    ran = {(Path(file).name, int(line)) for file, line in re.findall(r"(\S+):(\d+)", lines)}
    regions = {
        (path.name, number)
        for path in (ROOT / "csrc").glob("*.*")
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if line.startswith("#pragma omp parallel")
    }
    if alone := ", ".join(f"{name}:{number}" for name, number in sorted(regions - ran)):
        raise SystemExit(f"parallel regions for which no job of tests/ops/teams.py starts a team: {alone}")
    print(f"each of {len(regions)} parallel regions starts a team", flush=True)


def main(built: str, version: str, *tests: str) -> int:
    folder = Path(built).resolve()
    sanitizer = Sanitizer(version, folder.parent)
    check_planted(sanitizer)
    check_teams(sanitizer, folder)
    failed = 0
    for threads in TEAMS:
        print(f"{threads} threads", flush=True)
        status, reports = sanitizer.run(
            "-m",
            "pytest",
            "-q",
            "-x",
            "-o",
            f"pythonpath={folder} .",
            "-p",
            "no:cacheprovider",
            *tests,
            threads=threads,
        )
        failed += status != 0 or bool(reports)
        print(reports, flush=True)
    return min(failed, 1)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
