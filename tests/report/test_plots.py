"""Figures say what the data says, and equal data gives equal bytes."""

import re
import subprocess
import sys
from io import BytesIO
from xml.etree import ElementTree

import matplotlib as mpl
import numpy as np
import pytest
from matplotlib.figure import Figure

from gated_attention.report import fonts, plots
from gated_attention.report.plots import (
    INK,
    Curve,
    GateHistogram,
    attention_maps,
    gate_histograms,
    loss_curves,
    per_layer,
    strokes_for,
    to_svg,
)

STEPS = np.arange(10, 110, 10)


def curve(offset=0.0, diverges_after=None):
    values = 2.0 + 5.0 * np.exp(-STEPS / 10.0) + offset
    if diverges_after is not None:
        values[diverges_after < STEPS] = np.nan
    return Curve(STEPS, values)


def thick_lines(ax, color):
    return [
        line
        for line in ax.lines
        if line.get_color() == color and line.get_linewidth() > 1.5 and len(line.get_xdata()) > 1
    ]


def texts(figure):
    svg = to_svg(figure, "test")
    return [part.split("<")[0] for part in svg.split(">") if part.split("<")[0].strip()]


def test_strokes_are_distinct_and_the_reference_is_grey():
    strokes = strokes_for([f"variant {i}" for i in range(15)])
    assert len({(stroke.color, str(stroke.dashes)) for stroke in strokes.values()}) == 15
    red, green, blue = (int(strokes["variant 0"].color[i : i + 2], 16) for i in (1, 3, 5))
    assert max(red, green, blue) - min(red, green, blue) < 32
    assert INK not in {stroke.color for stroke in strokes.values()}


def test_the_mean_loss_leaves_out_runs_that_diverge():
    strokes = strokes_for(["a"])
    arms = {"a": {0: curve(0.0), 1: curve(0.2), 2: curve(9.0, diverges_after=60)}}
    ax = loss_curves(arms, {}, strokes).axes[0]
    (mean,) = thick_lines(ax, strokes["a"].color)
    np.testing.assert_allclose(mean.get_ydata(), curve(0.1).values)
    (cross,) = [line for line in ax.lines if line.get_marker() == "X"]
    assert cross.get_xdata()[0] == 60
    assert ax.get_ylim()[0] <= cross.get_ydata()[0] <= ax.get_ylim()[1]


def test_the_steep_start_leaves_the_frame_and_the_end_stays_in_it():
    ax = loss_curves({"a": {0: curve()}}, {}, strokes_for(["a"])).axes[0]
    low, high = ax.get_ylim()
    assert low < curve().values[-1] < high < curve().values[0]


def test_differences_are_paired_by_seed():
    strokes = strokes_for(["base", "other"])
    validation = {"base": {0: curve(0.0), 1: curve(1.0)}, "other": {1: curve(0.9), 7: curve(5.0)}}
    figure = loss_curves({}, validation, strokes, reference="base")
    (difference,) = thick_lines(figure.axes[1], strokes["other"].color)
    np.testing.assert_allclose(difference.get_ydata(), -0.1)


def test_without_a_reference_there_is_no_difference_panel():
    assert len(loss_curves({"a": {0: curve()}}, {"a": {0: curve()}}, strokes_for(["a"])).axes) == 1


def test_a_study_in_which_everything_diverged_can_be_drawn():
    arms = {"a": {0: Curve(STEPS, np.full(len(STEPS), np.nan))}, "b": {0: curve(diverges_after=30)}}
    assert to_svg(loss_curves(arms, arms, strokes_for(arms), reference="a"), "x").startswith("<?xml")


def test_per_layer_draws_seeds_mean_and_uniform():
    strokes = strokes_for(["a"])
    ax = per_layer({"a": [[0.1, 0.3], [0.3, 0.5]]}, strokes, "F-Attn", uniform=0.02).axes[0]
    (mean,) = thick_lines(ax, strokes["a"].color)
    np.testing.assert_allclose(mean.get_ydata(), [0.2, 0.4])
    assert [line.get_ydata()[0] for line in ax.lines if line.get_color() == INK] == [0.02]
    assert ax.get_ylim()[0] == 0.0


def test_per_layer_on_a_logarithmic_axis_prints_plain_numbers():
    figure = per_layer({"a": [[20.0, 900.0]]}, strokes_for(["a"]), "M-Act", log=True)
    assert figure.axes[0].get_yscale() == "log"
    assert {"20", "100", "500"} <= set(texts(figure))


