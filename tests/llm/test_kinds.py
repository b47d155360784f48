"""Kinds of faults: state that outlives its sequence, several end tokens, ids of any kind, trusted marks and files."""

import json
import resource
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.llm.fakes import dual, one_scale, words
from tests.llm.test_families import tiny_model
from tests.llm.test_grammar import SIZES, model_for
from tests.llm.test_training import picture, write
from tokenizers_mm.llm import (
    GenerationSettings,
    Grammar,
    GrammarProcessor,
    MultimodalProcessor,
    Sampling,
    TrainableRows,
    VisualVocabulary,
    extend,
    generate,
)
from tokenizers_mm.llm.model import MARK
from tokenizers_mm.llm.records import Records
from tokenizers_mm.llm.transformers_api import COUNTS, load_language_model, num_parameters

GREEDY = GenerationSettings(60, Sampling(temperature=0))


def chat() -> tuple[Any, MultimodalProcessor]:
    text = words(["a b c d"])
    vocabulary = VisualVocabulary.for_tokenizer(one_scale(), text)
    return model_for(vocabulary), MultimodalProcessor(one_scale(), text, vocabulary)


# State that recognises a sequence by its length


@pytest.mark.parametrize("options", [{"do_sample": True, "top_k": 0}, {"num_beams": 3}])
def test_one_processor_serves_calls_of_any_length(options: dict[str, Any]) -> None:
    """Shorter, longer, equal, one token longer, of more rows, and the whole of an earlier answer: each is an image."""
    model, processor = chat()
    shared = GrammarProcessor(Grammar(processor.vocabulary, "image", processor.eos))
    rows: list[Any] = [["a b"], ["a"], ["a b c d a b c d"], ["b a"], ["a b c", "a b c"]]
    rows.append([["a", picture(1), "b"]])
    answer = None
    for prompt in [*rows, None]:
        ids = answer if prompt is None else processor(prompt, end=False, side="left").input_ids
        assert ids is not None
        torch.manual_seed(0)
        answer = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            logits_processor=[shared],
            max_new_tokens=40,
            eos_token_id=processor.eos,
            pad_token_id=processor.pad,
            **options,
        )
        for row in processor.decode(answer[:, ids.shape[1] :], images="codes"):
            assert [type(item).__name__ for item in row] == ["ImageCodes"]


def test_a_prompt_as_long_as_the_row_so_far_is_read_anew() -> None:
    _, processor = chat()
    grammar = Grammar(processor.vocabulary, "image", processor.eos)
    shared, size = GrammarProcessor(grammar), processor.vocabulary.size
    first = processor([["a", processor.opening()]], end=False).input_ids
    code = processor.vocabulary.codes[0].start
    shared(first, torch.zeros(1, size))
    shared(torch.cat([first, torch.tensor([[code]])], 1), torch.zeros(1, size))
    other = processor(["a b c d"], end=False).input_ids
    assert other.shape[1] == first.shape[1] + 2
    expected = grammar.mask(grammar.read(other), torch.zeros(1, size))
    assert torch.equal(shared(other, torch.zeros(1, size)), expected)


def test_beams_that_change_places_keep_their_states() -> None:
    _, processor = chat()
    grammar = Grammar(processor.vocabulary)
    shared, size = GrammarProcessor(grammar), processor.vocabulary.size
    rows = processor(["a", processor.opening()], end=False, side="left").input_ids
    shared(rows, torch.zeros(2, size))
    code = processor.vocabulary.codes[0].start
    mixed = torch.cat([rows[[1, 1]], torch.tensor([[code], [code + 1]])], 1)
    expected = grammar.mask(grammar.read(mixed), torch.zeros(2, size))
    assert torch.equal(shared(mixed, torch.zeros(2, size)), expected)


# End tokens in the plural


