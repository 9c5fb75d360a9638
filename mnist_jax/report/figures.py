"""The figures of a report: PNG images, light or dark. They contain no text from the files of a run."""

import io
import textwrap
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

import matplotlib.style
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure

from mnist_jax.report.history import LANES, Attempt, Curve

PAGES = {False: "#ffffff", True: "#0d1117"}  # as in report.html; the keys say whether it is dark
# These can be read on both pages, and distinguished by people with colour blindness.
BLUE, ORANGE, RED, GREEN, GREY = "#2b83c6", "#d9822b", "#d1495b", "#2a9d74", "#7d8590"
MAX_COUNTED_CLASSES = 30  # More numbers cannot be read, and 256 classes would take minutes.
END_STYLES: dict[str, dict[str, Any]] = {
    "stopped": {"color": GREY, "linestyle": "dashed"},
    "killed": {"color": RED, "linestyle": "solid"},
    "failed": {"color": RED, "linestyle": "dotted"},
    "finished": {"color": GREEN, "linestyle": "solid"},
}
COLORS = (BLUE, ORANGE, GREEN, RED, "#9467bd", "#8c6d31", "#17a2b8", GREY)
LANE_COLORS = dict(zip(LANES, (GREY, GREY, BLUE, ORANGE, GREEN), strict=True))


WIDTH_IN = 6.5  # 975 pixels: the text can be read on a phone, where the page shows the image at 40 % of its size


def plot_run(
    attempts: Sequence[Attempt], train: Curve, test: Curve, *, train_name: str, min_loss: float, dark: bool
) -> bytes:
    """Plot loss, accuracy and learning rate over the steps, then the speed and the attempts over the time.

    Args:
        attempts: oldest first.
        train: metrics of the training.
        test: metrics of the evaluations.
        train_name: what distinguishes the training loss from the test loss.
        min_loss: the lowest possible training loss in nats; 0 is not drawn.
        dark: whether it is for a dark page.
    """
    with _style(dark=dark):
        figure = Figure(figsize=(WIDTH_IN, 9), layout="constrained")
        loss, accuracy, rate, speed, timeline = figure.subplots(5, 1, height_ratios=(2.2, 2.2, 1, 1, 1.7))
        last_step = max([1, *train.steps, *test.steps, *(attempt.last_step for attempt in attempts)])
        _plot_curves(loss, accuracy, train, test, color=BLUE, test_color=ORANGE, labels=(train_name, "test"))
        if min_loss:
            loss.axhline(min_loss, color=BLUE, linewidth=1, linestyle="dotted", label="lowest possible training loss")
        rate.plot(train.steps, np.array(train.rates, float), color=GREY, **_marker(train))
        rate.set_ylabel("learning rate")
        rate.set_ylim(bottom=0)
        rate.set_xlabel("step (updates)")
        for axes in (loss, accuracy, rate):
            _mark_ends(axes, attempts)
            axes.set_xlim(0, 1.01 * last_step)
            axes.grid(axis="y")
            axes.tick_params(labelbottom=axes is rate)
        _plot_timeline(timeline, speed, attempts)
        figure.legend(*loss.get_legend_handles_labels(), loc="outside upper left", ncols=3)
        return _png(figure)


def plot_comparison(curves: Sequence[tuple[Curve, Curve]], *, dark: bool) -> bytes:
    """Plot the curves of several runs: the training as lines, the tests as marks."""
    with _style(dark=dark):
        figure = Figure(figsize=(WIDTH_IN, 6.5), layout="constrained")
        loss, accuracy = figure.subplots(2, 1)
        for number, (train, test) in enumerate(curves):
            color, labels = COLORS[number % len(COLORS)], (f"run {number + 1}", None)
            _plot_curves(loss, accuracy, train, test, color=color, test_color=color, labels=labels)
        for axes in (loss, accuracy):
            axes.set_xlim(left=0)
            axes.grid(axis="y")
        loss.tick_params(labelbottom=False)
        accuracy.set_xlabel("step (updates); lines: training, marks: test")
        figure.legend(*loss.get_legend_handles_labels(), loc="outside upper left", ncols=4)
        return _png(figure)


