"""Families take every kind of quantizer: one key of the configuration changes it."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

import tokenizers_mm as tmm
from benchmarks.tiny import dualvitok_config, tokenflow_config
from tokenizers_mm.config import from_mapping, to_mapping
from tokenizers_mm.models import DualViTok, DualViTokConfig, TokenFlow, TokenFlowConfig
from tokenizers_mm.quantizers import QUANTIZERS, VQ, VQConfig

MAPPINGS: dict[str, dict[str, Any]] = {
    "vq": {"codebook_size": 64},
    "simvq": {"codebook_size": 64},
    "fsq": {"levels": [5, 4, 3]},
    "residual": {"stage": {"kind": "vq", "codebook_size": 32}, "depth": 3},
}


def mapping(kind: str, dim: int) -> dict[str, Any]:
    options = {"kind": kind, **MAPPINGS[kind]}
    if kind == "residual":
        return options | {"stage": {**options["stage"], "dim": dim}}
    return options | {"dim": dim}


def check(tokenizer: Any, folder: Path, size: tuple[int, int], groups: int) -> None:
    tokenizer.eval()
    x = torch.rand(2, 3, *size) * 2 - 1
    codes = tokenizer.encode(x)
    decoded = tokenizer.decode(codes)
    output = tokenizer.train().reconstruct(x)
    tokenizer.eval()
    assert sum(stream.num_ids for stream in codes.streams) == codes.ids.shape[1]
    assert len({stream.name for stream in codes.streams}) == len(codes.streams)
    assert len(codes.streams) >= groups
    assert decoded.shape == x.shape
    for name, quantized in output.quantized.items():
        assert set(quantized.terms) == tokenizer.quantizers()[name].loss_terms
    tokenizer.save(folder)
    again = tmm.load(folder)
    assert again.config == tokenizer.config
    assert torch.equal(again.encode(x).ids, codes.ids)
    assert torch.equal(again.decode_ids(codes.ids, *size), decoded)


@pytest.mark.parametrize("kind", sorted(MAPPINGS))
def test_tokenflow(kind: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    data = to_mapping(tokenflow_config()) | {"quantizer": mapping(kind, 12), "dims": [8, 4]}
    tokenizer = TokenFlow.from_config(from_mapping(TokenFlowConfig, data, "config"))
    check(tokenizer, tmp_path / "tok", (32, 32), 3 if kind == "residual" else 1)
    ids = tokenizer.encode(torch.zeros(1, 3, 32, 32)).ids
    vectors = tokenizer.quantizer.quantize(tokenizer.encode_features(torch.zeros(1, 3, 32, 32))).vectors
    found = tokenizer.vectors(tmm.ImageCodes(ids, 32, 32, tokenizer.streams(32, 32)))
    torch.testing.assert_close(found, vectors, atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", sorted(MAPPINGS))
def test_dualvitok(kind: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    data = to_mapping(dualvitok_config()) | {"pixel_quantizer": mapping(kind, 8)}
    tokenizer = DualViTok.from_config(from_mapping(DualViTokConfig, data, "config"))
    side = tokenizer.size_multiple * 4
    check(tokenizer, tmp_path / "tok", (side, 2 * side), 4 if kind == "residual" else 2)


def test_dims_must_fit() -> None:
    data = to_mapping(tokenflow_config()) | {"quantizer": mapping("vq", 12)}
    with pytest.raises(ValueError, match=r"config.dims: expected semantic and pixel channels that add up to the quan"):
        from_mapping(TokenFlowConfig, data, "config")
    with pytest.raises(ValueError, match=r"config.dims: expected nothing beside quantizer.dims"):
        from_mapping(TokenFlowConfig, to_mapping(tokenflow_config()) | {"dims": [8, 4]}, "config")
    with pytest.raises(ValueError, match=r"config.quantizer.kind: expected one of .* got own"):
        from_mapping(TokenFlowConfig, data | {"quantizer": {"kind": "own"}}, "config")


def test_a_quantizer_from_a_script(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A class of the user's own goes into the table; configuration files name it, saved tokenizers load with it."""

    @dataclasses.dataclass(frozen=True)
    class OwnConfig(VQConfig):
        kind: Any = "own"

    class Own(VQ):
        Config = OwnConfig

    monkeypatch.setitem(QUANTIZERS, "own", Own)
    data = to_mapping(tokenflow_config()) | {"quantizer": {"kind": "own", "codebook_size": 16, "dim": 12}}
    tokenizer = TokenFlow.from_config(from_mapping(TokenFlowConfig, data | {"dims": [8, 4]}, "config"))
    assert isinstance(tokenizer.quantizer.quantizer, Own)
    check(tokenizer, tmp_path / "tok", (32, 32), 1)
