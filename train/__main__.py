"""`python -m train CONFIG [key=value ...]`, the same as `tokenizers-mm train`; also under `accelerate launch`."""

import argparse
import os
import re
import shlex
import shutil
import sys
from pathlib import Path
from typing import Any

import yaml

from tokenizers_mm._check import fail, require
from tokenizers_mm._files import one_writer, write_text
from tokenizers_mm.cli import configs, guarded
from tokenizers_mm.cli.imports import run_imports, split_imports
from tokenizers_mm.cli.train import SUMMARY, add_arguments
from tokenizers_mm.config import parse_yaml, read_yaml, to_mapping

from .checkpoint import list_checkpoints
from .config import RunConfig, objective_class, parse_config, read_config
from .loop import InterruptedRunError, run
from .presets import make_preset

EXISTING = "config.yaml"
"""The complete configuration that a preset writes, in the folder of its run."""


class _Keys(argparse.Action):
    """`--help`: the options, then every key of a configuration."""

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        from .reference import text  # imports every objective

        parser.print_help()
        print("\nKeys of a configuration (and of key=value), with types, defaults and meanings:\n")
        print(text())
        parser.exit()


def main(arguments: list[str]) -> int:
    """Train. Bad input ends with one sentence and code 2, a signal with a checkpoint and 128 plus its number."""
    arguments, files = split_imports(arguments)
    parser = argparse.ArgumentParser(prog="tokenizers-mm train", description=SUMMARY, add_help=False)
    parser.add_argument("-h", "--help", action=_Keys, nargs=0, help="this text and every key of a configuration")
    add_arguments(parser)
    try:
        options = parser.parse_intermixed_args(arguments)
    except SystemExit as end:
        return int(end.code or 0)
    if not (options.words or options.preset):
        parser.print_usage(sys.stderr)
        return 2

    def train() -> int:
        run_imports(files)
        return _train(options, shlex.join(["tokenizers-mm", "train", *arguments]))

    return guarded("tokenizers-mm train", train)


def _train(options: argparse.Namespace, command: str) -> int:
    config = _config(options, command)
    if options.check:
        print(check(config))
        return 0
    _keep_existing(config, options.overwrite)
    if options.preset:
        print(f"configuration: {Path(config.out) / EXISTING}", file=sys.stderr)
    try:
        state = run(config)
    except InterruptedRunError as interrupted:
        print(f"tokenizers-mm train: {interrupted}", file=sys.stderr)
        return 128 + interrupted.number
    if state.accelerator.is_main_process:
        from .summary import summarize  # matplotlib, where it is installed

        print("\n".join(summarize(config)))
    return 0


def _config(options: argparse.Namespace, command: str) -> RunConfig:
    """The configuration of a file, of a shipped name, of stdin, or of a preset."""
    overrides = [word for word in options.words if re.match(r"[\w.\[\]-]+=", word)]
    names = [word for word in options.words if word not in overrides]
    overrides += [f"out={options.out}"] if options.out else []
    made_for = {name: getattr(options, name) for name in ("images", "size", "codebook")}
    if options.preset:
        require(not names, "CONFIG", "none beside --preset", names)
        text = make_preset(options.preset, overrides, command, **made_for)
        config = parse_config(yaml.safe_load(text))
        return config if options.check else _written(config, text, options.overwrite)
    given = [f"--{name}" for name, value in made_for.items() if value is not None]
    require(not given, given[0] if given else "", "--preset beside it (or key=value)", "none")
    require(len(names) == 1, "CONFIG", "one file or name", names or "none")
    (name,) = names
    if name == "-":
        return parse_config(parse_yaml(sys.stdin.read(), overrides, "config of the standard input"))
    shipped = not Path(name).exists() and "/" not in name and "." not in name
    return read_config(str(configs.find(name)) if shipped else name, overrides)


def _written(config: RunConfig, text: str, overwrite: bool) -> RunConfig:
    """Write the configuration of a preset into the folder of its run, where it is not there yet."""
    place = Path(config.out) / EXISTING
    if place.is_file() and not overwrite:
        if read_yaml(place) == parse_yaml(text, (), "preset"):
            return config  # the same command again: the run goes on
        fail("out", "a new folder, or --overwrite", f"{place}, of another command (to go on with it: train {place})")
    with one_writer(config.out, "config.out"):
        write_text(place, text)
    return config


def _keep_existing(config: RunConfig, overwrite: bool) -> None:
    """Refuse to start anew where a run is, unless asked. The first process alone looks: it may have begun already."""
    if os.environ.get("RANK", "0") != "0":
        return
    found = [step for step, _ in list_checkpoints(config.out)]
    there = bool(found) or (Path(config.out) / "log.jsonl").is_file()
    if overwrite:
        with one_writer(config.out, "config.out"):
            for name in ("checkpoints", "samples", "trackers", "best"):
                shutil.rmtree(Path(config.out) / name, ignore_errors=True)
            (Path(config.out) / "log.jsonl").unlink(missing_ok=True)
    elif there and config.resume == "never":
        last = f"a run up to step {found[-1]}" if found else "a run"
        fail("config.out", "a folder without a run (or resume=auto to go on, --overwrite to replace)",
             f"{last} in {config.out}")  # fmt: skip


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
