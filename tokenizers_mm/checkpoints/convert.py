"""Published checkpoints of other code bases into our format: `tokenizers-mm convert FAMILY FILE|FOLDER --out DIR`.

    convert(family, file, out, config=None, **options) -> Path      # what the command line calls
    FAMILIES[family].convert(tensors, where, config, **options) -> ImageTokenizer

A converter of a family (one file per family beside this one, built on `upstream`) gets the tensors by their published
names, `where` to begin an error with, and optionally the dimensions of an unpublished size in the form of the reference
cases' config.json. It returns a tokenizer that holds the weights, with source, licence and notice in `provenance`.
Its options are keyword-only parameters; numbers and booleans may come as text.
"""

import dataclasses
import inspect
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from tokenizers_mm._check import fail, require
from tokenizers_mm._files import kind_of, sha256
from tokenizers_mm.checkpoints import (
    apertus,
    bsq_vit,
    chameleon,
    dualvitok,
    emu3,
    glm_image,
    ibq,
    infinity,
    llamagen,
    mar,
    open_magvit2,
    showo,
    tokenflow,
    unitok,
    upstream,
    var,
    xomni,
)
from tokenizers_mm.checkpoints.family import Converter, Family
from tokenizers_mm.config import check_plain
from tokenizers_mm.models.saving import write

FAMILIES: dict[str, Family] = {
    "apertus1p5": apertus.FAMILY,
    "bitdance": open_magvit2.BITDANCE_FAMILY,
    "bsq_vit": bsq_vit.FAMILY,
    "chameleon": chameleon.FAMILY,
    "dualvitok": dualvitok.FAMILY,
    "emu3": emu3.FAMILY,
    "emu3.5": ibq.EMU35_FAMILY,
    "glm_image": glm_image.FAMILY,
    "ibq": ibq.IBQ_FAMILY,
    "infinity": infinity.FAMILY,
    "janus": llamagen.JANUS_FAMILY,
    "llamagen": llamagen.LLAMAGEN_FAMILY,
    "mar": mar.FAMILY,
    "open_magvit2": open_magvit2.OPEN_MAGVIT2_FAMILY,
    "showo": showo.FAMILY,
    "tokenflow": tokenflow.FAMILY,
    "unitok": unitok.FAMILY,
    "var": var.FAMILY,
    "xomni": xomni.FAMILY,
}


def convert(
    family: str,
    file: str | os.PathLike[str],
    out: str | os.PathLike[str],
    config: Mapping[str, Any] | None = None,
    **options: Any,
) -> Path:
    """Read a published checkpoint strictly and write it to `out` in our format, in float32; the path of `out`.

    file: a checkpoint, the index of one in several files, or a downloaded folder that holds one of these.

    Every key is accounted for: one ValueError names the first that are missing, unknown or of another shape. `out` is
    written whole or not at all.
    """
    require(family in FAMILIES, "family", f"one of {sorted(FAMILIES)}", family)
    out = Path(out)
    require(not out.exists() or out.is_dir(), "out", "a directory or a new name", f"the file {out}")
    require(config is None or isinstance(config, Mapping), "config", "a mapping", config)
    check_plain(config, "config")
    found = FAMILIES[family]
    options = _checked(found.convert, options)
    if found.parts is not None and kind_of(file) == "a folder":
        file, parts = found.parts(Path(file))
        options = {**parts, **options}
    files = upstream.files_of(file, found.names, found.prefixes)
    tokenizer = found.convert(upstream.read(files, found.wrappers, found.prefixes), str(file), config, **options)
    tokenizer.provenance = dataclasses.replace(tokenizer.provenance, sha256=sha256(*files))
    write(tokenizer, out, dtype=torch.float32)
    return out


COLUMNS = ("family", "checkpoint", "image", "ids", "bits", "licence", "shown by tests")


def rows() -> list[tuple[str, ...]]:
    """The published files that were described, one row of `COLUMNS` each."""
    return [
        (
            family,
            item.source,
            "x".join(map(str, item.image)),
            f"{item.ids:,}" if item.streams else "continuous",
            f"{round(item.bits):,}" if item.streams else "-",
            item.license,
            item.shown,
        )
        for family, found in FAMILIES.items()
        for item in found.checkpoints
    ]


def table(markdown: bool = False) -> list[str]:
    """Lines of `rows` under their columns, for a terminal or as a table of Markdown."""
    cells = [COLUMNS, *rows()]
    if markdown:
        lines = [f"| {' | '.join(row)} |" for row in cells]
        return [lines[0], "|" + "---|" * len(COLUMNS), *lines[1:]]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in cells]


def _checked(converter: Converter, options: Mapping[str, Any]) -> dict[str, Any]:
    """The options a converter knows, text turned into the type of its default."""
    parameters = inspect.signature(converter).parameters.values()
    known = {p.name: p.default for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY}
    for name in options:
        require(name in known, "option", f"one of {sorted(known)}" if known else "none for this family", name)
    return {name: _parsed(name, value, known[name]) for name, value in options.items()}


def _parsed(name: str, value: Any, default: Any) -> Any:
    if not isinstance(value, str) or isinstance(default, str):
        return value
    if value.lower() in ("true", "false"):
        return value.lower() == "true"
    try:
        return float(value) if isinstance(default, float) else int(value)
    except ValueError:
        fail(name, "a number", repr(value))
