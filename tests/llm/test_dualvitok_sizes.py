"""DualViTok's sizes in the tokenizer, the layout and the constrained decoder: one set of grids and counts."""

import pytest
import torch

from benchmarks.tiny import dualvitok_config as tiny_config
from tests.llm.fakes import words
from tests.models.test_dualvitok import noise
from tokenizers_mm.llm.grammar import Grammar
from tokenizers_mm.llm.presets import illume_plus
from tokenizers_mm.models import DualViTok
from tokenizers_mm.resolutions import ANCHORS

FALLBACK = [(384, 640), (640, 384), (256, 384), (384, 256), (256, 512), (512, 256)]
SIZES = [*ANCHORS, *FALLBACK]


@pytest.fixture(scope="module")
def tokenizer() -> DualViTok:
    torch.manual_seed(0)
    return DualViTok.from_config(tiny_config()).eval()


@pytest.fixture(scope="module")
def grammar(tokenizer: DualViTok) -> Grammar:
    text = words(["a b"])
    return Grammar(illume_plus(tokenizer, text, SIZES), "image", eos=0)


@pytest.mark.parametrize("size", SIZES)
@torch.no_grad()
def test_three_places_agree(tokenizer: DualViTok, grammar: Grammar, size: tuple[int, int]) -> None:
    (rows, columns), (fine_rows, fine_columns) = (
        tokenizer.resolutions.semantic_grid(*size),
        tokenizer.resolutions.pixel_grid(*size),
    )
    codes = tokenizer.encode(noise(1, 3, *size))
    assert codes.ids.shape[1] == rows * columns + fine_rows * fine_columns
    assert tokenizer.decode(codes).shape == (1, 3, *size)

    vocabulary = grammar.vocabulary
    tokens = vocabulary.to_tokens(codes)
    # The original's count: rows closed, two marks around each level, two around the image; and two for the size.
    assert tokens.shape[1] == 2 + (rows * (columns + 1) + 2) + (fine_rows * (fine_columns + 1) + 2) + 2
    assert torch.equal(vocabulary.to_codes(tokens, *size).ids, codes.ids)

    plan, state = vocabulary.plan(*size), grammar.begin(torch.tensor([0]))
    for slot, token in enumerate(tokens[0]):
        found = grammar.place(int(state))
        if slot >= len(plan.header):
            assert found is not None
            assert found[0].height == size[0]
            assert found[1] == slot
            assert plan.low[slot] <= token < plan.high[slot]
        state = grammar.advance(state, token[None])
    allowed = grammar.mask(state, torch.zeros(1, vocabulary.size))[0]
    assert (allowed == 0).nonzero().flatten().tolist() == [0]  # nothing but the end token