def test_gate_histograms_mark_each_layers_mean():
    counts = np.array([[4, 0, 0, 0], [0, 0, 1, 1]])
    figure = gate_histograms([GateHistogram("g", counts, np.linspace(0, 1, 5), "#123456")])
    ticks = sorted(line.get_xdata()[0] for line in figure.axes[0].lines if line.get_color() == INK)
    assert ticks == pytest.approx([0.125, 0.75])


def test_gate_histograms_pass_over_an_empty_layer_and_hide_spare_panels():
    edges = np.linspace(0, 1, 5)
    panels = [GateHistogram(str(i), np.array([[0, 0, 0, 0], [1, 2, 1, 0]]), edges, "#123456") for i in range(4)]
    figure = gate_histograms(panels, columns=3)
    assert [ax.get_visible() for ax in figure.axes] == [True] * 4 + [False] * 2


@pytest.mark.parametrize(("count", "columns"), [(1, 1), (4, 4), (5, 3), (8, 4), (9, 3)])
def test_attention_maps_are_spread_evenly_over_blocks(count, columns):
    weights = np.tril(np.ones((1, 8, 8)))
    figure = attention_maps({f"arm {i}": weights for i in range(count)}, layers=[0])
    assert figure.axes[0].get_gridspec().ncols == columns
    assert sum(bool(ax.images) for ax in figure.axes) == count


def test_attention_maps_hide_the_future_and_crop():
    weights = np.tril(np.ones((2, 80, 80))) / np.arange(1, 81)[:, None]
    figure = attention_maps({"a": weights, "b": weights}, layers=[0, 5], num_positions=16)
    images = [ax.images[0].get_array() for ax in figure.axes if ax.images]
    assert len(images) == 4
    assert all(image.shape == (16, 16) for image in images)
    assert images[0].mask[0, 1]
    assert not images[0].mask[1, 0]
    assert {"a", "b", "Layer 0", "Layer 5"} <= set(texts(figure))


def test_equal_data_gives_equal_bytes_whatever_the_callers_style():
    def draw():
        return to_svg(loss_curves({"a": {0: curve()}}, {"a": {0: curve()}}, strokes_for(["a"])), "loss")

    plain = draw()
    with mpl.rc_context({"font.size": 30, "svg.fonttype": "path", "axes.facecolor": "red"}):
        assert draw() == plain
        assert mpl.rcParams["font.size"] == 30
    assert "<dc:date>" not in plain
    assert "Loss (nats/token)</text>" in plain


def test_salts_keep_the_ids_of_two_figures_apart():
    def ids(salt):
        svg = to_svg(per_layer({"a": [[0.1, 0.2]]}, strokes_for(["a"]), "y"), salt)
        return {part.split(")")[0] for part in svg.split("url(#")[1:]}

    assert ids("one")
    assert not ids("one") & ids("two")


def test_pyplot_is_never_imported():
    # The file alone: its package would import torch, which takes seconds.
    program = (
        "import runpy, sys; runpy.run_path(sys.argv[1], run_name='plots'); print('matplotlib.pyplot' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program, plots.__file__], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("label", ["$x^{$", "_x", "<b>&", "a\x00b\x1b", "名 ☃", "%s"])
def test_a_label_is_text_whatever_it_is(label):
    figure = per_layer({label: [[1.0, 2.0]], "other": [[2.0, 3.0]]}, strokes_for([label, "other"]), "y")
    svg = to_svg(figure, salt="f")
    texts = [
        "".join(text.itertext()).strip()
        for text in ElementTree.fromstring(svg).iter("{http://www.w3.org/2000/svg}text")
    ]
    assert re.sub("[\x00-\x1f]", "\N{REPLACEMENT CHARACTER}", label) in texts


def test_a_character_is_drawn_in_a_font_that_has_it_or_named_as_missing(monkeypatch):
    installed = {name: [(name, path)] for name, path in fonts._installed()}
    monkeypatch.setattr(fonts, "_installed", lambda: [*installed[fonts.FIRST], *installed["STIXGeneral"]])
    assert fonts.fallbacks("a\n∬") == ([], "")
    assert fonts.fallbacks("\u20dd 中文") == (["STIXGeneral"], "中文")
    figure, file = Figure(), BytesIO()
    figure.text(0, 0.5, "中文 a")
    assert plots.write_png(figure, file, 50) == "中文"  # without a warning, which would be an error here
    assert file.getvalue().startswith(b"\x89PNG")
