"""Candidates of an evaluation behind one interface: our tokenizers, codecs, models of diffusers and transformers.

Each adapter says what sizes it takes, makes codes of images and images of codes, and counts bits.
"""

import hashlib
import json
import logging
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from tokenizers_mm._check import expecting, fail, require
from tokenizers_mm.config import from_mapping, read_json, to_mapping
from tokenizers_mm.eval.codecs import CODECS, CURVES, Codec
from tokenizers_mm.layers.towers import ChannelDeviations, ChannelMeans
from tokenizers_mm.models.base import ImageTokenizer
from tokenizers_mm.models.saving import MODEL_TYPE
from tokenizers_mm.types import ImageCodes, Stream

LATENT_BITS = 16
"""Bits that one value of a continuous latent counts for: half precision."""


@dataclass(frozen=True)
class Encoded:
    """The codes of a batch. value: what `decode` takes. bits: of each image. ids: None for what has none."""

    value: Any
    bits: Sequence[float]
    ids: ImageCodes | None = None


class Candidate(ABC):
    """Something that turns images into codes and back; images are float [B, 3, H, W] in [-1, 1] on the CPU.

    name: in tables. kind: of adapter. identity: what tells it from others of the same name, for the report.
    on_curve: a point of a codec's curve, which is plotted and not compared.
    image_size: the one (height, width) it takes, None for any multiple of size_multiple.
    """

    kind: str
    on_curve: bool = False
    image_size: tuple[int, int] | None = None
    size_multiple: int = 1
    has_features: bool = False
    has_semantic: bool = False

    def __init__(self, name: str, identity: str = "") -> None:
        self.name, self.identity = name, identity

    @abstractmethod
    def encode(self, x: Tensor, target: Sequence[float] | None = None) -> Encoded:
        """Codes of images. target: bits of each image that a codec is to match."""

    @abstractmethod
    def decode(self, encoded: Encoded) -> Tensor:
        """Images, float [B, 3, H, W], not clamped."""

    @property
    def device(self) -> torch.device:
        """Device of its networks."""
        return torch.device("cpu")

    def features(self, x: Tensor) -> Tensor | None:
        """[B, C], means over tokens; None for what has no features."""
        return None

    def semantic(self, x: Tensor) -> Tensor | None:
        """Semantic features [B, T, C] decoded from the codes of images; None for what has none."""
        return None


class Ours(Candidate):
    """A tokenizer of this library."""

    kind = "tokenizers_mm"
    has_features = True

    def __init__(self, name: str, tokenizer: ImageTokenizer[Any]) -> None:
        super().__init__(name, identity_of(tokenizer, to_mapping(tokenizer.config)))
        self.tokenizer = tokenizer.eval()
        self.image_size, self.size_multiple = tokenizer.image_size, tokenizer.size_multiple
        self.has_semantic = "semantic" in tokenizer.loss_terms

    @property
    def device(self) -> torch.device:
        return self.tokenizer.device

    @torch.no_grad()
    def encode(self, x: Tensor, target: Sequence[float] | None = None) -> Encoded:
        codes = self.tokenizer.encode(x)
        if isinstance(codes, ImageCodes):
            return Encoded(codes, [bits_of_ids(codes)] * len(x), codes.to("cpu"))
        return Encoded(codes, [LATENT_BITS * codes.values[0].numel()] * len(x))

    @torch.no_grad()
    def decode(self, encoded: Encoded) -> Tensor:
        return self.tokenizer.decode(encoded.value).float().cpu()

    @torch.no_grad()
    def features(self, x: Tensor) -> Tensor:
        return self.tokenizer.features(x).float().mean(1).cpu()

    @torch.no_grad()
    def semantic(self, x: Tensor) -> Tensor | None:
        found = self.tokenizer.reconstruct(x.to(self.device)).semantic
        return None if found is None else found.float().cpu()


