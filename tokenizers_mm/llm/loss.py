"""Logits where they are needed, and the next-token loss, without logits [B, L, V] of all tokens."""

from collections.abc import Mapping
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from tokenizers_mm.functional.precision import at_least_float32
from tokenizers_mm.llm.batch import IGNORED
from tokenizers_mm.llm.transformers_api import decoder, forward, head, only_adapters, unwrap

PLAIN = frozenset(
    ["gemma2", "gemma3_text", "gpt2", "gpt_neox", "llama", "mistral", "opt", "phi3", "qwen2", "qwen3"],
)
"""Kinds of `transformers` models whose logits are the head of the decoder's last hidden states and no more.

Those of Gemma are so where the configuration caps no logits. Others (Cohere and Granite scale theirs) are not here.
"""


def next_token_loss(model: Any, inputs: Mapping[str, Tensor]) -> Tensor:
    """Mean cross-entropy (a scalar) of the labelled tokens, each predicted from those before it; 0 without any.

    inputs: `Batch.model_inputs()`, or `projector.embed(...)`. The same number as the model's own loss.
    """
    labels = F.pad(inputs["labels"], (0, 1), value=IGNORED)[:, 1:]
    where = labels != IGNORED
    logits = logits_at(model, {name: value for name, value in inputs.items() if name != "labels"}, where)
    return F.cross_entropy(at_least_float32(logits), labels[where], reduction="sum") / where.sum().clamp_min(1)


def num_predicted(labels: Tensor) -> int:
    """Number of tokens that the loss of `next_token_loss` is a mean over, from int64 [B, L] labels."""
    return int((labels[:, 1:] != IGNORED).sum())


def logits_at(model: Any, inputs: Mapping[str, Tensor], where: Tensor) -> Tensor:
    """Logits [n, V] at the n places of bool [B, L] `where`, row by row.

    The head runs at these places alone for the kinds of `PLAIN`, also under adapters of peft; for all others the
    model computes every logit, in its own way.
    """
    config, to_logits = unwrap(model).config, head(model)
    capped = getattr(config, "final_logit_softcapping", None)
    if config.model_type not in PLAIN or capped or to_logits is None or not only_adapters(model):
        return forward(model, inputs).logits[where]
    return to_logits(forward(decoder(model), inputs).last_hidden_state[where])


def caption_rewards(model: Any, inputs: Mapping[str, Tensor]) -> Tensor:
    """Likelihood of the labelled text of each row for the model: the geometric mean of its tokens' probabilities, [B].

    A model that understands what it draws can so rank its own drawings: rows of image, prompt and caption, of which
    only the caption is labelled. inputs: as `next_token_loss`. Source: the intrinsic reward of GvU, where the prompt is
    read back from the decoded picture.
    """
    labels = F.pad(inputs["labels"], (0, 1), value=IGNORED)[:, 1:]
    where = labels != IGNORED
    logits = logits_at(model, {name: value for name, value in inputs.items() if name != "labels"}, where)
    told = -F.cross_entropy(logits.float(), labels[where], reduction="none")
    sums = told.new_zeros(len(labels)).index_add(0, where.nonzero()[:, 0], told)
    return (sums / where.sum(1).clamp_min(1)).exp()
