"""Small plots as SVG text: points, lines and bars with axes; colours come from the classes `s0` to `s7` of the page."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 420, 300
LEFT, RIGHT, TOP, BOTTOM = 56, 12, 12, 44


@dataclass(frozen=True)
class Series:
    """Points (x, y) of one colour, each with a text for whoever points at it.

    line: joined in the order of x. dots: drawn as dots.
    """

    label: str
    points: Sequence[tuple[float, float]]
    texts: Sequence[str] = ()
    line: bool = False
    colour: int = 0
    dots: bool = True


@dataclass(frozen=True)
class Axis:
    """A range of values on a range of pixels. logarithmic: by powers of ten."""

    label: str
    low: float
    high: float
    start: float
    end: float
    logarithmic: bool = False

    def __call__(self, value: float) -> float:
        low, high = self.low, self.high
        if self.logarithmic:
            value, low, high = math.log10(value), math.log10(low), math.log10(high)
        return self.start + (value - low) / (high - low) * (self.end - self.start)

    def ticks(self) -> list[float]:
        """Round values within the range."""
        if self.logarithmic:
            powers = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
            steps = (1, 2, 5) if len(powers) < 4 else (1,)
            return [m * 10.0**p for p in powers for m in steps if self.low <= m * 10.0**p <= self.high]
        step = 10 ** math.floor(math.log10((self.high - self.low) / 4))
        step = next(step * m for m in (1, 2, 2.5, 5, 10) if (self.high - self.low) / (step * m) <= 5)
        first = math.ceil(self.low / step)
        return [n * step for n in range(first, math.floor(self.high / step + 1e-9) + 1)]


def axis(label: str, values: Sequence[float], start: float, end: float, logarithmic: bool = False) -> Axis:
    """An axis with a margin around its values."""
    low, high = min(values), max(values)
    if logarithmic:
        factor = max(1.1, (high / low) ** 0.06)
        return Axis(label, low / factor, high * factor, start, end, True)
    margin = (high - low) * 0.06 or max(abs(high), 1.0) * 0.1
    return Axis(label, low - margin, high + margin, start, end)


def plot(series: Sequence[Series], x_label: str, y_label: str, about: str, logarithmic: bool = False) -> str:
    """Points and lines over common axes. about: the text in place of the image. logarithmic: of the x axis."""
    points = [point for item in series for point in item.points]
    x = axis(x_label, [p[0] for p in points], LEFT, WIDTH - RIGHT, logarithmic)
    y = axis(y_label, [p[1] for p in points], HEIGHT - BOTTOM, TOP)
    parts = _frame(x, y)
    for item in series:
        colour = f"s{item.colour % 8}"
        if item.line:
            path = " ".join(f"{x(a):.1f},{y(b):.1f}" for a, b in sorted(item.points))
            parts.append(f'<polyline class="{colour} line" points="{path}"/>')
        for index, (a, b) in enumerate(item.points if item.dots else ()):
            text = item.texts[index] if item.texts else item.label
            radius = 2.5 if len(item.points) > 40 else 4
            place = f'cx="{x(a):.1f}" cy="{y(b):.1f}" r="{radius}"'
            parts.append(f'<circle class="{colour}" {place}><title>{escape(text)}</title></circle>')
    return _svg(parts, about)


def diagonal(series: Sequence[Series], x_label: str, y_label: str, about: str) -> str:
    """Points whose two values are of one kind, with the line where both are equal."""
    values = [value for item in series for point in item.points for value in point]
    low, high = axis("", values, 0, 1).low, axis("", values, 0, 1).high
    equal = Series("equal", ((low, low), (high, high)), line=True, colour=7, dots=False)
    return plot([equal, *series], x_label, y_label, about)


def bars(values: Sequence[float], x_label: str, y_label: str, about: str) -> str:
    """A filled curve over 0, 1, 2, ...; values must not be negative."""
    x = Axis(x_label, 0, max(1, len(values)), LEFT, WIDTH - RIGHT)
    y = Axis(y_label, 0, max(*values, 1e-12) * 1.05, HEIGHT - BOTTOM, TOP)
    corners = [f"{x(0):.1f},{y(0):.1f}"]
    shown = max(1, len(values) // 400)
    for index in range(0, len(values), shown):
        height = max(values[index : index + shown])
        corners += [f"{x(index):.1f},{y(height):.1f}", f"{x(min(len(values), index + shown)):.1f},{y(height):.1f}"]
    corners.append(f"{x(len(values)):.1f},{y(0):.1f}")
    return _svg([*_frame(x, y), f'<polygon class="s0" points="{" ".join(corners)}"/>'], about)


def number(value: float) -> str:
    """A short text of a tick."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def _frame(x: Axis, y: Axis) -> list[str]:
    parts = []
    for value in x.ticks():
        at = f"{x(value):.1f}"
        parts.append(f'<line class="grid" x1="{at}" x2="{at}" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/>')
        parts.append(f'<text x="{at}" y="{HEIGHT - BOTTOM + 16}" text-anchor="middle">{number(value)}</text>')
    for value in y.ticks():
        at = f"{y(value):.1f}"
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{at}" y2="{at}"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{at}" dy="4" text-anchor="end">{number(value)}</text>')
    middle = (LEFT + WIDTH - RIGHT) / 2
    parts.append(f'<text x="{middle}" y="{HEIGHT - 6}" text-anchor="middle">{escape(x.label)}</text>')
    turned = f"translate(12 {(TOP + HEIGHT - BOTTOM) / 2}) rotate(-90)"
    parts.append(f'<text transform="{turned}" text-anchor="middle">{escape(y.label)}</text>')
    return parts


def _svg(parts: Sequence[str], about: str) -> str:
    head = f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(about)}">'
    return head + "".join(parts) + "</svg>"
