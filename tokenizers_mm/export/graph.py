"""A tokenizer as two graphs, image to ids and ids to image, through torch.export or ONNX, checked against the model."""

import os
import warnings
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from tokenizers_mm._check import fail, require
from tokenizers_mm._files import atomic_directory, write_json
from tokenizers_mm._origin import origin_facts
from tokenizers_mm.config import to_mapping
from tokenizers_mm.models.base import ImageTokenizer
from tokenizers_mm.types import ImageCodes

Format = Literal["torch", "onnx"]

SUFFIX: dict[str, str] = {"torch": "pt2", "onnx": "onnx"}


class Encode(nn.Module):
    """x [B, 3, H, W] in [-1, 1] -> ids int64 [B, L]."""

    def __init__(self, tokenizer: ImageTokenizer[Any]) -> None:
        super().__init__()
        self.tokenizer = tokenizer

    def forward(self, x: Tensor) -> Tensor:
        return self.tokenizer.encode_tensor(x).ids


class Decode(nn.Module):
    """ids int64 [B, L] -> image [B, 3, H, W], not clamped."""

    def __init__(self, tokenizer: ImageTokenizer[Any], height: int, width: int) -> None:
        super().__init__()
        self.tokenizer, self.height, self.width = tokenizer, height, width

    def forward(self, ids: Tensor) -> Tensor:
        streams = self.tokenizer.streams(self.height, self.width)
        return self.tokenizer.decode(ImageCodes(ids, self.height, self.width, streams))


@torch.no_grad()
def export(
    tokenizer: ImageTokenizer[Any],
    format: Format,
    directory: str | os.PathLike[str],
    size: tuple[int, int] | None = None,
    batch_size: int = 1,
) -> Path:
    """Write encode and decode graphs for one image size and batch size, and graphs.json that describes them.

    size: (height, width), needed where the tokenizer takes any. The ONNX graph searches codes in float32 with a matrix
    product: ids may differ from ours where two codes are equally near to within its rounding. Both graphs are run and
    compared with the model before anything is written: ValueError when they differ.
    """
    require(format in SUFFIX, "format", f"one of {sorted(SUFFIX)}", format)
    require(batch_size > 0, "batch_size", "a positive number", batch_size)
    size = size or tokenizer.image_size
    if size is None:
        fail("size", "the height and width of the graphs", "nothing")
    tokenizer.check_size(*size)
    require(len(tokenizer.streams(*size)) > 0, "tokenizer", "one with ids", "a continuous one")
    tokenizer = tokenizer.eval()
    x = torch.linspace(-1, 1, batch_size * 3 * size[0] * size[1], device=tokenizer.device)
    x = x.sin().reshape(batch_size, 3, *size)
    ids = Encode(tokenizer)(x)
    with atomic_directory(directory) as folder:
        graphs = {"encode": (Encode(tokenizer), x), "decode": (Decode(tokenizer, *size), ids)}
        for name, (module, example) in graphs.items():
            path = folder / f"{name}.{SUFFIX[format]}"
            produced = _write(module, example, format, path)
            _compare(name, module(example), produced)
        shape = {"height": size[0], "width": size[1], "batch": batch_size}
        facts = {"format": format, **origin_facts(tokenizer.fingerprint()), **shape}
        write_json(folder / "graphs.json", {**facts, "streams": to_mapping(tokenizer.streams(*size))})
    return Path(directory)


def _write(module: nn.Module, example: Tensor, format: Format, path: Path) -> Tensor:
    """Write a graph, read it back, run it."""
    if format == "torch":
        program = torch.export.export(module, (example,), strict=False)
        torch.export.save(program, path)
        return torch.export.load(path).module()(example)
    (output,) = write_onnx(module, (example,), path)
    return output


def write_onnx(module: nn.Module, examples: tuple[Tensor, ...], path: Path, one_file: bool = False) -> list[Tensor]:
    """Write an ONNX graph for inputs like these, read it back, and run it on them; returns its outputs.

    one_file: whether the weights are in the file (up to 2 GB) or in another one beside it.
    """
    import onnxruntime  # an extra: loaded when asked for

    from tokenizers_mm.export.onnx_ops import TRANSLATIONS

    program = torch.export.export(module, examples, strict=False)
    with warnings.catch_warnings():  # the exporter warns of its own internals
        warnings.simplefilter("ignore")
        torch.onnx.export(
            program,
            (),
            path,
            dynamo=True,
            custom_translation_table=TRANSLATIONS,
            verbose=False,
            external_data=not one_file,
        )
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    names = [entry.name for entry in session.get_inputs()]
    outputs = session.run(None, {name: x.cpu().numpy() for name, x in zip(names, examples, strict=True)})
    return [torch.from_numpy(output).to(examples[0].device) for output in outputs]


def _compare(name: str, expected: Tensor, got: Tensor) -> None:
    """Ids: equal but for one in a thousand (near ties); images: 1e-3."""
    if expected.dtype == torch.int64:
        same = float((expected == got).double().mean()) if expected.shape == got.shape else 0.0
        require(same >= 0.999, f"the {name} graph", "the ids of the model", f"{same:.2%} of them equal")
        return
    difference = float((expected - got).abs().max())
    require(difference <= 1e-3, f"the {name} graph", "the image of the model", f"a difference of {difference:.2g}")
