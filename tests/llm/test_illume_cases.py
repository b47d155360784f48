"""The ILLUME+ reference case: token strings and ids, prompts, parsing, decoding traces, guidance, sampling, features.

Strings, ids and traces are compared exactly; logits and embedded sequences within float32 rounding (1e-5).
"""

import json
from functools import cache
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from tests.cases import case
from tests.llm.fakes import FakeTokenizer, words
from tokenizers_mm.functional.sampling import filter_logits, guide_logits
from tokenizers_mm.llm import Grammar, MultimodalProcessor, Segment, VisualVocabulary
from tokenizers_mm.llm.layout import IMAGE_END, IMAGE_START, ROW_END, Layout, stream_marker
from tokenizers_mm.llm.parsing import ImageRun, Parser, repair
from tokenizers_mm.llm.presets import ChatFormat, illume_plus, illume_request, illume_size_tag
from tokenizers_mm.llm.projector import FeatureProjector, ProjectorConfig, embed
from tokenizers_mm.llm.vocabulary import CodeRange, ImageSize, Marker
from tokenizers_mm.types import ImageCodes

QWEN = 151665
"""Tokens of the Qwen2.5 text tokenizer."""


@cache
def reference() -> dict[str, Any]:
    return json.loads((case("dualvitok/mllm").folder / "layout.json").read_text())


def published() -> FakeTokenizer:
    """The published codebook sizes, with the grids of the reference at its sizes (and of the 2 x 3, 3 x 2 example)."""
    table = {tuple(map(int, key.split("x"))): value for key, value in reference()["token_num_mapping_version"].items()}

    def grids(level: str, example: tuple[int, int]):
        def find(height: int, width: int) -> tuple[tuple[int, int], ...]:
            if (height, width) == (64, 64):
                return (example,)
            if (height, width) not in table:
                raise ValueError("size: expected one of the table, got another")
            return (tuple(table[height, width][level]),)

        return find

    return FakeTokenizer({"semantic": (32768, grids("sem", (2, 3))), "pixel": (98304, grids("pix", (3, 2)))}, None, 64)


@cache
def text_tokenizer() -> Any:
    return words(["hello world no image broken"], size=QWEN, eos_token="<|im_end|>")


@cache
def vocabulary() -> VisualVocabulary:
    return illume_plus(published(), text_tokenizer())


def example_codes() -> ImageCodes:
    streams = published().streams(64, 64)
    ids = [code for level in reference()["example"]["image_embed_inds"] for row in level for code in row]
    return ImageCodes(torch.tensor([ids]), 64, 64, streams)


def text_of(tokens: list[int]) -> str:
    """Tokens as strings, by the texts of the vocabulary."""
    texts = {marker.ids[0]: marker.text for marker in vocabulary().markers}
    parts = []
    for token in tokens:
        stream, code = (int(v) for v in vocabulary().code(torch.tensor(token)))
        parts.append(vocabulary().codes[stream].text.format(code) if stream >= 0 else texts[token])
    return "".join(parts)


def test_ids_and_strings() -> None:
    known, ref = vocabulary(), reference()
    for name, text in [(IMAGE_START, "start_of_image"), (IMAGE_END, "end_of_image"), (ROW_END, "end_of_line")]:
        assert known.marker(name) == (ref["qwen2_5_ids"][text],)
    for level, code in enumerate(known.codes):
        assert known.marker(stream_marker(code.stream, "start")) == (ref["qwen2_5_ids"][f"start_of_level{level}"],)
        assert known.marker(stream_marker(code.stream, "end")) == (ref["qwen2_5_ids"][f"end_of_level{level}"],)
        assert [code.start, code.start + code.size] == ref["qwen2_5_ids"][f"level{level}_range"]
    assert {marker.text: marker.ids[0] for marker in known.markers} == ref["special_token_ids"]
    assert known.size - known.text_size == 131111
    tokens = known.to_tokens(example_codes())[0].tolist()[2:]
    assert tokens == ref["example"]["token_ids"]
    assert text_of(tokens) == ref["example"]["text"]


def test_lengths() -> None:
    """The reference allows six tokens more than a sequence without its size needs; ours count the size (2 tokens)."""
    for key, value in reference()["token_num_mapping_version"].items():
        height, width = map(int, key.split("x"))
        plan = vocabulary().plan(height, width)
        assert [stream.num_ids for stream in plan.streams] == value["nums"]
        assert plan.length - 2 == value["max_len"] - 4


