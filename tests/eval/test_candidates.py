"""Candidates: ours, and models of diffusers and transformers with small random configurations, from directories."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.tiny import dualvitok_config as tiny_dualvitok_config
from benchmarks.tiny import tokenflow_config as tiny_config
from tests.models.test_mar import tiny_config as tiny_mar_config
from tokenizers_mm.eval.candidates import Ours, open_candidates
from tokenizers_mm.models.dualvitok import DualViTok
from tokenizers_mm.models.loading import load_directory
from tokenizers_mm.models.mar import MAR
from tokenizers_mm.models.tokenflow import TokenFlow


def nothing(name: str) -> Any:
    raise AssertionError(f"{name} is none of ours")


def images(side: int) -> torch.Tensor:
    return torch.rand(2, 3, side, side, generator=torch.Generator().manual_seed(0)) * 2 - 1


def test_ours_counts_ids_and_latents() -> None:
    torch.manual_seed(0)
    discrete = Ours("discrete", TokenFlow.from_config(tiny_config()).eval())
    encoded = discrete.encode(images(32))
    assert list(encoded.bits) == [21 * 6.0] * 2
    assert encoded.ids is not None
    assert discrete.decode(encoded).shape == (2, 3, 32, 32)
    assert discrete.features(images(32)).ndim == 2
    continuous = Ours("continuous", MAR.from_config(tiny_mar_config()).eval())
    encoded = continuous.encode(images(64))
    assert encoded.ids is None
    assert list(encoded.bits) == [16.0 * encoded.value.values[0].numel()] * 2
    assert discrete.identity != continuous.identity
    torch.manual_seed(1)
    other = Ours("other", TokenFlow.from_config(tiny_config()).eval())
    assert other.identity != discrete.identity, "other weights"


def test_names_that_are_refused(tmp_path: Path) -> None:
    for config, message in (
        ({"_class_name": "AutoencoderOobleck"}, "_class_name: expected one of AutoencoderKL"),
        ({"model_type": "chameleon_vqgan"}, "model_type: expected a model that gives pixels back"),
        ({"model_type": "emu3"}, "its VQ part, saved by save_pretrained"),
    ):
        (tmp_path / "config.json").write_text(json.dumps(config))
        with pytest.raises(ValueError, match=message):
            open_candidates([str(tmp_path)], nothing)
    with pytest.raises(ValueError, match="tokenizers: expected a tokenizer whose bits the codecs match"):
        open_candidates(["jpeg@match"], nothing)
    with pytest.raises(ValueError, match="tokenizers: expected different names, got 'jpeg@q50' twice"):
        open_candidates(["jpeg@q50", "jpeg@q50"], nothing)
    assert [c.name for c in open_candidates(["jpeg@curve"], nothing)][:2] == ["jpeg q3", "jpeg q6"]


@pytest.mark.parametrize("family", ["tokenflow", "dualvitok", "mar"])
def test_an_evaluation_changes_no_tensor_of_a_tokenizer(family: str) -> None:
    """No average of codes, no count and no weight moves, whatever an evaluation asks for."""
    torch.manual_seed(0)
    made = {
        "tokenflow": lambda: TokenFlow.from_config(tiny_config()),
        "dualvitok": lambda: DualViTok.from_config(tiny_dualvitok_config()),
        "mar": lambda: MAR.from_config(tiny_mar_config()),
    }
    candidate = Ours(family, made[family]().train())
    height, width = candidate.image_size or (candidate.size_multiple * 4,) * 2
    x = images(height)[..., :width]
    before = {name: tensor.clone() for name, tensor in candidate.tokenizer.state_dict().items()}
    candidate.decode(candidate.encode(x))
    candidate.features(x)
    if candidate.has_semantic:
        assert candidate.semantic(x) is not None
    for name, tensor in candidate.tokenizer.state_dict().items():
        assert torch.equal(tensor, before[name]), name


def test_directories_of_one_name(tmp_path: Path) -> None:
    """Two folders `tok` have different names."""
    names = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        TokenFlow.from_config(tiny_config()).save(tmp_path / str(seed) / "tok")
        names.append(str(tmp_path / str(seed) / "tok"))
    candidates = open_candidates([*names, "jpeg"], load_directory_of)
    assert [candidate.name for candidate in candidates] == [*names, "jpeg at equal bits"]


def load_directory_of(name: str) -> Any:
    return load_directory(Path(name))


def diffusers_model(name: str) -> Any:
    diffusers = pytest.importorskip("diffusers", reason="an extra: models of diffusers")
    torch.manual_seed(0)
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    common = {"block_out_channels": (8, 16), "layers_per_block": 1, "norm_num_groups": 4, **blocks}
    if name == "AutoencoderKL":
        return diffusers.AutoencoderKL(latent_channels=4, **common)
    if name == "VQModel":
        return diffusers.VQModel(latent_channels=4, num_vq_embeddings=32, vq_embed_dim=4, **common)
    if name == "AutoencoderRAE":
        return diffusers.AutoencoderRAE(
            encoder_hidden_size=64,
            encoder_patch_size=14,
            encoder_num_hidden_layers=1,
            decoder_hidden_size=32,
            decoder_num_hidden_layers=1,
            decoder_num_attention_heads=2,
            decoder_intermediate_size=32,
            patch_size=16,
            encoder_input_size=28,
        )
    return diffusers.AutoencoderDC(
        latent_channels=4,
        attention_head_dim=8,
        encoder_block_types=("ResBlock", "ResBlock"),
        decoder_block_types=("ResBlock", "ResBlock"),
        encoder_block_out_channels=(8, 16),
        decoder_block_out_channels=(8, 16),
        encoder_layers_per_block=(1, 1),
        decoder_layers_per_block=(1, 1),
        encoder_qkv_multiscales=((), ()),
        decoder_qkv_multiscales=((), ()),
        upsample_block_type="interpolate",
        downsample_block_type="stride_conv",
    )


@pytest.mark.parametrize("name", ["AutoencoderKL", "VQModel", "AutoencoderDC", "AutoencoderRAE"])
@pytest.mark.filterwarnings("ignore")
def test_models_of_diffusers(name: str, tmp_path: Path) -> None:
    model = diffusers_model(name).eval()
    model.save_pretrained(tmp_path / "model")
    (candidate,) = open_candidates([str(tmp_path / "model")], nothing)
    x = images(32)
    encoded = candidate.encode(x)
    made = candidate.decode(encoded)
    assert made.shape == x.shape
    assert candidate.image_size == ((32, 32) if name == "AutoencoderRAE" else None)
    assert candidate.size_multiple == (1 if name == "AutoencoderRAE" else 2)
    with torch.no_grad():
        if name == "AutoencoderRAE":
            expected = model((x + 1) / 2).sample * 2 - 1
            assert list(encoded.bits) == [16.0 * 64 * 2 * 2] * 2
        elif name == "VQModel":
            expected = model.decode(model.encode(x).latents).sample
            assert list(encoded.bits) == [16 * 16 * 5.0] * 2
            assert encoded.ids is not None
            assert encoded.ids.streams[0].grids == ((16, 16),)
        else:
            expected = model(x).sample
            assert list(encoded.bits) == [16.0 * 4 * 16 * 16] * 2
            assert encoded.ids is None
    torch.testing.assert_close(made, expected, rtol=0, atol=1e-5)


def transformers_model(name: str) -> Any:
    transformers = pytest.importorskip("transformers", reason="an extra: VQ models of transformers")
    kind = {"janus": "JanusVQVAE", "emu3": "Emu3VQVAE"}[name]
    if not hasattr(transformers, kind):
        pytest.skip(f"this version of transformers has no {kind}")
    torch.manual_seed(0)
    if name == "janus":
        config = transformers.models.janus.configuration_janus.JanusVQVAEConfig(
            embed_dim=8,
            num_embeddings=32,
            latent_channels=32,
            base_channels=32,
            channel_multiplier=[1, 1],
            num_res_blocks=1,
            num_patches=8,
        )
    else:
        config = transformers.Emu3VQVAEConfig(
            codebook_size=64,
            embed_dim=4,
            latent_channels=4,
            base_channels=32,
            channel_multiplier=[1, 1],
            num_res_blocks=1,
            attn_resolutions=[],
            temporal_downsample_factor=1,
            hidden_size=32,
        )
    return getattr(transformers, kind)(config)


@pytest.mark.parametrize("name", ["janus", "emu3"])
@pytest.mark.filterwarnings("ignore")
def test_vq_models_of_transformers(name: str, tmp_path: Path) -> None:
    model = transformers_model(name).eval()
    model.save_pretrained(tmp_path / "model")
    (candidate,) = open_candidates([str(tmp_path / "model")], nothing)
    side = (candidate.image_size or (16, 16))[0]
    x = images(side)
    encoded = candidate.encode(x)
    assert encoded.ids is not None
    (stream,) = encoded.ids.streams
    assert stream.grids == ((side // candidate.size_multiple,) * 2,)
    made = candidate.decode(encoded)
    assert made.shape == x.shape
    with torch.no_grad():
        grid = encoded.ids.ids.view(2, *stream.grids[0])
        expected = model.decode(grid if name == "emu3" else encoded.ids.ids)
    torch.testing.assert_close(made, expected, rtol=0, atol=1e-5)
    mean = {"image_mean": [0.4, 0.5, 0.6], "image_std": [0.2, 0.25, 0.3]}
    (tmp_path / "model" / "preprocessor_config.json").write_text(json.dumps(mean))
    (again,) = open_candidates([str(tmp_path / "model")], nothing)
    inside = again._in(x)  # type: ignore[attr-defined]
    torch.testing.assert_close(again._out(inside), x, rtol=0, atol=1e-5)  # type: ignore[attr-defined]
    assert float((inside - x).abs().max()) > 0.1
