"""The one place that knows how a causal language model of `transformers` is called: wrappers, names, caches, files.

A name that changes in a later version is changed here, in one line.
"""

import inspect
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import errors
from safetensors import SafetensorError
from torch import Tensor, nn

from tokenizers_mm._check import fail, require
from tokenizers_mm._files import settle
from tokenizers_mm.llm.ids import as_ids

CACHE_NAMES = ("cache", "past_key_values", "cache_params")
"""Names of the keys and values among a model's arguments and outputs; a model knows one of them."""

RECOMPUTE_NAMES = ("activation_checkpointing_enable", "gradient_checkpointing_enable")
"""Names of the method by which a model keeps the inputs of its blocks alone; the first one it has counts."""

BROKEN_FILES = (
    *(OSError, ValueError, LookupError, TypeError, AttributeError, ImportError, RuntimeError, ArithmeticError),
    *(SafetensorError, MemoryError, AssertionError),
    getattr(errors, "StrictDataclassError", OSError),  # of newer versions: a configuration with values of other types
)
"""Errors of `transformers` for files that are missing, damaged, or ask for code of their own."""

MAX_LAYERS = 1024
"""Layers, experts and heads of a language model at most: they are built before its weights are read."""

COUNTS = re.compile(r"n_layers?|n_heads?|depth|num_\w*(layers|blocks|experts|heads)|n_\w*experts")
"""Names of such counts in configurations."""


def unwrap(model: Any) -> Any:
    """The language model inside of its wrappers: adapters of peft, torch.compile, data parallel, or a module around it.

    It is the innermost module that has a head (`get_output_embeddings`); a model without wrappers is returned as it is.
    """
    return _chain(model)[-1]


def recompute_activations(model: Any) -> bool:
    """Let a model compute the activations of its blocks again in the backward pass; False for another module."""
    name = next((name for name in RECOMPUTE_NAMES if hasattr(model, name)), None)
    if name is not None:
        getattr(model, name)({"use_reentrant": False})
    return name is not None


def takes(model: Any, name: str) -> bool:
    """True if an argument of this name reaches the language model through all its wrappers."""
    *wrappers, inner = _chain(model)
    passed = all(name in _parameters(link) or _takes_any(link) for link in wrappers)
    return passed and name in _parameters(inner) and not any(_prepends_tokens(link) for link in wrappers)


def forward(model: Any, inputs: Mapping[str, Tensor], *, cache: Any = None, use_cache: bool = False) -> Any:
    """Output of a causal language model, or of its decoder, for named inputs.

    inputs: `position_ids` int64 [B, L] among them, with `attention_mask` [B, L + cached] or [B, 1, L, L + cached].
    cache: keys and values of the tokens before, from `cache_of`. use_cache: whether `cache_of` the output is needed.

    Raises: ValueError where the positions would not reach the model and it would count others itself.
    """
    given: dict[str, Any] = dict(inputs)
    if "position_ids" in given and not takes(model, "position_ids"):
        _require_counted(model, given.pop("position_ids"), given.get("attention_mask"))
    if takes(model, "use_cache"):
        given["use_cache"] = use_cache
    if cache is not None:
        name = cache_name(model)
        given[name] = cache
        if name == "cache_params" and takes(model, "cache_position"):  # Mamba, before its cache was like all others
            mask, count = inputs["attention_mask"], _length(inputs)
            given["cache_position"] = torch.arange(mask.shape[-1], device=mask.device)[-count:]
            given["attention_mask"] = mask[:, -count:]
    watch = _Watch(model, given.get("position_ids"))
    with watch:
        return watch.model(**given)


def cache_name(model: Any) -> str:
    """The name of the argument for keys and values."""
    for name in CACHE_NAMES:
        if takes(model, name):
            return name
    fail("model", f"one that takes keys and values as {' or '.join(CACHE_NAMES)}", type(unwrap(model)).__name__)


def cache_of(output: Any) -> Any:
    """The keys and values that a forward pass with `use_cache` left; None where it left none."""
    return next((getattr(output, name) for name in CACHE_NAMES if hasattr(output, name)), None)


def keep_for_rewind(cache: Any) -> Any:
    """The cache, prepared for `rewind`; ValueError for one that cannot forget its last tokens."""
    record = getattr(cache, "activate_past_recording", None)  # caches of sliding windows, from version 5 on
    if record is not None:
        record()
    able = hasattr(cache, "crop") and getattr(cache, "is_croppable", True)
    require(able, "language_model", "a cache that can be cropped", type(cache).__name__)
    return cache


def rewind(cache: Any, count: int) -> None:
    """Forget the last `count` tokens of a cache that went through `keep_for_rewind`."""
    cache.crop(-count)