def test_prompts() -> None:
    chat, ref, size = ChatFormat(), reference()["prompts"], (512, 512)
    tag = illume_size_tag(*size)
    assert chat.prompt(illume_request("generate", size, "a cat")) + tag == ref["t2i"]
    assert chat.prompt(illume_request("generate_any", size)) + tag == ref["t2i_uncond"]
    assert chat.prompt(illume_request("edit", size, "add a hat")) + tag == ref["edit"]
    assert chat.prompt(illume_request("reconstruct", size)) + tag == ref["edit_uncond"]
    question = illume_request("understand", text="Describe the image.")
    assert chat.prompt(question) == ref["understand"]
    assert chat.prompt(question, "A frog.") == ref["train_full"]
    assert "{braces}" in chat.prompt(illume_request("generate", size, "{braces}"))


def test_training_samples() -> None:
    image = text_of(vocabulary().to_tokens(example_codes())[0].tolist()[2:])
    for kind, size, request in [
        ("t2i", (384, 576), illume_request("generate", (384, 576), "a frog")),
        ("edit", (512, 512), illume_request("edit", (512, 512), "Make it red.")),
    ]:
        human, gpt = reference()["train_samples"][kind]["out"]["conversations"]
        assert human["value"] == request
        assert gpt["value"] == illume_size_tag(*size) + image


def test_parsing() -> None:
    """Text tokens here are words, so the texts are compared without spaces."""
    small = vocabulary().with_sizes([(64, 64)])
    strings = {marker.text: marker.ids[0] for marker in small.markers}
    strings |= {small.codes[level].text.format(i): small.codes[level].start + i for level, i in _used_codes()}
    parser = Parser(small)
    for entry in reference()["parse"]:
        tokens = _split(entry["text"], strings)
        skipped = parser.parse(tokens, "skip")
        images = [run.codes for run in skipped if isinstance(run, ImageRun)]
        streams = [[image.stream("semantic")[0].tolist(), image.stream("pixel")[0].tolist()] for image in images]
        assert streams == entry["indices"]
        shown = "".join(
            "<image>" if isinstance(run, ImageRun) else _words(tokens[run.start : run.end]) for run in skipped
        )
        assert shown == entry["generated_text"].replace(" ", "").replace("<start_of_image>", "")
    with pytest.raises(ValueError, match="image at token 0: expected 23 tokens, got 2"):
        parser.parse(_split("<start_of_image>broken", strings))


def _used_codes() -> list[tuple[int, int]]:
    levels = reference()["example"]["image_embed_inds"]
    return [(level, code) for level, rows in enumerate(levels) for row in rows for code in row]


def _split(text: str, strings: dict[str, int]) -> Tensor:
    tokens: list[int] = []
    while text:
        found = next((key for key in strings if text.startswith(key)), None)
        if found is not None:
            tokens.append(strings[found])
            text = text[len(found) :]
            continue
        cut = min([i for i in (text.find("<start_of"), len(text)) if i >= 0 and i > 0] or [len(text)])
        tokens += text_tokenizer()(text[:cut], add_special_tokens=False)["input_ids"]
        text = text[cut:]
    return torch.tensor(tokens)


def _words(tokens: Tensor) -> str:
    return text_tokenizer().decode(tokens.tolist()).replace(" ", "")


def test_wrong_counts_are_repaired() -> None:
    for entry in reference()["check_image_token_num"]:
        grids = tuple(((1, count),) for count in entry["nums"])
        codes = (CodeRange("semantic", 16, 100), CodeRange("pixel", 16, 200))
        markers = (Marker(IMAGE_START, (50,)), Marker(IMAGE_END, (51,)))
        known = VisualVocabulary(50, codes, markers, Layout(("semantic", "pixel")), (ImageSize(1, 1, grids),))
        tokens = [start + code for start, level in zip((100, 200), entry["inds"], strict=True) for code in level]
        repaired = repair(known, torch.tensor(tokens, dtype=torch.int64), known.plan(1, 1))
        assert [repaired.stream("semantic")[0].tolist(), repaired.stream("pixel")[0].tolist()] == entry["out"]


def traced(mode: Any) -> Grammar:
    ref = reference()["interleaved_processor"]
    special, sizes = ref["special"], (tuple(ref["sem"]), tuple(ref["pix"]))
    names = {IMAGE_START: "start_of_image", IMAGE_END: "end_of_image", ROW_END: "end_of_line"}
    for level, stream in enumerate(("semantic", "pixel")):
        names[f"{stream}_start"], names[f"{stream}_end"] = f"start_of_level{level}", f"end_of_level{level}"
    markers = tuple(Marker(name, (special[text],)) for name, text in names.items())
    codes = tuple(
        CodeRange(stream, ref[level][1] - ref[level][0], ref[level][0])
        for stream, level in (("semantic", "level0"), ("pixel", "level1"))
    )
    layout = Layout(("semantic", "pixel"), stream_markers=True, row_end=True)
    grids = tuple((grid,) for grid in sizes)
    return Grammar(
        VisualVocabulary(64, codes, markers, layout, (ImageSize(1, 1, grids),)), mode, special["end_of_text"]
    )


