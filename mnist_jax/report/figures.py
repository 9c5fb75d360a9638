"""The pictures of a report, drawn by Matplotlib: functions from plain values to the bytes of a PNG, light or dark.

No text in them is taken for mathematics, and none is drawn before it was made to fit.
"""

import contextlib
import io
import logging
import textwrap
import time
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from mnist_jax.report import history
from mnist_jax.report.history import Curve, End, Span

# With a home that is empty or cannot be written to, it tells of its font cache, of which nobody asked.
logging.getLogger("matplotlib").setLevel(logging.ERROR)
import matplotlib.style  # noqa: E402
from matplotlib.axes import Axes  # noqa: E402
from matplotlib.colors import LinearSegmentedColormap  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402
from matplotlib.lines import Line2D  # noqa: E402
from matplotlib.patches import Patch  # noqa: E402

LANES = (*history.LANES.values(), "save")
DPI = 150
WIDTH_IN = 1400 / DPI
TEXT_PT = 9.0
LETTER_PX = 0.6 * TEXT_PT / 72 * DPI  # a letter's width, a little above the mean
MAX_LABELS = 8  # Where more turns ended than that, the lines alone say how.


class Mark(NamedTuple):
    """A step at which the work of a start ended, how, and in a few words."""

    step: int
    end: End
    label: str


class Theme(NamedTuple):
    """Colours that people see apart who see few colours: on the page, and from a cell that is empty to a full one."""

    page: str
    ink: str
    quiet: str
    grid: str
    blue: str
    orange: str
    red: str
    green: str
    heat: tuple[str, str]
    images: str


LIGHT = Theme(
    *("#ffffff", "#1f2328", "#59636e", "#d8dee4"),
    *("#0072b2", "#b06f00", "#c14a00", "#00795a"),
    heat=("#f6c9a5", "#a33d00"),
    images="gray_r",
)
DARK = Theme(
    *("#0d1117", "#e6edf3", "#9aa4af", "#30363d"),
    *("#56b4e9", "#e69f00", "#ff8c4b", "#3fc79a"),
    heat=("#4a2410", "#ff9d61"),
    images="gray",
)


def plot_run(
    *,
    train: Curve,
    test: Curve,
    starts: Sequence[int],
    marks: Sequence[Mark],
    lost: Sequence[tuple[int, int]],
    turns: Sequence[tuple[float, float]],
    spans: Sequence[Span],
    dark: bool,
) -> bytes:
    """Draw what was learned, step by step, above where the time went; 1400 pixels wide.

    Args:
        train: what the steps since the last line came to.
        test: what the evaluations came to.
        starts: the steps from which the run was begun or carried on.
        marks: how the work of the starts ended, oldest first.
        lost: the first and the last of the steps that were made, lost and recomputed.
        turns: when each start began and ended, in seconds since 1970, oldest first, none before the end of another.
        spans: what was done in this time.
        dark: for a dark page.
    """
    with _style(dark=dark) as theme:
        figure = Figure(figsize=(WIDTH_IN, 7.0), dpi=DPI, layout="constrained")
        loss, accuracy, clock = figure.subplots(3, 1, height_ratios=(2.2, 2.2, 1.8))
        last_step = max([1, *starts, *train.steps, *test.steps, *(m.step for m in marks), *(last for _, last in lost)])
        _draw_losses(loss, train, test, theme)
        _draw_accuracies(accuracy, train, test, theme)
        for axes in (loss, accuracy):
            axes.set_xlim(0, last_step * 1.015)
            axes.grid(axis="y")
            _mark_turns(axes, starts, marks, lost, theme)
        loss.tick_params(labelbottom=False)
        accuracy.set_xlabel("step")
        if len(marks) <= MAX_LABELS:
            _label_marks(loss, marks, last_step * 1.015)
        _draw_time(clock, turns, spans, theme)
        if keys := list(_keys(train, test, starts, marks, lost, theme)):
            figure.legend(handles=keys, loc="outside upper left", ncols=7)
        return _png(figure)


def _draw_losses(axes: Axes, train: Curve, test: Curve, theme: Theme) -> None:
    axes.plot(train.steps, train.losses, color=theme.blue)
    axes.plot(test.steps, test.losses, **_points(theme))
    axes.set_ylabel("loss")
    axes.set_ylim(bottom=0)
    _say_if_empty(axes, train, test, theme)


