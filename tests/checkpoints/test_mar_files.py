"""Files as they are published: kl16.ckpt, MAR's .pth with its Namespace, Harmon's .pth without the autoencoder."""

import argparse
import dataclasses
import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

import tokenizers_mm as tmm
from tests.mar_cases import tiny_config
from tokenizers_mm.checkpoints.convert import convert
from tokenizers_mm.checkpoints.mar import kl_links_of, links_of, read_config, read_harmon, read_kl16
from tokenizers_mm.checkpoints.upstream import give
from tokenizers_mm.decoders.diffusion import TokenDenoiserConfig
from tokenizers_mm.decoders.mar import MARDecoderConfig
from tokenizers_mm.encoders.mar import MAREncoderConfig
from tokenizers_mm.models import MAR, MARConfig

HEADS = {"mar": {"encoder_num_heads": 2, "decoder_num_heads": 2}}


class Files:
    """A tiny model, written under the published names."""

    def __init__(self, folder: Path) -> None:
        config = tiny_config()
        plain = {"channels": 32, "multipliers": (1, 1), "num_groups": 32}
        encoder = dataclasses.replace(config.autoencoder.encoder, stem_patch=1, **plain)
        decoder = dataclasses.replace(config.autoencoder.decoder, head_patch=1, **plain)
        autoencoder = dataclasses.replace(config.autoencoder, encoder=encoder, decoder=decoder)
        torch.manual_seed(0)
        self.model = MAR.from_config(dataclasses.replace(config, autoencoder=autoencoder)).eval()
        state = self.model.state_dict()
        shapes = {name: tuple(t.shape) for name, t in state.items()}
        kl = {n: s for n, s in shapes.items() if n.startswith("autoencoder.")}
        self.kl = give(kl_links_of(kl), state)
        self.mar = give(links_of({n: s for n, s in shapes.items() if n not in kl}), state)
        self.folder = folder
        self.kl_path = folder / "kl16.ckpt"
        torch.save({"model": {**self.kl, "loss.logvar": torch.zeros(())}}, self.kl_path)

    def mar_file(self, tensors: dict[str, Tensor]) -> Path:
        path = self.folder / "checkpoint-last.pth"
        other = {name: torch.zeros_like(t) for name, t in tensors.items()}
        whole = {"model": other, "model_ema": tensors, "args": argparse.Namespace(lr=1e-4), "epoch": 399}
        torch.save(whole, path)
        return path

    def harmon_file(self, **extra: Tensor) -> Path:
        path = self.folder / "harmon.pth"
        tensors = {f"mar.{name}": t for name, t in self.mar.items()}
        tensors |= {"llm.model.norm.weight": torch.ones(6), "proj_in.0.weight": torch.ones(6, 24)}
        torch.save({**tensors, **extra}, path)
        return path


@pytest.fixture
def files(tmp_path: Path) -> Files:
    return Files(tmp_path)


def test_kl16(files: Files) -> None:
    autoencoder = read_kl16(str(files.kl_path))
    x = torch.rand(1, 3, 16, 16) * 2 - 1
    with torch.no_grad():
        assert torch.equal(autoencoder.posterior(x).mean, files.model.autoencoder.posterior(x).mean)
    torch.save({"model": {**files.kl, "loss_extra": torch.zeros(1)}}, files.kl_path)
    with pytest.raises(ValueError, match=r"kl16.ckpt: expected exactly the tensors .* 1 unknown: loss_extra"):
        read_kl16(str(files.kl_path))
    del files.kl["decoder.up.1.upsample.conv.bias"]
    torch.save({"model": files.kl}, files.kl_path)
    with pytest.raises(ValueError, match=r"1 missing: decoder\.up\.1\.upsample\.conv\.bias"):
        read_kl16(str(files.kl_path))


def test_mar(files: Files, tmp_path: Path) -> None:
    path = files.mar_file(files.mar)
    out = convert("mar", path, tmp_path / "out", HEADS, autoencoder=str(files.kl_path))
    tokenizer = tmm.load(out)
    assert tokenizer.config == files.model.config
    assert tokenizer.provenance.license == "MIT"
    state = tokenizer.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in files.model.state_dict().items())


