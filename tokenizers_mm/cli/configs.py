"""`tokenizers-mm configs`: the configurations that come with the package."""

import argparse
import re
from pathlib import Path

from tokenizers_mm._check import require
from tokenizers_mm._files import atomic_path, kind_of
from tokenizers_mm.cli.program import find_program

SUMMARY = "List, show or copy the training configurations that come with the package."


def add_arguments(command: argparse.ArgumentParser) -> None:
    """Add the arguments of the verb."""
    command.add_argument("name", nargs="?", metavar="NAME", help="show this one (without a name: list all)")
    command.add_argument("--copy", type=Path, metavar="FILE", help="write it to a new file instead")


def run(options: argparse.Namespace) -> None:
    """List all configurations, print one, or copy one."""
    if options.name is None:
        require(options.copy is None, "NAME", "the configuration to copy", "none")
        names = sorted(path.stem for path in folder().glob("*.yaml"))
        width = max(map(len, names))
        print("\n".join(f"{name:<{width}}  {summary(find(name))}" for name in names))
        return
    text = find(options.name).read_text(encoding="utf-8")
    if options.copy is None:
        print(text, end="")
        return
    require(not options.copy.exists(), "--copy", "a new file", f"{kind_of(options.copy)}: {options.copy}")
    with atomic_path(options.copy) as temporary:
        temporary.write_text(text, encoding="utf-8")
    print(f"{options.copy}: {options.name}; run it with: tokenizers-mm train {options.copy}")


def folder() -> Path:
    """The folder of the configurations: beside the training program, in a checkout as in an installed package."""
    return find_program().resolve().parents[1] / "configs"


def find(name: str) -> Path:
    """The file of a shipped configuration, by its name with or without ending."""
    path = folder() / f"{name.removesuffix('.yaml')}.yaml"
    known = sorted(other.stem for other in folder().glob("*.yaml"))
    renamed = path.stem.replace("bridge_", "language_", 1)
    require(path.stem == renamed or renamed not in known, "NAME", f"{renamed}, its present name", name)
    require(path.stem in known and "/" not in name, "NAME", f"one of {', '.join(known)}", name)
    return path


def summary(path: Path) -> str:
    """The first sentence of the comment that a configuration begins with."""
    lines = []
    for line in path.read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            break
        lines.append(line.removeprefix("#").strip())
    text = " ".join(lines)
    return re.split(r"(?<=[.;])\s", text)[0].rstrip(".;")