class Saying(torch.nn.Module):
    """A language model that says given tokens, one after another, whatever it reads."""

    def __init__(self, says: list[int], rows: int) -> None:
        super().__init__()
        self.table, self.says, self.rows = torch.nn.Embedding(rows, 2), says, rows

    def get_input_embeddings(self) -> Any:
        return self.table

    def get_output_embeddings(self) -> Any:
        return self.table

    def forward(self, input_ids: Any, attention_mask: Any, position_ids: Any, use_cache: Any, cache: Any = None) -> Any:
        from types import SimpleNamespace

        done = 0 if cache is None else cache
        logits = torch.zeros(*input_ids.shape, self.rows)
        logits[:, -1, self.says[min(done, len(self.says) - 1)]] = 9.0
        return SimpleNamespace(logits=logits, cache=done + 1)


def test_every_end_token_ends_a_row() -> None:
    from types import SimpleNamespace

    _, processor = chat()
    text, size = processor.text_tokenizer, processor.vocabulary.size
    a, b = text.convert_tokens_to_ids(["a", "b"])
    prompts = processor(["c", "d"], end=False, side="left")
    model = Saying([a, a, b, a], size).eval()
    for eos, named, length in [
        ([processor.eos, b], None, 3),
        (np.array([processor.eos, b]), None, 3),
        (processor.eos, [processor.eos, b], 3),
        (processor.eos, b, 3),
        (processor.eos, None, 8),
        (None, [b], 8),
    ]:
        model.generation_config = SimpleNamespace(eos_token_id=named)  # type: ignore[assignment]
        ids = generate(
            model, prompts, Grammar(processor.vocabulary, "free", eos), GenerationSettings(8, GREEDY.sampling)
        )
        assert ids.shape[1] == length, (eos, named)
    image = Grammar(processor.vocabulary, "image", [int(processor.eos or 0), b])
    drawn = generate(Saying([b], size).eval(), prompts, image, GREEDY)
    assert drawn[:, -1].tolist() == [b, b]


def test_end_tokens_that_cannot_end_are_refused() -> None:
    _, processor = chat()
    for wrong in (-1, processor.vocabulary.size, processor.vocabulary.codes[0].start, [1, -5]):
        with pytest.raises(ValueError, match="eos: expected ids of text tokens"):
            Grammar(processor.vocabulary, "image", wrong)
    with pytest.raises(ValueError, match="eos: expected whole numbers"):
        Grammar(processor.vocabulary, "image", 1.0)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="eos: expected the id of the end token"):
        Grammar(processor.vocabulary, "image", [])


# Ids of any integer kind


def test_ids_are_whole_numbers_of_any_kind() -> None:
    _, processor = chat()
    image = picture()
    batch = processor([["a b", image], ["c", image, "d"]])
    rows = batch.input_ids
    expected = [
        [part if isinstance(part, str) else part.ids.tolist() for part in row]
        for row in processor.decode(rows, images="codes")
    ]
    kinds: list[Any] = [rows.to(kind) for kind in (torch.int32, torch.int16, torch.uint16, torch.uint32, torch.int64)]
    kinds += [rows.numpy(), rows.numpy().astype(np.uint16), rows.tolist(), list(rows), [row.numpy() for row in rows]]
    kinds += [tuple(tuple(row) for row in rows.tolist()), [rows[0, :-1].tolist(), rows[1].to(torch.uint8)]]
    for ids in kinds[:-1]:
        found = processor.decode(ids, images="codes")
        assert [[part if isinstance(part, str) else part.ids.tolist() for part in row] for row in found] == expected
    assert len(processor.decode(kinds[-1], images="codes")) == 2
    plan = processor.vocabulary.plan(16, 16)
    codes = processor.tokenizer.encode(image[None])
    tokens = plan.to_tokens(codes.ids)  # type: ignore[union-attr]
    assert torch.equal(plan.to_tokens(codes.ids.numpy().astype(np.uint16)), tokens)  # type: ignore[union-attr]
    assert torch.equal(processor.vocabulary.to_codes(tokens.tolist(), 16, 16).ids, codes.ids)  # type: ignore[union-attr,arg-type]
    grammar = Grammar(processor.vocabulary)
    assert torch.equal(grammar.read(rows.tolist()), grammar.read(rows))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "ids",
    [
        torch.zeros(1, 3),
        torch.zeros(1, 3, dtype=torch.bool),
        np.zeros((1, 3)),
        [[1.0, 2.0]],
        [["a"]],
        [[True]],
        [[10**30]],
        [[1, [2]]],
    ],
)
def test_other_ids_are_refused_with_a_short_sentence(ids: Any) -> None:
    _, processor = chat()
    with pytest.raises(ValueError, match=r"ids.*: expected whole numbers") as caught:
        processor.decode(ids)
    assert len(str(caught.value)) < 300


