"""Builds ``sadcl._C``: pybind11 alone, one wheel for every torch, instruction set chosen at run time.

The kernel files are compiled once per instruction set (csrc/isa.h says how they keep apart), the rest once. A compiler
that is missing or fails does not fail the installation: the reason goes to ``sadcl/_build_error.txt`` in the installed
package, where ``sadcl doctor`` finds it, and the other backends work.
"""

from __future__ import annotations

import os
import platform
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
X86 = platform.machine().lower() in ("x86_64", "amd64", "i686")

# Compiled once, and once per instruction set.
SOURCES = [
    "csrc/module.cpp",
    "csrc/dispatch.cpp",
    "csrc/parallel.cpp",
    "csrc/compact.cpp",
    "csrc/bank.cpp",
    "csrc/average_precision.cpp",
]
KERNEL_SOURCES = [
    "csrc/probe.cpp",
    "csrc/linear.cpp",
    "csrc/label_attention.cpp",
    "csrc/sscl.cpp",
    "csrc/asl.cpp",
    "csrc/mlc.cpp",
    "csrc/zlpr.cpp",
    "csrc/two_way.cpp",
    "csrc/pscl.cpp",
    "csrc/group_classifier.cpp",
]

# No flag here may change values: contraction to FMA is the only licence taken. -fno-trapping-math lets `x < y ? a : b`
# become a blend, -fno-math-errno lets sqrt be an instruction.
COMMON_FLAGS = [
    "-std=c++17",
    "-O3",
    "-falign-loops=64",
    "-g0",  # some interpreters bring -g: half of the build time and most of its size
    "-fvisibility=hidden",
    "-ffp-contract=fast",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-Wall",
    "-Wextra",
    "-Wno-unknown-pragmas",
]
ISA_FLAGS: dict[str, list[str]] = {"portable": []}
if X86:
    ISA_FLAGS["avx2"] = ["-mavx2", "-mfma", "-mf16c"]
    ISA_FLAGS["avx512"] = [
        *ISA_FLAGS["avx2"],
        "-mavx512f",
        "-mavx512bw",
        "-mavx512vl",
        "-mavx512dq",
        "-mprefer-vector-width=512",
    ]
    ISA_FLAGS["avx512_popcnt"] = [*ISA_FLAGS["avx512"], "-mavx512vpopcntdq"]
    ISA_FLAGS["avx512_bf16"] = [*ISA_FLAGS["avx512_popcnt"], "-mavx512bf16"]
# An instruction set that differs from the one below it in some kernels only.
ONLY = {
    "avx512_popcnt": ["csrc/mlc.cpp"],
    "avx512_bf16": ["csrc/sscl.cpp", "csrc/mlc.cpp", "csrc/label_attention.cpp"],
}
# `make sanitize` (address errors and undefined behaviour end the process) and `make races` build with these.
SANITIZERS = {
    "": [],
    "address": ["-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer", "-O2"],
    "thread": ["-fsanitize=thread", "-fno-omit-frame-pointer", "-O2", "-gline-tables-only"],
}
SANITIZE = SANITIZERS[os.environ.get("SADCL_SANITIZE", "")]


@dataclass(frozen=True)
class Job:
    """One object file: a source with the macros and flags of its instruction set, in a folder of its own."""

    source: str
    folder: str
    macros: list[tuple[str, str]]
    flags: list[str]


