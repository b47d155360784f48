"""Published checkpoints of the VQGAN family: ids, vectors and pixels of the original code, names, strictness."""

import dataclasses
import json
import re
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import tokenizers_mm as tmm
from tests.cases import ROOT, Case, case
from tests.checkpoints import published_memory
from tests.checkpoints.published_memory import Spec, empty, keys_of, size_of
from tests.weights_by_rule import rule_tensor
from tokenizers_mm.checkpoints import apertus, bsq_vit, emu3, ibq, infinity, llamagen, showo, unitok, var
from tokenizers_mm.checkpoints.cnn import AVERAGE, joined_attention, links_of, magvit_rules, shapes_of
from tokenizers_mm.checkpoints.convert import FAMILIES, convert, table
from tokenizers_mm.checkpoints.family import Checkpoint
from tokenizers_mm.checkpoints.upstream import Link, give
from tokenizers_mm.cli import main
from tokenizers_mm.config import from_mapping, read_yaml, to_mapping
from tokenizers_mm.functional.bits import bits_to_ids
from tokenizers_mm.models import VQGAN, VQGANConfig

pytestmark = pytest.mark.usefixtures("one_thread")


@dataclass(frozen=True)
class Reference:
    """A reference case of a family: names of its outputs, and the way back to its names.

    left_out: a regular expression for published names whose tensors are not kept.
    """

    family: str
    name: str
    links: Any
    image: str = "reconstruction"
    vectors: str | None = "zq"
    left_out: str = "mask|quantize"


def _cnn_links(rules_of: Any, model: VQGAN, **options: Any) -> list[Link]:
    return links_of(shapes_of(model.state_dict()), rules_of(len(model.config.encoder.multipliers)), **options)


REFERENCES = [
    Reference("ibq", "ibq/ibq_tokenizer_small", partial(_cnn_links, ibq.rules_of)),
    Reference("emu3.5", "published/emu35_small", partial(_cnn_links, ibq.rules_of), image="decode_code"),
    Reference("open_magvit2", "lfq/open_magvit2_tokenizer_small", partial(_cnn_links, magvit_rules)),
    Reference("bitdance", "published/bitdance_small", partial(_cnn_links, magvit_rules)),
    Reference("showo", "lfq/showo_magvitv2_small", partial(_cnn_links, showo.rules_of), image="decode_code"),
    Reference("infinity", "bsq/infinity_vae_small", partial(_cnn_links, infinity.rules_of)),
    Reference("infinity", "published/infinity_small", partial(_cnn_links, infinity.rules_of), image="decode_code"),
    Reference("llamagen", "published/llamagen_small", partial(_cnn_links, llamagen.rules_of), "decode_code", None),
    Reference(
        "var", "published/var_small", partial(_cnn_links, var.rules_of, adjust=joined_attention), vectors="f_hat"
    ),
    Reference(
        "emu3", "published/emu3_small", partial(_cnn_links, emu3.rules_of, adjust=emu3.folded), "decode_code", None
    ),
    Reference("bsq_vit", "published/bsqvit_small", lambda model: bsq_vit.links_of(shapes_of(model.state_dict()))),
    Reference(
        "unitok",
        "published/unitok_small",
        lambda model: unitok.links_of(shapes_of(model.state_dict())),
        left_out=r"vocab_usage|^(text_encoder|fc_norm|projection|logit_scale|encoder\.pos_embed)",
    ),
]


@dataclass(frozen=True)
class FullSize:
    """A key list of a model of a published size, built by the original code.

    row: of the family's table. file, shards: form of the download, where it is more than one file of weights.
    """

    family: str
    row: int = 0
    file: str = "model.safetensors"
    shards: int = 1

    def used(self, keys: Mapping[str, Spec]) -> dict[str, Spec]:
        """The tokenizer's tensors, which may stand beside those of a language model."""
        prefixes = tuple(FAMILIES[self.family].prefixes)
        return {name: spec for name, spec in keys.items() if name.startswith(prefixes)} or dict(keys)


