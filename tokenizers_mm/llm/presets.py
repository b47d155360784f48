"""Vocabularies and prompts of published systems: the exact strings, and ids by the same arithmetic."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from tokenizers_mm._check import require
from tokenizers_mm.llm.layout import IMAGE_END, IMAGE_START, ROW_END, SIZE_END, Layout, stream_marker
from tokenizers_mm.llm.vocabulary import (
    CodeRange,
    Marker,
    VisualVocabulary,
    image_sizes,
    spell_sizes,
    text_ids,
)
from tokenizers_mm.models.base import ImageTokenizer

ILLUME_SIDES = tuple(range(64, 1025, 64))


def illume_plus(
    tokenizer: ImageTokenizer, text_tokenizer: Any, sizes: Sequence[tuple[int, int]] | None = None
) -> VisualVocabulary:
    """ILLUME+ (arXiv 2504.01934): height and width tags, then two levels, each row closed.

    Ids follow the text tokenizer's: 7 markers, 16 heights, 16 widths, level-0 codes, level-1 codes.
    """
    known = image_sizes(tokenizer, sizes)
    streams = tokenizer.streams(known[0].height, known[0].width)
    require(len(streams) == 2, "tokenizer", "one of two streams, semantic and pixel", f"{len(streams)} streams")
    for size in known:
        tagged = size.height in ILLUME_SIDES and size.width in ILLUME_SIDES
        require(tagged, "sizes", "multiples of 64 up to 1024", (size.height, size.width))
    names = tuple(stream.name for stream in streams)
    texts = {IMAGE_START: "<start_of_image>", IMAGE_END: "<end_of_image>", ROW_END: "<end_of_line>"}
    for level, name in enumerate(names):
        texts[stream_marker(name, "start")] = f"<start_of_level{level}>"
        texts[stream_marker(name, "end")] = f"<end_of_level{level}>"
    texts |= {f"height_{side}": f"<height_{side}>" for side in ILLUME_SIDES}
    texts |= {f"width_{side}": f"<width_{side}>" for side in ILLUME_SIDES}
    first = text_ids(text_tokenizer)
    markers = tuple(Marker(name, (first + i,), text) for i, (name, text) in enumerate(texts.items()))
    start, codes = first + len(markers), []
    for level, stream in enumerate(streams):
        codes.append(CodeRange(stream.name, stream.codebook_size, start, f"<|image_level{level}_{{}}|>"))
        start += stream.codebook_size
    layout = Layout(names, stream_markers=True, row_end=True, size="before")
    return VisualVocabulary(first, tuple(codes), markers, layout, known)


def tokenflow_t2i(tokenizer: ImageTokenizer, text_tokenizer: Any) -> VisualVocabulary:
    """TokenFlow text-to-image (arXiv 2412.03069): a [PAD] token, the codes, and `<img>`, `</img>` as plain text."""
    known = image_sizes(tokenizer)
    streams = tokenizer.streams(known[0].height, known[0].width)
    require(len(streams) == 1, "tokenizer", "one of one stream", f"{len(streams)} streams")
    first = text_ids(text_tokenizer)

    def spelled(text: str) -> tuple[int, ...]:
        return tuple(text_tokenizer(text, add_special_tokens=False)["input_ids"])

    markers = (
        Marker("pad", (first,), "[PAD]"),
        Marker(IMAGE_START, spelled("<img>"), "<img>"),
        Marker(IMAGE_END, spelled("</img>"), "</img>"),
    )
    codes = (CodeRange(streams[0].name, streams[0].codebook_size, first + 1, "<vq_token_{}>"),)
    return VisualVocabulary(first, codes, markers, Layout((streams[0].name,)), known)


def raster(
    tokenizer: ImageTokenizer,
    text_tokenizer: Any,
    offset: int | None = None,
    start: str = "<|soi|>",
    end: str = "<|eoi|>",
) -> VisualVocabulary:
    """Plain raster with an offset, as in Show-o (arXiv 2408.12528) and MMaDA (arXiv 2505.15809).

    The two markers are taken from the text tokenizer where it has them, else they get the next ids. offset: the id of
    code 0; by default the next free one.
    """
    vocabulary = VisualVocabulary.for_tokenizer(tokenizer, text_tokenizer)
    have, first = text_tokenizer.get_vocab(), vocabulary.text_size
    markers, next_id = [], first
    for marker in vocabulary.markers:
        text = {IMAGE_START: start, IMAGE_END: end}.get(marker.name, marker.text)
        known = have.get(text)
        markers.append(Marker(marker.name, (next_id if known is None else known,), text))
        next_id += known is None
    codes, next_id = [], next_id if offset is None else offset
    for code in vocabulary.codes:
        codes.append(replace(code, start=next_id))
        next_id += code.size
    return replace(vocabulary, codes=tuple(codes), markers=tuple(markers))


def string_tokens(
    tokenizer: ImageTokenizer,
    text_tokenizer: Any,
    sizes: Sequence[tuple[int, int]] | None = None,
    code_text: str = "<MM-Token-{}>",
) -> VisualVocabulary:
    """Tokens that are strings, the grid as plain text, as in X-Omni (arXiv 2507.22058): `<SOM>rows columns<IMAGE>`."""
    known = image_sizes(tokenizer, sizes)
    streams = tokenizer.streams(known[0].height, known[0].width)
    require(len(streams) == 1, "tokenizer", "one of one stream", f"{len(streams)} streams")
    layout = Layout((streams[0].name,), size="text", size_text="{rows} {columns}")
    first = text_ids(text_tokenizer)
    texts = {IMAGE_START: "<SOM>", IMAGE_END: "<EOM>", SIZE_END: "<IMAGE>"}
    markers = tuple(Marker(name, (first + i,), text) for i, (name, text) in enumerate(texts.items()))
    codes = (CodeRange(streams[0].name, streams[0].codebook_size, first + len(markers), code_text),)
    return VisualVocabulary(first, codes, markers, layout, spell_sizes(known, layout.size_text, text_tokenizer))


@dataclass(frozen=True)
class ChatFormat:
    """The frame of a conversation; the ChatML of Qwen by default. Texts are joined, never formatted."""

    system: str = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
    user: tuple[str, str] = ("<|im_start|>user\n", "<|im_end|>\n")
    assistant: tuple[str, str] = ("<|im_start|>assistant\n", "<|im_end|>\n")

    def prompt(self, request: str, answer: str | None = None) -> str:
        """One turn; without an answer it ends where the assistant begins to speak."""
        opening = self.system + self.user[0] + request + self.user[1] + self.assistant[0]
        return opening if answer is None else opening + answer + self.assistant[1]


def illume_size_tag(height: int, width: int) -> str:
    """The text that says an image's size."""
    return f"<height_{height}><width_{width}>"


def illume_request(kind: str, size: tuple[int, int] | None = None, text: str = "") -> str:
    """The user's side of an ILLUME+ prompt; "<image>" marks the place of an image.

    kind: "generate" (text: the caption), "generate_any" (no caption: the unconditional branch), "edit" (text: the
    instruction), "reconstruct" (the unconditional branch of an edit) or "understand" (text: the question).
    """
    tag = "" if size is None else illume_size_tag(*size)
    requests = {
        "generate": f"Generate an image of {tag}, the content of image is {text}\n",
        "generate_any": f"Generate a random image of {tag}\n",
        "edit": f"{tag}<image>\nPlease edit the image according to the instruction: {text}\n",
        "reconstruct": f"{tag}<image>\nReconstruct the image according to the given image\n",
        "understand": f"<image>\n{text}",
    }
    require(kind in requests, "kind", f"one of {list(requests)}", kind)
    return requests[kind]
