"""tokenizers_mm: visual tokenizers that carry meaning and pixels at once."""

from importlib import metadata

from tokenizers_mm.checkpoints.store import load as load
from tokenizers_mm.models import MODELS as MODELS
from tokenizers_mm.models.base import ImageTokenizer as ImageTokenizer
from tokenizers_mm.types import ImageCodes as ImageCodes
from tokenizers_mm.types import ImageLatents as ImageLatents
from tokenizers_mm.types import Quantized as Quantized
from tokenizers_mm.types import Stream as Stream
from tokenizers_mm.types import VQTerms as VQTerms

__version__ = metadata.version("tokenizers_mm")
