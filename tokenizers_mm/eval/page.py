"""The report as one page that needs no network: tables, plots, and reconstructions side by side under one slider."""

import base64
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from html import escape
from importlib import resources
from io import BytesIO
from typing import Any

import numpy as np
from PIL import Image

from tokenizers_mm._images import image_to_tensor, tensor_to_images
from tokenizers_mm.eval import plots
from tokenizers_mm.eval.base import PerImage
from tokenizers_mm.eval.candidates import Encoded
from tokenizers_mm.eval.metrics import METRICS
from tokenizers_mm.eval.report import columns, heading, shown, told
from tokenizers_mm.eval.run import Run, reconstructions

BUDGET = 4_000_000
"""Characters of all images of a page."""

LONGEST = 512
"""Pixels of the longer side of an image on the page; larger ones are scaled."""

SHOWN = ("worst", "median", "best")
EACH = 4
"""Images of each of these kinds."""

RANKING = ("psnr", "ssim", "ssim_uniform", "ms_ssim", "lpips", "dists")
"""Metrics by which these are chosen: the first that was measured."""

PLOTTED = ("psnr", "ssim", "lpips", "dists", "rfid", "feature_distance")
"""Metrics that are plotted against bits, where they were measured."""


@dataclass(frozen=True)
class Example:
    """One image of the page: why it is there, its name and number, the original, and what each candidate made of it.

    made: by the candidates that are compared, in order. maps: ids as colours, with their labels.
    """

    kind: str
    name: str
    index: int
    original: Image.Image
    made: list[Image.Image]
    maps: list[tuple[str, Image.Image]]


def make_page(report: Mapping[str, Any], run: Run | None = None) -> str:
    """The page of a report. run: the finished run, for images; a page of joined reports has none."""
    examples = choose_examples(report, run) if run is not None else []
    sections = [
        ("Results", _results(report)),
        ("Bits and quality", _curves(report)),
        ("Reconstructions", _gallery(report, examples)),
        ("Codebooks", _codebooks(report)),
        ("Image by image", _scatter(report)),
        ("Which differences are certain", _pairs(report)),
        ("How to repeat this", _facts(report)),
    ]
    sections = [(title, body) for title, body in sections if body]
    links = "".join(f'<a href="#s{i}">{escape(title)}</a>' for i, (title, _) in enumerate(sections))
    parts = [
        f'<section aria-labelledby="s{i}"><h2 id="s{i}">{escape(title)}</h2>{body}</section>'
        for i, (title, body) in enumerate(sections)
    ]
    names = ", ".join(row["name"] for row in compared(report))
    style, script = (_resource(name) for name in ("page.css", "page.js"))
    count, protocol = report["images"]["count"], report["protocol"]
    size = report["images"]["size"]
    sides = "their own sizes" if size == "own" else f"{size[0]} x {size[1]} pixels"
    about = f"{count} images of {sides}, protocol {protocol['name']} ({protocol['hash']})"
    if report.get("mixed"):
        about = "Different images or protocols, as the names say: values of different ones cannot be compared"
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>Evaluation: {escape(names)}</title>"
        f'<meta name="description" content="{escape(about)}"><link rel="icon" href="data:,">'
        f"<style>{style}</style></head><body>"
        f"<header><h1>Evaluation: {escape(names)}</h1><p>{escape(about)}</p>"
        f'<nav aria-label="Sections">{links}</nav></header>'
        f"<main>{''.join(parts)}</main><script>{script}</script></body></html>\n"
    )


