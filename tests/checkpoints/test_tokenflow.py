"""TokenFlow's published names and shapes, and the command that converts such a file, at a tiny size."""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import tokenizers_mm as tmm
from tests.cases import case
from tokenizers_mm._files import sha256
from tokenizers_mm.checkpoints import tokenflow as published
from tokenizers_mm.checkpoints import upstream
from tokenizers_mm.checkpoints.convert import convert
from tokenizers_mm.checkpoints.tokenflow_variants import variant_of
from tokenizers_mm.models import TokenFlow
from tokenizers_mm.models.loading import build

PIXEL = {"ch": 32, "ch_mult": [1, 1, 1, 1, 1], "num_res_blocks": 1, "z_channels": 16}
DESCRIPTION: dict[str, Any] = {
    "model_args": {"teacher": "siglip_384", "codebook_size": 64},
    "dims": {
        "image_size": 56,
        "siglip": {"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 2},
        "decoder_vqkd": {"embed_dim": 24, "depth": 1, "num_heads": 2, "grid_trained": 4},
        "semantic_recon_dim": 20,
        "pixel_encoder": PIXEL,
        "pixel_decoder": PIXEL,
    },
    "scales": [1, 2, 4],
}


def expected_names(description: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Published names and shapes as the converter accounts for them."""
    tokenizer = build(TokenFlow, published.read_config(description))
    links = published.links_of(description, {name: tuple(t.shape) for name, t in tokenizer.state_dict().items()})
    names = {name: item.their_shape for item in links for name in item.theirs if name is not None}
    unused = variant_of(description).unused(description)
    return {**names, **unused, "quantize.codebook_used": (published.USAGE_WINDOW,)}


@pytest.mark.parametrize("name", ["clipb_224_base", "clipb_256_enhanced", "vitamin_256", "siglip_384"])
def test_released_variants_are_recognised_and_every_name_is_known(name: str) -> None:
    reference = case(f"tokenflow/full_{name}")
    keys = json.loads((reference.folder / "state_keys.json").read_text())
    tensors = {key: torch.empty(spec["shape"], device="meta") for key, spec in keys.items()}
    description = published.recognise(tensors, "file")
    config = reference.config
    assert description["dims"]["image_size"] == config["dims"]["image_size"]
    assert description["scales"] == config["scales"]
    assert published.read_config(description) == published.read_config(config)
    assert expected_names(description) == {key: tuple(spec["shape"]) for key, spec in keys.items()}
    assert len(keys) == {"clipb_224_base": 549, "clipb_256_enhanced": 649, "vitamin_256": 972, "siglip_384": 848}[name]


def test_the_file_of_two_sizes() -> None:
    reference = case("tokenflow/full_clipb_256_enhanced")
    keys = json.loads((reference.folder / "state_keys.json").read_text())
    tensors = {key: torch.empty(spec["shape"], device="meta") for key, spec in keys.items()}
    assert published.recognise(tensors, "file", 224)["scales"][-1] == 14
    with pytest.raises(ValueError, match="image_size: expected 224 or 256, got 384"):
        published.recognise(tensors, "file", 384)
    with pytest.raises(ValueError, match=r"names of a TokenFlow checkpoint .* got names of another model"):
        published.recognise({"weight": torch.zeros(1)}, "file")


@pytest.fixture(scope="module")
def tensors() -> dict[str, Tensor]:
    """A checkpoint with published names, made from a random model of ours; what that does not use is random too."""
    torch.manual_seed(3)
    tokenizer = TokenFlow.from_config(published.read_config(DESCRIPTION))
    state = {name: tensor + 0.01 * torch.randn_like(tensor) for name, tensor in tokenizer.state_dict().items()}
    links = published.links_of(DESCRIPTION, {name: tuple(t.shape) for name, t in state.items()})
    theirs = {name: tensor.clone() for name, tensor in upstream.give(links, state).items()}
    for name, shape in expected_names(DESCRIPTION).items():
        theirs.setdefault(name, torch.rand(shape))
    theirs |= {f"scaling_layer.{name}": torch.full((1, 3, 1, 1), 0.5) for name in ("shift", "scale")}
    return theirs


Writer = Callable[[dict[str, Tensor], Path], None]


def trainer_file(tensors: dict[str, Tensor], path: Path) -> None:
    other = {name: torch.zeros_like(tensor) for name, tensor in tensors.items()}
    torch.save({"model": other, "steps": 7, "args": argparse.Namespace(lr=1e-4), "ema": tensors}, path)


WRITERS: dict[str, tuple[str, Writer]] = {
    "bare": ("a.pt", torch.save),
    "legacy": ("a.bin", lambda t, path: torch.save(t, path, _use_new_zipfile_serialization=False)),
    "wrapped": ("a.pth", lambda t, path: torch.save({"state_dict": t}, path)),
    "model": ("a.ckpt", lambda t, path: torch.save({"model": t, "optimizer": {}}, path)),
    "trainer": ("a.pt", trainer_file),
    "safetensors": ("a.safetensors", save_file),
}


@pytest.mark.parametrize("how", WRITERS)
def test_every_kind_of_file_gives_the_same_tokenizer(how: str, tensors: dict[str, Tensor], tmp_path: Path) -> None:
    name, write = WRITERS[how]
    write(tensors, tmp_path / name)
    out = convert("tokenflow", tmp_path / name, tmp_path / "out", DESCRIPTION)
    tokenizer = tmm.load(out)
    links = published.links_of(DESCRIPTION, {n: tuple(t.shape) for n, t in tokenizer.state_dict().items()})
    for key, tensor in upstream.give(links, tokenizer.state_dict()).items():
        assert torch.equal(tensor, tensors[key]), key
    assert tokenizer.provenance.sha256 == sha256(tmp_path / name)
    card = (out / "README.md").read_text()
    assert tokenizer.provenance.sha256 in card
    assert "license: mit" in card
    assert "ByteFlow-AI/TokenFlow" in card
    assert tokenizer.encode(torch.zeros(1, 3, 56, 56)).ids.shape == (1, 21)


class Evil:
    """Effect of a pickle that must never happen."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (Path("evil"),))


def change(**edits: Tensor | None) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    def edit(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        merged = {**tensors, **{name.replace("__", "."): tensor for name, tensor in edits.items()}}
        return {name: tensor for name, tensor in merged.items() if tensor is not None}

    return edit


BAD_TENSORS = {
    "missing": (change(quant_conv__bias=None), "1 missing: quant_conv.bias"),
    "unknown": (change(quant_conv__scale=torch.zeros(1)), "1 unknown: quant_conv.scale"),
    "shape": (
        change(quantize__embedding_vqgan__weight=torch.zeros(32, 8)),
        r"1 of another shape: quantize.embedding_vqgan.weight \(expected \[64, 8\], got \[32, 8\]\)",
    ),
    "unused shape": (change(quantize__codebook_used=torch.zeros(3)), "of another shape: quantize.codebook_used"),
    "scaling": (
        change(scaling_layer__shift=torch.full((1, 3, 1, 1), 0.4)),
        r"scaling_layer.shift: expected \(0.5, 0.5, 0.5\), got \[0.4",
    ),
    "another model": (lambda t: {"weight": torch.zeros(3)}, "missing: .* and .* more; 1 unknown: weight"),
    "no tensors": (lambda t: {"model": {"a": 3}}, "expected named tensors, got a not a tensor"),
    "empty": (lambda t: {}, "expected named tensors, got none"),
}


@pytest.mark.parametrize("name", BAD_TENSORS)
def test_bad_tensors_get_one_sentence_and_nothing_is_written(
    name: str, tensors: dict[str, Tensor], tmp_path: Path
) -> None:
    edit, message = BAD_TENSORS[name]
    torch.save(edit(tensors), tmp_path / "a.pt")
    with pytest.raises(ValueError, match=message) as caught:
        convert("tokenflow", tmp_path / "a.pt", tmp_path / "out", DESCRIPTION)
    assert "\n" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["a.pt"]


def test_bad_files_get_one_sentence(
    tensors: dict[str, Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"model": Evil()}, tmp_path / "evil.pt")
    torch.save(tensors, tmp_path / "good.pt")
    data = (tmp_path / "good.pt").read_bytes()
    (tmp_path / "cut.pt").write_bytes(data[: len(data) // 2])
    (tmp_path / "text.pt").write_text("hello")
    (tmp_path / "nothing.pt").write_bytes(b"")
    (tmp_path / "text.safetensors").write_text("hello")
    for file, message in [
        ("none.pt", "expected a checkpoint file, got no such file"),
        ("evil.pt", "nothing but weights"),
        ("cut.pt", "expected a whole file of torch.save"),
        ("text.pt", "expected a (whole )?file of torch.save"),
        ("nothing.pt", "expected a whole file of torch.save"),
        ("text.safetensors", "expected a whole safetensors file"),
    ]:
        with pytest.raises(ValueError, match=message) as caught:
            convert("tokenflow", tmp_path / file, tmp_path / "out", DESCRIPTION)
        assert "\n" not in str(caught.value)
    assert not (tmp_path / "evil").exists()
    assert not (tmp_path / "out").exists()


def test_bad_arguments_get_one_sentence(tensors: dict[str, Tensor], tmp_path: Path) -> None:
    file, out = tmp_path / "a.pt", tmp_path / "out"
    torch.save(tensors, file)
    other_teacher = {**DESCRIPTION, "model_args": {"teacher": "clip_g", "codebook_size": 64}}
    no_sizes = {**DESCRIPTION, "dims": {}}
    bad_sizes = {**DESCRIPTION, "dims": {**DESCRIPTION["dims"], "pixel_encoder": {"ch": "x"}}}
    for call, message in [
        (lambda: convert("nonsense", file, out), r"family: expected one of \[.*'tokenflow'.*\], got nonsense"),
        (lambda: convert("tokenflow", file, out, size=3), r"option: expected one of \['image_size'\], got size"),
        (lambda: convert("tokenflow", file, out, image_size="big"), "image_size: expected a number, got 'big'"),
        (lambda: convert("tokenflow", file, out, DESCRIPTION, image_size="224"), "expected 56, as the config has it"),
        (lambda: convert("tokenflow", file, file, DESCRIPTION), "out: expected a directory or a new name"),
        (lambda: convert("tokenflow", file, out, other_teacher), "model_args.teacher: expected one of"),
        (lambda: convert("tokenflow", file, out, no_sizes), "config: dims.image_size: expected a value, got nothing"),
        (lambda: convert("tokenflow", file, out, bad_sizes), "config: expected sizes in the form of the reference"),
        (lambda: convert("tokenflow", file, out), "of another shape: "),  # not the released size
    ]:
        with pytest.raises(ValueError, match=message):
            call()
    assert not out.exists()