class BuildExt(build_ext):
    """Compiles per instruction set, in parallel, with what the compiler turns out to support."""

    def run(self) -> None:
        report = self._report_path()
        report.unlink(missing_ok=True)
        try:
            super().run()
        except Exception as error:
            compiler = getattr(getattr(self, "compiler", None), "compiler_cxx", None)
            report.parent.mkdir(parents=True, exist_ok=True)
            report.write_text(
                f"The CPU extension sadcl._C was not built: {type(error).__name__}: {error}\n"
                f"Compiler: {' '.join(compiler or ['not found'])}\n"
                "It needs a C++17 compiler (g++ or clang++) and the Python headers; install them and reinstall sadcl.\n"
            )
            print(f"warning: {report.read_text()}", file=sys.stderr)

    def copy_extensions_to_source(self) -> None:
        """Leave out an extension whose build failed."""
        built = [e for e in self.extensions if (Path(self.build_lib) / self.get_ext_filename(e.name)).exists()]
        self.extensions = built
        super().copy_extensions_to_source()

    def build_extension(self, ext: Extension) -> None:
        openmp = self._openmp_flags()
        isas = [isa for isa, flags in ISA_FLAGS.items() if not flags or self._compiles(flags)]
        common = [("SADCL_COMPILER", f'"{self._compiler_name()}"')]
        common += [(f"SADCL_HAS_{isa.upper()}", "1") for isa in isas]
        flags = COMMON_FLAGS + openmp + SANITIZE
        # Bindings run once a call: -O1 (the last -O counts) takes a quarter off the slowest files of the build.
        jobs = [
            Job(source, "base", common, flags + (["-O1"] if Path(source).stem.startswith(("module", "bind_")) else []))
            for source in ext.sources
        ]
        for isa in isas:
            macros = [("SADCL_ISA", isa), *([("SADCL_FLOAT64", "1")] if isa == "portable" else [])]
            jobs += [Job(s, isa, macros, flags + ISA_FLAGS[isa]) for s in ONLY.get(isa, KERNEL_SOURCES)]
        include = [str(ROOT / "csrc"), *self._pybind11_include(), *(ext.include_dirs or [])]

        def compile_one(job: Job) -> list[str]:
            return self.compiler.compile(
                [job.source],
                output_dir=os.path.join(self.build_temp, job.folder),
                macros=list(job.macros),
                include_dirs=include,
                extra_postargs=job.flags,
                depends=ext.depends,
            )

        with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
            objects = [path for paths in pool.map(compile_one, jobs) for path in paths]
        os.makedirs(os.path.dirname(os.path.abspath(self.get_ext_fullpath(ext.name))), exist_ok=True)
        self.compiler.link_shared_object(
            objects,
            self.get_ext_fullpath(ext.name),
            extra_postargs=openmp + SANITIZE,
            export_symbols=self.get_export_symbols(ext) if os.name == "nt" else None,
            target_lang="c++",
        )

    def _report_path(self) -> Path:
        """``_build_error.txt`` beside the module: in the source tree for in-place and editable builds."""
        inplace = self.inplace or getattr(self, "editable_mode", False)
        return (ROOT if inplace else Path(self.build_lib)) / "sadcl" / "_build_error.txt"

    @staticmethod
    def _pybind11_include() -> list[str]:
        import pybind11

        return [pybind11.get_include()]

    def _compiler_name(self) -> str:
        return " ".join(os.path.basename(part) for part in self.compiler.compiler_cxx[:1])

    def _openmp_flags(self) -> list[str]:
        """Flags for OpenMP, or none: kernels have one thread then (Apple's clang without libomp; SADCL_OPENMP=0)."""
        if os.environ.get("SADCL_OPENMP") == "0":
            return []
        code = "#include <omp.h>\nint main() { return omp_get_max_threads() < 1; }\n"
        for flags in (["-fopenmp"], ["-Xpreprocessor", "-fopenmp", "-lomp"]):
            if self._compiles(flags, code, link=True):
                return flags
        return []

    def _compiles(self, flags: list[str], code: str = "int main() { return 0; }\n", link: bool = False) -> bool:
        """Does the compiler take these flags?"""
        with tempfile.TemporaryDirectory() as folder:
            source = Path(folder) / "probe.cpp"
            source.write_text(code)
            try:
                objects = self.compiler.compile([str(source)], output_dir=folder, extra_postargs=flags)
                if link:
                    self.compiler.link_executable(
                        objects, str(Path(folder) / "probe"), extra_postargs=flags, target_lang="c++"
                    )
            except Exception:
                return False
            return True


setup(
    packages=[*find_packages(include=["sadcl", "sadcl.*"]), "sadcl.kernels"],
    package_dir={"sadcl.kernels": "kernels"},
    package_data={"sadcl": ["py.typed", "data/*.json"]},
    ext_modules=[
        Extension("sadcl._C", SOURCES, depends=sorted(str(p.relative_to(ROOT)) for p in (ROOT / "csrc").glob("*.h")))
    ],
    cmdclass={"build_ext": BuildExt},
)
