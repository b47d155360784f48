"""A process of its own for the full-size case: `python -m tests.models.dualvitok_full_size STEP ...`.

    weights CASE FILE                          the published-size weights, made by rule
    convert FILE DIR                           as the command line converts them
    encode DIR INPUTS RESULT                   load, encode both images, decode the smaller one

The last line printed is the peak resident memory in bytes.
"""

import resource
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

import tokenizers_mm as tmm
from tests.cases import Case
from tests.dualvitok_weights import dualvitok_weights
from tokenizers_mm.checkpoints.convert import convert
from tokenizers_mm.models import DualViTok


@torch.no_grad()
def encode(directory: str, inputs: str, result: str) -> None:
    tokenizer = tmm.load(directory)
    assert isinstance(tokenizer, DualViTok)
    found = {}
    for name, x in load_file(inputs).items():
        key = name.split(".")[0]
        semantic, pixel, target = tokenizer.encode_features(x)
        codes = tokenizer.encode(x)
        found |= {f"{key}.semantic": semantic, f"{key}.pixel": pixel, f"{key}.target": target, f"{key}.ids": codes.ids}
        if x.shape[-2] < 256:
            quantized = tokenizer.quantize(semantic, pixel)
            found[f"{key}.image"] = tokenizer.decode(codes)
            found[f"{key}.decoded"] = tokenizer.decode_semantic(quantized["semantic"].vectors)
    save_file({name: tensor.contiguous() for name, tensor in found.items()}, result)


def main(step: str, *arguments: str) -> None:
    if step == "weights":
        folder = Path(arguments[0])
        save_file(dualvitok_weights(Case(folder.name, folder)), arguments[1])
    elif step == "convert":
        convert("dualvitok", arguments[0], arguments[1])
    else:
        encode(*arguments)
    unit = 1 if sys.platform == "darwin" else 1024
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit)


if __name__ == "__main__":
    main(*sys.argv[1:])
