"""Reading a directory that `ImageTokenizer.save` wrote, or the hub id of one, and tensors into modules.

Strict, and no code is executed.
"""

import os
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from tokenizers_mm._check import fail, require, shorten
from tokenizers_mm._files import regular_file, settle
from tokenizers_mm._summary import CONFIG, SAVE_ID, WEIGHTS
from tokenizers_mm.config import from_mapping, read_json
from tokenizers_mm.models import MODELS, ImageTokenizer, Provenance
from tokenizers_mm.models.saving import FORMAT

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
"""Kinds of numbers that weights may have; 8-bit ones mean nothing without a scale, which a checkpoint does not say."""

MAX_COMPUTED = 1 << 28
"""Limit of the values in buffers that no checkpoint holds, which are computed from a configuration alone."""

SHIPPED = Path(__file__).resolve().parents[1] / "pretrained"
"""Tokenizers that come with the package; `tokenizers_mm/NAME` is the one in the folder NAME."""


def shipped() -> list[str]:
    """Names of the tokenizers that come with the package."""
    return sorted(f"tokenizers_mm/{path.parent.name}" for path in SHIPPED.glob(f"*/{CONFIG}"))


def load(
    source: str | os.PathLike[str], revision: str | None = None, device: torch.device | str | None = None
) -> ImageTokenizer[Any]:
    """A tokenizer from a directory, a hub id or the name of a shipped one ("tokenizers_mm/demo-64"), for evaluation.

    revision: of a hub id. device: None leaves the weights on the CPU. Strict: every tensor must be there with its
    shape, and no other. No code of the checkpoint is executed.

    Raises: ValueError, in one sentence, for a source that is none, cannot be reached, or is not what it says.
    """
    place = None if device is None else usable_device(device)
    tokenizer = load_directory(_directory(source, revision))
    return tokenizer if place is None else tokenizer.to(place)


from_pretrained = load
"""The name that Hugging Face libraries use."""


def _directory(source: str | os.PathLike[str], revision: str | None) -> Path:
    path = Path(source)
    if path.is_dir():
        return path
    name = str(source)
    if name in shipped():
        return SHIPPED / name.partition("/")[2]
    if path.exists() or name.count("/") != 1 or name.startswith((".", "/", "~")):
        fail("source", "a directory written by save, or a hub id such as 'owner/name'", name)
    if name.startswith("tokenizers_mm/"):
        fail("source", f"one of the shipped tokenizers {shipped()}", name)
    from huggingface_hub import snapshot_download  # network code: loaded when asked for
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=[CONFIG, "*.json", WEIGHTS, "*.md"]))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        fail("source", "a directory, or a hub id that can be reached", f"{name!r} ({type(error).__name__})")


def load_directory(directory: Path) -> ImageTokenizer[Any]:
    """The tokenizer of a directory, in evaluation mode: every tensor must be there with its shape, and no other."""
    data, tensors = _read_pair(directory)
    family = data.get("family")
    if not isinstance(family, str) or family not in MODELS:
        fail(f"{directory / CONFIG}: family", f"one of {sorted(MODELS)}", repr(family))
    model, where = MODELS[family], str(directory / CONFIG)
    config = from_mapping(model.Config, data.get("config", {}), f"{where}.config")
    provenance = from_mapping(Provenance, data.get("provenance", {}), f"{where}.provenance")
    try:
        tokenizer = build(model, config)
    except ValueError as error:
        raise ValueError(f"{where}.config: {error}") from None
    fill(tokenizer, tensors, str(directory / WEIGHTS))
    tokenizer.provenance = provenance
    return tokenizer.eval()


