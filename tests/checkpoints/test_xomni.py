"""X-Omni's SigLIP-VQ in two files: features, ids and vectors of the original code, names, strictness."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import tokenizers_mm as tmm
from tests.cases import Case, case, close
from tests.checkpoints.published_memory import write_safetensors
from tests.weights_by_rule import rule_tensor
from tokenizers_mm.checkpoints import xomni
from tokenizers_mm.checkpoints.cnn import shapes_of
from tokenizers_mm.checkpoints.convert import FAMILIES, convert
from tokenizers_mm.checkpoints.upstream import give
from tokenizers_mm.models.semantic import SemanticTokenizer

pytestmark = pytest.mark.usefixtures("one_thread")

PROJECTOR = ("quant_conv.", "quantize.", "post_quant_conv.", "post_conv.")


def parts() -> tuple[Case, dict[str, Tensor], dict[str, Tensor]]:
    """The case, the tensors of the tower and those of the projector."""
    found = case("published/xomni_small")
    keys, seed = json.loads((found.folder / "state_keys.json").read_text()), found.config["weights"]["seed"]
    weights = {name: rule_tensor(name, spec, seed) for name, spec in keys.items()}
    projector = {name: t for name, t in weights.items() if name.startswith(PROJECTOR)}
    return found, {name: t for name, t in weights.items() if name not in projector}, projector


@torch.no_grad()
def test_features_ids_and_vectors_of_the_original(tmp_path: Path) -> None:
    """On two sizes (positions are interpolated); features of ids use the rows as they are, `reconstruct` unit rows."""
    found, tower, projector = parts()
    pooling = {"attn_pool.latent": torch.zeros(1, 1, 64), "norm.weight": torch.zeros(64)}
    torch.save({**tower, **pooling}, tmp_path / "tower.pt")
    torch.save(projector, tmp_path / "projector.pt")
    out = convert("xomni", tmp_path / "tower.pt", tmp_path / "out", found.config, projector=tmp_path / "projector.pt")
    model = tmm.load(out)
    assert isinstance(model, SemanticTokenizer)
    for name, x in found.inputs.items():
        expected = {key: found.outputs[f"{key}_{name}"] for key in ("features", "indices", "latents", "forward")}
        codes = model.encode(x)
        assert torch.equal(codes.ids, expected["indices"].flatten(1))
        close(model.tower_features(x).flatten(1, 2), expected["features"], "features")
        close(model.features(codes), expected["latents"].flatten(2).transpose(1, 2), "features of the ids")
        semantic = model.reconstruct(x).semantic
        assert semantic is not None
        close(semantic, expected["forward"], "features through the quantizer")
    back = give(xomni.links_of(shapes_of(model.state_dict())), model.state_dict())
    assert back.keys() == tower.keys() | projector.keys()
    assert all(torch.equal(back[name], t) for name, t in {**tower, **projector}.items())
    assert model.provenance.license == FAMILIES["xomni"].checkpoints[0].license


def test_names_and_shapes_of_the_published_size(tmp_path: Path) -> None:
    """The projector's file is sparse: 500 MB of zeros that take no room and are never read."""
    keys = json.loads((case("published").folder / "xomni_keys.json").read_text())
    with torch.device("meta"):
        tower = {name: torch.empty(shape) for name, shape in keys.items() if not name.startswith(PROJECTOR)}
    projector = {n: (torch.float32, shape) for n, shape in keys.items() if n.startswith(PROJECTOR)}
    write_safetensors(projector, tmp_path / "projector.safetensors")
    model = xomni.convert(tower, "xomni", projector=str(tmp_path / "projector.safetensors"))
    checkpoint = FAMILIES["xomni"].checkpoints[0]
    (stream,) = model.streams(*checkpoint.image)
    assert ((stream.num_ids, stream.codebook_size),) == checkpoint.streams


def test_wrong_files_get_one_sentence(tmp_path: Path) -> None:
    found, tower, projector = parts()
    file, config = tmp_path / "projector.safetensors", found.config
    with pytest.raises(ValueError, match="projector: expected the path of the file with the quantizer"):
        xomni.convert(tower, "the file", config)
    for change, message in [
        ({"post_conv.1.norm2.bias": None}, r"1 missing: post_conv\.1\.norm2\.bias"),
        ({"quantize.embedding.weight": None}, r"a tensor quantize\.embedding\.weight"),
        ({"extra.weight": torch.zeros(1)}, r"1 unknown: extra\.weight"),
        ({"pos_embed": torch.zeros(1)}, r"other tensors than the file, got \['pos_embed'\]"),
    ]:
        save_file({name: t for name, t in {**projector, **change}.items() if t is not None}, file)
        with pytest.raises(ValueError, match=message):
            xomni.convert(tower, "the file", config, projector=str(file))
    save_file(projector, file)
    for name in ("pos_embed", "blocks.1.attn.qkv.bias"):
        with pytest.raises(ValueError, match=name):
            xomni.convert({key: t for key, t in tower.items() if key != name}, "it", config, projector=str(file))
    with pytest.raises(ValueError, match=r"config: codebook_size: expected 96, as in the file, got 95"):
        xomni.convert(tower, "the file", {**config, "codebook_size": 95}, projector=str(file))
