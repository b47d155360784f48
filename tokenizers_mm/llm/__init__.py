"""Images in language models: vocabulary, rows, training and generation. It programs against models/base.py only."""

import warnings
from typing import Any

from tokenizers_mm.llm.batch import Batch as Batch
from tokenizers_mm.llm.batch import ImageFeatures as ImageFeatures
from tokenizers_mm.llm.batch import Segment as Segment
from tokenizers_mm.llm.generate import GenerationSettings as GenerationSettings
from tokenizers_mm.llm.generate import Sampling as Sampling
from tokenizers_mm.llm.generate import generate as generate
from tokenizers_mm.llm.grammar import Grammar as Grammar
from tokenizers_mm.llm.grammar import GrammarProcessor as GrammarProcessor
from tokenizers_mm.llm.layout import Layout as Layout
from tokenizers_mm.llm.loss import next_token_loss as next_token_loss
from tokenizers_mm.llm.model import TrainableRows as TrainableRows
from tokenizers_mm.llm.model import extend as extend
from tokenizers_mm.llm.processor import MultimodalProcessor as MultimodalProcessor
from tokenizers_mm.llm.projector import FeatureProjector as FeatureProjector
from tokenizers_mm.llm.projector import ProjectorConfig as ProjectorConfig
from tokenizers_mm.llm.tasks import describe as describe
from tokenizers_mm.llm.tasks import draw as draw
from tokenizers_mm.llm.vocabulary import VisualVocabulary as VisualVocabulary


def __getattr__(name: str) -> Any:
    """Names of an older version, with a DeprecationWarning; they go with the next one."""
    if name == "OnlyNewRows":
        warnings.warn("OnlyNewRows is now TrainableRows", DeprecationWarning, stacklevel=2)
        return TrainableRows
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