def bits_of_ids(codes: ImageCodes) -> float:
    """Nominal bits of one image: log2 of the codes for every id that is there."""
    bits, left = 0.0, codes.ids.shape[1]
    for stream in codes.streams:
        count = min(left, stream.num_ids)
        bits, left = bits + count * math.log2(max(2, stream.codebook_size)), left - count
    return bits


@dataclass(frozen=True)
class Normalization:
    """Means and deviations of the channels of images in [0, 1], as a preprocessor_config.json has them."""

    mean: ChannelMeans
    std: ChannelDeviations


class _Directory(Candidate):
    """A model in the layout of another library, read from a directory; safetensors only, nothing is fetched."""

    def __init__(self, name: str, directory: Path, model: Any, device: str) -> None:
        super().__init__(name, identity_of(model, repr(model.config)))
        self.model = model.eval().requires_grad_(False).to(device)
        path = directory / "preprocessor_config.json"
        facts = read_json(path) if path.is_file() else {}
        mean, std = (facts.get(name) or (0.5,) * 3 for name in ("image_mean", "image_std"))
        found = from_mapping(Normalization, {"mean": mean, "std": std}, str(path))
        self.mean, self.std = (torch.tensor(t).view(3, 1, 1).to(device) for t in (found.mean, found.std))

    @property
    def device(self) -> torch.device:
        return self.mean.device

    def _in(self, x: Tensor) -> Tensor:
        return (((x.to(self.device) + 1) / 2) - self.mean) / self.std

    def _out(self, x: Tensor) -> Tensor:
        return ((x.float() * self.std + self.mean) * 2 - 1).cpu()

    def _ids(self, ids: Tensor, grid: tuple[int, int], size: int, x: Tensor, value: Any) -> Encoded:
        """Encoded ids of one grid."""
        height, width = x.shape[-2:]
        codes = ImageCodes(ids.reshape(len(x), -1).cpu(), height, width, (Stream("vq", size, (grid,)),))
        return Encoded(value, [bits_of_ids(codes)] * len(x), codes)


class DiffusersAutoencoder(_Directory):
    """AutoencoderKL (the mode of its posterior), AutoencoderDC or AutoencoderRAE."""

    kind = "diffusers"

    def __init__(self, name: str, directory: Path, model: Any, device: str) -> None:
        super().__init__(name, directory, model, device)
        config = model.config
        if hasattr(model, "spatial_compression_ratio"):
            self.size_multiple = int(model.spatial_compression_ratio)
        elif "block_out_channels" in config:
            self.size_multiple = 2 ** (len(config.block_out_channels) - 1)
        else:  # AutoencoderRAE scales what its encoder gets, gives one size, and normalises images in [0, 1] by itself
            self.image_size = (int(model.decoder_image_size), int(model.decoder_image_size))
            self.mean, self.std = torch.zeros_like(self.mean), torch.ones_like(self.std)

    @torch.no_grad()
    def encode(self, x: Tensor, target: Sequence[float] | None = None) -> Encoded:
        output = self.model.encode(self._in(x))
        latent = output.latent_dist.mode() if hasattr(output, "latent_dist") else output.latent
        return Encoded(latent, [LATENT_BITS * latent[0].numel()] * len(x))

    @torch.no_grad()
    def decode(self, encoded: Encoded) -> Tensor:
        return self._out(self.model.decode(encoded.value).sample)


class DiffusersVQ(_Directory):
    """VQModel of diffusers: its `encode` returns vectors before quantization, the ids come from its quantizer."""

    kind = "diffusers"

    def __init__(self, name: str, directory: Path, model: Any, device: str) -> None:
        super().__init__(name, directory, model, device)
        self.size_multiple = 2 ** (len(model.config.block_out_channels) - 1)

    @torch.no_grad()
    def encode(self, x: Tensor, target: Sequence[float] | None = None) -> Encoded:
        latents = self.model.encode(self._in(x)).latents
        vectors, _, (_, _, ids) = self.model.quantize(latents)
        return self._ids(ids, (latents.shape[-2], latents.shape[-1]), self.model.config.num_vq_embeddings, x, vectors)

    @torch.no_grad()
    def decode(self, encoded: Encoded) -> Tensor:
        return self._out(self.model.decode(encoded.value, force_not_quantize=True).sample)


