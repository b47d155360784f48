"""Run tests on the newest versions, and say which upstream change broke what.

Usage: python .ci/upstream.py VERSIONS TESTS...; VERSIONS is the tested set. Prints the packages that moved, the
failures grouped by package and message, and the counts. Exit code 1 where a test failed.
"""

import re
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from collections import defaultdict
from importlib import metadata
from pathlib import Path


def tested_versions(path: Path) -> dict[str, set[str]]:
    """Versions of each package in the tested set; several where they differ by Python."""
    versions: dict[str, set[str]] = defaultdict(set)
    for line in path.read_text().splitlines():
        name, _, rest = line.partition("==")
        versions[name.lower()].add(rest.split(";")[0].strip())
    return versions


def moved_packages(tested: dict[str, set[str]]) -> dict[str, str]:
    """`name: tested -> installed` of every installed package whose version is not of the tested set."""
    moved = {}
    for package in metadata.distributions():
        name = re.sub(r"[-_.]+", "-", package.metadata["Name"]).lower()
        if name in tested and package.version.split("+")[0] not in tested[name]:
            moved[name] = f"{'/'.join(sorted(tested[name]))} -> {package.version}"
    return moved


def failure_cause(text: str, modules: dict[str, str]) -> tuple[str, str]:
    """The package of the innermost frame outside this project ("" where there is none), and the error's first line."""
    frames = re.findall(r"site-packages/([A-Za-z_0-9]+)", text)
    errors = re.findall(r"^E\s{2,}(\S.*)$", text, re.M)
    return (modules.get(frames[-1], frames[-1]) if frames else ""), (errors[0] if errors else text.strip()[:200])


def main(versions: str, *tests: str) -> int:
    """Run pytest and explain its report."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", "-m", "not full", "-q", f"--junitxml={report}", *tests]
        subprocess.run(command, check=False)
        cases = list(ElementTree.parse(report).iter("testcase")) if report.is_file() else []
    moved = moved_packages(tested_versions(Path(versions)))
    modules = {module: names[0].lower() for module, names in metadata.packages_distributions().items()}
    causes: dict[tuple[str, str], list[str]] = defaultdict(list)
    failed = skipped = 0
    for case in cases:
        skipped += case.find("skipped") is not None
        bad = case.find("failure") if case.find("failure") is not None else case.find("error")
        if bad is not None:
            failed += 1
            causes[failure_cause(bad.text or "", modules)].append(f"{case.get('classname')}::{case.get('name')}")
    print("\nNewest versions against the tested set:")
    print("\n".join(f"  {name}: {change}" for name, change in sorted(moved.items())) or "  no package moved")
    for (package, message), names in sorted(causes.items(), key=lambda item: -len(item[1])):
        origin = f"{package} ({moved.get(package, 'version unchanged')})" if package else "no package in the traceback"
        print(f"UPSTREAM {origin} broke {len(names)} tests, e.g. {names[0]}\n  {message}")
    print(f"newest versions: {len(cases) - failed - skipped} passed, {failed} failed, {skipped} skipped")
    return int(failed > 0 or not cases)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