FULL_SIZES = {
    "llamagen_vq16": FullSize("llamagen"),
    "llamagen_vq8": FullSize("llamagen", 2),
    "ibq_262144": FullSize("ibq", 3),
    "emu35": FullSize("emu3.5", file="model.ckpt"),
    "open_magvit2": FullSize("open_magvit2"),
    "var": FullSize("var"),
    "emu3": FullSize("emu3"),
    "bsq_vit_18": FullSize("bsq_vit"),
    "infinity_d32": FullSize("infinity", 2),
    "unitok": FullSize("unitok"),
    "chameleon": FullSize("chameleon", file="tokenizer/vqgan.ckpt"),
    "anole_7b": FullSize("chameleon", shards=3),
    "janus_pro_1b": FullSize("janus", file="pytorch_model.bin"),
    "janus_pro_1b_hf": FullSize("janus", 1),
    "glm_image": FullSize("glm_image", file="vision_language_encoder/model.safetensors", shards=4),
    "showo": FullSize("showo", file="pytorch_model.bin"),
    "bitdance_d16c32": FullSize("bitdance", file="ae_d16c32.safetensors"),
}


def weights(reference: Case) -> dict[str, Tensor]:
    """The case's state dict: stored, or made by the rule of its names."""
    if (reference.folder / "state_dict.safetensors").exists():
        return reference.tensors("state_dict")
    keys, seed = json.loads((reference.folder / "state_keys.json").read_text()), reference.config["weights"]["seed"]
    return {
        name: rule_tensor(name, spec, seed) if "float" in spec["dtype"] else torch.zeros(spec["shape"]).long()
        for name, spec in keys.items()
    }


def ids_of(outputs: Mapping[str, Tensor], model: VQGAN) -> Tensor:
    """The case's ids [B, L], made of its bits where it has no ids."""
    if "indices" in outputs:
        return outputs["indices"].flatten(1)
    bits = [outputs["bits"]] if "bits" in outputs else None
    if bits is None and "bits_0" in outputs:
        bits = [outputs[f"bits_{scale}"].flatten(1, -2) for scale in range(len(model.config.scales or ()))]
    if bits is None:  # BitDance: signs [B, C, h, w]
        signs = outputs["zq"].permute(0, 2, 3, 1).flatten(1, 2) > 0
        ids = bits_to_ids(signs.unflatten(-1, (model.quantizer.groups, -1)), "lsb_first")
        return ids.transpose(1, 2).flatten(1)
    return bits_to_ids(torch.cat(bits, dim=1) > 0, "msb_first")


@dataclass(frozen=True)
class Converted:
    """A reference case, its weights by published names, and the tokenizer read back from our format."""

    reference: Reference
    case: Case
    weights: dict[str, Tensor]
    model: VQGAN


