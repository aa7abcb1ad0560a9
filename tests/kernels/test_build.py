"""What an installation from source builds, with a stand-in for the compiler."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LIBRARY = "zerolith/kernels/libzerolith_kernels.so"
FAKE = """
import sys
from pathlib import Path
arguments = sys.argv[1:]
if any(word in arguments for word in {refused!r}):
    sys.exit("error: what is that?")
Path(arguments[arguments.index("-o") + 1]).write_text(" ".join(arguments))
"""


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """All that goes into a wheel, and little more."""
    target = tmp_path / "source"
    package = target / "src/zerolith"
    package.mkdir(parents=True)
    for name in ("pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE", "NOTICE"):
        shutil.copy(ROOT / name, target)
    shutil.copy(ROOT / "src/zerolith/__init__.py", package)
    shutil.copytree(ROOT / "src/zerolith/kernels", package / "kernels", ignore=shutil.ignore_patterns("*.so"))
    return target


def setup(source: Path, *arguments: str, refused: tuple[str, ...] = (), compiler: str = "") -> str:
    """Run setup.py with a compiler that writes its arguments to its output; returns what was said."""
    fake = source.parent / "fake.py"
    fake.write_text(FAKE.format(refused=refused))
    environment = {**os.environ, "CXX": compiler or f"{sys.executable} {fake}"}
    command = [sys.executable, "setup.py", "-q", *arguments]
    done = subprocess.run(command, cwd=source, env=environment, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    return done.stderr


def wheel_of(source: Path) -> Path:
    (wheel,) = (source / "dist").glob("*.whl")
    return wheel


def names_in(wheel: Path) -> list[str]:
    with zipfile.ZipFile(wheel) as archive:
        return archive.namelist()


def test_a_wheel_serves_every_python_of_the_platform(source: Path) -> None:
    setup(source, "bdist_wheel")
    wheel = wheel_of(source)
    assert "-py3-none-linux_" in wheel.name or "-py3-none-macosx_" in wheel.name
    names = names_in(wheel)
    assert LIBRARY in names
    assert "zerolith/kernels/native.py" in names
    assert not [name for name in names if "csrc" in name], "sources belong in the sdist only"
    with zipfile.ZipFile(wheel) as archive:
        assert "-shared" in archive.read(LIBRARY).decode()


def test_without_a_compiler_the_wheel_serves_every_platform(source: Path) -> None:
    (source / "build").mkdir()
    setup(source, "bdist_wheel")
    wheel_of(source).unlink()
    said = setup(source, "bdist_wheel", compiler="/no/such/compiler")  # what was built before is not taken
    assert wheel_of(source).name.endswith("-py3-none-any.whl")
    assert LIBRARY not in names_in(wheel_of(source))
    assert "no C++ compiler" in said


def test_a_compiler_without_an_instruction_set_leaves_it_out(source: Path) -> None:
    said = setup(source, "build_ext", "--inplace", refused=("-DZL_AVX512", "-DZL_NEON"))
    assert "GENERIC" in said.splitlines()[-1]
    assert "AVX512" not in said.splitlines()[-1]
    command = (source / "src" / LIBRARY).read_text()
    assert "generic.o" in command
    assert "avx512.o" not in command


def test_a_compiler_that_fails_leaves_no_old_library(source: Path) -> None:
    setup(source, "build_ext", "--inplace")
    assert (source / "src" / LIBRARY).exists()
    setup(source, "build_ext", "--inplace", refused=("-DZL_GENERIC",))
    assert not (source / "src" / LIBRARY).exists()


def test_results_stay_defined_whatever_the_users_options_are(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXXFLAGS", "-Ofast -ffp-contract=fast")
    setup(source, "build_ext", "--inplace")
    words = (source / "src" / LIBRARY).read_text().split()
    assert words.index("-fno-fast-math") > words.index("-Ofast")
    assert words.index("-ffp-contract=off") > words.index("-ffp-contract=fast")


def test_the_sdist_holds_all_sources(source: Path) -> None:
    setup(source, "sdist", "--formats", "zip")
    (archive,) = (source / "dist").glob("*.zip")
    names = names_in(archive)
    for path in (ROOT / "src/zerolith/kernels/csrc").iterdir():
        assert any(name.endswith(f"kernels/csrc/{path.name}") for name in names), path.name
    assert any(name.endswith("/setup.py") for name in names)