def test_rows_and_labels_are_told_apart_from_ids() -> None:
    _, processor = chat()
    for flat in ([1, 2, 3], torch.tensor([1, 2]), torch.zeros(1, 1, 1, dtype=torch.int64), np.arange(3)):
        with pytest.raises(ValueError, match=r"ids: expected rows of ids \[B, L\]"):
            processor.decode(flat)
    labels = processor([["a", picture()]], side="left").labels
    labels[0, 0] = -100
    with pytest.raises(ValueError, match=r"token 0: expected an id from 0 on \(labels say -100 .*\), got -100"):
        processor.decode(labels)


@pytest.mark.filterwarnings("ignore:.*does not say which")
def test_no_message_prints_all_ids(tmp_path: Path) -> None:
    long = list(range(20_000))
    _, processor = chat()
    records = Records(
        write(
            tmp_path / "rows.jsonl",
            [
                {"content": [{"codes": {"height": 16, "width": 16, "ids": long}}]},
                {"content": [{"text": "a", "learn": long}]},
                {"content": [{"image": long}]},
                {"content": [{"text": long}]},
                {"content": [{"codes": long}]},
                {"content": [{str(long): "a"}]},
            ],
        ),
        one_scale(),
    )
    for index in range(len(records)):
        with pytest.raises(ValueError, match="row") as caught:
            records[index]
        assert len(str(caught.value)) < 1000
    for wrong in ([long], [[float(number) for number in long]], [torch.tensor(long)]):
        with pytest.raises(ValueError, match="expected") as caught:
            processor.decode(wrong)
        assert len(str(caught.value)) < 1000


# Marks that are trusted


def test_rows_are_counted_although_the_configuration_says_that_they_are_there() -> None:
    for name in ("llama", "llama-tied"):
        model, text = tiny_model(name)
        vocabulary = VisualVocabulary.for_tokenizer(one_scale(), text)
        extend(model, vocabulary)
        model.resize_token_embeddings(len(text), mean_resizing=False)
        with pytest.raises(ValueError, match=rf"model: expected at least {vocabulary.size} rows, .* got {len(text)}"):
            extend(model, vocabulary)
        with pytest.raises(ValueError, match="model: expected"):
            TrainableRows(model, vocabulary)


def test_a_marked_model_with_a_short_head_is_refused() -> None:
    model, text = tiny_model("llama")
    vocabulary = VisualVocabulary.for_tokenizer(one_scale(), text)
    extend(model, vocabulary)
    model.lm_head = torch.nn.Linear(32, len(text), bias=False)
    with pytest.raises(ValueError, match=rf"model: expected at least {vocabulary.size} rows"):
        extend(model, vocabulary)


def test_a_mark_of_something_else_is_refused() -> None:
    for mark in (5, "all", [], {"size": 1}, {"text_size": None, "size": [1] * 50_000}):
        model, text = tiny_model("llama")
        setattr(model.config, MARK, mark)
        with pytest.raises(ValueError, match="model: expected one without visual rows") as caught:
            extend(model, VisualVocabulary.for_tokenizer(one_scale(), text))
        assert len(str(caught.value)) < 1000