def _draw_accuracies(axes: Axes, train: Curve, test: Curve, theme: Theme) -> None:
    """Draw the share of wrong answers, on a logarithmic scale that is upside down and labelled with the right ones."""
    for curve, style in ((train, {"color": theme.blue}), (test, _points(theme))):
        axes.plot(curve.steps, np.clip(1 - np.asarray(curve.accuracies), 1e-4, 1), **style)
    axes.set_yscale("log")
    axes.set_ylim(1, min([0.005, *(max(1 - value, 1e-4) / 1.5 for value in (*train.accuracies, *test.accuracies))]))
    axes.set_yticks([1, 0.1, 0.01, *([0.001] if axes.get_ylim()[1] < 0.001 else [])])
    axes.yaxis.set_major_formatter(lambda wrong, _: f"{100 - 100 * wrong:.4g} %")
    axes.minorticks_off()
    axes.set_ylabel("accuracy")
    if test.steps:
        axes.annotate(
            f"{100 * test.accuracies[-1]:.2f} %",
            (1, max(1 - test.accuracies[-1], 1e-4)),
            xycoords=("axes fraction", "data"),
            xytext=(4, 0),
            textcoords="offset points",
            va="center",
            color=theme.orange,
        )
    _say_if_empty(axes, train, test, theme)


def _points(theme: Theme) -> dict[str, Any]:
    return {"color": theme.orange, "marker": "D", "markersize": 5, "linestyle": "none", "zorder": 4}


def _say_if_empty(axes: Axes, train: Curve, test: Curve, theme: Theme) -> None:
    if not train.steps and not test.steps:
        axes.tick_params(left=False, labelleft=False)
        axes.text(0.5, 0.5, "nothing was measured yet", transform=axes.transAxes, ha="center", color=theme.quiet)


def _end_styles(theme: Theme) -> dict[End, dict[str, Any]]:
    return {
        "stopped": {"color": theme.ink, "linestyle": (0, (5, 2))},
        "killed": {"color": theme.red, "linestyle": "solid"},
        "failed": {"color": theme.red, "linestyle": (0, (1, 1.5))},
        "finished": {"color": theme.green, "linestyle": "solid"},
    }


def _mark_turns(
    axes: Axes, starts: Sequence[int], marks: Sequence[Mark], lost: Sequence[tuple[int, int]], theme: Theme
) -> None:
    width = 1.2 if len(marks) <= MAX_LABELS else 0.6
    axes.broken_barh(
        [(first, last - first) for first, last in lost],
        (0, 1),
        transform=axes.get_xaxis_transform(),
        color=theme.red,
        alpha=0.18,
        linewidth=0,
    )
    for end, style in _end_styles(theme).items():
        steps = [mark.step for mark in marks if mark.end == end]
        axes.vlines(steps, 0, 1, transform=axes.get_xaxis_transform(), linewidth=width, zorder=3, **style)
    if starts:  # What is not clipped and not there has no extent to make room for.
        style = _start_style(theme, small=len(starts) > MAX_LABELS)
        axes.plot(starts, len(starts) * [0], transform=axes.get_xaxis_transform(), clip_on=False, zorder=5, **style)


def _start_style(theme: Theme, *, small: bool = False) -> dict[str, Any]:
    return {"color": theme.ink, "marker": "^", "markersize": 3.5 if small else 6, "linestyle": "none"}


def _label_marks(axes: Axes, marks: Sequence[Mark], width: float) -> None:
    """Write how each turn ended above its line, in one of two rows, where there is room."""
    marks = list(dict.fromkeys(marks))  # A finished run may have been started again.
    fitted = _fit([mark.step / width for mark in marks], [mark.label for mark in marks])
    for mark, row, (left, _) in zip(marks, *fitted, strict=True):
        if row is not None:
            axes.text(left, 1.03 + 0.11 * row, mark.label, transform=axes.transAxes, parse_math=False)


def _fit(
    centers: Sequence[float], labels: Sequence[str], rows: int = 2
) -> tuple[list[int | None], list[tuple[float, float]]]:
    """Return for labels around `centers`, in [0, 1], each one's row or None, and its left and right end."""
    axes_px = WIDTH_IN * DPI * 0.9
    free = [0.0] * rows
    found, places = [], []
    for center, label in zip(centers, labels, strict=True):
        half = len(label) * LETTER_PX / axes_px / 2
        left = min(max(center - half, 0), 1 - 2 * half)
        row = next((row for row in range(rows) if free[row] <= left), None)
        if row is not None:
            free[row] = left + 2 * half + LETTER_PX / axes_px
        found.append(row)
        places.append((left, left + 2 * half))
    return found, places


def _keys(
    train: Curve,
    test: Curve,
    starts: Sequence[int],
    marks: Sequence[Mark],
    lost: Sequence[tuple[int, int]],
    theme: Theme,
) -> Iterator[Line2D | Patch]:
    """Yield the entries of the legend, of what is there only."""
    if train.steps:
        yield Line2D([], [], color=theme.blue, label="training")
    if test.steps:
        yield Line2D([], [], label="test", **_points(theme))
    if starts:
        yield Line2D([], [], label="start, resume", **_start_style(theme))
    words = {"stopped": "stopped by a signal", "killed": "killed", "failed": "failed", "finished": "finished"}
    for end, style in _end_styles(theme).items():
        if any(mark.end == end for mark in marks):
            yield Line2D([], [], label=words[end], **style)
    if lost:
        yield Patch(color=theme.red, alpha=0.18, linewidth=0, label="lost, made again")


