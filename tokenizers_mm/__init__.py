"""tokenizers_mm: visual tokenizers that carry meaning and pixels at once.

The public names and the submodules load when they are first used, so that the command line can answer without torch.
"""

import importlib
import importlib.util
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tokenizers_mm.models import MODELS as MODELS
    from tokenizers_mm.models.base import ImageTokenizer as ImageTokenizer
    from tokenizers_mm.models.from_encoder import tokenizer_from as tokenizer_from
    from tokenizers_mm.models.loading import from_pretrained as from_pretrained
    from tokenizers_mm.models.loading import load as load
    from tokenizers_mm.registry import register as register
    from tokenizers_mm.types import ImageCodes as ImageCodes
    from tokenizers_mm.types import ImageLatents as ImageLatents
    from tokenizers_mm.types import Quantized as Quantized
    from tokenizers_mm.types import Stream as Stream

    __version__: str

_HOMES = {
    "load": "models.loading",
    "from_pretrained": "models.loading",
    "register": "registry",
    "MODELS": "models",
    "ImageTokenizer": "models.base",
    "tokenizer_from": "models.from_encoder",
    "ImageCodes": "types",
    "ImageLatents": "types",
    "Quantized": "types",
    "Stream": "types",
}
"""Public name -> the module that defines it."""


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        value = getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    elif name == "__version__":
        value = _version()
    elif not name.startswith("__") and importlib.util.find_spec(f"{__name__}.{name}") is not None:
        value = importlib.import_module(f"{__name__}.{name}")
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value
    return value


def _version() -> str:
    """Version of the installed package; of a checkout that is only on the path, a text that says so."""
    metadata = importlib.import_module("importlib.metadata")
    try:
        return metadata.version("tokenizers_mm")
    except metadata.PackageNotFoundError:
        return "0+not.installed"


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES, "__version__"})
