"""Small pieces of SVG: text, lines, axes, and a line chart."""

from __future__ import annotations

import html
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

#: Names of the colours in the style sheet for runs and for micro-batches, in order.
HUES = 8


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
      label: What it shows, for who cannot see it.
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
    """Returns a number with three significant digits and no power of ten."""
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    places = max(0, 2 - math.floor(math.log10(abs(value))))
    shown = f"{value:,.{places}f}"
    return shown.rstrip("0").rstrip(".") if "." in shown else shown


def line_chart(
    title: str,
    x_label: str,
    series: Sequence[Series],
    *,
    show: Callable[[float], str] = digits,
    from_zero: bool = False,
    size: tuple[float, float] = (430.0, 250.0),
) -> str:
    """Returns a chart of lines, each named in the page's legend and at its points.

    Args:
      title: What the y axis shows.
      x_label: What the x axis shows.
      series: The lines.
      show: Writes a y value.
      from_zero: Whether the y axis begins at zero.
      size: Width and height in pixels.
    """
    width, height = size
    plot = Box(52, 30, width - 66, height - 72)
    xs = [x for one in series for x, _ in one.points]
    ys = [y for one in series for _, y in one.points]
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
    for y in ticks(low, high):
        _, at = place(0, y)
        parts.append(element("line", x1=plot.left, x2=plot.left + plot.width, y1=at, y2=at,
                             class_="grid"))  # fmt: skip
        parts.append(text(plot.left - 6, at + 4, show(y), "tick", "end"))
    for x in ticks(0, x_high):
        at, _ = place(x, low)
        parts.append(text(at, plot.top + plot.height + 16, digits(x), "tick", "middle"))
    parts.append(element("line", x1=plot.left, x2=plot.left + plot.width,
                         y1=plot.top + plot.height, y2=plot.top + plot.height,
                         class_="axis"))  # fmt: skip
    parts.append(text(plot.left + plot.width / 2, height - 8, x_label, "label", "middle"))
    for one in series:
        placed = [place(x, y) for x, y in one.points]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in placed)
        hue = f"hue{one.hue % HUES}"
        if len(placed) > 1:
            parts.append(element("polyline", points=path, class_=f"line {hue}"))
        for (x, y), (value_x, value_y) in zip(placed, one.points, strict=True):
            note = f"{one.label}: {show(value_y)} at {digits(value_x)} {x_label}"
            parts.append(
                element("circle", element("title", html.escape(note)), cx=x, cy=y, r=3.0,
                        class_=f"dot {hue}")
            )  # fmt: skip
    return drawing(width, height, "".join(parts), f"{title} against {x_label}")


def legend(entries: Sequence[tuple[str, str]]) -> str:
    """Returns a legend: pairs of a class of the style sheet and a name."""
    items = "".join(
        f'<li><span class="swatch {kind}"></span>{html.escape(name)}</li>' for kind, name in entries
    )
    return f'<ul class="legend">{items}</ul>'