def _plot_curves(
    loss: Axes,
    accuracy: Axes,
    train: Curve,
    test: Curve,
    *,
    color: str,
    test_color: str,
    labels: tuple[str | None, str | None],
) -> None:
    """Plot losses and accuracies of one run; `labels` are those of training and test."""
    for axes, train_values, test_values in (
        (loss, train.losses, test.losses),
        (accuracy, np.clip(train.accuracies, 0.1, 0.9999), np.clip(test.accuracies, 0.1, 0.9999)),
    ):
        axes.plot(train.steps, train_values, color=color, label=labels[0], linewidth=1.2, **_marker(train))
        axes.plot(test.steps, test_values, "D", color=test_color, markersize=5, label=labels[1])
    loss.set_ylim(bottom=0)
    loss.set_ylabel("loss (nats)")
    accuracy.set_yscale("logit")
    accuracy.set_yticks([0.1, 0.5, 0.9, 0.99, 0.999], ["10 %", "50 %", "90 %", "99 %", "99.9 %"])
    accuracy.minorticks_off()
    accuracy.set_ylim(0.1, 0.9995)
    accuracy.set_ylabel("accuracy")


def _marker(curve: Curve) -> dict[str, Any]:
    """Return the marks of a curve: a line through one point would be invisible."""
    return {"marker": "."} if len(curve.steps) < 40 else {}


def _mark_ends(axes: Axes, attempts: Sequence[Attempt]) -> None:
    """Draw a line at the step where each attempt ended, and shade the steps that were lost."""
    for end, style in END_STYLES.items():
        if steps := [attempt.last_step for attempt in attempts if attempt.end == end]:
            axes.vlines(steps, 0, 1, transform=axes.get_xaxis_transform(), linewidth=1, label=end, **style)
    lost = [(attempt.last_step - attempt.lost_steps, attempt.lost_steps) for attempt in attempts if attempt.lost_steps]
    if lost:
        transform = axes.get_xaxis_transform()
        axes.broken_barh(lost, (0, 1), transform=transform, color=RED, alpha=0.2, label="lost and recomputed")


def _plot_timeline(axes: Axes, speed: Axes, attempts: Sequence[Attempt]) -> None:
    """Draw what the attempts did when and how fast, one after the other, without the time between them."""
    places: dict[str, list[tuple[float, float]]] = {lane: [] for lane in LANES}
    begin_s, ends_s, speeds = 0.0, [], list[tuple[float, float]]()
    for attempt in attempts:
        if attempt.began_s is None or attempt.ended_s is None:
            continue
        for lane, span_begin_s, span_end_s in attempt.spans:
            places[lane].append((begin_s + span_begin_s - attempt.began_s, span_end_s - span_begin_s))
        speeds += [(begin_s + time_s - attempt.began_s, images_per_s) for time_s, images_per_s in attempt.speeds]
        speeds.append((np.nan, np.nan))  # The line has a gap between attempts.
        begin_s += attempt.ended_s - attempt.began_s
        ends_s.append(begin_s)
    unit, unit_s = ("seconds", 1) if begin_s < 600 else ("minutes", 60) if begin_s < 36_000 else ("hours", 3600)
    for row, (lane, bars) in enumerate(places.items()):
        color = LANE_COLORS[lane]
        bars = [(start_s / unit_s, length_s / unit_s) for start_s, length_s in bars]
        axes.broken_barh(bars, (row - 0.3, 0.6), facecolor=color, edgecolor=color, linewidth=0.7)
    axes.vlines(np.array(ends_s[:-1]) / unit_s, -0.5, len(LANES) - 0.5, color=GREY, linewidth=1)
    times_s, images_per_s = np.array(speeds or [(np.nan, np.nan)]).T
    marker = "." if len(speeds) < 60 else None
    speed.plot(times_s / unit_s, images_per_s, color=BLUE, marker=marker, linewidth=1, clip_on=False)
    speed.set_ylabel("images/s")
    speed.yaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    speed.set_ylim(bottom=0)
    speed.grid(axis="y")
    speed.tick_params(labelbottom=False)
    for each in (axes, speed):
        each.set_xlim(0, begin_s / unit_s or 1)
    axes.set_xlabel(f"time ({unit}), without the time between attempts")
    axes.set_yticks(range(len(LANES)), LANES.values())
    axes.set_ylim(len(LANES) - 0.5, -0.5)