def only_adapters(model: Any) -> bool:
    """True if there is nothing around the language model but adapters inside of its layers (peft)."""
    return all(hasattr(type(link), "get_base_model") and not _prepends_tokens(link) for link in _chain(model)[:-1])


def embeddings(model: Any) -> nn.Embedding:
    """The table of token embeddings."""
    return unwrap(model).get_input_embeddings()


def head(model: Any) -> nn.Module | None:
    """The map from hidden states to logits, None where the model has none."""
    return unwrap(model).get_output_embeddings()


def decoder(model: Any) -> nn.Module:
    """The language model without its head: hidden states from embeddings."""
    inner = unwrap(model)
    found = inner.get_decoder()
    return inner.base_model if found is inner else found  # before version 5, GPT-2 and GPT-NeoX answer with themselves


def rope(theta: float) -> dict[str, Any]:
    """Settings of a configuration for rotary positions with this base frequency."""
    from transformers import LlamaConfig

    if "rope_theta" in inspect.signature(LlamaConfig.__init__).parameters:
        return {"rope_theta": theta}
    return {"rope_parameters": {"rope_type": "default", "rope_theta": theta}}


def end_tokens(model: Any) -> tuple[int, ...]:
    """All end tokens that a model's generation settings name (chat models have several)."""
    settings = getattr(unwrap(model), "generation_config", None) or getattr(unwrap(model), "config", None)
    ends = getattr(settings, "eos_token_id", None)
    return () if ends is None else tuple(as_ids(ends, "generation_config.eos_token_id").reshape(-1).tolist())


def grow(model: Any, rows: int) -> None:
    """Give the embeddings and the head so many rows; what new rows hold is not defined."""
    unwrap(model).resize_token_embeddings(rows, mean_resizing=False)


class _Narrowed:
    """A block around `tokenizers`, which raises the bare class Exception: that becomes a RuntimeError."""

    def __enter__(self) -> None:
        return

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: Any) -> None:
        if kind is Exception:
            raise RuntimeError(str(error)) from error


@contextmanager
def _reading(name: str, expected: str) -> Iterator[None]:
    """A block that reads files of anybody: what `transformers` and `tokenizers` raise becomes the one error."""
    try:
        with _Narrowed():
            yield
    except BROKEN_FILES as error:
        fail(name, expected, first_line(error))


def _of_usual_size(config: Any) -> Any:
    """A configuration, if it asks for no more parts than language models have: building them could take for ever."""
    stack = [config.to_dict()]
    while stack:
        entries = stack.pop()
        stack += [value for value in entries.values() if isinstance(value, dict)]
        for key, value in entries.items():
            if isinstance(value, int) and COUNTS.fullmatch(str(key)):
                require(value <= MAX_LAYERS, str(key), f"at most {MAX_LAYERS}", value)
    return config


def load_language_model(source: str | os.PathLike[str], name: str, *, dtype: Any = None, local: bool = False) -> Any:
    """A causal language model from a directory or hub id; it never runs code from there.

    name: of the argument, for errors. dtype: None keeps that of the file. local: never look beyond this machine.
    """
    from transformers import AutoConfig, AutoModelForCausalLM  # loaded when asked for

    options = {} if dtype is None else {"dtype": dtype}
    options |= {"trust_remote_code": False, "local_files_only": local}
    settle(source)
    with _reading(name, "a causal language model"):
        _of_usual_size(AutoConfig.from_pretrained(source, trust_remote_code=False, local_files_only=local))
        return AutoModelForCausalLM.from_pretrained(source, use_safetensors=True if local else None, **options)


def new_language_model(kind: str, name: str, settings: Mapping[str, Any]) -> Any:
    """A causal language model with random weights, from the name of its kind and its settings."""
    from transformers import AutoConfig, AutoModelForCausalLM

    with _reading(name, "a causal language model"):
        config = _of_usual_size(AutoConfig.for_model(kind, **settings))
        return AutoModelForCausalLM.from_config(config, trust_remote_code=False)


def num_parameters(kind: str, source: str, settings: Mapping[str, Any], name: str) -> int:
    """Parameters of a model of a kind with settings, or of a directory where `kind` is empty; no memory is taken."""
    from transformers import AutoConfig, AutoModelForCausalLM

    with _reading(name, "a causal language model"):
        if kind:
            config = AutoConfig.for_model(kind, **settings)
        else:
            config = AutoConfig.from_pretrained(source, trust_remote_code=False)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(_of_usual_size(config), trust_remote_code=False)
        return sum(parameter.numel() for parameter in model.parameters())


def load_text_tokenizer(source: str | os.PathLike[str], name: str) -> Any:
    """A text tokenizer from a directory or hub id, tried on a text; it never runs code from there."""
    from transformers import AutoTokenizer

    settle(source)
    with _reading(name, "a text tokenizer"):
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
        tokenizer.decode(tokenizer("a")["input_ids"], skip_special_tokens=True)
        return tokenizer


