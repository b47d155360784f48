"""Records, packing, masked diffusion and adapters: what training is fed with."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from tests.llm.fakes import byte_level, dual, multi_scale, one_scale, words
from tests.llm.test_families import FAMILIES, tiny_model
from tests.llm.test_grammar import SIZES, model_for
from tokenizers_mm.llm import MultimodalProcessor, Segment, VisualVocabulary, extend
from tokenizers_mm.llm.batch import IGNORED, pad_rows
from tokenizers_mm.llm.diffuse import DiffusionSettings, diffuse, diffusion_loss
from tokenizers_mm.llm.model import add_lora
from tokenizers_mm.llm.packing import pack_rows
from tokenizers_mm.llm.records import RecordMixture, Records, pretokenize


def picture(seed: int = 0, height: int = 16, width: int = 16) -> torch.Tensor:
    return torch.rand(3, height, width, generator=torch.Generator().manual_seed(seed)) * 2 - 1


@pytest.mark.parametrize("name", FAMILIES)
def test_packed_rows_do_not_see_each_other(name: str) -> None:
    """The loss over packed rows is that of the rows alone; rows are no longer than the windows of 16."""
    model, text = tiny_model(name)
    vocabulary = VisualVocabulary.for_tokenizer(one_scale(), text)
    extend(model, vocabulary).eval()
    processor = MultimodalProcessor(one_scale(), text, vocabulary)
    rows = processor.rows(["a b a", "b b", "a a a a", "b a"])
    packed = pack_rows(rows, 20, processor.pad)
    assert len(packed) < len(rows)
    with torch.no_grad():
        together = model(**packed.model_inputs()).logits
        number = 0
        for line in range(len(packed)):
            starts = [i for i in range(20) if packed.position_ids[line, i] == 0 and packed.input_ids[line, i:].any()]
            for row in rows:
                for start in starts:
                    inside = packed.input_ids[line, start : start + len(row)]
                    fresh = packed.position_ids[line, start : start + len(row)]
                    if not (torch.equal(inside, row.tokens) and torch.equal(fresh, row.position_ids)):
                        continue
                    alone = model(input_ids=row.tokens[None]).logits[0]
                    found = together[line, start : start + len(row)]
                    torch.testing.assert_close(found, alone, atol=2e-5, rtol=1e-4)  # float32, another order of sums
                    assert int(packed.labels[line, start]) == IGNORED
                    number += 1
    assert number >= len(rows)


def test_packing_keeps_every_label_and_fills_well() -> None:
    processor = MultimodalProcessor(
        one_scale(), byte_level(), VisualVocabulary.for_tokenizer(one_scale(), byte_level())
    )
    rows = processor.rows([["a" * n, picture(n)] for n in range(1, 30)])
    packed = pack_rows(rows, 100, processor.pad)
    total = sum(len(row) for row in rows)
    assert int(packed.places[..., 0].ge(0).sum()) == 29 * 16
    assert sorted(packed.labels[packed.labels != IGNORED].tolist()) == sorted(
        token for row in rows for token in row.labels[1:].tolist()
    )
    assert len(packed) <= -(-total // 100) + 1
    with pytest.raises(ValueError, match="rows: expected 1 to 10 tokens each, got 48"):
        pack_rows(rows, 10, processor.pad)


def test_positions_by_slot() -> None:
    text = words(["a b"])
    vocabulary = VisualVocabulary.for_tokenizer(multi_scale(), text)
    processor = MultimodalProcessor(multi_scale(), text, vocabulary, positions="slots")
    batch = processor([["a b", picture(), "a"], [picture(), "b a"]])
    longest = vocabulary.plan(16, 16).length
    assert batch.position_ids[0].tolist() == [longest, longest + 1, *range(longest), longest + 2, longest + 3]
    assert batch.position_ids[1][: longest + 3].tolist() == list(range(longest + 3))
    model = extend(learned_positions(len(text), longest + 9), vocabulary)
    assert model(**batch.model_inputs()).logits.shape[-1] == vocabulary.size


def learned_positions(rows: int, positions: int) -> Any:
    """A tiny GPT-2."""
    sizes: dict[str, Any] = {"n_embd": 32, "n_layer": 1, "n_head": 2, "bos_token_id": 0, "eos_token_id": 0}
    none: dict[str, Any] = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    return GPT2LMHeadModel(GPT2Config(vocab_size=rows, n_positions=positions, **sizes, **none))


def write(path: Path, lines: list[Any]) -> Path:
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines) + "\n")
    return path


def test_records_read_pretokenised_and_mixed(tmp_path: Path) -> None:
    tokenizer = dual()
    (tmp_path / "pictures").mkdir()
    for index, (height, width) in enumerate(SIZES):
        tokenizer.to_pil(picture(index, height, width)[None])[0].save(tmp_path / f"pictures/{index}.png")
    content = [
        {"text": "see {it}", "learn": False},
        {"image": "pictures/0.png"},
        {"text": "and"},
        {"image": "pictures/1.png"},
    ]
    lines: list[Any] = [
        {"id": 7, "content": content},
        {"content": [{"image": "pictures/2.png", "features": True}, {"text": "é"}]},
    ]
    path = write(tmp_path / "rows.jsonl", [lines[0], "", lines[1]])
    records = Records(path, tokenizer)
    assert len(records) == 2
    assert [segment.learn for segment in records[0]] == [False, True, True, True]
    assert pretokenize(records, tmp_path / "codes.jsonl") == 2
    again = Records(tmp_path / "codes.jsonl", tokenizer)
    text = byte_level()
    processor = MultimodalProcessor(tokenizer, text, VisualVocabulary.for_tokenizer(tokenizer, text, sizes=SIZES))
    first, second = processor([records[0], records[1]]), processor([again[0], again[1]])
    assert torch.equal(first.input_ids, second.input_ids)
    assert torch.equal(first.labels, second.labels)
    assert torch.equal(first.features[0][0], second.features[0][0])
    mixture = RecordMixture([(records, 3.0), (again, 1.0)], seed=1)
    assert mixture[5][0].content == mixture[5][0].content
    from_first = sum(any(isinstance(s.content, Path) and not s.as_features for s in mixture[i]) for i in range(400))
    assert 100 < from_first < 200  # 3 / 4 of the rows, half of which have pictures as ids: 150, sd 10


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "row 0: expected valid JSON"),
        ("[1]", "row 0: expected a list of parts under 'content'"),
        ({"content": []}, "row 0: expected a list of parts under 'content'"),
        ({"content": [{"text": "a", "image": "b"}]}, "row 0: expected parts with one of text, image, codes"),
        ({"content": [{"text": "a", "colour": 1}]}, "row 0: expected parts with one of text, image, codes"),
        ({"content": [{"text": 3}]}, "row 0: expected a text, got 3"),
        ({"content": [{"text": "a", "learn": 1}]}, "row 0: expected learn and features true or false"),
        ({"content": [{"codes": {"height": 16}}]}, "row 0: expected codes with height, width and ids"),
        ({"content": [{"codes": {"height": 16, "width": 16, "ids": [9] * 16}}]}, "row 0: ids of stream 'pixel'"),
        ({"content": [{"codes": {"height": 16, "width": 16, "ids": [1]}}]}, r"row 0: ids: expected int64 \[B, 16\]"),
    ],
)
@pytest.mark.filterwarnings("ignore:.*does not say which")
def test_bad_records_get_one_sentence(tmp_path: Path, line: Any, message: str) -> None:
    records = Records(write(tmp_path / "rows.jsonl", [line]), one_scale())
    with pytest.raises(ValueError, match=message):
        records[0]


def test_no_records(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="records: expected a JSONL file"):
        Records(tmp_path / "rows.jsonl", one_scale())
    with pytest.raises(ValueError, match="expected at least one row, got none"):
        Records(write(tmp_path / "rows.jsonl", [""]), one_scale())
    good = Records(write(tmp_path / "rows.jsonl", [{"content": [{"text": "a"}]}]), one_scale())
    with pytest.raises(ValueError, match="weights: expected numbers from 0 on"):
        RecordMixture([(good, 0.0)])


def test_masked_diffusion_learns_and_draws() -> None:
    """A tiny model learns two pictures and then gives each place one of the two codes that it saw there."""
    torch.manual_seed(0)
    text, tokenizer = words(["a b"], mask_token="<mask>"), one_scale()
    vocabulary = VisualVocabulary.for_tokenizer(tokenizer, text)
    processor = MultimodalProcessor(tokenizer, text, vocabulary, positions="slots")
    model = extend(learned_positions(len(text), 40), vocabulary)
    ramp = torch.linspace(-1, 1, 256).view(1, 16, 16).expand(3, -1, -1)
    shown = [[Segment("a", learn=False), ramp], [Segment("b", learn=False), -ramp]]
    batch, mask = processor(shown), int(text.mask_token_id)  # type: ignore[call-overload]
    optimizer, generator = torch.optim.Adam(model.parameters(), lr=5e-3), torch.Generator().manual_seed(0)
    losses = []
    for _ in range(200):
        loss = diffusion_loss(model, batch, mask, generator)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert sum(losses[-10:]) / 10 < 0.4 * losses[0]
    blank = batch.input_ids.clone()
    drawn = diffuse(model.eval(), vocabulary, batch, mask, DiffusionSettings(8, 0.0), generator=generator)
    seen = (drawn == blank) | (drawn == blank.flip(0))
    codes = batch.places[..., 0] >= 0
    assert torch.equal(drawn[~codes], blank[~codes])
    assert float(seen[codes].double().mean()) > 0.85  # guesses among 8 codes would give 0.25
    alone = diffuse(model, vocabulary, processor([[picture(3)], [picture(4)]]), mask, generator=generator)
    for row in processor.decode(alone, images="codes"):
        assert len(row) == 1
    guided = DiffusionSettings(4, 1.0, guidance=2.0)
    empty = processor([[picture(3)], [picture(4)]])
    diffuse(model, vocabulary, batch, mask, guided, unconditional=empty, generator=generator)
    with pytest.raises(ValueError, match="unconditional: expected rows for guidance"):
        diffuse(model, vocabulary, batch, mask, guided)
    with pytest.raises(ValueError, match="batch: expected as many codes in each row"):
        diffuse(model, vocabulary, processor(["a", [picture(1)]]), mask)


def test_masked_diffusion_draws_what_the_caption_says() -> None:
    """Two captions, each of an image of one code: drawn from a caption, with every code hidden, is that image."""
    torch.manual_seed(0)
    text, tokenizer = words(["dark light"], mask_token="<mask>"), one_scale()
    vocabulary = VisualVocabulary.for_tokenizer(tokenizer, text)
    processor = MultimodalProcessor(tokenizer, text, vocabulary, positions="slots")
    model, mask = extend(learned_positions(len(text), 40), vocabulary), int(text.mask_token_id)  # type: ignore[call-overload]
    levels = {"dark": -0.8, "light": 0.8}
    shown = [[Segment(caption, learn=False), torch.full((3, 16, 16), level)] for caption, level in levels.items()]
    batch = processor(shown)
    codes = [row[1].ids.unique().tolist() for row in processor.decode(batch.input_ids, images="codes")]
    assert codes == [[0], [7]]
    optimizer, generator = torch.optim.Adam(model.parameters(), lr=5e-3), torch.Generator().manual_seed(0)
    for _ in range(300):
        diffusion_loss(model, batch, mask, generator).backward()
        optimizer.step()
        optimizer.zero_grad()
    # The images given here are noise: diffuse hides them before the first step.
    captions = ["light", "dark", "dark", "light"]
    blank = processor([[Segment(caption, learn=False), picture(seed)] for seed, caption in enumerate(captions)])
    drawn = diffuse(model.eval(), vocabulary, blank, mask, DiffusionSettings(8, 1.0), generator=generator)
    found = [row[1].ids[0] for row in processor.decode(drawn, images="codes")]
    for caption, ids in zip(captions, found, strict=True):
        assert float((ids == {"dark": 0, "light": 7}[caption]).double().mean()) > 0.9, caption


def test_packed_masked_diffusion_is_padded_masked_diffusion() -> None:
    text, tokenizer = byte_level(), one_scale()
    vocabulary = VisualVocabulary.for_tokenizer(tokenizer, text)
    processor, model = MultimodalProcessor(tokenizer, text, vocabulary), model_for(vocabulary)
    rows = processor.rows([["ab", picture(1)], ["c", picture(2)]])
    padded, packed = pad_rows(rows, processor.pad), pack_rows(rows, 64, processor.pad, causal=False)
    from tokenizers_mm.llm.diffuse import see_both_ways

    with torch.no_grad():
        one = model(padded.input_ids, attention_mask=see_both_ways(padded), position_ids=padded.position_ids).logits
        both = model(packed.input_ids, attention_mask=see_both_ways(packed), position_ids=packed.position_ids).logits
    first = len(rows[0])
    torch.testing.assert_close(both[0, :first], one[0, :first], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(both[0, first : first + len(rows[1])], one[1, : len(rows[1])], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", ["llama", "qwen2", "phi3"])
def test_adapters_train_and_merge(name: str) -> None:
    pytest.importorskip("peft")
    model, text = tiny_model(name)
    vocabulary = VisualVocabulary.for_tokenizer(one_scale(), text)
    extend(model, vocabulary)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    adapted = add_lora(model, vocabulary, rank=4)
    batch = MultimodalProcessor(one_scale(), text, vocabulary)([["a", picture()]])
    optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(2):
        adapted(**batch.model_inputs()).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    adapted.eval()
    inputs = {key: value for key, value in batch.model_inputs().items() if key != "labels"}
    with torch.no_grad():
        expected = adapted(**inputs).logits
        merged = adapted.merge_and_unload()
        torch.testing.assert_close(merged(**inputs).logits, expected, atol=1e-5, rtol=1e-4)
    assert set(merged.state_dict()) == set(before)
    table = merged.get_input_embeddings().weight
    old = before["model.embed_tokens.weight"]
    assert torch.equal(table[: vocabulary.text_size], old[: vocabulary.text_size])
    assert not torch.equal(table[vocabulary.text_size : vocabulary.size], old[vocabulary.text_size : vocabulary.size])
