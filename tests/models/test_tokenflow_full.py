"""The four TokenFlow models at full size (182 to 560 million numbers, K 32768): minutes each, run by `make test-full`.

Each is written as a checkpoint of the original, then converted, loaded and used in a process of its own, whose peak
memory must stay under 6 GB.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import tokenizers_mm as tmm
from tests.cases import ROOT, case
from tests.models.ids import TIE, assert_same_ids
from tests.models.test_tokenflow_cases import close, close_image
from tests.weights_by_rule import tokenflow_weights
from tokenizers_mm.models import TokenFlow

MEMORY = 6e9


@pytest.mark.full
@pytest.mark.parametrize("name", ["clipb_224_base", "clipb_256_enhanced", "vitamin_256", "siglip_384"])
def test_full_size(name: str, tmp_path: Path) -> None:
    reference = case(f"tokenflow/full_{name}")
    torch.save({"model": tokenflow_weights(reference)}, tmp_path / "checkpoint.pt")
    files = [reference.folder / f"{part}.safetensors" for part in ("inputs", "outputs")]
    arguments = [tmp_path / "checkpoint.pt", tmp_path / "tokenizer", *files, tmp_path / "result.safetensors"]
    command = [sys.executable, "-m", "tests.models.full_size", *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    peaks = json.loads(done.stdout.splitlines()[-1])
    print(name, peaks)
    assert peaks["decode"] < MEMORY, peaks

    result, outputs = load_file(tmp_path / "result.safetensors"), reference.outputs
    features = result["features"].permute(0, 3, 1, 2)
    close(features[:, :32], outputs["semantic_pre_quant"], "semantic_pre_quant")
    close(features[:, 32:], outputs["pixel_pre_quant"], "pixel_pre_quant")
    close(result["tokens"], outputs["semantic_encoder_tokens"], "semantic_encoder_tokens")
    close_image(result["image"], outputs["image_recon"], "image_recon")
    close(result["semantic"], outputs["semantic_recon"], "semantic_recon")
    tokenizer = tmm.load(tmp_path / "tokenizer")
    assert isinstance(tokenizer, TokenFlow)
    flips = assert_same_ids(tokenizer, result["features"], outputs["indices"])
    print(
        name,
        "near ties that fell on the other side:",
        flips,
        "ids that differ:",
        int((result["ids"] != outputs["indices"]).sum()),
    )
    if flips == 0:
        assert torch.equal(result["ids"], outputs["indices"])
    quant = tokenizer.quantizer.look_up(outputs["indices"]).detach().permute(0, 3, 1, 2)
    close(quant, outputs["quant"], "quant")
    residuals = [key for key in outputs if key.endswith(".residual_in")]
    assert len(residuals) == 2
    for key in residuals:  # the quantizer alone, from the original's own residuals
        expected, margin = (outputs[key.replace("residual_in", part)] for part in ("indices", "margin"))
        ids = tokenizer.quantizer.quantizer.quantize(outputs[key].permute(0, 2, 3, 1)).ids.flatten(1)
        clear = margin > TIE
        assert torch.equal(ids[clear], expected[clear]), key
