"""Reference cases: tensors made by the original code of each system.

The small ones are kept in tests/fixtures. The larger ones are read from a `shared/fixtures` folder beside the checkout;
a test that needs one is skipped where it is absent.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
OWN, SHARED = ROOT / "tests" / "fixtures", ROOT.parent / "shared" / "fixtures"


@dataclass(frozen=True)
class Case:
    """One folder of reference tensors."""

    name: str
    folder: Path

    @property
    def config(self) -> dict[str, Any]:
        return json.loads((self.folder / "config.json").read_text())

    def tensors(self, name: str) -> dict[str, Tensor]:
        return load_file(self.folder / f"{name}.safetensors")

    @property
    def inputs(self) -> dict[str, Tensor]:
        return self.tensors("inputs")

    @property
    def outputs(self) -> dict[str, Tensor]:
        return self.tensors("outputs")


def close(actual: Tensor, expected: Tensor, name: str, tolerance: float = 1e-5) -> None:
    """Compare within `tolerance`, relative and of the largest element expected.

    Independent forms of the originals agree to 2e-7 (extra), 2.2e-7 (ibq) and 3.7e-7 (bsq, lfq), by their README.
    """
    near(actual, expected, name, rtol=tolerance, atol=tolerance * float(expected.detach().abs().max()))


def near(actual: Tensor, expected: Tensor, name: str, *, rtol: float, atol: float) -> None:
    """Compare within fixed tolerances; an error begins with the name."""
    torch.testing.assert_close(actual, expected, rtol=rtol, atol=atol, msg=lambda m: f"{name}: {m}")


def case(name: str, whole: bool = False) -> Case:
    """The case FAMILY/CASE, or a skip that says what is missing.

    whole: all of its tensors where they can be had, else what this checkout carries of it.
    """
    for place in (SHARED, OWN) if whole else (OWN, SHARED):
        if (place / name).is_dir():
            return Case(name, place / name)
    pytest.skip(f"reference case {name} is not in this checkout, and there is no shared/fixtures beside it")
