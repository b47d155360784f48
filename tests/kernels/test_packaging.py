"""The native library as a package: built without torch, optional, loaded late, one wheel for every Python and torch."""

import importlib.util
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tokenizers_mm import kernels
from tokenizers_mm.kernels import _native

ROOT = Path(__file__).resolve().parents[2]
CMAKE = shutil.which("cmake")
NINJA = shutil.which("ninja")
needs_cmake = pytest.mark.skipif(CMAKE is None or NINJA is None, reason="cmake and ninja are not installed")


def run_python(code: str, **environment: str) -> str:
    variables = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=variables, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.fixture
def no_library(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(_native, "library_path", lambda name: None)
    _native._load.cache_clear()
    yield
    _native._load.cache_clear()


def test_import_loads_nothing() -> None:
    code = "import tokenizers_mm.kernels, tokenizers_mm.kernels._native as n; print(n._load.cache_info().currsize)"
    assert run_python(code) == "0"


def test_environment_chooses_the_path() -> None:
    code = "from tokenizers_mm import kernels; print(kernels.describe()['path'])"
    assert run_python(code, TOKENIZERS_MM_KERNELS="reference") == "reference"


@pytest.mark.usefixtures("no_library")
def test_without_the_library() -> None:
    z, c = torch.randn(5, 4), torch.randn(6, 4)
    assert kernels.describe()["path"] == "reference"
    assert "not installed" in kernels.describe()["reason"]
    assert torch.equal(kernels.nearest_code(z, c), torch.cdist(z, c).argmin(1))
    with kernels.use_kernels("native"), pytest.raises(_native.NativeUnavailableError, match="C\\+\\+ compiler"):
        kernels.nearest_code(z, c)


def test_broken_library_is_explained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = tmp_path / "libtokenizers_mm.so"
    broken.write_bytes(b"not a library")
    monkeypatch.setattr(_native, "library_path", lambda name: broken)
    _native._load.cache_clear()
    assert "cannot be loaded" in kernels.describe()["reason"]
    _native._load.cache_clear()


@needs_cmake
def test_without_a_compiler_cmake_still_succeeds(tmp_path: Path) -> None:
    tools = tmp_path / "tools"
    tools.mkdir()
    assert NINJA is not None
    (tools / "ninja").symlink_to(Path(NINJA).resolve())
    environment = {"PATH": str(tools), "HOME": str(tmp_path)}
    configure = [str(CMAKE), "-S", str(ROOT), "-B", str(tmp_path / "build"), "-G", "Ninja"]
    done = subprocess.run(configure, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    assert "no C++ compiler found" in done.stderr
    install = [str(CMAKE), "--install", str(tmp_path / "build"), "--prefix", str(tmp_path / "installed")]
    assert subprocess.run(install, capture_output=True, env=environment, check=False).returncode == 0


@needs_cmake
@pytest.mark.skipif(importlib.util.find_spec("scikit_build_core") is None, reason="scikit-build-core is not installed")
@pytest.mark.skipif(not any(map(shutil.which, ("c++", "g++", "clang++"))), reason="no C++ compiler")
def test_wheel(tmp_path: Path) -> None:
    source = tmp_path / "source"
    skip = shutil.ignore_patterns(".git", ".venv", "build", "runs", "dist", "*.so", "*.dylib", "__pycache__", "tests")
    shutil.copytree(ROOT, source, ignore=skip)
    code = f"from scikit_build_core.build import build_wheel; build_wheel({str(tmp_path)!r})"
    done = subprocess.run([sys.executable, "-c", code], cwd=source, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    assert "-py3-none-" in wheel.name
    with zipfile.ZipFile(wheel) as archive:
        (library,) = [name for name in archive.namelist() if "libtokenizers_mm." in name]
        assert library.startswith("tokenizers_mm/kernels/")
        archive.extract(library, tmp_path)
    native = _native.CpuLibrary(tmp_path / library)
    assert native.isa in _native.ISAS
    if readelf := shutil.which("readelf"):
        needed = subprocess.run(
            [readelf, "-d", str(tmp_path / library)], capture_output=True, text=True, check=True
        ).stdout
        assert "libtorch" not in needed
        assert "libpython" not in needed
