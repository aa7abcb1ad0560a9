"""Builds the compiled kernels with the system's C++ compiler; everything else is in pyproject.toml.

The library has a plain C interface and knows neither Python nor torch, so one wheel serves all versions of both. Where
there is no compiler, or it fails, the package is installed without the library, and torch operations do its work.

    CXX         the compiler; by default the first of c++, g++, clang++
    CXXFLAGS    more options for it, before ours
"""

from __future__ import annotations

import os
import platform
import shlex
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

LIBRARY = "zerolith.kernels.libzerolith_kernels"
SOURCES = Path("src/zerolith/kernels/csrc")
OPTIONS = [
    "-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-fno-exceptions", "-fno-rtti", "-Wno-psabi",
    # The results are defined operation by operation: see src/zerolith/kernels/recipe.py.
    "-fno-fast-math", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math",
]  # fmt: skip
TIERS = {  # instruction sets beside the generic one, by processor, and what the compiler must be told
    "x86_64": {"AVX2": ["-mavx2", "-mf16c"], "AVX512": ["-mavx512f", "-mavx512bw", "-mf16c"]},
    "aarch64": {"NEON": []},
}
MACHINES = {"amd64": "x86_64", "arm64": "aarch64"}


class BuildKernels(build_ext):
    """Compiles csrc/ without Python's own options, once for each instruction set."""

    def get_ext_filename(self, fullname: str) -> str:
        return os.path.join(*fullname.split(".")) + ".so"

    def copy_extensions_to_source(self) -> None:
        Path("src", self.get_ext_filename(LIBRARY)).unlink(missing_ok=True)  # not that of other sources
        super().copy_extensions_to_source()

    def build_extension(self, ext: Extension) -> None:
        """Raises CompileError, upon which setuptools goes on without this optional extension."""
        target = Path(self.get_ext_fullpath(ext.name))
        target.unlink(missing_ok=True)
        compiler = _compiler()
        objects = Path(self.build_temp)
        for folder in (objects, target.parent):
            folder.mkdir(parents=True, exist_ok=True)
        machine = platform.machine().lower()
        tiers = {"GENERIC": [], **TIERS.get(MACHINES.get(machine, machine), {})}
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            done = {name: pool.submit(self._tier, compiler, objects, name, options) for name, options in tiers.items()}
        parts = {name: future.result() for name, future in done.items()}
        if parts["GENERIC"] is None:
            raise CompileError("the C++ compiler refuses the kernels; see its messages above")
        built = [name for name, part in parts.items() if part is not None]
        main = objects / "library.o"
        _run([*compiler, "-c", str(SOURCES / "library.cpp"), "-o", str(main), *(f"-DZL_WITH_{name}" for name in built)])
        _run([*compiler, "-shared", "-o", str(target), str(main), *(str(parts[name]) for name in built), "-pthread"])
        print(f"compiled {target.name} for {', '.join(built)}", file=sys.stderr)

    def _tier(self, compiler: list[str], objects: Path, name: str, options: list[str]) -> Path | None:
        """The object of one instruction set; None where the compiler does not know it."""
        part = objects / f"{name.lower()}.o"
        try:
            _run([*compiler, *options, f"-DZL_{name}", "-c", str(SOURCES / "tier.cpp"), "-o", str(part)])
        except CompileError as error:
            print(f"kernels without {name}: {error}", file=sys.stderr)
            return None
        return part


class Wheel(bdist_wheel):
    """Any Python 3 on this platform; any platform where nothing was compiled."""

    def get_tag(self) -> tuple[str, str, str]:
        platform_tag = super().get_tag()[2]
        self.root_is_pure = not any(Path(self.bdist_dir).rglob("libzerolith_kernels.so"))
        return "py3", "none", "any" if self.root_is_pure else platform_tag


def _compiler() -> list[str]:
    named = shlex.split(os.environ.get("CXX", ""))
    found = named or [name for name in ("c++", "g++", "clang++") if shutil.which(name)][:1]
    if not found or not shutil.which(found[0]):
        raise CompileError(f"no C++ compiler {' '.join(named)}".rstrip())
    return [*found, *shlex.split(os.environ.get("CXXFLAGS", "")), *OPTIONS]


def _run(command: list[str]) -> None:
    """Raises CompileError where the command fails."""
    try:
        subprocess.run(command, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise CompileError(str(error)) from error


sources = [str(path) for path in sorted(SOURCES.glob("*.cpp"))]
headers = [str(path) for path in sorted(SOURCES.glob("*.h"))]
setup(
    ext_modules=[Extension(LIBRARY, sources, depends=headers, optional=True)],
    cmdclass={"build_ext": BuildKernels, "bdist_wheel": Wheel},
)
