"""The figures of a report: for any number of attempts, light and dark, whatever the user's Matplotlib is set to."""

import io

import matplotlib as mpl
import numpy as np
import pytest
from PIL import Image

from mnist_jax.report import figures
from mnist_jax.report.history import Attempt, Curve, Span


def plot(count: int, *, dark: bool = False) -> bytes:
    """Plot a run of attempts of 100 steps and 10 s each."""
    attempts = [
        Attempt(
            *(
                [{"time": 1e9 + 20 * n + 5, "images_per_s": 1e3}],
                100 * n,
                100 * n + 100,
                1e9 + 20 * n,
                1e9 + 20 * n + 10,
            ),
            end=("stopped", "killed", "failed", "finished")[n % 4],
            lost_steps=20 * (n % 4 == 1),
            spans=[Span(lane, 1e9 + 20 * n + 2 * i, 1e9 + 20 * n + 2 * i + 2) for i, lane in enumerate(figures.LANES)],
        )
        for n in range(count)
    ]
    steps = list(range(1, 100 * count))
    train = Curve(steps, [1.0] * len(steps), [0.9] * len(steps), [0.1] * len(steps))
    test = Curve([100 * count], [0.1], [1.0], [None]) if count else Curve([], [], [], [])
    return figures.plot_run(attempts, train, test, train_name="training", min_loss=0.5, dark=dark)


def pixels(png: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(png)).convert("RGB"), int)


@pytest.fixture(scope="module")
def light() -> bytes:
    return plot(4)


def test_figures_have_the_colours_of_the_page(light):
    for png, page in ((light, 255), (plot(0, dark=True), 13)):
        drawn = pixels(png)
        assert drawn.shape[1] == 975
        assert drawn[0, 0, 0] == drawn[500, 974, 0] == np.median(drawn[..., 0]) == page
        assert np.abs(drawn[..., 0] - page).max() > 200
    colours = {tuple(colour) for colour in pixels(light).reshape(-1, 3)}
    expected = (figures.BLUE, figures.ORANGE, figures.RED, figures.GREEN, figures.GREY)
    assert {tuple(bytes.fromhex(colour[1:])) for colour in expected} <= colours


def test_long_runs_can_be_plotted():
    assert pixels(plot(60)).shape == (1350, 975, 3)


def test_a_curve_of_one_point_is_visible():
    def blue(train: Curve) -> int:
        drawn = pixels(figures.plot_comparison([(train, Curve([], [], [], []))], dark=False))
        return int((drawn == tuple(bytes.fromhex(figures.BLUE[1:]))).all(axis=2)[150:].sum())  # below the legend

    assert blue(Curve([], [], [], [])) == 0
    assert blue(Curve([5], [1.0], [0.5], [0.1])) > 20


def test_confusion_matrix_colours_mistakes_only():
    def colored(counts: np.ndarray) -> int:
        drawn = pixels(figures.plot_confusion(counts, "0123456789", dark=False))
        return int((drawn.max(axis=2) - drawn.min(axis=2) > 60).sum())

    correct = 100 * np.eye(10, dtype=int)
    assert colored(correct) == 0
    assert colored(correct + np.eye(10, k=1, dtype=int)) > 10_000


def test_each_mistake_is_drawn():
    image = np.zeros((28, 28, 1), np.uint8)
    image[:, :7] = 255
    for dark, foreground in ((False, 0), (True, 255)):
        drawn = pixels(figures.plot_mistakes(7 * [image], 7 * [""], dark=dark))[..., 0]
        top, bottom = (
            (drawn[half] == foreground).sum() for half in (np.s_[: len(drawn) // 2], np.s_[len(drawn) // 2 :])
        )
        assert 5.5 < top / bottom < 6.5  # six in the first row, one in the second


def test_an_image_that_is_not_square_keeps_its_form_below_its_caption():
    image = np.full((20, 40, 1), 255, np.uint8)
    plain, captioned = (
        figures.plot_mistakes([image], [caption], dark=False) for caption in ("", "Ankle boot, predicted Sneaker (97%)")
    )
    black = pixels(plain)[..., 0] == 0
    rows, columns = (np.flatnonzero(black.any(axis=axis)) for axis in (1, 0))
    assert black[np.ix_(rows, columns)].all()
    assert len(columns) / len(rows) == pytest.approx(2, abs=0.05)
    assert len(pixels(captioned)) > len(pixels(plain)) + 20  # pixels for two lines
    below = pixels(captioned)[-len(rows) - 8 :, : columns[-1] + 1, 0] == 0
    assert below.sum() == pytest.approx(black.sum(), rel=0.05)  # The caption covers none of the image.


def test_style_files_of_the_user_are_ignored(tmp_path, light):
    (tmp_path / "matplotlibrc").write_text("text.usetex: True\nlines.linewidth: 9\nfont.size: 30\n")
    with mpl.rc_context(fname=tmp_path / "matplotlibrc"):
        assert plot(4) == light