def _draw_time(axes: Axes, turns: Sequence[tuple[float, float]], spans: Sequence[Span], theme: Theme) -> None:
    """Draw a lane for each kind of work, over all turns; what lies between two is drawn shorter where it is long."""
    axes.set_yticks(range(len(LANES)), LANES)
    axes.tick_params(axis="y", length=0)
    axes.set_ylim(len(LANES) - 0.4, -0.6)
    axes.grid(axis="y")
    axes.spines["left"].set_visible(False)
    if not turns:
        axes.set_xticks([])
        axes.text(0.5, 0.5, "no times were recorded", transform=axes.transAxes, ha="center", color=theme.quiet)
        return
    times, places = _shorten(turns)
    lane_colors = dict(zip(LANES, (theme.quiet, theme.quiet, theme.blue, theme.orange, theme.green), strict=True))
    for index, lane in enumerate(LANES):
        begins = np.interp([span.begin_s for span in spans if span.lane == lane], times, places)
        ends = np.interp([span.end_s for span in spans if span.lane == lane], times, places)
        color = lane_colors[lane]
        bars = list(zip(begins, ends - begins, strict=True))
        axes.broken_barh(bars, (index - 0.3, 0.6), color=color, linewidth=0.7, edgecolor=color)
    for (_, down_s), (up_s, _), left, right in zip(turns, turns[1:], places[1::2], places[2::2], strict=False):
        axes.axvspan(left, right, facecolor="none", edgecolor=theme.grid, hatch="////", linewidth=0, zorder=2.5)
        _label_down(axes, duration(up_s - down_s), left, right, theme)
    clocks = _clocks([began for began, _ in turns])
    rows, _ = _fit(list(places[::2]), clocks, rows=1)
    axes.set_xticks(places[::2], [clock if row == 0 else "" for clock, row in zip(clocks, rows, strict=True)])
    axes.vlines(places[::2], *axes.get_ylim(), color=theme.ink, linewidth=0.6)
    axes.set_xlim(0, 1)
    axes.set_xlabel("time of each start")
    _draw_scale(axes, times, places, theme)


def _shorten(turns: Sequence[tuple[float, float]]) -> tuple[np.ndarray, np.ndarray]:
    """Return the times at which turns begin and end, and the places in [0, 1] where these are drawn."""
    times = np.asarray(turns, float).ravel()
    lengths = np.diff(times)
    at_work_s = max(float(lengths[::2].sum()), 1e-3)
    lengths[1::2] = np.minimum(lengths[1::2], at_work_s * 0.5 / max(len(turns) - 1, 6))
    places = np.concatenate([[0.0], np.cumsum(lengths)])
    return times, places / max(float(places[-1]), 1e-3)


def _label_down(axes: Axes, length: str, left: float, right: float, theme: Theme) -> None:
    """Write how long nothing ran, across or upright, where there is room for either."""
    room_px = (right - left) * WIDTH_IN * DPI * 0.9
    across = room_px > LETTER_PX * (max(4, len(length)) + 1)
    if across or room_px > 2 * LETTER_PX:
        text = f"down\n{length}" if across else f"down {length}"
        middle, rotation = ((left + right) / 2, 2.0), 0 if across else 90
        background = {"facecolor": theme.page, "edgecolor": "none", "pad": 1.5}
        axes.text(*middle, text, rotation=rotation, ha="center", va="center", color=theme.quiet, bbox=background)


def _clocks(times_s: Sequence[float]) -> list[str]:
    """Return the clock times of seconds since 1970, with the date where they are of several days."""
    days = {time.localtime(moment)[:3] for moment in times_s}
    return [
        time.strftime("%H:%M:%S" if len(days) == 1 else "%d %b %H:%M", time.localtime(moment)) for moment in times_s
    ]


def _draw_scale(axes: Axes, times: np.ndarray, places: np.ndarray, theme: Theme) -> None:
    """Draw how long a round number of seconds, minutes or hours is, unless nothing took any time."""
    work_s, work_places = (float(np.diff(ends)[::2].sum()) for ends in (times, places))
    per_second = work_places / max(work_s, 1e-3)
    rounds = [unit * n for unit in (0.01, 0.1, 1, 10, 60, 600, 3600, 36_000, 360_000) for n in (1, 2, 5)]
    length_s = max((s for s in rounds if s * per_second <= 0.2), default=0.0)
    if not length_s or not per_second:
        return
    left, y = 1 - length_s * per_second, -0.85
    axes.plot([left, 1], [y, y], color=theme.ink, linewidth=1, marker="|", markersize=6, clip_on=False)
    axes.text(left - 0.01, y, duration(length_s), ha="right", va="center")


