"""Tokenizers that transformers ships: its classes with small random weights are the reference, ids and pixels."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

import tokenizers_mm as tmm
from tests.weights_by_rule import rule_tensor
from tokenizers_mm.checkpoints.convert import convert
from tokenizers_mm.eval.candidates import image_tokens

pytest.importorskip("transformers", reason="its tokenizers are the reference")
pytestmark = pytest.mark.usefixtures("one_thread")

SMALL: dict[str, Any] = {
    "base_channels": 32,
    "channel_multiplier": [1, 1, 2],
    "num_res_blocks": 1,
    "latent_channels": 24,
}


def filled(model: Any, seed: int) -> Any:
    """A model with weights by the rule of their names."""
    state = model.state_dict()
    floats = {name: list(t.shape) for name, t in state.items() if t.is_floating_point()}
    model.load_state_dict(
        {**state, **{name: rule_tensor(name, {"shape": shape}, seed) for name, shape in floats.items()}}
    )
    return model.eval()


def images(batch: int, height: int, width: int) -> Tensor:
    return torch.rand(batch, 3, height, width, generator=torch.Generator().manual_seed(0)) * 2 - 1


def converted(family: str, tensors: dict[str, Tensor], folder: Path, **options: Any) -> Any:
    save_file({name: t.contiguous() for name, t in tensors.items()}, folder / "model.safetensors")
    return tmm.load(convert(family, folder / "model.safetensors", folder / "out", **options))


def close(found: Tensor, expected: Tensor) -> bool:
    return bool((found - expected).abs().max() <= 1e-5 * expected.abs().max())


def with_decoder(original: nn.Module, seed: int) -> dict[str, Tensor]:
    """The original's weights and a decoder of the same sizes, which transformers leaves out, by the rule."""
    from transformers.models.janus.configuration_janus import JanusVQVAEConfig
    from transformers.models.janus.modeling_janus import JanusVQVAEDecoder

    decoder = JanusVQVAEDecoder(JanusVQVAEConfig(**SMALL))
    count = len(SMALL["channel_multiplier"])
    names = {name: name for name in decoder.state_dict()}
    for index in range(count):  # Janus counts the levels from coarse to fine
        names |= {
            n: n.replace(f"up.{index}.", f"up.{count - 1 - index}.", 1) for n in names if n.startswith(f"up.{index}.")
        }
    shapes = {f"decoder.{names[n]}": list(t.shape) for n, t in decoder.state_dict().items()}
    return {**original.state_dict(), **{n: rule_tensor(n, {"shape": shape}, seed) for n, shape in shapes.items()}}


@torch.no_grad()
def test_janus(tmp_path: Path) -> None:
    """Ids and pixels in both directions. transformers compares raw features with raw codes, the original unit vectors
    with unit vectors; they agree where codes have norm 1."""
    from transformers.models.janus.configuration_janus import JanusVQVAEConfig
    from transformers.models.janus.modeling_janus import JanusVQVAE

    original = filled(JanusVQVAE(JanusVQVAEConfig(**SMALL, num_embeddings=64, embed_dim=8, num_patches=6)), 1)
    original.quantize.embedding.weight.copy_(F.normalize(original.quantize.embedding.weight, dim=-1))
    x = images(2, 24, 24)
    ids = image_tokens(original.encode(x)).view(2, -1)
    whole = {f"model.vqmodel.{name}": t for name, t in original.state_dict().items()} | {
        "lm_head.weight": torch.zeros(2)
    }
    model = converted("janus", whole, tmp_path)
    assert torch.equal(model.encode(x).ids, ids)
    assert close(model.decode_ids(ids, 24, 24), original.decode(ids))
    assert model.provenance.license == "other"
    assert "DeepSeek" in model.provenance.notice


@torch.no_grad()
def test_chameleon(tmp_path: Path) -> None:
    """Ids; transformers has no decoder, so the pixels are those of Janus's, whose decoder has the same form."""
    from transformers.models.chameleon.configuration_chameleon import ChameleonVQVAEConfig
    from transformers.models.chameleon.modeling_chameleon import ChameleonVQVAE

    config = ChameleonVQVAEConfig(**SMALL, num_embeddings=64, embed_dim=16, resolution=24)
    original = filled(ChameleonVQVAE(config), 2)
    x = images(2, 24, 32)
    tensors = with_decoder(original, 2)
    tensors = {name: t for name, t in tensors.items() if ".attn." not in name}  # no attention in the levels
    tensors |= {"loss.discriminator.weight": torch.zeros(3)}
    model = converted("chameleon", tensors, tmp_path)
    ids = image_tokens(original.encode(x))
    assert torch.equal(model.encode(x).ids, ids.view(2, -1))
    vectors = original.quantize.embedding(ids).view(2, 6, 8, 16)
    assert torch.equal(model.vectors(model.encode(x)), vectors)