@pytest.mark.parametrize(("trace", "mode"), [("interleaved_processor", "free"), ("dualvq_processor", "image")])
def test_decoding_traces(trace: str, mode: str) -> None:
    """Step by step what is allowed. Outside of an image the reference also allows a lone end of image; we do not."""
    walk = next(value for key, value in reference()[trace].items() if key.startswith("walk"))
    grammar, scores = traced(mode), torch.zeros(1, 64)
    plain = grammar.to_dict()
    first = torch.tensor([walk["first"]], dtype=torch.int64)
    state = grammar.read(first) if first.numel() else grammar.begin(torch.tensor([0]))
    number = int(state)
    for step in walk["steps"]:
        allowed = torch.isfinite(grammar.mask(state, scores.clone())[0]).nonzero()[:, 0].tolist()
        outside = mode == "free" and int(state) == 0
        assert allowed == [token for token in step["allowed"] if not (outside and token == 41)]
        told = plain["states"][number]
        assert allowed == sorted({token for low, high in told["allow"] for token in range(low, high)})
        state = grammar.advance(state, torch.tensor([step["chosen"]]))
        number = told["next"] if "next" in told else told["jump"].get(str(step["chosen"]), told["else"])
        assert number == int(state)


def test_guidance() -> None:
    ref = reference()["cfg"]
    for call in ref["calls"]:
        out = guide_logits(
            torch.tensor(call["cond_logits"]), torch.tensor(call["uncond_logits"]), ref["guidance_scale"]
        )
        torch.testing.assert_close(out, torch.tensor(call["out"]), atol=1e-5, rtol=0)


def test_sampling_filters() -> None:
    for entry in reference()["sampling"]:
        scores = torch.tensor([entry["scores"]])
        values, index = filter_logits(scores, entry["temp"], entry["top_k"], entry["top_p"])
        assert index is not None
        assert sorted(index[torch.isfinite(values)].tolist()) == entry["kept"]


def test_features_in_the_sequence() -> None:
    """Two images as features, with the markers of the layout between them."""
    folder = case("dualvitok/mllm").folder
    tensors, meta = load_file(folder / "sequence.safetensors"), json.loads((folder / "sequence.json").read_text())
    images = {(64, 96): meta["feature_shapes"][0], (112, 64): meta["feature_shapes"][1]}
    cut = [area(shape[0]) for shape in images.values()], [area(shape[1]) for shape in images.values()]
    semantic, pixel = tensors["h_semantics"][0].split(cut[0]), tensors["h_pixels"][0].split(cut[1])
    parts = {size: (semantic[i][None], pixel[i][None]) for i, size in enumerate(images)}

    def stream_features(x: Tensor) -> dict[str, Tensor]:
        """By stream, on its grid, as DualViTok's own."""
        size = (x.shape[2], x.shape[3])
        return {
            name: part.unflatten(1, tuple(images[size][i]))
            for i, (name, part) in enumerate(zip("sp", parts[size], strict=True))
        }

    tokenizer = FakeTokenizer(
        {
            "semantic": (4, lambda h, w: (tuple(images[h, w][0]),)),
            "pixel": (4, lambda h, w: (tuple(images[h, w][1]),)),
        },
        None,
        16,
    )
    layout = Layout(("semantic", "pixel"), stream_markers=True, row_end=True, size="before")
    text = words(["a"])
    known = VisualVocabulary.for_tokenizer(tokenizer, text, layout, list(images))
    order = [IMAGE_START, IMAGE_END, ROW_END, "semantic_start", "semantic_end", "pixel_start", "pixel_end"]
    embedding = nn.Embedding(known.size, 40)
    with torch.no_grad():
        for name, row in zip(order, tensors["special_embed"], strict=True):
            embedding.weight[known.marker(name)[0]] = row
    projector = FeatureProjector(ProjectorConfig((96, 32), 40))
    names = {"mm_projector.projector_1.": "parts.0.", "mm_projector.projector_2.": "parts.1."}
    projector.load_state_dict(
        {
            new + key.removeprefix(old): value
            for key, value in tensors.items()
            for old, new in names.items()
            if old in key
        }
    )
    processor = MultimodalProcessor(tokenizer, text, known, features=stream_features)
    model = SimpleNamespace(get_input_embeddings=lambda: embedding)
    for index, name in enumerate(("image0", "image1")):
        image = Segment(tensors[name][0].clamp(-1, 1), as_features=True)
        inputs = embed(model, processor([[image]], end=False), projector)
        expected = tensors[f"sequence{index}"]
        torch.testing.assert_close(inputs["inputs_embeds"][0], expected, atol=1e-5, rtol=0)
        assert (inputs["labels"] == -100).all()


def area(grid: list[int]) -> int:
    return grid[0] * grid[1]
