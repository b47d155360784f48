"""Cost of the grammar in a decoding step: python -m benchmarks.grammar [--rounds 60] [--record].

A step at batch 8 in the middle of an image of 16 x 16 codes: the model's forward pass for one token on its cache, the
grammar's mask over the logits, the choice, the grammar's advance. The model is a Qwen2 of 4 layers and width 256, far
smaller than any in use, so that the share is more than it will be there.
"""

from collections.abc import Sequence
from typing import Any

import torch
import transformers

from benchmarks import harness
from tokenizers_mm.llm import Grammar, VisualVocabulary
from tokenizers_mm.llm.layout import IMAGE_START, Layout
from tokenizers_mm.llm.transformers_api import cache_of, keep_for_rewind, rewind
from tokenizers_mm.llm.transformers_api import forward as call
from tokenizers_mm.llm.vocabulary import CodeRange, ImageSize, Marker

BATCH, TEXT, CODES, SIDE = 8, 4096, 32768, 16


def build() -> tuple[Any, VisualVocabulary]:
    """Random weights with room for the text, the markers and the codes."""
    layout = Layout(("pixel",))
    names = layout.marker_names([(256, 256)])
    markers = tuple(Marker(name, (TEXT + index,)) for index, name in enumerate(names))
    codes = CodeRange("pixel", CODES, TEXT + len(markers))
    vocabulary = VisualVocabulary(TEXT, (codes,), markers, layout, (ImageSize(256, 256, (((SIDE, SIDE),),)),))
    config = transformers.Qwen2Config(
        hidden_size=256,
        intermediate_size=1024,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=vocabulary.size,
    )
    return transformers.Qwen2ForCausalLM(config).eval(), vocabulary


def main(arguments: Sequence[str] | None = None) -> None:
    parser = harness.parser(__doc__)
    parser.add_argument("--rounds", type=int, default=60)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model, vocabulary = build()
    grammar = Grammar(vocabulary, "image", eos=0)
    start = torch.tensor(vocabulary.marker(IMAGE_START)).expand(BATCH, -1)
    codes = vocabulary.codes[0].start + torch.randint(0, CODES, (BATCH, SIDE * SIDE // 2))
    prompt = torch.cat([torch.randint(1, TEXT, (BATCH, 32)), start, codes], 1)
    state, token = grammar.read(prompt), prompt[:, -1:]
    with torch.no_grad():
        cache = keep_for_rewind(cache_of(model(prompt, use_cache=True)))
        logits = torch.randn(BATCH, vocabulary.size)

        def forward() -> torch.Tensor:
            found = call(model, {"input_ids": token}, cache=cache, use_cache=True).logits[:, -1]
            rewind(cache, 1)
            return found

        methods = {
            "step": lambda: forward().argmax(-1),
            "step with grammar": lambda: grammar.advance(state, grammar.mask(state, forward()).argmax(-1)),
            "grammar alone": lambda: (grammar.mask(state, logits), grammar.advance(state, token[:, 0])),
        }
        times = harness.interleave(methods, options.rounds, clock="cpu")
    share = times["grammar alone"] / times["step with grammar"]
    print(harness.table([[name, f"{value:.3f} ms"] for name, value in times.items()]))
    print(f"the grammar's share of a step: {share:.1%}")
    if options.record:
        row = {"batch": BATCH, "rows": vocabulary.size, "share": share, "milliseconds": times}
        harness.record("grammar", row, harness.machine())


if __name__ == "__main__":
    main()
