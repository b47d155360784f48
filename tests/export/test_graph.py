"""Graphs give the model's ids and pixels; what cannot be exported is one sentence."""

from pathlib import Path

import pytest
import torch

from benchmarks.tiny import tokenflow_config as tiny_config
from tokenizers_mm.cli import main
from tokenizers_mm.export.graph import export
from tokenizers_mm.models import TokenFlow


@pytest.fixture(scope="module")
def tokenizer() -> TokenFlow:
    torch.manual_seed(0)
    return TokenFlow.from_config(tiny_config()).eval()


@pytest.mark.filterwarnings("ignore")  # of the exporters' own making
def test_torch_graphs_equal_the_model(tokenizer: TokenFlow, tmp_path: Path) -> None:
    export(tokenizer, "torch", tmp_path / "graphs", batch_size=2)
    x = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    codes = tokenizer.encode(x)
    ids = torch.export.load(tmp_path / "graphs" / "encode.pt2").module()(x)
    assert torch.equal(ids, codes.ids)
    image = torch.export.load(tmp_path / "graphs" / "decode.pt2").module()(ids)
    torch.testing.assert_close(image, tokenizer.decode(codes), atol=1e-5, rtol=0)
    with pytest.raises(Exception, match=r"shape|size|guard|expected"):
        torch.export.load(tmp_path / "graphs" / "encode.pt2").module()(x[:, :, :16])


@pytest.mark.filterwarnings("ignore")
def test_onnx_graphs_equal_the_model(tokenizer: TokenFlow, tmp_path: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    tokenizer.save(tmp_path / "tok")
    arguments = ["export", "--tokenizer", str(tmp_path / "tok"), "--format", "onnx", "--out", str(tmp_path / "graphs")]
    assert main(arguments) == 0
    x = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    codes = tokenizer.encode(x)
    encode = onnxruntime.InferenceSession(str(tmp_path / "graphs" / "encode.onnx"))
    (ids,) = encode.run(None, {encode.get_inputs()[0].name: x.numpy()})
    assert torch.equal(torch.from_numpy(ids), codes.ids)  # no near tie among these 21 ids
    decode = onnxruntime.InferenceSession(str(tmp_path / "graphs" / "decode.onnx"))
    (image,) = decode.run(None, {decode.get_inputs()[0].name: ids})
    torch.testing.assert_close(torch.from_numpy(image), tokenizer.decode(codes), atol=1e-4, rtol=0)


def test_bad_requests_get_one_sentence(tokenizer: TokenFlow, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="format: expected one of"):
        export(tokenizer, "tensorrt", tmp_path / "x")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="images: expected 32 x 32 pixels, got 64 x 64"):
        export(tokenizer, "torch", tmp_path / "x", size=(64, 64))
    for count in (0, -1):
        with pytest.raises(ValueError, match=f"batch_size: expected a positive number, got {count}"):
            export(tokenizer, "torch", tmp_path / "x", batch_size=count)
    assert not (tmp_path / "x").exists()