def compared(report: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Rows of the tokenizers, without the points of codecs' curves."""
    return [row for row in report["tokenizers"] if not row["on_curve"]] or list(report["tokenizers"])


def _resource(name: str) -> str:
    return resources.files("tokenizers_mm.eval").joinpath(name).read_text(encoding="utf-8")


# ------------------------------------------------------------------------------------------------------------- images


def ranked_by(report: Mapping[str, Any]) -> str:
    """Name of the metric that orders the images of the first candidate; "" where none has a value per image."""
    values = report["per_image"]["values"][compared(report)[0]["name"]]
    return next((name for name in RANKING if any(value is not None for value in values.get(name, ()))), "")


def choose_examples(report: Mapping[str, Any], run: Run) -> list[Example]:
    """The worst, middle and best images of the first candidate, reconstructed once more; without an order, the first.

    Infinite values are the best ones; images that the metric could not be measured on are left out.
    """
    run = replace(run, measured=[m for m in run.measured if not m.candidate.on_curve] or run.measured)
    name = ranked_by(report)
    if not name:
        return [_example(run, "image", index) for index in range(min(len(run.used), EACH))]
    scores, metric = report["per_image"]["values"][compared(report)[0]["name"]][name], METRICS[name]
    sign, infinite = (-1.0 if metric.better == "lower" else 1.0), issubclass(metric, PerImage) and metric.infinite
    known = [index for index, score in enumerate(scores) if score is not None or infinite]
    order = sorted(known, key=lambda i: math.inf if scores[i] is None else sign * scores[i])
    middle = len(order) // 2 - EACH // 2
    groups = [order[:EACH], order[max(EACH, middle) :][:EACH], order[max(2 * EACH, len(order) - EACH) :]]
    found = []
    for kind, members in zip(SHOWN, groups, strict=True):
        found += [_example(run, kind, index) for index in members]
    return found


def _example(run: Run, kind: str, index: int) -> Example:
    """One image through all candidates. index: among those that were used."""
    place = run.used[index]
    original = run.prepare(run.source.read(place).image, run.source.names[place])
    made, maps = [], []
    for measured, (x, encoded, *_) in zip(
        run.measured, reconstructions(run, image_to_tensor(original)[None]), strict=True
    ):
        made.append(tensor_to_images(x)[0])
        maps += [(f"{measured.candidate.name}, {label}", image) for label, image in _maps(encoded)]
    return Example(kind, run.source.names[place], index, original, made, maps)


def _maps(encoded: Encoded) -> list[tuple[str, Image.Image]]:
    """Ids as colours, one image per stream: its finest grid. Ids that are alike have one colour."""
    found = []
    for stream in encoded.ids.streams if encoded.ids is not None else ():
        rows, columns = stream.grids[-1]
        ids = encoded.ids.stream(stream.name)[0, -rows * columns :] if encoded.ids is not None else None
        if ids is None or len(ids) != rows * columns:
            continue
        mixed = ids.numpy().astype(np.uint64).reshape(rows, columns) * np.uint64(0x9E3779B97F4A7C15)
        colours = np.stack([(mixed >> np.uint64(shift)) & np.uint64(255) for shift in (56, 48, 40)], -1)
        found.append((f"{stream.name} {rows} x {columns}", Image.fromarray(colours.astype(np.uint8))))
    return found


def _within(size: tuple[int, int]) -> tuple[int, int]:
    """Width and height of an image on the page: its own, or no longer than LONGEST."""
    factor = min(1.0, LONGEST / max(size))
    return max(1, round(size[0] * factor)), max(1, round(size[1] * factor))


def _source(image: Image.Image, quality: int) -> str:
    """A data address of an image: WebP, without loss where the quality is 100."""
    image = image.resize(_within(image.size), Image.Resampling.LANCZOS)
    stream = BytesIO()
    image.save(stream, format="WEBP", lossless=quality == 100, quality=quality, method=4)
    return "data:image/webp;base64," + base64.b64encode(stream.getvalue()).decode()


def _gallery(report: Mapping[str, Any], examples: Sequence[Example]) -> str:
    """Figures of the examples within the budget: with loss where they are too large without, and then fewer."""
    if not examples:
        return ""
    small = max(max(example.original.size) for example in examples) <= 128
    for quality, count in ((100, len(examples)), (92, len(examples)), (85, 6), (80, 3), (60, 3), (40, 1)):
        if quality == 100 and not small:
            continue
        chosen = examples if count >= len(examples) else examples[:: -(-len(examples) // count)]
        figures = [_figure(report, example, quality) for example in chosen]
        if sum(map(len, figures)) <= BUDGET:
            break
    loss = "without loss" if quality == 100 else f"as WebP of quality {quality}, which adds errors of its own"
    first, name = compared(report)[0]["name"], ranked_by(report)
    chosen = f"The worst, median and best images of {first} by {METRICS[name].label}" if name else "The first images"
    zoom = 3 if small else 1
    return (
        f"<p>{escape(chosen)}, shown {loss}. Left of the slider stands the original, right of it the "
        "reconstruction.</p>"
        '<form class="controls" id="controls">'
        '<label>Original to reconstruction <input type="range" id="cut" min="0" max="100" value="50"></label>'
        f'<label>Zoom <input type="range" id="zoom" min="1" max="8" step="1" value="{zoom}"></label>'
        '<label>Show <select id="view"><option value="images">images</option>'
        '<option value="difference">difference, 6 times as bright</option></select></label></form>'
        f'<div class="gallery" id="gallery" style="--cut:50%;--zoom:{zoom}">{"".join(figures)}</div>'
    )


def _figure(report: Mapping[str, Any], example: Example, quality: int) -> str:
    original, name = _source(example.original, quality), escape(example.name)
    width, height = _within(example.original.size)
    cells = []
    for row, image in zip(compared(report), example.made, strict=True):
        values = report["per_image"]["values"][row["name"]]
        facts = [told(k, values[k][example.index]) for k in ("psnr", "ssim", "bits") if k in values]
        label = escape(row["name"])
        cells.append(
            f'<figure><div class="pair" style="--w:{width}px;--h:{height}px" tabindex="0" role="group" '
            f'aria-label="{name} and its reconstruction by {label}">'
            f'<img src="{original}" alt="original {name}" width="{width}" height="{height}">'
            f'<img class="made" src="{_source(image, quality)}" alt="reconstruction of {name} by {label}" '
            f'width="{width}" height="{height}"></div><figcaption>{label}<br><small>{escape(", ".join(facts))}</small>'
            "</figcaption></figure>"
        )
    for label, image in example.maps:
        text = escape(label)
        cells.append(
            f'<figure><div class="pair map" style="--w:{width}px;--h:{height}px">'
            f'<img src="{_source(image, 100)}" alt="ids of {name}: {text}" width="{width}" height="{height}"></div>'
            f"<figcaption>ids<br><small>{text}</small></figcaption></figure>"
        )
    return f'<h3>{example.kind}: {name}</h3><div class="row">{"".join(cells)}</div>'


# ------------------------------------------------------------------------------------------------------ tables, plots


def _table(head: Sequence[str], rows: Sequence[Sequence[str]], caption: str) -> str:
    """A table of HTML cells, the first of each row its heading; it scrolls by itself where it is too wide."""
    top = "".join(f'<th scope="col">{cell}</th>' for cell in head)
    body = "".join(
        f'<tr><th scope="row">{row[0]}</th>{"".join(f"<td>{cell}</td>" for cell in row[1:])}</tr>' for row in rows
    )
    label = escape(caption)
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{label}"><table><caption>{label}</caption>'
        f"<thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def _results(report: Mapping[str, Any]) -> str:
    names = columns(report)
    rows = compared(report)
    best = {name: _best(rows, name) for name in names}
    head = ["tokenizer"]
    for name in names:
        better = {"higher": " ↑", "lower": " ↓"}.get(METRICS[name].better if name in METRICS else "lower", "")
        head.append(escape(heading(name)) + better)
    speed = any("speed" in row for row in rows)
    head += ["encode, ms", "decode, ms"] if speed else []
    body: dict[bool, list[list[str]]] = {False: [], True: []}
    for row in report["tokenizers"]:
        cells = [escape(row["name"])]
        for name in names:
            entry = row["metrics"].get(name)
            text = escape(shown(entry))
            first = row in rows and entry is not None and entry.get("mean") == best[name]
            text = f"<strong>{text}</strong>" if first else text
            if entry is not None and "low" in entry and entry["low"] != entry["high"]:
                text += f"<br><small>{shown({'mean': entry['low']})} to {shown({'mean': entry['high']})}</small>"
            for key in ("originals", "chance"):
                if entry is not None and key in entry:
                    text += f"<br><small>{key} {shown({'mean': entry[key]})}</small>"
            cells.append(text)
        if speed:
            cells += [
                f"{1000 * row['speed'][k]:.1f}" if "speed" in row else "-" for k in ("encode_seconds", "decode_seconds")
            ]
        body[row not in rows].append(cells)
    notes = ["Small numbers are 95 % bootstrap intervals of the mean. Bold: the best of a column."]
    if any("chance" in entry for row in rows for entry in row["metrics"].values()):
        notes.append("Originals: the same for the images themselves. Chance: what a guess without the image reaches.")
    stand_ins = {e["stands_in"] for row in rows for e in row["metrics"].values() if "stands_in" in e}
    notes += [f"rFID, KID and inception score: {text}." for text in sorted(stand_ins)]
    peaks = {row["speed"]["device"]: row["speed"]["peak_memory"] for row in rows if "speed" in row}
    for device, peak in peaks.items():
        holder = "the process" if device == "cpu" else "tensors"
        notes.append(f"Times are per image on {device}; at most {peak / 2**20:,.0f} MiB of memory for {holder}.")
    few = {
        f"{heading(name)}: {entry['images']} images for {entry['features']} features, so the value is far too high; "
        "compare it within this table only."
        for row in rows
        for name, entry in row["metrics"].items()
        if entry.get("features", 0) > entry.get("images", 0)
    }
    notes += sorted(few)
    for row in rows:
        if row.get("over_target"):
            notes.append(f"{row['name']} needs more bits than it may have for {row['over_target']} images.")
    missing = dict.fromkeys(reason for row in rows for reason in row["missing"].values())
    below = "".join(f"<p>{escape(note)}</p>" for note in notes)
    if body[True]:
        curves = _table(head, body[True], "Points of the codecs' curves")
        below += f"<details><summary>Points of the codecs' curves</summary>{curves}</details>"
    if missing:
        items = "".join(f"<li>{escape(reason)}</li>" for reason in missing)
        below += f"<details><summary>Not measured</summary><ul>{items}</ul></details>"
    return _table(head, body[False], "Means over all images") + below


def _best(rows: Sequence[Mapping[str, Any]], name: str) -> float | None:
    values = [row["metrics"][name]["mean"] for row in rows if name in row["metrics"]]
    values = [value for value in values if value is not None]
    better = METRICS[name].better if name in METRICS else "lower"
    if len(values) < 2 or not better:
        return None
    return max(values) if better == "higher" else min(values)


def _legend(labels: Sequence[tuple[str, int]]) -> str:
    items = "".join(
        f'<li><svg viewBox="0 0 10 10" aria-hidden="true"><circle class="s{colour % 8}" cx="5" cy="5" r="4"/></svg>'
        f"{escape(label)}</li>"
        for label, colour in labels
    )
    return f'<ul class="legend">{items}</ul>'


def _curves(report: Mapping[str, Any]) -> str:
    """Bits against each of a few metrics: a point per tokenizer, a line per codec."""
    rows = report["tokenizers"]
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        label = f"{row['name'].split()[0]}, several qualities" if row["on_curve"] else row["name"]
        groups.setdefault(label, []).append(row)
    families = list(dict.fromkeys(label.split()[0].strip(",") for label in groups))  # a codec has one colour
    colours = {label: families.index(label.split()[0].strip(",")) for label in groups}
    found = []
    for name in PLOTTED:
        series = []
        for label, members in groups.items():
            points, texts = [], []
            for row in members:
                bits, value = (row["metrics"].get(k, {}).get("mean") for k in ("bits_per_pixel", name))
                if bits and value is not None:
                    points.append((bits, value))
                    texts.append(f"{row['name']}: {bits:.3g} bits per pixel, {shown({'mean': value})}")
            if points:
                series.append(plots.Series(label, points, texts, members[0]["on_curve"], colours[label]))
        if series:
            about = f"{heading(name)} against bits per pixel: " + "; ".join(t for s in series for t in s.texts)
            picture = plots.plot(series, "bits per pixel", heading(name), about, logarithmic=True)
            found.append(f"<figure>{picture}<figcaption>{escape(heading(name))}</figcaption></figure>")
    if not found:
        return ""
    return _legend(list(colours.items())) + f'<div class="plots">{"".join(found)}</div>'


def _codebooks(report: Mapping[str, Any]) -> str:
    rows, figures = [], []
    for row in report["tokenizers"]:
        for name, stream in row.get("codebook", {}).items():
            conditional = [c for c in (stream["conditional"] or {}).values() if c]
            least = min((c for c in conditional), key=lambda c: c["bits"], default=None)
            given = "-" if least is None else f"{least['bits']:.2f}{'' if least['reliable'] else ' (too few ids)'}"
            label = f"{row['name']}, {name}"
            rows.append([
                escape(label), f"{stream['codebook_size']:,}", f"{stream['ids']:,}", f"{100 * stream['usage']:.1f} %",
                f"{stream['dead']:,}", f"{stream['perplexity']:,.0f}", f"{stream['entropy']:.2f}", given,
                f"{stream['bits']['nominal']:,.0f}", f"{stream['bits']['entropy_coded']:,.0f}",
            ])  # fmt: skip
            about = f"Occurrences of the codes of {label}, most frequent first"
            ranks, codes = len(stream["histogram"]), stream["codebook_size"]
            label_x = "rank of the code" + (f" (the first {ranks:,})" if ranks < codes else "")
            picture = plots.bars(stream["histogram"], label_x, "occurrences", about)
            scales = ", ".join(f"{s['perplexity']:.0f}" for s in stream["scales"])
            below = f"<br><small>perplexity by scale: {scales}</small>" if len(stream["scales"]) > 1 else ""
            figures.append(f"<figure>{picture}<figcaption>{escape(label)}{below}</figcaption></figure>")
    if not rows:
        return ""
    head = ["stream", "codes", "ids counted", "used", "never used", "perplexity", "entropy, bits",
            "given a neighbour, bits", "bits per image", "entropy-coded"]  # fmt: skip
    note = (
        "<p>Entropies are corrected by Miller and Madow's term. “Given a neighbour” is the lower of those given "
        "the id before and the id above: what a bigram model could reach; with few ids it is far too low. "
        "“Entropy-coded” is what an ideal adaptive coder of order 0 spends.</p>"
    )
    return _table(head, rows, "Use of the codebooks") + note + f'<div class="plots">{"".join(figures)}</div>'


def _scatter(report: Mapping[str, Any]) -> str:
    """PSNR (or the first metric) of the first tokenizer against that of every other, image by image."""
    values, names = report["per_image"]["values"], report["per_image"]["names"]
    rows = [row["name"] for row in compared(report)]
    metric = next((m for m in ("psnr", "ssim") if all(values[name].get(m) for name in rows)), None)
    if metric is None or len(set(map(len, (values[name][metric] for name in rows)))) != 1:
        return ""
    first, *others = rows
    found = []
    for colour, other in enumerate(others[:6], 1):
        pairs = zip(values[first][metric], values[other][metric], names, strict=True)
        points = [(a, b, name) for a, b, name in pairs if a is not None and b is not None][:2000]
        if points:
            ahead = sum(a > b for a, b, _ in points)
            about = (
                f"{heading(metric)} of {len(points)} images by {first} and by {other}; {first} is higher for {ahead}"
            )
            texts = [f"{name}: {a:.4g} and {b:.4g}" for a, b, name in points]
            series = plots.Series(other, [(a, b) for a, b, _ in points], texts, colour=colour)
            picture = plots.diagonal([series], first, other, about)
            found.append(f"<figure>{picture}<figcaption>{escape(about)}</figcaption></figure>")
    if not others:
        points = list(enumerate(sorted(value for value in values[first][metric] if value is not None)))
        about = f"{heading(metric)} of every image by {first}, in order"
        if points:
            picture = plots.plot([plots.Series(first, points)], "images", heading(metric), about)
            found.append(f"<figure>{picture}<figcaption>{escape(about)}</figcaption></figure>")
    return f'<div class="plots">{"".join(found)}</div>' if found else ""


def _pairs(report: Mapping[str, Any]) -> str:
    rows = []
    for pair in report["pairs"]:
        metric = METRICS[pair["metric"]]
        if metric.name == "bits_per_pixel":
            continue
        ahead = (pair["difference"] > 0) == (metric.better == "higher")
        verdict = "no clear difference" if pair["p"] >= 0.05 else f"{pair['a'] if ahead else pair['b']} is better"
        rows.append([
            escape(f"{pair['a']} less {pair['b']}"), escape(heading(pair["metric"])), f"{pair['difference']:+.4g}",
            f"{pair['low']:+.4g} to {pair['high']:+.4g}", f"{pair['p']:.2g}", escape(verdict),
        ])  # fmt: skip
    if not rows:
        return ""
    head = ["tokenizers", "metric", "mean difference", "95 % interval", "p", "at the level of 5 %"]
    note = "<p>Paired by image; p is that of a two-sided sign-flip test, not corrected for several tests.</p>"
    return _table(head, rows, "Paired differences") + note


def _facts(report: Mapping[str, Any]) -> str:
    facts: dict[str, Any] = {
        "command": "tokenizers-mm " + " ".join(report["command"]) if report["command"] else "",
        **{f"protocol: {key}": value for key, value in report["protocol"].items()},
        **{f"images: {key}": value for key, value in report["images"].items() if key != "skipped"},
        "images left out": len(report["images"]["skipped"]),
        **{f"setup: {key}": value for key, value in report["setup"].items()},
        **{f"identity of {row['name']}": row["identity"] for row in compared(report)},
        **report["versions"],
    }
    items = "".join(f"<dt>{escape(str(k))}</dt><dd>{escape(str(v)) or '-'}</dd>" for k, v in facts.items())
    return f"<dl>{items}</dl>"