@pytest.fixture(scope="module", params=REFERENCES, ids=lambda item: item.name)
def converted(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Converted:
    reference, folder = request.param, tmp_path_factory.mktemp("published")
    found = case(reference.name)
    theirs = weights(found)
    save_file(theirs, folder / "model.safetensors")
    model = tmm.load(convert(reference.family, folder / "model.safetensors", folder / "out", found.config))
    assert isinstance(model, VQGAN)
    return Converted(reference, found, theirs, model)


@torch.no_grad()
def test_ids_vectors_and_pixels_of_the_original(converted: Converted) -> None:
    reference, model = converted.reference, converted.model
    x, outputs = converted.case.inputs["pixel_values"], converted.case.outputs
    ids, expected = ids_of(outputs, model), outputs[reference.image]
    codes = model.encode(x)
    assert torch.equal(codes.ids, ids)
    if reference.vectors is not None:
        vectors = outputs[reference.vectors]
        vectors = vectors.permute(0, 2, 3, 1) if vectors.ndim == 4 else vectors.unflatten(1, (model.config.grid))
        assert (model.vectors(codes) - vectors).abs().max() <= 1e-5 * vectors.abs().max()
    limit = float(expected.abs().max())  # some cases hold clamped images
    for image in (model.decode_ids(ids, *x.shape[-2:]), model.reconstruct(x).image):
        assert image is not None
        assert (image.clamp(-limit, limit) - expected).abs().max() <= 1e-5 * limit


def test_weights_come_back_under_their_names(converted: Converted) -> None:
    reference, theirs, model = converted.reference, converted.weights, converted.model
    assert model.provenance.license in (FAMILIES[reference.family].checkpoints[0].license, "other")
    assert len(model.provenance.sha256) == 64
    if reference.family == "emu3":  # what a still image does not use of the weights is not kept
        with pytest.raises(ValueError, match="expected a tensor that was only joined"):
            give(reference.links(model), model.state_dict())
        return
    back = give(reference.links(model), model.state_dict())
    assert all(torch.equal(back[name], theirs[name]) for name in back)
    assert all(re.search(reference.left_out, name) for name in theirs.keys() - back.keys())


@pytest.mark.parametrize("name", FULL_SIZES)
def test_names_and_shapes_of_the_published_sizes(name: str) -> None:
    """Every tensor of a model that the original code builds, and no other; ids per image as the table says."""
    size = FULL_SIZES[name]
    with torch.device("meta"):
        model = FAMILIES[size.family].convert(empty(keys_of(name)), name)
    assert_streams(model, FAMILIES[size.family].checkpoints[size.row])


def assert_streams(model: Any, checkpoint: Checkpoint) -> None:
    """Ids per image and codes as a row of the table says."""
    streams = model.streams(*checkpoint.image)
    counted = (sum(stream.num_ids for stream in streams), streams[0].codebook_size)
    assert (counted,) == checkpoint.streams


def test_names_and_shapes_of_apertus(tmp_path: Path) -> None:
    """The tokenizer of the whole model's file, and a decoder from Emu3.5's; the codes of both are compared."""
    published_memory.write(keys_of("emu35"), tmp_path / "emu" / "model.ckpt")
    keys = keys_of("apertus1p5_8b")
    codes = {name: torch.zeros(shape) for name, (_, shape) in keys.items() if name.endswith(apertus.CODES)}
    with torch.device("meta"):
        tensors = empty(keys)
    model = apertus.convert({**tensors, **codes}, "it", decoder=str(tmp_path / "emu"))
    assert_streams(model, FAMILIES["apertus1p5"].checkpoints[0])


RECIPES = {
    "vqgan_ibq": ("ibq_262144", {}),
    "vqgan_open_magvit2": ("open_magvit2", {}),
    "vqgan_var": ("var", {}),
    "vqgan_infinity": ("infinity_d32", {"image_size": 256}),
}
"""Training configurations with published networks, the list of keys they must fit, and options of its reader."""


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_have_the_published_networks(name: str) -> None:
    """Encoder, decoder, scales and everything else but the size of the codebook and the entropy of the training."""
    keys, options = RECIPES[name]
    with torch.device("meta"):
        read = FAMILIES[FULL_SIZES[keys].family].convert(empty(keys_of(keys)), keys, **options).config
    model = read_yaml(ROOT / "configs" / f"{name}.yaml")["objective"]["model"]["config"]
    trained = from_mapping(VQGANConfig, model, name)
    free = ("codebook_size", "entropy_temperature", "entropy_bits")
    ours, theirs = (to_mapping(config.quantizer) for config in (trained, read))
    assert ours == {**theirs, **{key: ours[key] for key in free if key in ours}}
    assert dataclasses.replace(trained, quantizer=read.quantizer) == read


@pytest.mark.full
@pytest.mark.parametrize("name", FULL_SIZES)
def test_memory_of_a_conversion(name: str, tmp_path: Path) -> None:
    """Less than 1.3 times the tokenizer's weights above the process without them, whatever else a download holds."""
    size, keys = FULL_SIZES[name], keys_of(name)
    published_memory.write(keys, tmp_path / "in" / size.file, size.shards)
    assert_memory(size.family, tmp_path / "in", size_of(size.used(keys)))


@pytest.mark.full
def test_memory_of_two_files(tmp_path: Path) -> None:
    """Apertus 1.5 with Emu3.5's decoder; X-Omni's tower with its projector, as its config.json names them."""
    emu, keys, prefixes = keys_of("emu35"), keys_of("apertus1p5_8b"), ("decoder.", "post_quant_conv.")
    published_memory.write(keys, tmp_path / "a" / "in" / "model.safetensors", 4)
    published_memory.write(emu, tmp_path / "a" / "emu" / "model.ckpt")
    weights = size_of({n: s for n, s in keys.items() if n.startswith(apertus.PREFIXES)})
    weights += size_of({n: s for n, s in emu.items() if n.startswith(prefixes)})
    assert_memory("apertus1p5", tmp_path / "a" / "in", weights, f"decoder={tmp_path / 'a' / 'emu'}")
    keys, projector = keys_of("xomni"), ("quant_conv.", "quantize.", "post_quant_conv.", "post_conv.")
    around = {name: spec for name, spec in keys.items() if name.startswith(projector)}
    published_memory.write({n: s for n, s in keys.items() if n not in around}, tmp_path / "x" / "in" / "tower.pt")
    published_memory.write(around, tmp_path / "x" / "in" / "projector.pt")
    encoder = {"siglip_path": "tower.pt", "projector_path": "projector.pt"}
    (tmp_path / "x" / "in" / "config.json").write_text(json.dumps({"vision_config": {"encoder": encoder}}))
    assert_memory("xomni", tmp_path / "x" / "in", size_of(keys))


def assert_memory(family: str, folder: Path, weights: int, *options: str) -> None:
    """The bar, in a process of its own; the numbers are printed."""
    command = [sys.executable, "-m", "tests.checkpoints.published_memory", family, str(folder), *options]
    found = json.loads(subprocess.run(command, check=True, capture_output=True, text=True, cwd=ROOT).stdout)
    took = found["after"] - found["before"]
    print(f"{family}: weights {weights / 1e9:.3f} GB, memory {took / 1e9:.3f} GB, ratio {took / weights:.3f}")
    assert took < 1.3 * weights


def test_the_table_of_the_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    """One line for each described file, with ids, bits and licence; the same table in Markdown."""
    assert main(["convert", "--list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1 + sum(len(family.checkpoints) for family in FAMILIES.values())
    found = next(line for line in lines if "imagenet256_262144.ckpt" in line)
    assert found.startswith("ibq ")
    assert all(text in found for text in ("256x256", " 256 ", "4,608", "Apache-2.0"))
    assert "continuous" in next(line for line in lines if line.startswith("mar "))
    assert len(table(markdown=True)) == len(lines) + 1
    assert main(["convert", "ibq"]) == 2
    assert "CHECKPOINT: expected a value (or --list)" in capsys.readouterr().err


def test_the_moving_average_of_lightning_files(tmp_path: Path) -> None:
    """The average under names without dots, by default; `loss.*` is left out of both sets; both are strict."""
    found = case("published/emu35_small")
    theirs = weights(found)
    average = {AVERAGE + name.replace(".", ""): t * 0.5 for name, t in theirs.items()}
    state = {**theirs, **average, "loss.discriminator.main.0.weight": torch.zeros(2)}
    state |= {f"{AVERAGE}lossdiscriminatormain0weight": torch.zeros(2), f"{AVERAGE}decay": torch.tensor(0.999)}
    state |= {f"{AVERAGE}num_updates": torch.tensor(7)}
    torch.save({"state_dict": state, "epoch": 3, "callbacks": {"a": {"best": None}}}, tmp_path / "last.ckpt")
    for ema, factor in ((True, 0.5), (False, 1.0), ("false", 1.0)):
        model = tmm.load(convert("ibq", tmp_path / "last.ckpt", tmp_path / f"out-{ema}", ema=ema))
        assert torch.equal(model.state_dict()["quantizer.codes"], theirs["quantize.embedding.weight"] * factor)
        assert torch.equal(model.state_dict()["encoder.conv_in.weight"], theirs["encoder.conv_in.weight"] * factor)
    del state[f"{AVERAGE}encoderconv_inbias"]
    torch.save({"state_dict": state}, tmp_path / "broken.ckpt")
    with pytest.raises(ValueError, match=r"1 missing: encoder\.conv_in\.bias"):
        convert("ibq", tmp_path / "broken.ckpt", tmp_path / "out")
    state |= {f"{AVERAGE}encoderconv_inbias": torch.zeros(32), f"{AVERAGE}strange": torch.zeros(1)}
    torch.save({"state_dict": state}, tmp_path / "broken.ckpt")
    with pytest.raises(ValueError, match=r"1 unknown: model_ema\.strange"):
        convert("ibq", tmp_path / "broken.ckpt", tmp_path / "out")


def test_trainers_wrap_weights_in_their_own_ways(tmp_path: Path) -> None:
    """Infinity keeps them under `vae`, BSQ-ViT under `ema_state_dict` with prefixes, LlamaGen beside an optimizer,
    UniTok inside its trainer."""
    for family, name, wrap in (
        ("infinity", "published/infinity_small", lambda state: {"ema": {"a": torch.zeros(1)}, "vae": state}),
        ("infinity", "published/infinity_small", lambda state: {"vae": {_plain(n): t for n, t in state.items()}}),
        ("bsq_vit", "published/bsqvit_small", lambda state: {"ema_state_dict": _prefixed(state), "state_dict": {}}),
        ("llamagen", "published/llamagen_small", lambda state: {"model": state, "optimizer": {"lr": 0.1}}),
        ("unitok", "published/unitok_small", lambda state: {"args": {}, "trainer": {"unitok": state, "disc": {}}}),
    ):
        found = case(name)
        torch.save(wrap(weights(found)), tmp_path / "file.pth")
        model = tmm.load(convert(family, tmp_path / "file.pth", tmp_path / "out", found.config))
        assert isinstance(model, VQGAN)
        assert torch.equal(model.encode(found.inputs["pixel_values"]).ids, ids_of(found.outputs, model))


def _plain(name: str) -> str:
    """A name of Infinity without the modules that wrap its layers."""
    return name.replace(".conv.weight", ".weight").replace(".conv.bias", ".bias").replace(".norm.", ".")


def _prefixed(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {f"module.module.{name}": t for name, t in state.items()}


def test_sizes_that_contradict_a_description(tmp_path: Path) -> None:
    found = case("published/emu35_small")
    theirs = weights(found)
    for key, value in (("n_embed", 97), ("ddconfig", {"ch": 64})):
        with pytest.raises(ValueError, match=f"config: {key}"):
            FAMILIES["ibq"].convert(theirs, "the file", {**found.config, key: value})
    with pytest.raises(ValueError, match="image_size: expected one of"):
        FAMILIES["infinity"].convert(weights(case("published/infinity_small")), "the file", image_size=100)


def test_wrong_files_get_one_sentence(converted: Converted) -> None:
    theirs, config = converted.weights, converted.case.config
    name = next(key for key in reversed(theirs) if key.startswith("decoder.") and key.endswith("weight"))
    family = FAMILIES[converted.reference.family]
    for change, message in [
        ({name: None}, f"1 missing: {name}|a tensor {name}"),
        ({"extra.weight": torch.zeros(1)}, "1 unknown: extra.weight"),
        ({name: torch.zeros(3, 5, 7)}, f"{name}|of another shape"),
    ]:
        changed = {key: value for key, value in {**theirs, **change}.items() if value is not None}
        with pytest.raises(ValueError, match=message):
            family.convert(changed, "the file", config)
    with pytest.raises(ValueError, match="a tensor"):
        family.convert({"a": torch.zeros(1)}, "the file")


def test_a_missing_tensor_is_no_sign_of_another_form(converted: Converted) -> None:
    """Any one that is missing is named, those included whose presence tells how a network is built."""
    reference, theirs = converted.reference, converted.weights
    kept = [name for name in theirs if not re.search(reference.left_out, name)]
    telling = [name for name in kept if re.search(r"conv_in|attn_1\.proj_out|ln_pre|\.block\.0\.conv1", name)]
    for missing in (*kept[:: len(kept) // 3], *telling[:: max(1, len(telling) // 3)]):
        changed = {name: t for name, t in theirs.items() if name != missing}
        with pytest.raises(ValueError, match=rf"expected .*{re.escape(missing)}") as raised:
            FAMILIES[reference.family].convert(changed, "the file", converted.case.config)
        assert "\n" not in str(raised.value)