def _read_pair(directory: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """config.json and the weights of one save, also while another process replaces them.

    Files without the mark of `saving`, of older versions or written by hand, are taken as they are.
    """
    for _ in range(10):
        settle(directory)
        data = read_config(directory / CONFIG)
        tensors, metadata = read_safetensors_with_metadata(directory / WEIGHTS)
        marks = {data.get(SAVE_ID), metadata.get(SAVE_ID)} - {None}
        if len(marks) < 2:
            return data, tensors
        time.sleep(0.02)
    fail(
        str(directory),
        f"{CONFIG} and {WEIGHTS} of one save",
        "files of two (a copy or a save was interrupted: copy or save the tokenizer again)",
    )


def usable_device(device: torch.device | str) -> torch.device:
    """A device by name, tried with a value that is read back; ValueError where torch has no such device here."""
    try:
        found = torch.device(device)
        torch.zeros(1, device=found).item()
    except (RuntimeError, AssertionError) as error:
        count = torch.cuda.device_count()
        here = f"cpu{f' or cuda:0 to cuda:{count - 1}' if count else ' (torch finds no CUDA device here)'}"
        fail("device", here, f"{str(device)!r} ({shorten(str(error), 80)})")
    return found


def build(model: type[ImageTokenizer[Any]], config: Any) -> ImageTokenizer[Any]:
    """A tokenizer without memory for its weights, ready for `fill`."""
    with torch.device("meta"):
        return model.from_config(config)


def fill(module: torch.nn.Module, tensors: Mapping[str, Tensor], where: str) -> None:
    """Give a module its tensors. Names and shapes must match exactly, else one error names the first offenders.

    Floating-point weights of one dtype keep it; those of several dtypes all become float32. Anything but float32,
    bfloat16, float16 and float64 is refused, and so are whole numbers of another dtype than the module's.
    """
    state = module.state_dict()
    account({name: tuple(tensor.shape) for name, tensor in state.items()}, tensors, where)
    for name, tensor in tensors.items():
        known = FLOATS if state[name].is_floating_point() else (state[name].dtype,)
        if tensor.dtype not in known:
            names = " or ".join(str(dtype).removeprefix("torch.") for dtype in known)
            fail(f"{where}: {name}", names, tensor)
    floats = {tensor.dtype for tensor in tensors.values() if tensor.is_floating_point()}
    if len(floats) > 1:
        tensors = {name: t.float() if t.is_floating_point() else t for name, t in tensors.items()}
    module.load_state_dict(tensors, strict=True, assign=True)
    _compute_buffers(module)


def _compute_buffers(module: torch.nn.Module) -> None:
    """Give a module built by `build` the buffers that no checkpoint holds: they follow from its configuration."""
    missing = {name: buffer for name, buffer in module.named_buffers() if buffer.is_meta}
    if not missing:
        return
    total = sum(buffer.numel() for buffer in missing.values())
    require(total <= MAX_COMPUTED, "config", f"at most {MAX_COMPUTED} values in computed buffers", f"{total}")
    whole: Any = type(module).from_config(module.config)  # type: ignore[attr-defined]
    for name, buffer in whole.named_buffers():
        if name in missing:
            path, _, last = name.rpartition(".")
            setattr(module.get_submodule(path), last, buffer)


def account(expected: Mapping[str, tuple[int, ...]], tensors: Mapping[str, Tensor], where: str) -> None:
    """Refuse tensors whose names and shapes are not exactly those expected, with one sentence that names the first."""
    missing, unknown = [n for n in expected if n not in tensors], [n for n in tensors if n not in expected]
    wrong = [
        f"{n} (expected {list(expected[n])}, got {list(tensors[n].shape)})"
        for n in expected
        if n in tensors and tuple(tensors[n].shape) != tuple(expected[n])
    ]
    problems = {"missing": missing, "unknown": unknown, "of another shape": wrong}
    found = [f"{len(names)} {what}: {first_few(names)}" for what, names in problems.items() if names]
    if found:
        fail(where, "exactly the tensors of the model", "; ".join(found), limit=1000)


def read_safetensors(path: Path, prefixes: Sequence[str] = ()) -> dict[str, Tensor]:
    """The tensors of a safetensors file, mapped; one error for a file that is missing, truncated or something else.

    prefixes: where names begin with one of them, the others are left alone: each that is mapped costs some pages.
    """
    return read_safetensors_with_metadata(path, prefixes)[0]


def read_safetensors_with_metadata(
    path: Path, prefixes: Sequence[str] = ()
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The same, and the texts beside the tensors."""
    regular_file(path, "a safetensors file")
    try:
        with safe_open(path, framework="pt") as file:
            names = [name for name in file.keys() if name.startswith(tuple(prefixes))]  # noqa: SIM118 (not a mapping)
            tensors = {name: file.get_tensor(name) for name in names or file.keys()}
            return tensors, file.metadata() or {}
    except (SafetensorError, OSError, ValueError) as error:
        fail(str(path), "a whole safetensors file", f"{type(error).__name__}: {error}")


def first_few(names: Iterable[str], count: int = 3) -> str:
    """The first names of a list, and how many more there are."""
    names = list(names)
    rest = f" and {len(names) - count} more" if len(names) > count else ""
    return ", ".join(names[:count]) + rest


def read_config(path: Path) -> dict[str, Any]:
    """A config.json of this library, of the format that this version reads."""
    data = read_json(path)
    if data.get("library") != "tokenizers_mm":
        fail(str(path), "a config.json written by tokenizers_mm", "another file")
    if type(data.get("format")) is not int or data["format"] != FORMAT:
        fail(f"{path}: format", str(FORMAT), repr(data.get("format")))
    if not isinstance(data.get(SAVE_ID, ""), str):
        fail(f"{path}: {SAVE_ID}", "text", data[SAVE_ID])
    return data