def test_a_text_tokenizer_with_other_tokens_in_the_place_of_images_is_refused() -> None:
    text = words(["a b"])
    vocabulary = VisualVocabulary.for_tokenizer(one_scale(), text)
    MultimodalProcessor(one_scale(), text, vocabulary)
    text.add_tokens(["<own>"])
    with pytest.raises(ValueError, match=r"text_tokenizer: expected .*image_start.* at id 5, got <own>"):
        MultimodalProcessor(one_scale(), text, vocabulary)


def test_records_that_change_while_they_are_read_are_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", [{"content": [{"text": "a"}]}, {"content": [{"text": "b"}]}])
    records = Records(path, one_scale())
    assert records[1][0].content == "b"
    write(path, [{"content": [{"text": "a much longer text"}]}, {"content": [{"text": "b"}]}])
    with pytest.raises(ValueError, match="expected the file as it was opened, got another one"):
        records[1]


# Files of others


def vocabulary_data(tmp_path: Path) -> dict[str, Any]:
    VisualVocabulary.for_tokenizer(dual(), words(["a"]), sizes=SIZES).save(tmp_path)
    return json.loads((tmp_path / "visual_vocab.json").read_text())


def put(data: Any, place: tuple[Any, ...], value: Any) -> Any:
    inner = data
    for key in place[:-1]:
        inner = inner[key]
    inner[place[-1]] = value
    return data


BROKEN: list[tuple[tuple[Any, ...], Any]] = [
    (("text_size",), -1),
    (("text_size",), 10**12),
    (("text_size",), 1e999),
    (("text_size",), "5"),
    (("codes", 0, "size"), 10**12),
    (("codes", 0, "size"), 0),
    (("codes", 0, "size"), -8),
    (("codes", 0, "start"), -3),
    (("codes", 1, "start"), 10**12),
    (("codes", 0, "size"), 9),
    (("codes", 0, "stream"), "pixel"),
    (("codes", 0, "text"), "{:>1000000000}"),
    (("codes", 0, "text"), "{0.__class__}"),
    (("markers", 0, "ids"), [-1]),
    (("markers", 0, "ids"), []),
    (("markers", 0, "ids"), [10**12]),
    (("markers", 0, "ids"), [1.5]),
    (("markers", 0, "name"), "image_end"),
    (("layout", "streams"), []),
    (("layout", "size"), "nowhere"),
    (("layout", "row_end"), True),
    (("layout", "size_text"), "{height.__class__}"),
    (("sizes", 0, "height"), 0),
    (("sizes", 0, "width"), -64),
    (("sizes", 0, "height"), 10**12),
    (("sizes", 0, "grids", 0, 0), [10**6, 10**6]),
    (("sizes", 0, "grids", 0, 0), [0, 4]),
    (("sizes", 0, "grids", 0, 0), [2]),
    (("sizes", 0, "grids", 0), []),
    (("sizes", 0, "grids"), [[[2, 2]]]),
    (("sizes", 0, "text_ids"), [-4]),
    (("sizes", 1, "width"), 64),
    (("sizes",), []),
    (("format",), [1]),
    (("unknown",), 1),
]


@pytest.mark.parametrize(
    ("place", "value"), BROKEN, ids=[".".join(map(str, p)) + f"-{n}" for n, (p, _) in enumerate(BROKEN)]
)
def test_a_broken_vocabulary_is_refused_in_one_sentence(place: tuple[Any, ...], value: Any, tmp_path: Path) -> None:
    data = put(vocabulary_data(tmp_path), place, value)
    (tmp_path / "visual_vocab.json").write_text(json.dumps(data))
    with pytest.raises(ValueError, match=r"expected|unknown key") as caught:
        VisualVocabulary.load(tmp_path)
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize(
    "content",
    [
        b"[" * 200_000,
        b'{"a":' * 100_000,
        b"\xff\xfe{",
        b"[]",
        b"5",
        b"",
        b'{"format": 1}',
        b'{"format": ' + b"9" * 6000 + b"}",
    ],
)
def test_a_vocabulary_that_is_none_is_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "visual_vocab.json").write_bytes(content)
    with pytest.raises(ValueError, match="expected") as caught:
        VisualVocabulary.load(tmp_path)
    assert len(str(caught.value)) < 1000


