"""Graphs of the kinds give their ids and vectors: many in one module, exported once for each format."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from tests.quantizers.kinds import DIM, MAKERS
from tokenizers_mm.quantizers import Quantizer

NAMES = [
    "vq, cosine",
    "fvq",
    "ibq",
    "lfq, groups",
    "bsq",
    "fsq, symmetric",
    "multi-codebook",
    "per dimension",
    "scales, VAR",
]


class Kinds(nn.Module):
    """z [B, 2, 2, DIM] -> the ids of each quantizer, and the vectors of these ids."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.quantizers = nn.ModuleList(MAKERS[name]() for name in NAMES)

    def forward(self, z: Tensor) -> tuple[Tensor, ...]:
        outputs: list[Tensor] = []
        for quantizer in self.quantizers:
            assert isinstance(quantizer, Quantizer)
            ids = quantizer.quantize(z).ids
            outputs += [ids, quantizer.look_up(ids)]
        return tuple(outputs)


@pytest.mark.filterwarnings("ignore")  # of the exporters' own making
def test_graphs_equal_the_kinds(tmp_path: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    from tokenizers_mm.export.onnx_ops import TRANSLATIONS

    module = Kinds().eval()
    z = torch.randn(3, 2, 2, DIM, generator=torch.Generator().manual_seed(0))
    expected = module(z)
    program = torch.export.export(module, (z,))
    exported = program.module()(z)
    torch.onnx.export(
        program, (), tmp_path / "kinds.onnx", dynamo=True, custom_translation_table=TRANSLATIONS, verbose=False
    )
    session = onnxruntime.InferenceSession(tmp_path / "kinds.onnx")
    found = [torch.from_numpy(array) for array in session.run(None, {session.get_inputs()[0].name: z.numpy()})]
    names = [name for name in NAMES for _ in range(2)]
    for name, theirs, graph, onnx in zip(names, expected, exported, found, strict=True):
        for ours in (graph, onnx):  # no near tie among these few ids
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5, msg=lambda m, name=name: f"{name}: {m}")
