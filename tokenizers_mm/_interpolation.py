"""Interpolations in configurations, bounded: values that refer to other values of the same data."""

import os
import re
from typing import Any

from tokenizers_mm._check import fail, require

MAX_DEPTH, MAX_ENTRIES, MAX_TEXT, MAX_LENGTH = 32, 100_000, 10_000, 4096
"""Limits of any configuration: levels, values in all, characters of a text, and values of one list or mapping (the
last one unless a `Length` says otherwise)."""


class Interpolation:
    """Plain data with every `${key.sub}`, `${.sibling}` and, where allowed, `${oc.env:NAME}` replaced by its value."""

    _MARK = re.compile(r"\\\$\{|\$\{([^}]*)\}")
    _ENV = re.compile(r"oc\.env:\s*(\w+)\s*(?:,\s*(.*?)\s*)?")

    def __init__(self, data: dict[str, Any], where: str, allow_env: bool) -> None:
        """where: how errors call the data. allow_env: see `config.read_yaml`."""
        self._data, self._where, self._allow_env = data, where, allow_env
        self._left = MAX_ENTRIES

    def all(self) -> dict[str, Any]:
        """The whole of the data."""
        return self._replace(self._data, (), ())

    def _replace(self, value: Any, path: tuple[Any, ...], active: tuple[Any, ...]) -> Any:
        self._left -= 1
        require(self._left >= 0, self._where, f"at most {MAX_ENTRIES} values", "more through interpolation")
        if isinstance(value, dict):
            return {key: self._replace(item, (*path, key), active) for key, item in value.items()}
        if isinstance(value, list):
            return [self._replace(item, (*path, index), active) for index, item in enumerate(value)]
        if not isinstance(value, str) or "${" not in value:
            return value
        if (whole := self._MARK.fullmatch(value)) and whole[1] is not None:
            return self._look_up(whole[1], path, active)

        def text(match: re.Match[str]) -> str:
            return "${" if match[1] is None else str(self._look_up(match[1], path, active))

        result = self._MARK.sub(text, value)
        require(len(result) <= MAX_TEXT, self._at(path), f"at most {MAX_TEXT} characters", f"{len(result)}")
        return result

    def _look_up(self, name: str, path: tuple[Any, ...], active: tuple[Any, ...]) -> Any:
        here = self._at(path)
        if ":" in name:
            return self._environment(name, here)
        require("${" not in name, here, "an interpolation without another inside", name)
        keys = name.lstrip(".")
        levels = len(name) - len(keys)
        start = path[: len(path) - levels] if levels else ()
        target = (*start, *(key for key in re.split(r"[.\[\]]+", keys) if key))
        require(levels <= len(path) and target not in active, here, "an interpolation that ends", f"${{{name}}}")
        require(len(active) < MAX_DEPTH, here, f"at most {MAX_DEPTH} interpolations in a chain", "more")
        value: Any = self._data
        for key in target:
            index: Any = int(key) if isinstance(value, list) and re.fullmatch("[0-9]{1,9}", str(key)) else key
            inside = index in value if isinstance(value, dict) else isinstance(index, int) and index < len(value)
            require(isinstance(value, (dict, list)) and inside, here, "an interpolation of a key", f"${{{name}}}")
            value = value[index]
        return self._replace(value, target, (*active, target))

    def _environment(self, name: str, here: str) -> str:
        match = self._ENV.fullmatch(name)
        expected = "no ${oc.env:...} (allow_env=True of read_yaml lets a file read the environment)"
        require(match is not None, here, "interpolations of keys only", f"${{{name}}}")
        require(self._allow_env, here, expected, f"${{{name}}}")
        value = os.environ.get(match[1], match[2])  # type: ignore[index]
        return fail(here, "an environment variable", f"none with the name {match[1]}") if value is None else value  # type: ignore[index]

    def _at(self, path: tuple[Any, ...]) -> str:
        return ".".join([self._where, *map(str, path)])
