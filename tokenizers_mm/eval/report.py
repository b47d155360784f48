"""The report of a run: everything needed to repeat it, as JSON, and tables of several reports of one protocol."""

import importlib.metadata
import itertools
import math
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tokenizers_mm import __version__
from tokenizers_mm._check import expecting, fail, printable, require
from tokenizers_mm._files import settle
from tokenizers_mm.config import from_mapping, read_json
from tokenizers_mm.eval.base import Metric, PerImage
from tokenizers_mm.eval.metrics import METRICS
from tokenizers_mm.eval.protocols import Protocol, differences
from tokenizers_mm.eval.run import Measured, Run, peak_memory
from tokenizers_mm.eval.statistics import interval, paired

FORMAT = "tokenizers_mm.eval/1"

MAX_BYTES, MAX_VALUES = 1 << 28, 1 << 21
"""Limits of a report in a file: bytes, and values, of which there is one per image, metric and tokenizer."""

PACKAGES = ("torch", "pillow", "numpy", "timm", "torch-fidelity", "lpips", "diffusers", "transformers")
"""Packages whose versions a report names, where they are installed."""


def make_report(run: Run, command: Sequence[str] = ()) -> dict[str, Any]:
    """The report of a finished run; all values are such as JSON has. command: the arguments that repeat it."""
    outcomes = [_outcome(measured) for measured in run.measured]
    return {
        "format": FORMAT,
        "command": [printable(word) for word in command],
        "versions": versions(),
        "protocol": {**asdict(run.protocol), "hash": run.protocol.hash},
        "images": {
            "source": printable(run.source.place),
            "count": len(run.used),
            "size": list(run.size) if run.size else "own",
            "skipped": [printable(reason) for reason in run.skipped],
            "digest": run.digest,
        },
        "setup": {"weights": dict(run.setup.weights), "extractor": run.setup.extractor, "seed": run.setup.seed},
        "seconds": run.seconds,
        "tokenizers": [_row(outcome, run.setup.seed) for outcome in outcomes],
        "pairs": _pairs(outcomes, run.setup.seed),
        "per_image": {
            "names": [printable(run.source.names[index]) for index in run.used],
            "values": {outcome.measured.candidate.name: _shown_values(outcome) for outcome in outcomes},
        },
    }


