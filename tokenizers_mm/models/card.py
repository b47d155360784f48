"""The model card of a saved tokenizer: what it makes of an image, how it was measured, its licence, how to use it."""

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from tokenizers_mm._check import expecting, fail, printable, require

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
    lines += [f"- {name}: {printable(' '.join(value.split()))}" for name, value in known.items() if value]
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


def measurements(report: Mapping[str, Any], name: str = "") -> Mapping[str, Any]:
    """The entry of one tokenizer in a report of `tokenizers-mm eval`: the only one, or the one of this name.

    Raises: ValueError for another file, and for a report of several tokenizers without this one.
    """
    found = report.get("report", report)
    rows = found.get("tokenizers") if isinstance(found, Mapping) else None
    if not isinstance(rows, list) or not rows or not all(isinstance(row, Mapping) for row in rows):
        fail("report", "a report of tokenizers-mm eval", "another file")
    names = [str(row.get("name")) for row in rows]
    require(len(rows) == 1 or name in names, "report", f"one of {name or 'one tokenizer'}", ", ".join(names))
    return {**found, "tokenizers": [rows[names.index(name)] if name in names else rows[0]]}


def _measured(report: Mapping[str, Any]) -> list[str]:
    """Numbers of a report as a table, bits first, with the protocol under it."""
    with expecting("report", "one that tokenizers-mm eval wrote"):
        report = measurements(report)
        metrics = report["tokenizers"][0].get("metrics", {})
        values = {name: value for name, value in metrics.items() if isinstance(value, Mapping) and "mean" in value}
        ordered = sorted(values, key=lambda name: "bits" not in name)  # stable: else as in the report
        rows = [f"| {_inline(name)} | {_interval(values[name])} |" for name in ordered]
        images = report.get("images", {})
        lines = [f"## Measured on {_inline(images.get('count'))} images ({_inline(images.get('source'))})", ""]
        lines += ["| metric | mean (95 % interval) |", "|---|---|", *rows, "", "Protocol:", ""]
        return lines + [f"- {_inline(name)}: {_inline(value)}" for name, value in report.get("protocol", {}).items()]


def _interval(value: Mapping[str, Any]) -> str:
    """A mean and its interval, where it has one."""
    numbers = [value.get(name) for name in ("mean", "low", "high")]
    texts = [f"{number:,.4g}" if isinstance(number, (int, float)) else "-" for number in numbers]
    return texts[0] if "-" in texts[1:] or texts[1] == texts[2] else f"{texts[0]} ({texts[1]} to {texts[2]})"


def _inline(value: Any) -> str:
    """A value on one line of Markdown."""
    return " ".join(str(value).replace("|", "\\|").split())[:400]


def _quoted(text: str) -> str:
    """A text as a YAML scalar in double quotes."""
    plain = printable(" ".join(text.split())[:200]).replace("\\", "/").replace('"', "'")
    return f'"{plain}"'
