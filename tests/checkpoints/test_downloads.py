"""Folders and shards as they are downloaded: found, read in part, refused with one sentence; written in float32."""

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import tokenizers_mm as tmm
from tests.cases import case
from tests.checkpoints.test_published import weights
from tests.checkpoints.test_xomni import parts
from tokenizers_mm._files import sha256
from tokenizers_mm._safetensors import DTYPES
from tokenizers_mm.checkpoints.convert import FAMILIES, convert
from tokenizers_mm.models.saving import save_tensors

pytestmark = pytest.mark.usefixtures("one_thread")

OTHERS = {"language_model.lm_head.weight": torch.ones(3), "model.layers.0.mlp.up_proj.weight": torch.ones(2, 2)}
"""Tensors of a language model."""


def shard(tensors: Mapping[str, Tensor], folder: Path, count: int = 2) -> Path:
    """A checkpoint in `count` files, whose first names stand in the first; the path of its index."""
    names, folder_map = list(tensors), {}
    folder.mkdir(parents=True, exist_ok=True)
    step = math.ceil(len(names) / count)
    for index in range(count):
        file = f"model-{index + 1:05}-of-{count:05}.safetensors"
        part = names[index * step : (index + 1) * step]
        save_file({name: tensors[name].contiguous() for name in part}, folder / file)
        folder_map |= dict.fromkeys(part, file)
    path = folder / "model.safetensors.index.json"
    path.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": folder_map}))
    return path


def glm_image() -> dict[str, Tensor]:
    """GLM-Image's tower and quantizer: those of X-Omni under the names of transformers."""
    _, tower, projector = parts()
    names = {"pos_embed": "embeddings.position_embedding.weight"}
    found = {f"model.visual.{names.get(name, name)}": t for name, t in tower.items()}
    found["model.visual.embeddings.position_embedding.weight"] = tower["pos_embed"][0]
    return found | {f"model.vqmodel.{name}": t for name, t in projector.items() if not name.startswith("post_conv.")}


def small(family: str) -> dict[str, Tensor]:
    """A file of the whole model: the tokenizer's tensors under the family's prefix, and a language model's."""
    if family == "glm_image":
        return {**glm_image(), **OTHERS}
    name, prefix = {
        "janus": ("published/llamagen_small", "gen_vision_model."),
        "chameleon": ("ibq/ibq_tokenizer_small", "model.vqmodel."),
    }[family]
    return {**{prefix + key: t for key, t in weights(case(name)).items()}, **OTHERS}


def same(first: Path, second: Path) -> bool:
    ours, theirs = load_file(first / "model.safetensors"), load_file(second / "model.safetensors")
    return ours.keys() == theirs.keys() and all(torch.equal(t, theirs[name]) for name, t in ours.items())


CONFIG = {"glm_image": {"num_heads": 4}}


@pytest.mark.parametrize("family", ["janus", "glm_image"])
def test_shards_of_a_whole_model(family: str, tmp_path: Path) -> None:
    """The folder, its index and one file give the same tokenizer; shards without tensors of it need not be there."""
    found, config = small(family), CONFIG.get(family)
    save_file({name: t.contiguous() for name, t in found.items()}, tmp_path / "one.safetensors")
    whole = convert(family, tmp_path / "one.safetensors", tmp_path / "whole", config)
    place = tmp_path / "in" / ("vision_language_encoder" if family == "glm_image" else "")
    index = shard({**found, **{f"model.last.{i}": torch.zeros(1) for i in range(len(found))}}, place, 4)
    for path in sorted(index.parent.glob("*.safetensors"))[2:]:
        path.unlink()
    if family == "glm_image":
        (tmp_path / "in" / "processor").mkdir()
        settings = {"image_mean": [0.4, 0.5, 0.6], "image_std": [0.2, 0.3, 0.25], "patch_size": 16}
        (tmp_path / "in" / "processor" / "preprocessor_config.json").write_text(json.dumps(settings))
        tower = tmm.load(convert(family, tmp_path / "in", tmp_path / "set", config)).config.tower
        assert (tower.mean, tower.std) == (tuple(settings["image_mean"]), tuple(settings["image_std"]))
        with pytest.raises(ValueError, match=r"config: expected sizes .*, got TypeError"):
            convert(family, tmp_path / "in", tmp_path / "no", {**(config or {}), "image_mean": 3})
    for number, source in enumerate((tmp_path / "in", index)):
        out = convert(family, source, tmp_path / f"out{number}", config)
        assert same(out, whole)
    files = sorted(index.parent.glob("*.safetensors"))
    assert tmm.load(out).provenance.sha256 == sha256(*files)
    files[1].unlink()
    with pytest.raises(ValueError, match=r"model-00002-of-00004\.safetensors: expected a checkpoint file, got no such"):
        convert(family, tmp_path / "in", tmp_path / "no", config)


