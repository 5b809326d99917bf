"""Small pieces of SVG: text, lines, axes, and a line chart."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from typing import NamedTuple

#: Number of colours in the style sheet for runs and for micro-batches.
HUES = 8
#: A line with more points than this has no markers, which would cover it.
MOST_MARKERS = 40
_FIGURE_SPACE, _PUNCTUATION_SPACE = "\u2007", "\u2008"


class Box(NamedTuple):
    """A rectangle of a drawing, in pixels.

    Attributes:
      left: Left edge.
      top: Upper edge.
      width: Width.
      height: Height.
    """

    left: float
    top: float
    width: float
    height: float


class Series(NamedTuple):
    """A line of a chart.

    Attributes:
      label: Its name.
      hue: Index of its colour.
      points: Pairs (x, y), x increasing.
    """

    label: str
    hue: int
    points: Sequence[tuple[float, float]]


def element(name: str, content: str = "", /, **attributes: object) -> str:
    """Returns an element; underscores in attribute names become hyphens, numbers are rounded."""
    parts = [name]
    for key, value in attributes.items():
        text = f"{value:.2f}".rstrip("0").rstrip(".") if isinstance(value, float) else str(value)
        parts.append(f'{key.rstrip("_").replace("_", "-")}="{html.escape(text)}"')
    return f"<{' '.join(parts)}>{content}</{name}>"


def text(x: float, y: float, words: str, class_: str = "", anchor: str = "start") -> str:
    """Returns a line of text."""
    return element("text", html.escape(words), x=x, y=y, class_=class_, text_anchor=anchor)


def drawing(width: float, height: float, content: str, label: str) -> str:
    """Returns a complete drawing that scales to the page's width.

    Args:
      width: Its width in pixels.
      height: Its height.
      content: Its elements.
      label: Its description for screen readers.
    """
    return element(
        "svg", content, viewBox=f"0 0 {width:g} {height:g}", width=width, height=height, role="img",
        aria_label=label,
    )  # fmt: skip


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Returns round numbers that cover a range, about ``count`` of them."""
    if not high > low:
        return [low]
    raw = (high - low) / count
    power = 10 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [i * step for i in range(first, math.floor(high / step + 1e-9) + 1)]


def digits(value: float) -> str:
    """Returns a number with up to three significant digits, without an exponent."""
    shown = _significant(value)
    return shown.rstrip("0").rstrip(".") if "." in shown else shown


def aligned(values: Sequence[float | None]) -> list[str]:
    """Returns the numbers of a table's column, right-aligned with their decimal points in line.

    Numbers have three significant digits. Spaces as wide as a digit and a point stand in for
    missing decimals; the style sheet has to ask for tabular digits and forbid line breaks.

    Args:
      values: The numbers, from top to bottom; None is shown as a dash.
    """
    shown = ["–" if value is None else _significant(value) for value in values]
    fractions = [len(number.partition(".")[2]) for number in shown]
    most = max(fractions, default=0)
    return [
        number
        + (_PUNCTUATION_SPACE if most and not fraction else "")
        + _FIGURE_SPACE * (most - fraction)
        for number, fraction in zip(shown, fractions, strict=True)
    ]


def tick_labels(values: Sequence[float]) -> list[str]:
    """Returns the labels of an axis, all with the decimals that its step needs.

    Args:
      values: The ticks, evenly spaced.
    """
    step = values[1] - values[0] if len(values) > 1 else sum(values)
    exact = (n for n in range(12) if math.isclose(round(step, n), step, rel_tol=1e-6))
    places = next(exact, 12)
    return [f"{value:,.{places}f}" for value in values]


def _significant(value: float) -> str:
    """Returns a number with three significant digits, trailing zeros included."""
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    places = max(0, 2 - math.floor(math.log10(abs(value))))
    return f"{value:,.{places}f}"


def line_chart(
    title: str,
    x_label: str,
    series: Sequence[Series],
    *,
    unit: str = "",
    from_zero: bool = False,
    size: tuple[float, float] = (430.0, 250.0),
) -> str:
    """Returns a chart of lines, whose names are in the page's legend and in tooltips.

    Args:
      title: What the y axis shows.
      x_label: What the x axis shows.
      series: The lines.
      unit: Follows each y value.
      from_zero: Whether the y axis begins at zero.
      size: Width and height in pixels.
    """
    width, height = size
    plot = Box(52, 30, width - 66, height - 72)
    xs = [x for line in series for x, _ in line.points]
    ys = [y for line in series for _, y in line.points]
    if not xs:
        return ""
    x_high = max(xs) or 1.0
    low, high = (0.0 if from_zero else min(ys)), max(ys)
    if not high > low:
        high = low + (abs(low) or 1.0) * 0.1
    margin = (high - low) * 0.06
    low, high = (low if from_zero else low - margin), high + margin

    def place(x: float, y: float) -> tuple[float, float]:
        return (plot.left + x / x_high * plot.width,
                plot.top + (high - y) / (high - low) * plot.height)  # fmt: skip

    parts = [text(8, 16, title, "chart-title")]
    levels = ticks(low, high)
    for y, label in zip(levels, tick_labels(levels), strict=True):
        _, at = place(0, y)
        parts.append(element("line", x1=plot.left, x2=plot.left + plot.width, y1=at, y2=at,
                             class_="grid"))  # fmt: skip
        parts.append(text(plot.left - 6, at + 4, label + unit, "tick", "end"))
    stations = ticks(0, x_high)
    for x, label in zip(stations, tick_labels(stations), strict=True):
        at, _ = place(x, low)
        parts.append(text(at, plot.top + plot.height + 16, label, "tick", "middle"))
    parts.append(element("line", x1=plot.left, x2=plot.left + plot.width,
                         y1=plot.top + plot.height, y2=plot.top + plot.height,
                         class_="axis"))  # fmt: skip
    parts.append(text(plot.left + plot.width / 2, height - 8, x_label, "label", "middle"))
    for line in series:
        placed = [place(x, y) for x, y in line.points]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in placed)
        hue = f"hue{line.hue % HUES}"
        if len(placed) > 1:
            name = element("title", html.escape(line.label))
            parts.append(element("polyline", name, points=path, class_=f"line {hue}"))
        if len(placed) > MOST_MARKERS:
            continue
        for (x, y), (value_x, value_y) in zip(placed, line.points, strict=True):
            note = f"{line.label}: {digits(value_y)}{unit} at {digits(value_x)} {x_label}"
            parts.append(
                element("circle", element("title", html.escape(note)), cx=x, cy=y, r=3.0,
                        class_=f"dot {hue}")
            )  # fmt: skip
    return drawing(width, height, "".join(parts), f"{title} against {x_label}")


def legend(entries: Sequence[tuple[str, ...]]) -> str:
    """Returns a legend.

    Args:
      entries: For each entry a class of the style sheet, the name, and optionally the letters that
        stand on its mark.
    """
    items = "".join(
        f'<li><span class="swatch {kind}">{html.escape("".join(letters))}</span>'
        f"{html.escape(name)}</li>"
        for kind, name, *letters in entries
    )
    return f'<ul class="legend">{items}</ul>'