def duration(seconds: float) -> str:
    """Return a length of time in one unit, with two digits or so."""
    for limit, unit, name in ((120, 1, "s"), (120 * 60, 60, "min"), (48 * 3600, 3600, "h")):
        if seconds < limit:
            count = seconds / unit
            return f"{count:.2g} {name}" if count < 10 else f"{count:.0f} {name}"
    return f"{seconds / 86400:,.0f} days"


def plot_confusion(counts: np.ndarray, class_names: Sequence[str], *, dark: bool) -> bytes:
    """Draw a confusion matrix; the colour shows the mistakes alone. counts: [10, 10], a row for each label."""
    with _style(dark=dark) as theme:
        figure = Figure(figsize=(7.2, 6.4), dpi=DPI, layout="constrained")
        axes = figure.subplots()
        mistakes = np.log1p(np.where(np.eye(len(counts), dtype=bool), 0, counts).astype(float))
        heat = mistakes / max(float(mistakes.max()), 1.0)
        colors = LinearSegmentedColormap.from_list("heat", [theme.page, *theme.heat])
        axes.imshow(heat, cmap=colors, vmin=0, vmax=1)
        for (row, column), count in np.ndenumerate(counts):
            axes.text(
                *(column, row, f"{count or '·'}"),
                ha="center",
                va="center",
                color=_readable_on(colors(heat[row, column])),
                weight="bold" if row == column else "normal",
            )
        axes.set_xticks(range(len(class_names)), class_names, parse_math=False)
        if max(map(len, class_names)) > 3:
            axes.tick_params(axis="x", rotation=90)
        axes.set_yticks(range(len(class_names)), class_names, parse_math=False)
        axes.set_xlabel("taken for")
        axes.set_ylabel("label")
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
        return _png(figure)


def _readable_on(color: tuple[float, float, float, float]) -> str:
    """Return black or white, whichever is easier to read on a colour: sRGB in [0, 1]."""
    luminance = np.dot(np.asarray(color[:3]) ** 2.2, (0.2126, 0.7152, 0.0722))
    return "black" if luminance > 0.18 else "white"


def plot_mistakes(images: np.ndarray, captions: Sequence[str], *, dark: bool) -> bytes:
    """Draw images, each with its caption below, six in a row. images: [N, 28, 28, 1] uint8, ink 255 on ground 0."""
    rows = -(-len(images) // 6)
    texts = [textwrap.fill(caption, 19) for caption in captions]
    lines = 1 + max((text.count("\n") for text in texts), default=0)
    with _style(dark=dark) as theme:
        figure = Figure(figsize=(WIDTH_IN, rows * (1.25 + 0.17 * lines)), dpi=DPI, layout="constrained")
        grid = figure.subplots(rows, 6, squeeze=False).ravel()
        for axes in grid:
            axes.set_axis_off()
        for axes, image, text in zip(grid, images, texts, strict=False):
            axes.imshow(image[..., 0], cmap=theme.images, vmin=0, vmax=255)
            axes.set_title(text, y=0, pad=-4, va="top", parse_math=False)
        return _png(figure)


@contextlib.contextmanager
def _style(*, dark: bool) -> Iterator[Theme]:
    """Have all that is drawn in a `with` block look as one, whatever Matplotlib's files at home say."""
    theme = DARK if dark else LIGHT
    with matplotlib.style.context(["default", _parameters(theme)]):
        yield theme


def _parameters(theme: Theme) -> dict[str, Any]:
    return {
        "font.family": "DejaVu Sans",
        "font.size": TEXT_PT,
        "axes.titlesize": TEXT_PT,
        "text.color": theme.ink,
        "axes.labelcolor": theme.quiet,
        "axes.edgecolor": theme.grid,
        "axes.facecolor": theme.page,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.axisbelow": True,
        "figure.facecolor": theme.page,
        "grid.color": theme.grid,
        "grid.linewidth": 0.6,
        "hatch.color": theme.grid,
        "hatch.linewidth": 0.8,
        "legend.frameon": False,
        "legend.columnspacing": 1.4,
        "legend.handlelength": 1.6,
        "lines.linewidth": 1.5,
        "xtick.color": theme.grid,
        "ytick.color": theme.grid,
        "xtick.labelcolor": theme.ink,
        "ytick.labelcolor": theme.ink,
    }


def _png(figure: Figure) -> bytes:
    file = io.BytesIO()
    figure.savefig(file, format="png", metadata={"Software": None})
    return file.getvalue()