def versions() -> dict[str, str]:
    """Versions of this package, Python and the packages that metrics rest on."""
    found = {"tokenizers_mm": __version__, "python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


@dataclass(frozen=True)
class _Outcome:
    """Findings of the metrics of a candidate: results and values per image by metric, and why others are missing."""

    measured: Measured
    results: dict[str, Any]
    values: dict[str, Sequence[float]]
    missing: dict[str, str]


def _outcome(measured: Measured) -> _Outcome:
    """Results of all metrics, each computed once."""
    results, values, missing = {}, {}, dict(measured.missing)
    for name, metric in measured.metrics.items():
        try:
            results[name], each = metric.result(), metric.per_image()
        except ValueError as error:
            missing[name] = str(error)
            continue
        if each is not None:
            values[name] = each
    return _Outcome(measured, results, values, missing)


def _row(outcome: _Outcome, seed: int) -> dict[str, Any]:
    """Row of the report for one candidate."""
    measured, results = outcome.measured, dict(outcome.results)
    candidate, codebook = measured.candidate, results.pop("codebook", None)
    metrics = {
        name: _entry(measured.metrics[name], value, outcome.values.get(name), seed)
        for name, value in results.items()
        if value is not None or name in outcome.values
    }
    row: dict[str, Any] = {
        "name": candidate.name,
        "kind": candidate.kind,
        "identity": candidate.identity,
        "on_curve": candidate.on_curve,
        "image_size": list(candidate.image_size) if candidate.image_size else None,
        "metrics": metrics,
        "missing": outcome.missing,
    }
    if codebook is not None:
        row["codebook"] = codebook
        nominal, coded = (sum(s["bits"][kind] for s in codebook.values()) for kind in ("nominal", "entropy_coded"))
        if "bits" in metrics and abs(nominal - metrics["bits"]["mean"]) < 1e-6 * nominal:  # every stream was counted
            metrics["bits_entropy_coded"] = {"mean": coded}
    if measured.timed:
        encode, decode = (seconds / measured.timed for seconds in measured.seconds)
        row["speed"] = {"encode_seconds": encode, "decode_seconds": decode, "device": str(candidate.device)}
        row["speed"]["peak_memory"] = peak_memory(candidate.device)
    if measured.over:
        row["over_target"] = measured.over
    return row


def _entry(metric: Metric, value: Any, each: Sequence[float] | None, seed: int) -> dict[str, Any]:
    """The entry of a metric: its mean, and where there is a value per image, the interval and the images left out."""
    entry: dict[str, Any] = dict(value) if isinstance(value, Mapping) else {"mean": value}
    if each is not None:
        finite = [v for v in each if math.isfinite(v)]
        if finite:
            entry["low"], entry["high"] = interval(finite, seed)
        entry |= {"images": len(finite), "infinite": sum(map(math.isinf, each))}
        entry["left_out"] = sum(map(math.isnan, each))
    stands_in = getattr(metric, "stands_in", "")
    return entry | ({"stands_in": f"extractor {stands_in} in place of Inception"} if stands_in else {})


def _shown_values(outcome: _Outcome) -> dict[str, list[float | None]]:
    """Per-image values of all metrics that have them; None for what is not finite."""
    return {
        name: [value if math.isfinite(value) else None for value in values] for name, values in outcome.values.items()
    }


def _pairs(outcomes: Sequence[_Outcome], seed: int) -> list[dict[str, Any]]:
    """Paired differences of every two candidates, by metric; points of a codec's curve are left out."""
    found = []
    compared = [outcome for outcome in outcomes if not outcome.measured.candidate.on_curve]
    for first, second in itertools.combinations(compared, 2):
        a, b = (outcome.measured.candidate.name for outcome in (first, second))
        for name, values in first.values.items():
            if not METRICS[name].better or name not in second.values:
                continue
            result = paired(values, second.values[name], seed)
            if result is not None:
                found.append({"a": a, "b": b, "metric": name, **result})
    return found


def read_report(path: Path) -> dict[str, Any]:
    """The report in a file that `eval` wrote, or in the folder of one; ValueError names the file and what is wrong."""
    place = path / "report.json" if path.is_dir() else path
    settle(place.parent)
    data = read_json(place, MAX_BYTES, MAX_VALUES)
    found = data.get("report", data)
    with expecting(f"report {place}", "one that tokenizers-mm eval wrote"):
        _check_report(found)
    return found


def _check_report(report: Mapping[str, Any]) -> None:
    """Refuse a report without the parts that tables and pages are made of, or with parts of another type."""

    def has(part: Mapping[str, Any], **kinds: Any) -> None:
        for name, kind in kinds.items():
            right = isinstance(part[name], kind) and (kind is bool or not isinstance(part[name], bool))
            require(right, f"report.{name}", f"a value of type {getattr(kind, '__name__', 'number')}", part[name])

    number = (int, float)
    require(report.get("format") == FORMAT, "report", f"the format {FORMAT}", report.get("format"))
    has(report, command=list, versions=dict, protocol=dict, images=dict, setup=dict, tokenizers=list, pairs=list)
    protocol = {key: value for key, value in report["protocol"].items() if key != "hash"}
    found = from_mapping(Protocol, protocol, "report.protocol").hash
    has(report["protocol"], hash=str)
    require(
        report["protocol"]["hash"] == found,
        "report.protocol.hash",
        f"{found}, as its fields give",
        report["protocol"]["hash"],
    )
    has(report["images"], source=str, count=int, size=(str, list), skipped=list, digest=str)
    size = report["images"]["size"]
    require(size == "own" or (len(size) == 2 and all(type(side) is int for side in size)), "report.size", "sides", size)
    names, values = report["per_image"]["names"], report["per_image"]["values"]
    texts = [*report["command"], *report["images"]["skipped"], *report["versions"].values(), *names]
    require(all(isinstance(text, str) for text in texts), "report", "texts", "other values")
    require(len(report["tokenizers"]) > 0, "report.tokenizers", "at least one", "none")
    for row in report["tokenizers"]:
        has(row, name=str, identity=str, on_curve=bool, metrics=dict, missing=dict)
        require(bool(row["name"].strip()), "report.name", "a name", row["name"])
        require(all(isinstance(text, str) for text in row["missing"].values()), "report.missing", "reasons", "others")
        for entry in row["metrics"].values():
            has(entry, mean=(int, float, type(None)), **{k: number for k in ("low", "high", "images") if k in entry})
        for listed in values[row["name"]].values():
            finite = all(value is None or type(value) in number for value in listed)
            require(finite and len(listed) == len(names), "report.per_image", f"{len(names)} numbers", listed)
    for pair in report["pairs"]:
        has(pair, a=str, b=str, difference=number, low=number, high=number, p=number)
        require(pair["metric"] in METRICS, "report.pairs.metric", "a metric", pair["metric"])


def join_reports(reports: Sequence[Mapping[str, Any]], any_protocol: bool = False) -> dict[str, Any]:
    """The tokenizers of several reports in one; refused where protocols or images differ, unless asked for.

    Then the report is "mixed": names say of which protocol or images each is, and values per image are kept of the
    images of the first report alone. Paired tests of candidates of different reports are left out, and all of them
    where the report is mixed.
    """
    require(len(reports) > 0, "reports", "at least one", "none")
    first = reports[0]
    for report in reports:
        require(report.get("format") == FORMAT, "report", f"the format {FORMAT}", report.get("format"))
        mine, theirs = first["protocol"], report["protocol"]
        if mine["hash"] != theirs["hash"] and not any_protocol:
            a, b = (Protocol(**{k: v for k, v in p.items() if k != "hash"}) for p in (mine, theirs))
            fail(
                "reports", "one protocol (or --any-protocol)", f"{a.name} and {b.name}: {'; '.join(differences(a, b))}"
            )
        if first["images"]["digest"] != report["images"]["digest"] and not any_protocol:
            fail("reports", "the same images (or --any-protocol)", f"{first['images']} and {report['images']}")
    protocols, sets = (
        {report[part][key] for report in reports} for part, key in (("protocol", "hash"), ("images", "digest"))
    )
    rows, values = [], {}
    for report in reports:
        images, same = report["images"], report["images"]["digest"] == first["images"]["digest"]
        of = report["protocol"]["name"] if len(protocols) > 1 else f"{images['count']} images of {images['source']}"
        for row in report["tokenizers"]:
            name = f"{row['name']} ({of})" if len(protocols) > 1 or len(sets) > 1 else row["name"]
            require(name not in values, "reports", "different tokenizers", f"{name} twice")
            rows.append({**row, "name": name})
            values[name] = report["per_image"]["values"][row["name"]] if same else {}
    pairs = [pair for report in reports for pair in report["pairs"]] if len(protocols) == len(sets) == 1 else []
    joined = {**first, "tokenizers": rows, "pairs": pairs, "mixed": len(protocols) > 1 or len(sets) > 1}
    return joined | {"per_image": {**first["per_image"], "values": values}}


def table(report: Mapping[str, Any]) -> list[list[str]]:
    """Rows of text: a head, then one row per tokenizer."""
    names = columns(report)
    head = ["tokenizer", *(heading(name) for name in names)]
    return [
        head,
        *([row["name"], *(shown(row["metrics"].get(name)) for name in names)] for row in report["tokenizers"]),
    ]


def columns(report: Mapping[str, Any]) -> list[str]:
    """Names of metrics in the order of the table."""
    names = list(METRICS)
    names.insert(names.index("bits") + 1, "bits_entropy_coded")
    return [name for name in names if any(name in row["metrics"] for row in report["tokenizers"])]


def heading(name: str) -> str:
    """Label of a metric with its unit."""
    if name == "bits_entropy_coded":
        return "bits, entropy-coded"
    metric = METRICS[name]
    return f"{metric.label}, {metric.unit}" if metric.unit and metric.unit not in metric.label else metric.label


def told(name: str, value: float | None) -> str:
    """A value of one image with the name and the unit of its metric; None stands for one that is not finite."""
    metric = METRICS[name]
    infinite = issubclass(metric, PerImage) and metric.infinite
    unit = f" {metric.unit}" if metric.unit == "dB" and value is not None else ""
    return f"{metric.label} {shown({'mean': value, 'infinite': infinite})}{unit}"


def shown(entry: Mapping[str, Any] | None) -> str:
    """A value for people: four significant digits."""
    if entry is None:
        return "-"
    mean = entry.get("mean")
    if mean is None:
        return "infinite" if entry.get("infinite") else "-"
    if abs(mean) >= 1000:
        return f"{mean:,.0f}"
    return f"{mean:.4g}" if abs(mean) < 1 else f"{mean:.2f}"


def as_markdown(rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown."""
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    lines.insert(1, "|" + "---|" * len(rows[0]))
    return "\n".join(lines)


def flat(report: Mapping[str, Any]) -> dict[str, Any]:
    """The report of one tokenizer with its main values at the top, under short names, for scripts."""
    row = report["tokenizers"][0]
    metrics = row["metrics"]
    protocol = report["protocol"]
    window = {"gaussian": "Gaussian window, sigma 1.5"}.get(protocol["ssim"], f"{protocol['ssim']} window")
    found = {
        "protocol": {
            **protocol,
            "psnr": "mean over images that differ from their reconstruction (it is infinite for the others), range 1",
            "ssim": f"{window}, range {protocol['ssim_range']:g}, mean over images",
            "size": report["images"]["size"],
        },
        "images": report["images"]["count"],
        "lossless": metrics.get("psnr", {}).get("infinite"),
        "skipped": report["images"]["skipped"],
        "psnr": metrics.get("psnr", {}).get("mean"),
        "ssim": metrics.get("ssim", {}).get("mean"),
        "rfid": metrics.get("rfid", {}).get("mean"),
    }
    found |= {"codebook": row["codebook"]} if "codebook" in row else {}
    found |= {"rfid_missing": row["missing"]["rfid"]} if "rfid" in row["missing"] else {}
    return found | {"report": dict(report)}
