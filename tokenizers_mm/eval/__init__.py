"""Metrics (METRICS), protocols, and reports of any number of tokenizers side by side."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tokenizers_mm.eval.metrics import METRICS as METRICS
    from tokenizers_mm.eval.protocols import PROTOCOLS as PROTOCOLS


def __getattr__(name: str) -> Any:
    """METRICS and PROTOCOLS, imported when they are first used: single modules stay light."""
    homes = {"METRICS": "metrics", "PROTOCOLS": "protocols"}
    if name not in homes:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{homes[name]}"), name)
