"""The tokenizer that made ids: how files name it, and the one check of all that read ids from files.

The origin of ids is the text `FAMILY:DIGEST`, the `fingerprint()` of the tokenizer that made them. It stands beside the
ids as `tokenizer`: in the metadata of `.safetensors`, `.npz` and `.parquet` files, in the `KEY.json` of an image in a
`.tar` shard, in the `codes` of a record, in the manifest of shards, in `visual_vocab.json` and in the `graphs.json` of
an export. Files of older versions have the family only, or nothing.
"""

import re
import warnings
from collections.abc import Mapping
from typing import Any

from tokenizers_mm._check import fail

KEY = "tokenizer"
"""Name of the origin beside ids."""

_ORIGIN = re.compile(r"[\w.-]{1,64}:[0-9a-f]{32}")
_FAMILY = re.compile(r"[\w.-]{1,64}")


def origin_facts(origin: str) -> dict[str, str]:
    """An origin as the metadata of a file."""
    family, _, digest = origin.partition(":")
    return {"family": family, **({KEY: origin} if digest else {})}


def read_origin(facts: Mapping[str, Any]) -> str:
    """The origin that a file tells: `FAMILY:DIGEST`, the family alone, or "" where it tells neither."""
    origin, family = facts.get(KEY), facts.get("family")
    if isinstance(origin, str) and _ORIGIN.fullmatch(origin):
        return origin
    return family if isinstance(family, str) and _FAMILY.fullmatch(family) else ""


class OriginCheck:
    """Refuses ids that another tokenizer made, with one sentence; warns once of a file that does not tell.

    tokenizer: the one that is to read the ids, an `ImageTokenizer`. any_tokenizer: ids of others are taken as well.
    """

    def __init__(self, tokenizer: Any, any_tokenizer: bool = False) -> None:
        self.tokenizer, self.any_tokenizer = tokenizer, any_tokenizer
        self._seen: set[tuple[str, str]] = set()

    def __call__(self, where: str, origin: str) -> None:
        """Check the origin of ids from a file.

        Raises: ValueError that begins with `where`, for ids of another tokenizer.
        """
        if self.any_tokenizer or (where, origin) in self._seen:
            return
        family, _, digest = origin.partition(":")
        mine = self.tokenizer.fingerprint() if digest else self.tokenizer.family
        if origin not in ("", mine):
            advice = "any_tokenizer=True, on the command line --any-tokenizer, takes them all the same"
            fail(where, f"ids of this tokenizer, {_short(mine)}", f"ids of {_short(origin)} ({advice})")
        if not digest:
            kind = f"which {family} tokenizer" if family else "which tokenizer"
            warnings.warn(f"{where} does not say {kind} made its ids; they are taken for this one's", stacklevel=3)
        self._seen.add((where, origin))


def _short(origin: str) -> str:
    """An origin with the first digits of its digest."""
    family, colon, digest = origin.partition(":")
    return f"{family}{colon}{digest[:12]}"