def image_tokens(output: Any) -> Any:
    """Ids in what `encode` of VQ models of transformers returns: in version 4, the ids or a tuple with the ids last."""
    if isinstance(output, tuple):
        return output[-1]
    return output if isinstance(output, list) else output.image_tokens


class Emu3(_Directory):
    """Emu3VQVAE of transformers."""

    kind = "transformers"

    def __init__(self, name: str, directory: Path, model: Any, device: str) -> None:
        super().__init__(name, directory, model, device)
        self.size_multiple = int(model.spatial_scale_factor)

    @torch.no_grad()
    def encode(self, x: Tensor, target: Sequence[float] | None = None) -> Encoded:
        sizes = torch.tensor([x.shape[-2:]] * len(x))
        ids = torch.stack(list(image_tokens(self.model.encode(self._in(x), sizes))))
        return self._ids(ids, (ids.shape[-2], ids.shape[-1]), self.model.config.codebook_size, x, ids)

    @torch.no_grad()
    def decode(self, encoded: Encoded) -> Tensor:
        return self._out(self.model.decode(encoded.value))


class Janus(_Directory):
    """JanusVQVAE of transformers."""

    kind = "transformers"

    def __init__(self, name: str, directory: Path, model: Any, device: str) -> None:
        super().__init__(name, directory, model, device)
        rows, columns = model.quantize.quant_state_dims
        self.grid = int(rows), int(columns)
        multiple = 2 ** (len(model.config.channel_multiplier) - 1)
        self.size_multiple, self.image_size = multiple, (self.grid[0] * multiple, self.grid[1] * multiple)

    @torch.no_grad()
    def encode(self, x: Tensor, target: Sequence[float] | None = None) -> Encoded:
        ids = image_tokens(self.model.encode(self._in(x))).reshape(len(x), -1)
        return self._ids(ids, self.grid, self.model.config.num_embeddings, x, ids)

    @torch.no_grad()
    def decode(self, encoded: Encoded) -> Tensor:
        return self._out(self.model.decode(encoded.value))


class CodecCandidate(Candidate):
    """An image codec at a quality, at a number of bits, or at the bits of a tokenizer."""

    kind = "codec"

    def __init__(self, codec: Codec, on_curve: bool = False) -> None:
        super().__init__(codec.name, codec.version)
        self.codec, self.on_curve = codec, on_curve

    @property
    def matches(self) -> bool:
        """True if it needs the bits of a tokenizer."""
        return self.codec.match

    def encode(self, x: Tensor, target: Sequence[float] | None = None) -> Encoded:
        wanted = self.codec.targets(x, target)
        files = [self.codec.compress(image, bits) for image, bits in zip(x, wanted, strict=True)]
        return Encoded(files, [bits for _, bits in files])

    def decode(self, encoded: Encoded) -> Tensor:
        return torch.stack([self.codec.decompress(data) for data, _ in encoded.value])


DIFFUSERS: dict[str, type[_Directory]] = {
    "AutoencoderKL": DiffusersAutoencoder,
    "AutoencoderDC": DiffusersAutoencoder,
    "AutoencoderRAE": DiffusersAutoencoder,
    "VQModel": DiffusersVQ,
}
"""Classes of diffusers, as `_class_name` of a config.json names them."""

TRANSFORMERS: dict[str, tuple[str, type[_Directory]]] = {
    "emu3_vqgan": ("Emu3VQVAE", Emu3),
    "janus_vqgan": ("JanusVQVAE", Janus),
}
"""Kinds of models of transformers, as `model_type` of a config.json names them."""

NO_PIXELS = ("chameleon_vqgan", "glm_image_vqmodel", "apertus1p5_vqmodel")
"""Kinds whose classes in transformers have an encoder only."""


