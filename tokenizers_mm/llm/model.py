"""Room for images in a causal language model of `transformers`: its embeddings and head grow once."""

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from tokenizers_mm._check import fail, require
from tokenizers_mm.llm.transformers_api import embeddings, grow, head, unwrap
from tokenizers_mm.llm.vocabulary import VisualVocabulary

MARK = "visual_vocabulary"
"""The entry of the model's config.json that says which rows are visual."""


def extend(
    model: Any,
    vocabulary: VisualVocabulary,
    *,
    init: Literal["mean", "normal"] = "mean",
    codebooks: Mapping[str, Tensor] | None = None,
    generator: torch.Generator | None = None,
    pad_to_multiple_of: int = 1,
) -> Any:
    """Grow the embedding and the head (tied or not) to hold the vocabulary, and fill the new rows; returns the model.

    Padded rows that the model already has are used first. New rows: "mean", the mean of the text rows plus a
    hundredth of their spread as noise; "normal", drawn with the mean and the spread of the text rows. codebooks: a
    [K, D] tensor by stream; rows of its codes are then a fixed random projection of the codes, with the mean and spread
    of the text rows, so that near codes start near.

    Calling it again with the same vocabulary changes nothing; with another, or after rows were taken away, it is an
    error.
    """
    require(init in ("mean", "normal"), "init", "'mean' or 'normal'", init)
    mark = {"text_size": vocabulary.text_size, "size": vocabulary.size}
    config = unwrap(model).config
    before = getattr(config, MARK, None)
    if before is not None:
        require(before == mark, "model", f"one without visual rows, or with {mark}", before)
        rows = min(table.shape[0] for table in _tables(model))
        what = f"at least {vocabulary.size} rows, as its configuration says (resized since?)"
        require(rows >= vocabulary.size, "model", what, f"{rows}")
        return model
    have = embeddings(model).weight.shape[0]
    require(have >= vocabulary.text_size, "model", f"at least {vocabulary.text_size} rows (the text)", f"{have}")
    rows = -(-max(have, vocabulary.size) // pad_to_multiple_of) * pad_to_multiple_of
    if rows > have:
        grow(model, rows)
    tables = _tables(model)
    unknown = sorted(set(codebooks or {}) - {code.stream for code in vocabulary.codes})
    require(not unknown, "codebooks", f"streams {[code.stream for code in vocabulary.codes]}", unknown)
    with torch.no_grad():
        for table in tables:
            _fill(table, vocabulary, init, codebooks or {}, generator)
        bias = getattr(head(model), "bias", None)
        if isinstance(bias, Tensor):
            bias[vocabulary.text_size :] = bias[: vocabulary.text_size].mean()
    setattr(config, MARK, mark)
    return model


def _tables(model: Any) -> list[nn.Parameter]:
    """The weights of the embeddings and, where it is not tied to them, of the head."""
    output = head(model)
    tables = [embeddings(model).weight]
    return tables if output is None or output.weight is tables[0] else [*tables, output.weight]  # type: ignore[list-item]


def _fill(
    table: Tensor,
    vocabulary: VisualVocabulary,
    init: str,
    codebooks: Mapping[str, Tensor],
    generator: torch.Generator | None,
) -> None:
    """Fill the rows behind the text rows of one table [rows, C]."""
    text = table[: vocabulary.text_size].float()
    mean, spread = text.mean(0), text.std(0)
    new = table[vocabulary.text_size :]
    noise = torch.randn(new.shape, generator=generator).to(table.device)
    new.copy_(mean + spread * noise * (0.01 if init == "mean" else 1.0))
    for code in vocabulary.codes:
        if code.stream not in codebooks:
            continue
        codebook = codebooks[code.stream].detach().float().to(table.device)
        require(
            codebook.ndim == 2 and codebook.shape[0] == code.size,
            f"codebooks[{code.stream!r}]",
            f"[{code.size}, D]",
            codebook,
        )
        projection = torch.randn(codebook.shape[1], table.shape[1], generator=generator).to(table.device)
        rows = (codebook - codebook.mean(0)) @ projection
        rows = (rows - rows.mean(0)) / rows.std(0).clamp_min(1e-12)
        table[code.start : code.start + code.size] = (mean + spread * rows).to(table.dtype)


class TrainableRows:
    """Training of the visual rows alone: all else is frozen, and the gradient of the text rows is set to zero.

    Use an optimizer without weight decay (decay would move the text rows too). `remove` gives the model back as it was.

    Raises: ValueError for a model without rows for the vocabulary (call `extend`).
    """

    def __init__(self, model: Any, vocabulary: VisualVocabulary) -> None:
        tables = _tables(model)
        self._before = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
        self._hooks = []
        check_rows(model, vocabulary)
        visual = torch.zeros(tables[0].shape[0], dtype=torch.bool)
        for code in vocabulary.codes:
            visual[code.start : code.start + code.size] = True
        own = [m.ids[0] for m in vocabulary.markers if len(m.ids) == 1]
        visual[own] = True
        for parameter in model.parameters():
            parameter.requires_grad_(any(parameter is table for table in tables))
        for table in tables:
            require(table.shape[0] == len(visual), "model", f"{len(visual)} rows in the head", f"{table.shape[0]}")
            self._hooks.append(table.register_hook(_row_mask(visual[:, None].to(table.device))))

    def parameters(self) -> list[nn.Parameter]:
        """Parameters that are trained: the tables that hold new rows."""
        return [parameter for parameter, _ in self._before if parameter.requires_grad]

    def remove(self) -> None:
        """Let the model be trained as before."""
        for hook in self._hooks:
            hook.remove()
        for parameter, learns in self._before:
            parameter.requires_grad_(learns)


def _row_mask(visual: Tensor) -> Any:
    def mask(gradient: Tensor) -> Tensor:
        return gradient * visual.to(gradient.device, gradient.dtype)

    return mask


def check_rows(model: Any, vocabulary: VisualVocabulary) -> None:
    """Refuse a model that has no room for the vocabulary."""
    rows = min(table.shape[0] for table in _tables(model))
    if rows < vocabulary.size:
        fail("model", f"at least {vocabulary.size} rows (call extend)", f"{rows}")


def add_lora(model: Any, vocabulary: VisualVocabulary, rank: int = 16, alpha: int = 32, dropout: float = 0.0) -> Any:
    """Low-rank adapters on all linear layers (Hu et al., arXiv 2106.09685) through peft; the visual rows learn too.

    Returns the adapted model; its `merge_and_unload()` gives a plain model again.
    """
    from peft import LoraConfig, get_peft_model  # an optional package: loaded when asked for

    visual = sorted({m.ids[0] for m in vocabulary.markers if len(m.ids) == 1})
    for code in vocabulary.codes:
        visual += range(code.start, code.start + code.size)
    tables = _tables(model)
    holders = [part for part in (embeddings(model), head(model)) if part is not None]
    names = []
    for table in tables:  # peft follows tied weights itself: one name for each table
        holder = next(part for part in holders if part.weight is table)
        names += [name for name, module in model.named_modules() if module is holder]
    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,
        lora_dropout=dropout,
        target_modules="all-linear",
        trainable_token_indices={name.split(".")[-1]: visual for name in names},
        task_type="CAUSAL_LM",
    )
    return get_peft_model(model, config)