def plot_confusion(counts: np.ndarray, class_names: Sequence[str], *, dark: bool) -> bytes:
    """Plot a confusion matrix; only the mistakes are coloured. counts: [K, K], a row for each label."""
    with _style(dark=dark):
        figure = Figure(figsize=(5.6, 5.2), layout="constrained")
        axes = figure.subplots()
        mistakes = np.log1p(np.where(np.eye(len(counts), dtype=bool), 0, counts))
        colors = LinearSegmentedColormap.from_list("mistakes", [PAGES[dark], "#8a3c12" if dark else "#f2a06b"])
        axes.imshow(mistakes, cmap=colors, vmin=0, vmax=max(float(mistakes.max()), 1.0))
        for (row, column), count in np.ndenumerate(counts if len(counts) <= MAX_COUNTED_CLASSES else np.empty((0, 0))):
            weight = "bold" if row == column else "normal"
            axes.text(column, row, f"{count or '·'}", ha="center", va="center", weight=weight)
        axes.set_xticks(range(len(class_names)), class_names, rotation=90 if max(map(len, class_names)) > 3 else 0)
        axes.set_yticks(range(len(class_names)), class_names)
        axes.set_xlabel("prediction")
        axes.set_ylabel("label")
        return _png(figure)


def plot_mistakes(images: Sequence[np.ndarray], captions: Sequence[str], *, dark: bool) -> bytes:
    """Plot images with captions, six in a row. images: each [H, W, 1] uint8."""
    captions = [textwrap.fill(caption, 15) for caption in captions]
    rows, width_in = -(-len(images) // 6), WIDTH_IN / 6
    height_in = width_in + 0.05 + 0.15 * max(caption.count("\n") + 1 for caption in captions)  # lines of 9 points
    with _style(dark=dark):
        figure = Figure(figsize=(WIDTH_IN, height_in * rows))
        # All share one system of axes, in inches from the top left: with 24, Matplotlib took four times as long.
        axes = figure.add_axes((0, 0, 1, 1))
        for number, (image, caption) in enumerate(zip(images, captions, strict=True)):
            row, column = divmod(number, 6)
            middle_in, bottom_in = (column + 0.5) * width_in, (row + 1) * height_in - 0.05
            image_height_in, image_width_in = (0.94 * width_in * side / max(image.shape) for side in image.shape[:2])
            top_in = bottom_in - image_height_in
            extent = (middle_in - image_width_in / 2, middle_in + image_width_in / 2, bottom_in, top_in)
            axes.imshow(image[..., 0], cmap="gray" if dark else "gray_r", vmin=0, vmax=255, extent=extent)
            axes.text(middle_in, top_in - 0.04, caption, ha="center", va="bottom")
        axes.set(xlim=(0, WIDTH_IN), ylim=(height_in * rows, 0), aspect="auto")
        axes.set_axis_off()
        return _png(figure)


def _style(*, dark: bool) -> AbstractContextManager[None]:
    """Return a context in which Matplotlib ignores the style files of the user."""
    parameters: dict[str, Any] = {
        **dict.fromkeys(("figure.facecolor", "axes.facecolor", "savefig.facecolor"), PAGES[dark]),
        **dict.fromkeys(("axes.edgecolor", "xtick.color", "ytick.color", "axes.labelcolor", "grid.color"), GREY),
        **dict.fromkeys(("font.size", "axes.titlesize"), 9),
        **dict.fromkeys(("axes.spines.top", "axes.spines.right", "legend.frameon"), False),
        "grid.alpha": 0.3,
        "figure.dpi": 150,
    }
    return matplotlib.style.context(["default", *(["dark_background"] if dark else []), parameters])


def _png(figure: Figure) -> bytes:
    file = io.BytesIO()
    figure.savefig(file, format="png", metadata={"Software": None})
    return file.getvalue()