def test_names_of_files_in_a_download(tmp_path: Path) -> None:
    """One checkpoint is taken whatever its name; of several, one of the known names; else the sentence names them."""
    found = weights(case("published/bitdance_small"))
    with pytest.raises(ValueError, match="expected one checkpoint in the folder, got none"):
        convert("bitdance", tmp_path, tmp_path / "out")
    save_file(found, tmp_path / "ae_d16c32.safetensors")
    first = convert("bitdance", tmp_path, tmp_path / "first")
    save_file({"a": torch.zeros(1)}, tmp_path / "vision_head.safetensors")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"give the path of the file\), got ae_d16c32\.safetensors, vision_head\.saf"):
        convert("bitdance", tmp_path, tmp_path / "out")
    (tmp_path / "ae_d16c32.safetensors").rename(tmp_path / "ae.safetensors")
    assert same(convert("bitdance", tmp_path, tmp_path / "second"), first)
    theirs = weights(case("ibq/ibq_tokenizer_small"))
    (tmp_path / "c" / "tokenizer").mkdir(parents=True)
    torch.save({"state_dict": theirs}, tmp_path / "c" / "tokenizer" / "vqgan.ckpt")
    save_file({"a": torch.zeros(1)}, tmp_path / "c" / "model.safetensors")
    codes = tmm.load(convert("chameleon", tmp_path / "c", tmp_path / "third")).state_dict()["quantizer.codes"]
    assert torch.equal(codes, theirs["quantize.embedding.weight"])


def test_an_index_that_is_none(tmp_path: Path) -> None:
    """Names outside of the folder, of other files, and tensors that stand in two shards."""
    found = weights(case("published/llamagen_small"))
    index = shard(found, tmp_path)
    for content, message in [
        ({}, "expected a weight_map with the file of each tensor, got none"),
        ({"weight_map": {}}, "expected a weight_map"),
        ({"weight_map": {"a": "../other.safetensors"}}, "weight_map: expected names of checkpoint files beside it"),
        ({"weight_map": {"a": "config.json"}}, "weight_map: expected names of checkpoint files beside it"),
        ({"weight_map": {"a": 3}}, "weight_map: expected names of checkpoint files beside it"),
        ({"weight_map": {"a": "model.safetensors"}}, r"model\.safetensors: expected a checkpoint file, got no such"),
    ]:
        (tmp_path / "other.index.json").write_text(json.dumps(content))
        with pytest.raises(ValueError, match=message):
            convert("llamagen", tmp_path / "other.index.json", tmp_path / "out")
    second = sorted(tmp_path.glob("*.safetensors"))[1]
    save_file({**load_file(second), next(iter(found)): torch.zeros(1)}, second)
    with pytest.raises(ValueError, match=rf"expected other tensors than the shards before it, got {next(iter(found))}"):
        convert("llamagen", index, tmp_path / "out")