def open_candidates(
    names: Sequence[str], load: Callable[[str], ImageTokenizer[Any]], device: str = "cpu"
) -> list[Candidate]:
    """Candidates by what a user writes: a tokenizer, a directory of another library, or a codec (see `codecs`).

    load: reads a tokenizer of this library. `jpeg@curve` stands for several qualities of one codec. Directories of the
    same name are told apart by their whole paths.
    """
    found: list[Candidate] = []
    places: list[str] = []
    for name in names:
        codec, _, option = name.partition("@")
        if codec in CODECS and not Path(name).exists():
            curve = option == "curve"
            options = [f"q{quality}" for quality in CURVES[codec]] if curve else [option or "match"]
            found += [CodecCandidate(Codec.parse(codec, option), curve) for option in options]
        else:
            found.append(_open_model(name, load, device))
        places += [name] * (len(found) - len(places))
    labels = [candidate.name for candidate in found]
    for candidate, label, place in zip(found, labels, places, strict=True):
        if labels.count(label) > 1:
            candidate.name = place
    labels = [candidate.name for candidate in found]
    for label in labels:
        require(labels.count(label) == 1, "tokenizers", "different names", f"{label!r} twice")
    if any(isinstance(c, CodecCandidate) and c.matches for c in found):
        others = [c for c in found if not isinstance(c, CodecCandidate)]
        require(len(others) > 0, "tokenizers", "a tokenizer whose bits the codecs match", ", ".join(labels))
    return found


def _open_model(name: str, load: Callable[[str], ImageTokenizer[Any]], device: str) -> Candidate:
    path = Path(name) / "config.json"
    data: dict[str, Any] = {}
    if path.is_file():
        data = read_json(path)
    place = Path(name)
    label = (place.parent.name if place.name == "tokenizer" else place.name) or name  # a run calls its own that
    kind, model = data.get("_class_name"), data.get("model_type")
    if kind is not None:
        if not isinstance(kind, str) or kind not in DIFFUSERS:
            fail(f"{path}: _class_name", f"one of {', '.join(DIFFUSERS)}", repr(kind))
        import diffusers  # pyright: ignore[reportMissingImports]  # an extra: loaded when asked for

        return _built(label, path.parent, getattr(diffusers, kind), DIFFUSERS[kind], device)
    if model is not None and model != MODEL_TYPE:
        if model in NO_PIXELS:
            fail(f"{path}: model_type", "a model that gives pixels back", f"{model!r}, an encoder only")
        if not isinstance(model, str) or model not in TRANSFORMERS:
            hint = f"one of {', '.join(TRANSFORMERS)} (of a larger model: its VQ part, saved by save_pretrained)"
            fail(f"{path}: model_type", hint, repr(model))
        import transformers  # an extra: loaded when asked for

        cls, adapter = TRANSFORMERS[model]
        return _built(label, path.parent, getattr(transformers, cls), adapter, device)
    return Ours(label, load(name))


def _built(label: str, directory: Path, model: Any, adapter: type[_Directory], device: str) -> Candidate:
    """A model of another library behind its adapter; what its code makes of a broken directory is one error."""
    from huggingface_hub import errors  # which both libraries need

    strict = getattr(errors, "StrictDataclassError", OSError)  # of newer versions
    faults = (AssertionError, OSError, RuntimeError, SafetensorError, strict)
    logging.disable(logging.ERROR)  # the error says it once
    try:
        with expecting(str(directory), f"a directory that {model.__name__} can load", *faults):
            options = {"use_safetensors": True, "local_files_only": True, "output_loading_info": True}
            loaded, found = model.from_pretrained(directory, **options)
            missing = sorted(map(str, [*found["missing_keys"], *found.get("mismatched_keys", ())]))
            require(not missing, str(directory), "all weights of the model", f"none that fit for {missing[:3]}")
            return adapter(label, directory, loaded, device)
    finally:
        logging.disable(logging.NOTSET)


def identity_of(model: nn.Module, config: Any) -> str:
    """SHA-256 over a configuration and the names and values of all weights, 16 hexadecimal digits."""
    digest = hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]
