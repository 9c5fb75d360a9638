"""The pictures of a report: for any number of starts, with whatever names, and quietly."""

import io
import os
import subprocess
import sys
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from mnist_jax.report import figures
from mnist_jax.report.figures import Mark
from mnist_jax.report.history import Curve, Span

ENDS = ("stopped", "killed", "stopped", "failed")


def a_story(starts: int, *, dark: bool = False, down_s: float = 7.0) -> bytes:
    """Return the story of a run of so many starts of 100 steps and 10 s each, of which kills cost 20 steps."""
    firsts = [max(0, 100 * n - 20 * (n % 4 == 2)) for n in range(starts)]
    begins = [1e9 + n * (10 + down_s) for n in range(starts)]
    curve = Curve(range(1, 100 * starts), [1.0] * (100 * starts - 1), [0.9] * (100 * starts - 1))
    return figures.plot_run(
        train=curve if starts else Curve([], [], []),
        test=Curve([100 * starts], [0.1], [1.0]) if starts else Curve([], [], []),
        starts=firsts,
        marks=[Mark(100 * n + 100, ENDS[n % 4], "SIGTERM") for n in range(starts)],
        lost=[(first, first + 20) for first in firsts if first % 100],
        turns=[(begin, begin + 10) for begin in begins],
        spans=[
            Span(lane, begin + 2 * n, begin + 2 * n + 2) for begin in begins for n, lane in enumerate(figures.LANES)
        ],
        dark=dark,
    )


def pixels(png: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(png)).convert("RGB"), int)


@pytest.mark.parametrize("starts", [0, 1, 4, 60])
def test_the_story_of_any_number_of_starts_is_1400_pixels_wide(starts):
    assert pixels(a_story(starts)).shape[1] == 1400


def test_a_dark_picture_has_light_ink_on_a_dark_page():
    for dark, page in ((False, 255), (True, 13)):
        drawn = pixels(a_story(2, dark=dark))
        assert drawn[0, 0, 0] == drawn[500, 1399, 0] == np.median(drawn[..., 0]) == page
        assert np.abs(drawn[..., 0] - page).max() > 200


def test_equal_values_make_equal_bytes():
    assert a_story(2) == a_story(2)


def test_a_long_time_without_a_run_is_drawn_shorter_and_all_else_to_scale():
    times, places = figures._shorten([(0, 10), (12, 22), (36_022, 36_042)])
    assert times.tolist() == [0, 10, 12, 22, 36_022, 36_042]
    lengths = np.diff(places) / np.diff(places)[0] * 10
    np.testing.assert_allclose(lengths, [10, 2, 10, 40 * 0.5 / 6, 20])
    assert (places[0], places[-1]) == (0, 1)


@given(
    centers=st.lists(st.floats(0, 1), max_size=12).map(sorted),
    labels=st.lists(st.text(max_size=30), min_size=12, max_size=12),
    rows=st.integers(1, 2),
)
def test_no_two_labels_overlap(centers, labels, rows):
    chosen, places = figures._fit(centers, labels[: len(centers)], rows)
    for row in range(rows):
        ends = [place for of, place in zip(chosen, places, strict=True) if of == row]
        assert all(right <= left for (_, right), (left, _) in pairwise(ends))
        assert all(left >= 0 and right <= 1 + 1e-9 for left, right in ends)
    assert not centers or chosen[0] == 0


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0 s"), (0.04, "0.04 s"), (9.5, "9.5 s"), (77, "77 s"), (200, "3.3 min"), (36_000, "10 h"), (1e6, "12 days")],
)
def test_a_length_of_time_is_told_in_one_unit(seconds, text):
    assert figures.duration(seconds) == text


def test_in_a_confusion_matrix_only_mistakes_have_a_colour():
    def colored(counts: np.ndarray) -> int:
        drawn = pixels(figures.plot_confusion(counts, "0123456789", dark=False))
        return int((drawn.max(axis=2) - drawn.min(axis=2) > 60).sum())

    right = 100 * np.eye(10, dtype=int)
    assert colored(right) == 0
    assert colored(right + np.eye(10, k=1, dtype=int)) > 10_000


def test_no_name_is_taken_for_mathematics():
    hostile = r"$\frac{$"
    names = [hostile] * 10
    assert figures.plot_confusion(np.eye(10, dtype=int), names, dark=False)
    assert figures.plot_mistakes(np.zeros((1, 28, 28, 1), np.uint8), [hostile], dark=False)


def test_each_mistake_is_drawn_as_ink_on_the_page():
    image = np.zeros((7, 28, 28, 1), np.uint8)
    image[:, :, :7] = 255
    inked = []
    for dark, ink in ((False, 0), (True, 255)):
        drawn = pixels(figures.plot_mistakes(image, 7 * [""], dark=dark))[..., 0]
        top, bottom = ((drawn[half] == ink).sum() for half in (np.s_[: len(drawn) // 2], np.s_[len(drawn) // 2 :]))
        assert 5.5 < top / bottom < 6.5  # six in the first row, one in the second
        inked.append(top)
    assert inked[0] == pytest.approx(inked[1], rel=0.05)  # The ground is three times as large.


def test_neither_a_home_that_takes_no_files_nor_a_taste_found_there_is_heard_or_seen(tmp_path):
    (tmp_path / "matplotlibrc").write_text("text.usetex: True\nlines.linewidth: 9\nfont.size: 30\n")
    script = "import sys, test_figures; sys.stdout.buffer.write(test_figures.a_story(2))"
    for changed in ({"HOME": "/proc/nowhere"}, {"MPLCONFIGDIR": str(tmp_path)}):
        kept = {name: value for name, value in os.environ.items() if name not in ("MPLCONFIGDIR", "XDG_CACHE_HOME")}
        ended = subprocess.run(
            [sys.executable, "-W", "error", "-c", script],
            cwd=os.path.dirname(__file__),
            env={**kept, **changed},
            capture_output=True,
            timeout=120,
        )
        assert ended.stderr == b""
        assert ended.stdout == a_story(2)