def test_the_two_files_of_x_omni(tmp_path: Path) -> None:
    """config.json of the folder names both; names that lead out of it are refused."""
    found, tower, projector = parts()
    torch.save(tower, tmp_path / "tower.pt")
    torch.save(projector, tmp_path / "projector.pt")
    save_file(OTHERS, tmp_path / "model.safetensors")
    whole = convert(
        "xomni", tmp_path / "tower.pt", tmp_path / "whole", found.config, projector=str(tmp_path / "projector.pt")
    )
    encoder = {"siglip_path": "tower.pt", "projector_path": "projector.pt"}
    (tmp_path / "config.json").write_text(json.dumps({"vision_config": {"encoder": encoder}}))
    assert same(convert("xomni", tmp_path, tmp_path / "out", found.config), whole)
    for name, message in [("../a.pt", "name of a file of the folder"), (None, "encoder.siglip_path: expected a value")]:
        changed = {"vision_config": {"encoder": {**encoder, "siglip_path": name}}}
        (tmp_path / "config.json").write_text(json.dumps(changed))
        with pytest.raises(ValueError, match=message):
            convert("xomni", tmp_path, tmp_path / "out", found.config)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_every_dtype_becomes_float32(dtype: torch.dtype, tmp_path: Path) -> None:
    """Numbers of a file are cast when they are written: the same as if the file had held them in float32."""
    found = {name: t.to(dtype) for name, t in weights(case("published/llamagen_small")).items()}
    save_file(found, tmp_path / "model.safetensors")
    save_file({name: t.float() for name, t in found.items()}, tmp_path / "float.safetensors")
    out = convert("llamagen", tmp_path, tmp_path / "out")
    assert same(out, convert("llamagen", tmp_path / "float.safetensors", tmp_path / "float"))
    assert tmm.load(out).dtype == torch.float32


def test_safetensors_that_are_written(tmp_path: Path) -> None:
    """Every dtype, in a file that safetensors reads; a tensor of any strides; an error for what it has no name for."""
    generator = torch.Generator().manual_seed(0)
    tensors = {str(dtype): torch.randint(0, 2, (3, 5), generator=generator).to(dtype) for dtype in DTYPES}
    tensors |= {"turned": torch.rand(7, 4).t(), "scalar": torch.tensor(1.5), "none": torch.zeros(0, 3)}
    tensors |= {"größe": torch.ones(1)}
    save_tensors(tensors, tmp_path / "a.safetensors", {"note": "text"})
    found = load_file(tmp_path / "a.safetensors")
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor)
    save_tensors(tensors, tmp_path / "a.safetensors", dtype=torch.bfloat16)
    for name, tensor in load_file(tmp_path / "a.safetensors").items():
        expected = tensors[name].bfloat16() if tensors[name].is_floating_point() else tensors[name]
        assert tensor.dtype == expected.dtype
        assert torch.equal(tensor, expected)
    with pytest.raises(ValueError, match="a: expected numbers that a safetensors file can hold"):
        save_tensors({"a": torch.zeros(1, dtype=torch.complex64)}, tmp_path / "b.safetensors")
    assert not (tmp_path / "b.safetensors").exists()


@pytest.mark.parametrize("family", ["janus", "chameleon", "glm_image"])
def test_wrong_files_get_one_sentence(family: str) -> None:
    """Any tensor of the tokenizer that is missing, has another name or another shape is named."""
    found, config, read = small(family), CONFIG.get(family), FAMILIES[family].convert
    names = [name for name in found if name not in OTHERS]
    prefix = "model." if family == "glm_image" else next(p for p in FAMILIES[family].prefixes if names[0].startswith(p))
    for name in names[:: len(names) // 4]:
        short, rest = re.escape(name.removeprefix(prefix)), {key: t for key, t in found.items() if key != name}
        for changed in (rest, {**rest, f"{name}_x": found[name]}, {**rest, name: found[name][None]}):
            with pytest.raises(ValueError, match=rf"^the file: .*{short}") as raised:
                read(changed, "the file", config)
            assert "\n" not in str(raised.value)
    with pytest.raises(ValueError, match="expected a tensor"):
        read(OTHERS | {"decoder.a": torch.zeros(1)}, "the file", config)


def test_a_tokenizer_without_its_decoder() -> None:
    """Chameleon as transformers has it."""
    found = {name: t for name, t in small("chameleon").items() if ".decoder." not in name}
    with pytest.raises(ValueError, match=r"expected a tokenizer with its decoder, decoder\.\* \(vqgan\.ckpt has it\)"):
        FAMILIES["chameleon"].convert(found, "the file")
