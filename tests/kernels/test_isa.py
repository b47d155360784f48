"""The instruction set of the native library: TOKENIZERS_MM_ISA caps it, `doctor` shows it."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tokenizers_mm import kernels
from tokenizers_mm.doctor import report
from tokenizers_mm.kernels import _native

ROOT = Path(__file__).resolve().parents[2]
LIBRARY = _native.cpu_or_none()
needs_native = pytest.mark.skipif(LIBRARY is None, reason="the native library is not installed")


@pytest.fixture
def fresh_library() -> Iterator[None]:
    """The library is loaded again inside the test and, with the environment as it was, after it."""
    _native._load.cache_clear()
    yield
    _native._load.cache_clear()
    _native.cpu_or_none()


def has(name: str) -> bool:
    """True if this CPU has the instruction set."""
    library = _native.cpu()
    before = library.isa
    try:
        library.select_isa(name)
    except ValueError:
        return False
    library.select_isa(before)
    return True


@needs_native
@pytest.mark.usefixtures("fresh_library")
@pytest.mark.parametrize("cap", _native.ISAS)
def test_environment_caps_the_instruction_set(cap: str, monkeypatch: pytest.MonkeyPatch) -> None:
    allowed = [name for name in _native.ISAS[: _native.ISAS.index(cap) + 1] if has(name)]
    _native._load.cache_clear()
    monkeypatch.setenv("TOKENIZERS_MM_ISA", cap)
    live = kernels.describe()
    assert (live["isa"], live["isa_cap"]) == (allowed[-1], cap)
    capped = [line for line in report() if "TOKENIZERS_MM_ISA" in line]
    assert len(capped) == (cap != _native.ISAS[-1])
    assert all(cap in line for line in capped)


@pytest.mark.parametrize("command", ["doctor", "nearest_code"])
def test_unknown_instruction_set_is_one_sentence(command: str) -> None:
    code = {
        "doctor": "from tokenizers_mm.cli import main; raise SystemExit(main(['doctor']))",
        "nearest_code": "import torch; from tokenizers_mm.kernels import nearest_code as f\n"
        "try: f(torch.ones(2, 3), torch.ones(2, 3))\n"
        "except ValueError as error: raise SystemExit(str(error))",
    }[command]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TOKENIZERS_MM_ISA": "avx3"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode != 0
    assert f"TOKENIZERS_MM_ISA: expected one of {', '.join(_native.ISAS)}, got avx3" in done.stderr
    assert "Traceback" not in done.stderr