@torch.no_grad()
def test_apertus(tmp_path: Path) -> None:
    """Ids of the encoder in a whole model's file; the decoder comes from a file of Emu3.5's tokenizer."""
    pytest.importorskip("transformers.models.apertus1p5", reason="this version of transformers does not have it")
    from transformers.models.apertus1p5.configuration_apertus1p5 import Apertus1p5VisionTokenizerConfig
    from transformers.models.apertus1p5.modeling_apertus1p5 import Apertus1p5VisionTokenizerModel

    config = Apertus1p5VisionTokenizerConfig(
        **SMALL, codebook_size=96, embed_dim=16, resolution=24, attn_resolutions=[6]
    )
    original = filled(Apertus1p5VisionTokenizerModel(config), 3)
    x = images(2, 24, 32)
    ids = original.encode(x).image_tokens.flatten(1)
    prefix = "model.vision_tokenizer."
    whole = {prefix + name: t for name, t in original.state_dict().items()} | {"model.norm.weight": torch.zeros(2)}
    emu = {n: t for n, t in with_decoder(original, 3).items() if n.startswith(("decoder.", "quantize."))}
    emu |= {"post_quant_conv.weight": torch.rand(24, 16, 1, 1), "post_quant_conv.bias": torch.rand(24)}
    with pytest.raises(ValueError, match="decoder: expected the path"):
        converted("apertus1p5", whole, tmp_path)
    torch.save({"state_dict": emu}, tmp_path / "emu.ckpt")
    model = converted("apertus1p5", whole, tmp_path, decoder=str(tmp_path / "emu.ckpt"))
    assert torch.equal(model.encode(x).ids, ids)
    assert model.decode_ids(ids, 24, 32).shape == x.shape
    torch.save({"state_dict": {**emu, "quantize.embedding.weight": torch.rand(96, 16)}}, tmp_path / "emu.ckpt")
    with pytest.raises(ValueError, match="decoder: expected the codebook of"):
        converted("apertus1p5", whole, tmp_path, decoder=str(tmp_path / "emu.ckpt"))


@torch.no_grad()
def test_glm_image(tmp_path: Path) -> None:
    """Features on two sizes (positions are interpolated), ids, vectors; pixels are refused."""
    pytest.importorskip("transformers.models.glm_image", reason="this version of transformers does not have it")
    from transformers.models.glm_image.configuration_glm_image import GlmImageVisionConfig, GlmImageVQVAEConfig
    from transformers.models.glm_image.modeling_glm_image import GlmImageVisionModel, GlmImageVQVAE

    sizes: dict[str, Any] = {
        "depth": 2,
        "hidden_size": 32,
        "num_heads": 2,
        "image_size": 16,
        "patch_size": 4,
        "intermediate_size": 64,
    }
    tower = filled(GlmImageVisionModel(GlmImageVisionConfig(**sizes)), 4)
    vqmodel = filled(GlmImageVQVAE(GlmImageVQVAEConfig(embed_dim=16, num_embeddings=64, latent_channels=32)), 4)
    whole = {f"model.visual.{name}": t for name, t in tower.state_dict().items()}
    whole |= {f"model.vqmodel.{name}": t for name, t in vqmodel.state_dict().items()} | {
        "lm_head.weight": torch.ones(1)
    }
    given = {"num_heads": 2, "image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5], "num_embeddings": 64}
    model = converted("glm_image", whole, tmp_path, config=given)
    for height, width in ((16, 16), (12, 20)):
        x, rows, columns = images(1, height, width), height // 4, width // 4
        patches = F.unfold(x, 4, stride=4).transpose(1, 2).flatten(0, 1)
        features = tower(patches, torch.tensor([[1, rows, columns]])).last_hidden_state
        assert close(model.tower_features(x).flatten(0, 2), features)
        encoded = vqmodel.encode(features.T.reshape(1, 32, rows, columns))
        codes = model.encode(x)
        assert torch.equal(codes.ids.flatten(), encoded.image_tokens)
        vectors = encoded.quantized_last_hidden_state.permute(0, 2, 3, 1)
        assert close(model.reconstruct(x).vectors, vectors)
        expected = vqmodel.post_quant_conv(
            vqmodel.quantize.embedding(encoded.image_tokens).T.reshape(1, 16, rows, columns)
        )
        assert close(model.features(codes), expected.flatten(2).transpose(1, 2))
    with pytest.raises(ValueError, match="codes: expected a tokenizer with a pixel decoder"):
        model.decode(model.encode(images(1, 16, 16)))


@torch.no_grad()
def test_emu3(tmp_path: Path) -> None:
    """Ids and pixels in both directions, although the original is a video tokenizer and ours is folded for images."""
    from transformers.models.emu3.configuration_emu3 import Emu3VQVAEConfig
    from transformers.models.emu3.modeling_emu3 import Emu3VQVAE

    sizes: dict[str, Any] = {
        "base_channels": 32,
        "channel_multiplier": [1, 1, 2],
        "num_res_blocks": 1,
        "attn_resolutions": [2],
    }
    original = filled(Emu3VQVAE(Emu3VQVAEConfig(**sizes, hidden_size=64, codebook_size=64)), 5)
    x = images(2, 16, 24)
    ids = torch.stack(list(image_tokens(original.encode(x, torch.tensor([[16, 24]] * 2)))))
    whole = {f"model.vqmodel.{name}": t for name, t in original.state_dict().items()} | {
        "lm_head.weight": torch.ones(1)
    }
    model = converted("emu3", whole, tmp_path)
    assert torch.equal(model.encode(x).ids, ids.flatten(1))
    assert close(model.decode_ids(ids.flatten(1), 16, 24), original.decode(ids))
