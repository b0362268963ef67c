"""Computes where numbers are drawn: the range of an axis, its ticks, and pixels of values."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from fedpress.reports.plot import Axis, Panel, Series

MARGIN = 0.06  # share of the range between the lowest or highest value and the edge of the picture
TINIEST = 1e-100  # dividing by a smaller range could overflow: such numbers are drawn as equal


@dataclass(frozen=True)
class Scale:
    """A linear map from values to pixels: `low` is drawn at the pixel `start`, `high` at `end`.

    >>> Scale(low=0.0, high=10.0, start=100.0, end=200.0)(2.5)
    125.0
    """

    low: float
    high: float
    start: float
    end: float

    def __call__(self, value: float) -> float:
        """Returns the pixel of `value`."""
        return self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start)


def axis_range(
    axis: Axis, numbers: Iterable[float], *, margin: float = MARGIN
) -> tuple[float, float]:
    """Returns the lowest and the highest value that an axis shows.

    Args:
        axis: the axis. An end that it sets (`low`, `high`) is kept, except that `bounds` may cut
            it, and that `high` is raised if it equals `low`. Other ends are chosen here: they
            follow from the numbers, `least_range` and `bounds`.
        numbers: the values that must be visible.
        margin: space beyond the values, as a share of the range, at each end that is chosen here.

    >>> axis_range(Axis("accuracy (%)", bounds=(0.0, 100.0)), [90.0, 99.5])
    (89.43, 100.0)
    >>> axis_range(Axis("bytes", low=0.0), [3.0, 5.0], margin=0)
    (0.0, 5.0)
    """
    known = list(numbers)
    low = axis.low if axis.low is not None else min(known, default=0.0)
    high = axis.high if axis.high is not None else max(known, default=1.0)

    # Widens a range that is too small: equally at both ends, or only at the end that is not set.
    missing = axis.least_range - (high - low)
    if missing > 0 and axis.low is None:
        low -= missing if axis.high is not None else missing / 2
    if missing > 0 and axis.high is None:
        high += missing if axis.low is not None else missing / 2
    # Equal numbers have a range of 0: `Scale` would divide by it.
    if high - low <= max(1e-6 * max(abs(low), abs(high)), TINIEST):
        spread = abs(low) * 0.05 if abs(low) > TINIEST else 1.0
        high = low + spread
        if axis.low is None:
            low -= spread

    space = margin * (high - low)
    if axis.low is None:
        low -= space
    if axis.high is None:
        high += space
    if axis.bounds is None:
        return low, high
    return max(low, axis.bounds[0]), min(high, axis.bounds[1])


def ticks(low: float, high: float, most: int = 6, *, whole: bool = False) -> list[float]:
    """Returns about `most` round numbers from `low` to `high`, or fewer.

    Args:
        low: the lowest value of the axis.
        high: the highest value of the axis.
        most: for how many numbers there is room; rounding may add one or two.
        whole: whether only integers make sense, as with epochs.

    >>> ticks(0, 1), ticks(83.2, 94.9), ticks(1, 4, whole=True)
    ([0.0, 0.2, 0.4, 0.6, 0.8, 1.0], [85.0, 87.5, 90.0, 92.5], [1.0, 2.0, 3.0, 4.0])
    """
    rough = (high - low) / max(1, most - 1)
    power = 10.0 ** math.floor(math.log10(rough))
    # Steps that divide 10: multiples of 3 or 4 are hard to read on an axis.
    steps = [power * factor for factor in (1, 2, 2.5, 5, 10)]
    # 0.999, because rounding may make a step that fits exactly slightly too small.
    step = next(step for step in steps if step >= rough * 0.999)
    if whole:
        step = max(1.0, math.ceil(step))
    first = math.ceil(low / step - 1e-9)
    count = math.floor(high / step + 1e-9) - first + 1
    # Rounded, because 3 * 0.1 would be 0.30000000000000004.
    return [round((first + i) * step, 12) for i in range(count)]


def tick_text(value: float, step: float) -> str:
    """Returns a tick's label with as many digits as the step between ticks needs.

    >>> tick_text(0.25, 0.05), tick_text(30.0, 10.0)
    ('0.25', '30')
    >>> tick_text(20000.0, 5000.0), tick_text(2e-9, 1e-9)
    ('20,000', '2e-09')
    """
    if 0 < step < 1e-4 or abs(value) >= 1e9:
        return f"{value:.3g}"
    digits = max(0, -math.floor(math.log10(step) + 1e-9)) if step > 0 else 0
    # A step such as 2.5 needs one digit more than the logarithm says.
    if round(step, digits) != round(step, 10):
        digits += 1
    return f"{value:,.{digits}f}"


def tick_texts(marks: Sequence[float]) -> list[str]:
    """Returns the labels of all ticks of one axis."""
    # A single tick has no distance to a neighbour: its own size decides the number of digits.
    step = abs(marks[0]) if marks else 1.0
    if len(marks) > 1:
        step = marks[1] - marks[0]
    return [tick_text(mark, step) for mark in marks]


def smallest_distance(numbers: Iterable[float]) -> float:
    """Returns the smallest distance between two different numbers; 1 if there is only one.

    >>> smallest_distance([1, 4, 4, 6])
    2
    """
    ordered = sorted(set(numbers))
    return min((b - a for a, b in pairwise(ordered)), default=1.0)


def panel_heights(panel: Panel) -> list[float]:
    """Returns all vertical values that the panel must show; for stacked series these are sums."""
    found: list[float] = []
    if panel.stacked:
        found += [part.base + part.height for part in stacked(panel)]
    else:
        for series in panel.series:
            found += [y for y in series.y if y is not None]
    # The length of a bar or area shows its number, so the axis must begin at 0.
    from_zero = any(series.kind in ("bars", "areas") for series in panel.series)
    return [0.0, *found] if from_zero else found


@dataclass(frozen=True)
class Part:
    """One bar or one point of an area in a stack.

    Attributes:
        series: the series of the part.
        at: index of the part in the series.
        base: the sum of the parts below.
        height: the number of this part.
    """

    series: Series
    at: int
    base: float
    height: float

    @property
    def x(self) -> float:
        """The horizontal value."""
        return self.series.x[self.at] or 0.0

    @property
    def hover(self) -> str:
        """The tooltip; "" if there is none."""
        return self.series.hover[self.at] if self.series.hover else ""


def stacked(panel: Panel) -> list[Part]:
    """Returns all parts of a stack; a part begins at the top of the earlier parts at its `x`."""
    tops: dict[float, float] = {}
    parts = []
    for series in panel.series:
        for at, (x, y) in enumerate(zip(series.x, series.y, strict=True)):
            if x is None:
                continue
            base = tops.get(x, 0.0)
            parts.append(Part(series, at, base, y or 0.0))
            tops[x] = base + (y or 0.0)
    return parts


def pixel_of(a: float | None, b: float | None, x: Scale, y: Scale) -> tuple[float, float] | None:
    """Returns the pixel of the point (a, b); None if a number is missing or b is off the axis."""
    if a is None or b is None or not y.low <= b <= y.high:
        return None
    return x(a), y(b)
