"""`python -m train CONFIG [key=value ...]`, the same as `tokenizers-mm train`; also under `accelerate launch`."""

import sys
from pathlib import Path
from typing import Any

import yaml

from tokenizers_mm.cli import guarded
from tokenizers_mm.config import to_mapping

from .config import RunConfig, objective_class, read_config
from .loop import InterruptedRunError, run

USAGE = """usage: tokenizers-mm train CONFIG [key=value ...] [--check]

CONFIG: a YAML file; configs/ holds one for every kind of run.
--check: read and validate, print the whole configuration and the size of what it trains, and touch nothing."""


def main(arguments: list[str]) -> int:
    """Train. Bad input ends with one sentence and code 2, a signal with a checkpoint and 128 plus its number."""
    return guarded("tokenizers-mm train", lambda: _main(arguments))


def _main(arguments: list[str]) -> int:
    given = [argument for argument in arguments if argument != "--check"]
    if not given or given[0] in ("-h", "--help"):
        print(USAGE, file=sys.stderr)
        return 0 if given else 2
    config = read_config(given[0], given[1:])
    if "--check" in arguments:
        print(check(config))
        return 0
    try:
        run(config)
    except InterruptedRunError as interrupted:
        print(f"tokenizers-mm train: {interrupted}", file=sys.stderr)
        return 128 + interrupted.number
    return 0


def check(config: RunConfig) -> str:
    """The resolved configuration as YAML, then sizes and missing inputs as comments."""
    lines = [yaml.safe_dump(to_mapping(config), sort_keys=False, width=120).rstrip()]
    for name, size in objective_class(config.objective.kind).sizes(config).items():
        lines.append(f"# {name}: {size:,} parameters" if isinstance(size, int) else f"# {name}: {size}")
    lines += [f"# not here: {path}" for path in _paths(to_mapping(config)) if not Path(path).exists()]
    return "\n".join(lines)


def _paths(value: Any) -> list[str]:
    """Local paths that a configuration reads, wherever they stand."""
    if isinstance(value, list):
        return [path for item in value for path in _paths(item)]
    if not isinstance(value, dict):
        return []
    names = ("path", "start_from", "tokenizer", "folder", "inception", "kl16", "lpips_weights", "projector_from")
    own = [value[name] for name in names if isinstance(value.get(name), str) and value[name]]
    return own + [path for item in value.values() for path in _paths(item)]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
