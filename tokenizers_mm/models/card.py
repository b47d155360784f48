"""The model card of a saved tokenizer: what it makes of an image, how it was measured, its licence, how to use it."""

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tokenizers_mm.models.base import ImageTokenizer

LICENSES = frozenset(
    {
        *("apache-2.0", "mit", "openrail", "bsd-2-clause", "bsd-3-clause", "mpl-2.0", "unlicense", "gemma"),
        *("cc0-1.0", "cc-by-4.0", "cc-by-sa-4.0", "cc-by-nc-4.0", "cc-by-nc-sa-4.0", "cc-by-nc-nd-4.0"),
        *("gpl-3.0", "lgpl-3.0", "agpl-3.0", "llama2", "llama3"),
    }
)
"""Licences that the hub knows by these names; others are `other`, with their text as `license_name`."""

TYPICAL = 256
"""Side of the image that stands for a tokenizer of any size, rounded up to what it takes."""


def card(tokenizer: "ImageTokenizer[Any]", report: Mapping[str, Any] | None = None) -> str:
    """README.md of a tokenizer. report: of `tokenizers-mm eval`, for its numbers and its protocol."""
    origin = tokenizer.provenance
    lines = ["---", "library_name: tokenizers_mm", "pipeline_tag: image-to-image", "tags: [image-tokenizer]"]
    lines += [*_license(origin.license), "---", "", f"# A {tokenizer.family} image tokenizer", ""]
    lines += [*_contents(tokenizer), ""]
    known = {
        "Source": origin.source,
        "Licence": origin.license or "not stated",
        "sha256 of the source": origin.sha256,
        "Notice": origin.notice,
    }
    lines += [f"- {name}: {value}" for name, value in known.items() if value]
    if report is not None:
        lines += ["", *_measured(report)]
    lines += ["", "## Use", "", "```python", "import tokenizers_mm as tmm", "", "tok = tmm.load('this directory')"]
    lines += ["codes = tok.encode('photo.png', fit='crop')", "image = tok.to_pil(codes)[0]", "```", ""]
    return "\n".join(lines)


def bits_per_image(tokenizer: "ImageTokenizer[Any]") -> tuple[float, tuple[int, int]] | None:
    """Bits of all ids of one image, and its (height, width): `TYPICAL` where any is taken; None without ids."""
    multiple = tokenizer.size_multiple
    side = -(-TYPICAL // multiple) * multiple
    size = tokenizer.image_size or (side, side)
    streams = tokenizer.streams(*size)
    return (sum(s.num_ids * math.log2(s.codebook_size) for s in streams), size) if streams else None


def _contents(tokenizer: "ImageTokenizer[Any]") -> list[str]:
    """Sentences about bits, sizes and streams."""
    found, size = bits_per_image(tokenizer), tokenizer.image_size
    lines = []
    if found is not None:
        bits, (height, width) = found
        per_pixel = bits / (height * width)
        lines.append(f"**{bits:,.0f} bits per image** of {height} x {width} pixels ({per_pixel:.3f} bits per pixel).")
        for stream in tokenizer.streams(height, width):
            grids = ", ".join(f"{rows}x{columns}" for rows, columns in stream.grids)
            lines.append(
                f"Stream `{stream.name}`: {stream.num_ids} ids of {stream.codebook_size} codes (grids {grids})."
            )
    else:
        lines.append("Continuous latents; no ids.")
    lines.append(
        f"Images: {f'{size[0]} x {size[1]}' if size else f'any multiple of {tokenizer.size_multiple}'} pixels, RGB."
    )
    return lines


def _license(text: str) -> list[str]:
    """The licence for the hub's header; nothing where none is stated."""
    name = text.strip().lower()
    if not name:
        return []
    return [f"license: {name}"] if name in LICENSES else ["license: other", f"license_name: {_quoted(text)}"]


def _measured(report: Mapping[str, Any]) -> list[str]:
    """Numbers of a report as a table, bits first, with the protocol under it."""
    numbers = {
        name: value
        for name, value in _flat(report)
        if isinstance(value, (int, float)) and not isinstance(value, bool) and not name.startswith("protocol")
    }
    ordered = sorted(numbers, key=lambda name: "bits" not in name)  # stable: else as in the report
    rows = [f"| {name} | {_number(numbers[name])} |" for name in ordered]
    lines = ["## Measured", "", "| | |", "|---|---|", *rows]
    protocol = [
        f"- {name.removeprefix('protocol.')}: {_inline(value)}"
        for name, value in _flat(report)
        if name.startswith("protocol")
    ]
    return [*lines, "", "Protocol:", "", *protocol] if protocol else lines


def _flat(value: Mapping[str, Any], before: str = "", depth: int = 3) -> list[tuple[str, Any]]:
    """Entries of nested mappings by dotted names, lists left out."""
    found: list[tuple[str, Any]] = []
    for key, item in value.items():
        name = f"{before}{key}"
        if isinstance(item, Mapping) and depth:
            found += _flat(item, f"{name}.", depth - 1)
        elif not isinstance(item, Mapping) and not (isinstance(item, list) and len(item) > 8):
            found.append((name, item))
    return found


def _number(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


def _inline(value: Any) -> str:
    """A value on one line of Markdown."""
    return " ".join(str(value).replace("|", "\\|").split())[:400]


def _quoted(text: str) -> str:
    """A text as a YAML scalar in double quotes."""
    plain = " ".join(text.split())[:200].replace("\\", "/").replace('"', "'")
    return f'"{plain}"'