def spots(value: Any, place: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Places in JSON, of long lists and mappings the first ones."""
    yield from [place] if place else []
    pairs = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in list(pairs)[:12]:
        yield from spots(item, (*place, key))


ODD: list[Any] = [None, True, -1, 10**30, 1e300, 1.5, "", "x" * 10_000, [], {}, [None], {"a": 1}, [-1, -1]]


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "multimodal_processor.json"])
def test_a_changed_folder_of_a_processor_works_or_is_one_sentence(name: str, tmp_path: Path) -> None:
    text = words(["a b c"])
    vocabulary = VisualVocabulary.for_tokenizer(one_scale(), text)
    MultimodalProcessor(one_scale(), text, vocabulary).save(tmp_path)
    whole = (tmp_path / name).read_text()
    refused = []
    for number, place in enumerate(spots(json.loads(whole))):
        for value in ODD[number % 3 :: 3]:
            (tmp_path / name).write_text(json.dumps(put(json.loads(whole), place, value)))
            try:
                processor = MultimodalProcessor.from_pretrained(tmp_path, one_scale())
                batch = processor([["a b", torch.zeros(3, 16, 16)]])
                processor.decode(batch.input_ids, malformed="skip")
            except ValueError as error:
                refused.append(str(error))
    assert len(refused) > 3
    for sentence in refused:
        assert ": expected " in sentence or "unknown key" in sentence
        assert "\n" not in sentence
        assert len(sentence) < 1000, sentence[:200]


def test_a_text_tokenizer_on_a_full_disk_leaves_the_old_folder(tmp_path: Path) -> None:
    """The library below raises an error without a class of its own."""
    folder = tmp_path / "processor"
    text = words(["a"])
    made = MultimodalProcessor(one_scale(), text, VisualVocabulary.for_tokenizer(one_scale(), text))
    made.save(folder)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    handler, limit = signal.signal(signal.SIGXFSZ, signal.SIG_IGN), resource.getrlimit(resource.RLIMIT_FSIZE)
    for size in (0, 10, 700):
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, limit[1]))
        try:
            with pytest.raises(OSError) as raised:
                made.save(folder)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        assert raised.value.filename == str(folder)
        assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    signal.signal(signal.SIGXFSZ, handler)
    assert [path.name for path in tmp_path.iterdir()] == ["processor"]


def test_a_language_model_of_anybody_is_one_sentence(tmp_path: Path) -> None:
    """Weights of which bits were changed, and configurations that ask for more parts than can ever be built."""
    model_for(VisualVocabulary.for_tokenizer(one_scale(), words(["a"]))).save_pretrained(tmp_path)
    weights, config = tmp_path / "model.safetensors", tmp_path / "config.json"
    whole, entries = weights.read_bytes(), json.loads(config.read_text())
    changes: list[tuple[Path, bytes]] = [(weights, whole[:size]) for size in (0, 5, 100, len(whole) - 1)]
    changes += [(weights, b"\xff" * 8 + whole[8:]), (weights, whole[:9] + b"\xff" + whole[10:])]
    counts = [key for key in entries if COUNTS.fullmatch(key) and isinstance(entries[key], int)]
    assert counts
    changes += [(config, json.dumps({**entries, key: 10**size}).encode()) for key in counts for size in (7, 30)]
    changes += [(config, json.dumps({**entries, key: value}).encode()) for key in counts for value in ("x", [1], None)]
    for path, content in changes:
        before, started, sentence = path.read_bytes(), time.process_time(), ""
        path.write_bytes(content)
        try:
            load_language_model(tmp_path, "language_model")
        except ValueError as error:
            sentence = str(error)
        assert not sentence or ": expected " in sentence, content[:80]
        assert sentence or path == config
        assert time.process_time() - started < 5
        path.write_bytes(before)
    with pytest.raises(ValueError, match="n_layer: expected at most 1024, got 100000"):
        num_parameters("gpt2", "", {"n_layer": 100_000}, "model")


def test_records_read_nothing_outside_of_their_folder(tmp_path: Path) -> None:
    inside, outside = tmp_path / "in", tmp_path / "out"
    (inside / "deep").mkdir(parents=True)
    outside.mkdir()
    for folder in (inside, outside, inside / "deep"):
        one_scale().to_pil(picture()[None])[0].save(folder / "0.png")
    (inside / "link.png").symlink_to(outside / "0.png")
    (inside / "folder").symlink_to(outside)
    good = ["0.png", "deep/0.png", "deep/../0.png", str(inside / "0.png")]
    bad = [
        "../out/0.png",
        str(outside / "0.png"),
        "deep/../../out/0.png",
        "link.png",
        "folder/0.png",
        "~/0.png/../../../out/0.png",
    ]
    path = write(inside / "rows.jsonl", [{"content": [{"image": name}]} for name in good + bad])
    records = Records(path, one_scale())
    for index in range(len(good)):
        assert records[index][0].content.is_file()  # type: ignore[attr-defined]
    for index in range(len(good), len(good) + len(bad)):
        with pytest.raises(ValueError, match=r"row \d+: expected an image inside of .* \(or outside=True\), got"):
            records[index]
    everywhere = Records(path, one_scale(), outside=True)
    assert everywhere[len(good)][0].content.is_file()  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    "line",
    [
        b'{"content": [{"text": "\xff"}]}',
        b'\xff\xfe{\x00"\x00',
        b'{"content": [{"text": "\\ud800"}]}',
        b'{"content": [{"image": "a\\u0000b.png"}]}',
        b'{"content": [{"image": ""}]}',
        b'{"content": [{"image": "' + b"a" * 70_000 + b'"}]}',
        b'{"content": ' + b"[" * 100_000,
        b'{"content": [{"codes": {"height": 16, "width": 16, "ids": [1e3]}}]}',
        b'{"content": [{"codes": {"height": 16, "width": 16, "ids": [' + b"9" * 40 + b"]}}]}",
        b'{"content": [{"codes": {"height": 16, "width": 16, "ids": [' + b"9" * 5000 + b"]}}]}",
        b'{"content": [{"codes": {"height": ' + b"9" * 40 + b', "width": 16, "ids": [1]}}]}',
        b'{"content": [{"codes": {"height": -16, "width": 16, "ids": [1]}}]}',
        b'{"content": [{"text": "a", "learn": 1}]}',
        b'{"content": [{"text": 5}]}',
        b'{"content": [[]]}',
        b'{"content": {}}',
        b"5",
        b"null",
    ],
    ids=range(18),
)
@pytest.mark.filterwarnings("ignore:.*does not say which")
def test_a_broken_record_is_refused_in_one_sentence(line: bytes, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(line + b"\n")
    for tokenizer in (one_scale(), dual()):
        with pytest.raises(ValueError, match=r"rows\.jsonl row 0") as caught:
            Records(path, tokenizer)[0]
        assert len(str(caught.value)) < 1000


def test_the_former_name_of_trainable_rows_still_works() -> None:
    from tokenizers_mm import llm

    with pytest.warns(DeprecationWarning, match="OnlyNewRows is now TrainableRows"):
        assert llm.OnlyNewRows is TrainableRows
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = llm.nothing
