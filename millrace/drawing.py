"""Pictures as SVG, by nothing but text: a page to put parts on, and charts of what changes step by step over time."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final
from xml.sax.saxutils import escape

COLOURS: Final = ("#2f6f9f", "#c2571a", "#3f8f4f", "#8a4f9f", "#a9a39a", "#b03a48", "#5b7f1f", "#1f8f8f")
_WIDTH: Final = 860
_LEFT: Final = 64
_RIGHT: Final = 20
_HIGH: Final = 150
_GAP: Final = 64
_TIMES: Final = (1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 900, 1800, 3600, 7200, 14_400, 21_600, 43_200, 86_400, 172_800, 604_800)


@dataclass(frozen=True, kw_only=True)
class Line:
    """What changes in steps: a value holds from its moment until the next one. `points`: (seconds, value), by time."""

    name: str
    points: Sequence[tuple[float, float]]
    dashed: bool = False


@dataclass(frozen=True, kw_only=True)
class Panel:
    """Lines over one stretch of time that share a scale."""

    title: str
    lines: Sequence[Line]


def page(width: int, height: int, title: str, parts: Iterable[str]) -> str:
    """A whole picture with its title."""
    head = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" font-family="sans-serif" font-size="13">',
        f'<rect width="{width}" height="{height}" fill="#ffffff"/>',
        f'<text x="8" y="18" font-weight="bold">{escape(title)}</text>',
    ]
    return "\n".join([*head, *parts, "</svg>"]) + "\n"


def charts(title: str, panels: Sequence[Panel], until_s: float) -> str:
    """Panels one below the other, from second 0 to `until_s`. What their lines are is said once where it is the same in all."""
    until_s = until_s or 1.0
    names = [[line.name for line in panel.lines] for panel in panels]
    shared = len(names[0]) > 1 and all(each == names[0] for each in names)
    parts, top = _legend(names[0], _LEFT, 40) if shared else ([], 40)
    top += 32 if shared else 16
    for panel in panels:
        parts += _panel(panel, top, until_s)
        if not shared and len(panel.lines) > 1:
            begin = _WIDTH - _RIGHT - sum(_wide(line.name) for line in panel.lines)
            parts += _legend([line.name for line in panel.lines], begin, top - 10)[0]
        top += _HIGH + _GAP
    return page(_WIDTH, top - _GAP + 36, title, parts)


def _legend(names: Sequence[str], begin: int, y: int) -> tuple[list[str], int]:
    """The names in the colours of their lines, from `begin` on; and where the last row of them is."""
    parts, x = [], begin
    for number, name in enumerate(names):
        if x > begin and x + _wide(name) > _WIDTH:
            x, y = begin, y + 18
        parts.append(f'<text x="{x}" y="{y}" fill="{_colour(number)}">{escape(name)}</text>')
        x += _wide(name)
    return parts, y


def _wide(text: str) -> int:
    """How wide it is, about, with a gap."""
    return 18 + round(7.2 * len(text))


def _panel(panel: Panel, top: int, until_s: float) -> list[str]:
    bottom, right = top + _HIGH, _WIDTH - _RIGHT
    step = _nice(max((value for line in panel.lines for _at, value in line.points), default=0.0) / 4)
    most = step * max(1, math.ceil(max((value for line in panel.lines for _at, value in line.points), default=0.0) / step))
    parts = [f'<text x="{_LEFT}" y="{top - 10}">{escape(panel.title)}</text>']
    for number in range(round(most / step) + 1):
        y = bottom - _HIGH * number * step / most
        parts += [
            f'<line x1="{_LEFT}" y1="{y:.1f}" x2="{right}" y2="{y:.1f}" stroke="#dddddd"/>',
            f'<text x="{_LEFT - 6}" y="{y + 4:.1f}" text-anchor="end" font-size="11">{number * step:g}</text>',
        ]
    apart = next((each for each in _TIMES if until_s / each <= 10), _TIMES[-1])
    for number in range(int(until_s / apart) + 1):
        x = _LEFT + (right - _LEFT) * number * apart / until_s
        label = _clock(number * apart)
        parts.append(f'<text x="{x:.1f}" y="{bottom + 16}" text-anchor="middle" font-size="11">{label}</text>')
    for number, line in enumerate(panel.lines):
        style = ' stroke-dasharray="5 3"' if line.dashed else ""
        path = _path(line.points, until_s, most, bottom, right)
        parts.append(f'<path d="{path}" fill="none" stroke="{_colour(number)}" stroke-width="1.5"{style}/>')
    return parts


def _path(points: Sequence[tuple[float, float]], until_s: float, most: float, bottom: int, right: int) -> str:
    """Steps; of all that fall on one column of the picture, the highest and the last."""
    wide = right - _LEFT
    columns: dict[int, tuple[float, float]] = {}
    for at_s, value in points:
        column = round(wide * min(at_s, until_s) / until_s)
        highest = columns[column][0] if column in columns else value
        columns[column] = (max(highest, value), value)
    said, y_now = "", ""
    for column, (highest, last) in columns.items():
        for value in dict.fromkeys((highest, last)):
            y = f"{bottom - _HIGH * value / most:.1f}"
            if y != y_now:
                said += f"H{_LEFT + column}V{y}" if said else f"M{_LEFT + column} {y}"
            y_now = y
    return said + f"H{right}" if said else ""


def _nice(step: float) -> float:
    """1, 2 or 5 times a power of ten, the next one up."""
    if step <= 0:
        return 1.0
    power = 10.0 ** math.floor(math.log10(step))
    return next(times * power for times in (1, 2, 5, 10) if times * power >= step * (1 - 1e-9))


def _clock(seconds: int) -> str:
    days, rest = divmod(seconds, 86_400)
    hours, minutes, left = rest // 3600, rest % 3600 // 60, rest % 60
    if days:
        return f"{days} d" + (f" {hours} h" if hours else "")
    if hours:
        return f"{hours} h" + (f" {minutes:02}" if minutes else "")
    return f"{minutes} min" + (f" {left:02}" if left else "") if minutes else f"{left} s"


def _colour(number: int) -> str:
    return COLOURS[number % len(COLOURS)]