def save_text_tokenizer(text_tokenizer: Any, directory: Path) -> None:
    """Write a text tokenizer; RuntimeError or OSError where its files cannot be written."""
    with _Narrowed():
        text_tokenizer.save_pretrained(str(directory))


def first_line(error: BaseException) -> str:
    """The first line of an error's text, or its name where it has none."""
    return next(iter(str(error).splitlines()), "") or type(error).__name__


def _length(inputs: Mapping[str, Tensor]) -> int:
    """Tokens of a forward pass."""
    return next(inputs[name].shape[1] for name in ("input_ids", "inputs_embeds") if name in inputs)


def _chain(model: Any) -> list[Any]:
    """The model, the wrapper inside of it, and so on, down to the module with the head."""
    chain = [model]
    while (inside := _inside(chain[-1])) is not None:
        chain.append(inside)
    return chain


def _inside(model: Any) -> Any:
    """The module that a wrapper hands its arguments to; None for a language model itself."""
    if hasattr(type(model), "get_base_model"):
        return model.get_base_model()
    parts = dict(model.named_children()) if isinstance(model, nn.Module) else {}
    for name in ("_orig_mod", "module"):
        if name in parts:
            return parts[name]
    if _is_transformers(model):
        return None
    found = [part for part in parts.values() if _has_head(part)]
    return found[0] if len(found) == 1 else None


def _is_transformers(model: Any) -> bool:
    """True if a module is a model of `transformers` itself and no module around one."""
    return any(base.__module__.split(".")[0] == "transformers" for base in type(model).__mro__)


def _has_head(part: Any) -> bool:
    """True if a module is, or wraps, a language model with a head."""
    inner = unwrap(part)
    return hasattr(type(inner), "get_output_embeddings") and inner.get_output_embeddings() is not None


def _parameters(model: Any) -> Mapping[str, inspect.Parameter]:
    return inspect.signature(model.forward).parameters


def _takes_any(model: Any) -> bool:
    return any(p.kind == inspect.Parameter.VAR_KEYWORD for p in _parameters(model).values())


def _hands_on(model: Any) -> bool:
    """True if a wrapper is known to hand on every named argument as it is."""
    return hasattr(type(model), "get_base_model") or type(model).__module__.startswith("torch.")


def _prepends_tokens(model: Any) -> bool:
    """True if a wrapper of peft puts tokens of its own before each row, and so drops the positions."""
    active = getattr(model, "active_peft_config", None) if hasattr(type(model), "get_base_model") else None
    return bool(getattr(active, "is_prompt_learning", False))


def _require_counted(model: Any, positions: Tensor, mask: Tensor | None) -> None:
    """Refuse positions that a model without such an argument would not count itself: those of unpadded rows, from 0."""
    total = positions.shape[1] if mask is None else mask.shape[-1]
    counted = torch.arange(total - positions.shape[1], total, device=positions.device)
    right = positions == counted
    if mask is not None and mask.ndim == 2:
        right = right | (mask[:, -positions.shape[1] :] == 0)
    if not bool(right.all()):
        what = "one that takes position_ids (rows are padded on the left or packed, or positions are slots)"
        fail("model", what, " in ".join(type(link).__name__ for link in reversed(_chain(model))))


class _Watch:
    """A check, around one forward pass of `model`, that modules around the language model hand the positions on.

    A compiled wrapper outside of such a module is left out, since what was compiled does not see a new hook.
    """

    def __init__(self, model: Any, positions: Tensor | None) -> None:
        chain = _chain(model)
        doubtful = [i for i, link in enumerate(chain[:-1]) if not _hands_on(link)] if positions is not None else []
        while doubtful and type(chain[0]).__module__.startswith("torch._dynamo"):
            chain, doubtful = chain[1:], [i - 1 for i in doubtful]
        self.model, self.positions, self.seen, self.hook = chain[0], positions, False, None
        self.last = chain[doubtful[-1]] if doubtful else None
        self.receiver = chain[doubtful[-1] + 1] if doubtful else None

    def __enter__(self) -> None:
        if self.receiver is not None:
            self.hook = self.receiver.register_forward_pre_hook(self._see, with_kwargs=True)

    def __exit__(self, kind: Any, *_: Any) -> None:
        if self.hook is not None:
            self.hook.remove()
        if self.hook is not None and kind is None and not self.seen:
            got = f"{type(self.last).__name__}, which drops them"
            fail("model", "wrappers that hand position_ids on to the language model", got)

    def _see(self, module: Any, arguments: Any, named: dict[str, Any]) -> None:
        found = named.get("position_ids")
        assert self.positions is not None
        self.seen = isinstance(found, Tensor) and (found is self.positions or torch.equal(found, self.positions))