def test_harmon(files: Files, tmp_path: Path) -> None:
    path = files.harmon_file()
    with pytest.warns(UserWarning, match="NTU S-Lab License 1.0: non-commercial use only"):
        out = convert("mar", path, tmp_path / "out", HEADS, autoencoder=str(files.kl_path))
    tokenizer = tmm.load(out)
    images = torch.rand(1, 3, 16, 16) * 2 - 1
    assert torch.equal(tokenizer.features(images), files.model.features(images))
    assert "non-commercial" in json.loads((out / "config.json").read_text())["provenance"]["notice"]
    assert "non-commercial" in (out / "README.md").read_text()
    with pytest.warns(UserWarning, match="non-commercial"):
        weights = read_harmon(str(path), str(files.kl_path), HEADS)
    assert list(weights.language_model) == ["model.norm.weight"]
    assert list(weights.projectors) == ["proj_in.0.weight"]


def test_harmon_with_its_autoencoder(files: Files, tmp_path: Path) -> None:
    path = files.harmon_file(**{f"vae.{name}": t for name, t in files.kl.items()})
    with pytest.warns(UserWarning, match="non-commercial"):
        out = convert("mar", path, tmp_path / "out", HEADS)
    assert tmm.load(out).config == files.model.config


def test_what_is_wrong_is_named(files: Files, tmp_path: Path) -> None:
    kl, out = str(files.kl_path), tmp_path / "out"
    path = files.mar_file(files.mar)
    with pytest.raises(ValueError, match=r"autoencoder: expected the path of kl16.ckpt .* got nothing"):
        convert("mar", path, out, HEADS)
    with pytest.raises(ValueError, match=r"a published width \(768, 1024, 1280\), or a config with the heads, got wid"):
        convert("mar", path, out, autoencoder=kl)
    files.mar_file({**files.mar, "stranger": torch.zeros(1)})
    with pytest.raises(ValueError, match=r"checkpoint-last.pth: expected exactly .* 1 unknown: stranger"):
        convert("mar", path, out, HEADS, autoencoder=kl)
    files.mar_file({n: t for n, t in files.mar.items() if n != "fake_latent"})
    with pytest.raises(ValueError, match="1 missing: fake_latent"):
        convert("mar", path, out, HEADS, autoencoder=kl)
    files.mar_file({**files.mar, "z_proj_ln.weight": torch.zeros(7)})
    with pytest.raises(ValueError, match=r"z_proj_ln.weight \(expected \[24\], got \[7\]\)"):
        convert("mar", path, out, HEADS, autoencoder=kl)
    files.mar_file({"weight": torch.zeros(1)})
    with pytest.raises(ValueError, match=r"expected a tensor z_proj\.weight, got none"):
        convert("mar", path, out, HEADS, autoencoder=kl)
    with pytest.raises(ValueError, match=r"expected a Harmon checkpoint .* got none"):
        read_harmon(str(path), kl, HEADS)
    assert not out.exists()


@pytest.mark.parametrize(
    ("width", "depth", "heads", "denoiser", "tensors"),
    [(768, 12, 12, (1024, 6), 364), (1024, 16, 16, (1280, 8), 476), (1280, 20, 16, (1536, 12), 604)],
)
def test_published_sizes_are_recognised(
    width: int, depth: int, heads: int, denoiser: tuple[int, int], tensors: int
) -> None:
    """B, L and H from their names and shapes alone; the counts are those of the published files (kl16: 312)."""
    config = MARConfig(
        encoder=MAREncoderConfig(width=width, depth=depth, heads=heads),
        decoder=MARDecoderConfig(encoder_width=width, width=width, depth=depth, heads=heads),
        denoiser=TokenDenoiserConfig(condition_dim=width, width=denoiser[0], depth=denoiser[1]),
    )
    with torch.device("meta"):
        state = MAR.from_config(config).state_dict()
    shapes = {name: tuple(t.shape) for name, t in state.items()}
    kl_shapes = {n: s for n, s in shapes.items() if n.startswith("autoencoder.")}
    mar = give(links_of({n: s for n, s in shapes.items() if n not in kl_shapes}), state)
    kl = give(kl_links_of(kl_shapes), state)
    assert (len(mar), len(kl)) == (tensors, 312)
    assert read_config(mar, kl, "file", None) == config
