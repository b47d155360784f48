"""Image sampling through a language model, with and without its cache.

    python -m benchmarks.mar_cache [--prompts 32 320 1200] [--steps 64] [--record]

Harmon's loop: MAR's encoder sees all known tokens anew in each step, so only what comes before the image can be cached.
What that saves depends on the length of the prompt: a caption (32), an image and a caption (320), or several (1200).
"""

from collections.abc import Sequence
from typing import Any

import torch

from benchmarks import harness
from tokenizers_mm.decoders.diffusion import TokenDenoiserConfig
from tokenizers_mm.decoders.mar import MARDecoderConfig
from tokenizers_mm.decoders.pixel import PixelDecoderConfig
from tokenizers_mm.encoders.mar import MAREncoderConfig
from tokenizers_mm.encoders.pixel import PixelEncoderConfig
from tokenizers_mm.llm.continuous import ContinuousLM
from tokenizers_mm.models import MAR, MARConfig
from tokenizers_mm.models.kl import KLConfig
from tokenizers_mm.models.mar_sampling import SamplingConfig

WIDTH, BUFFERS, SIDE = 96, 16, 8


def build() -> ContinuousLM:
    """Random weights; a Qwen2 of 4 layers and width 192, a MAR of 2 + 2 layers and width 96 on 8 x 8 tokens."""
    import transformers

    pixel: dict[str, Any] = {"channels": 32, "multipliers": (1,), "num_blocks": 1, "attention_levels": ()}
    sizes: dict[str, Any] = {"width": WIDTH, "depth": 2, "heads": 4, "grid": (SIDE, SIDE), "num_buffers": BUFFERS}
    config = MARConfig(
        autoencoder=KLConfig(PixelEncoderConfig(32, **pixel), PixelDecoderConfig(16, **pixel)),
        encoder=MAREncoderConfig(num_classes=1, **sizes),
        decoder=MARDecoderConfig(encoder_width=WIDTH, **sizes),
        denoiser=TokenDenoiserConfig(condition_dim=WIDTH, width=64, depth=2),
    )
    tokenizer = MAR.from_config(config)
    denoiser = tokenizer.denoiser
    for layer in (denoiser.out, denoiser.modulation):  # zero at the start, which would hide a difference
        torch.nn.init.normal_(layer.weight, std=0.05)
    qwen = transformers.Qwen2Config(
        hidden_size=192,
        intermediate_size=768,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=512,
    )
    return ContinuousLM(tokenizer, transformers.Qwen2ForCausalLM(qwen)).eval()


def main(arguments: Sequence[str] | None = None) -> None:
    parser = harness.parser(__doc__)
    parser.add_argument("--prompts", nargs="+", type=int, default=[32, 320, 1200])
    parser.add_argument("--steps", type=int, default=64)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model, about = build(), harness.machine()
    config = SamplingConfig(options.steps, diffusion="25", guidance=2.0)
    for length in options.prompts:
        ids = torch.randint(0, 512, (2, length))
        with torch.no_grad():
            prompt = model.prompt(ids, torch.ones_like(ids, dtype=torch.bool))

        times, drawn = {}, {}
        for name, cache in (("cached", True), ("recomputed", False)):
            start = harness.CLOCKS["cpu"]()
            drawn[name] = model.generate(prompt, config, torch.Generator().manual_seed(0), cache=cache)
            times[name] = 1e3 * (harness.CLOCKS["cpu"]() - start)
        expected = drawn["recomputed"]
        difference = float((drawn["cached"] - expected).abs().max() / expected.abs().max())
        gain = times["recomputed"] / times["cached"]
        rows = [[name, f"{value / 1e3:.2f} s"] for name, value in times.items()]
        print(f"\nprompt {length}: {gain:.2f} times faster, difference {difference:.1e}\n{harness.table(rows)}")
        row = {"prompt": length, "steps": options.steps, "gain": gain, "difference": difference, "milliseconds": times}
        if options.record:
            harness.record("mar_cache", row, about)


if __name__ == "__main__":
    main()
