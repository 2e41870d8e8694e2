"""What a figure shows is what it was given, and a reader can tell its parts apart."""

import itertools
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import arviz as az
import matplotlib
import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.collections import QuadMesh
from matplotlib.colors import to_hex, to_rgb
from matplotlib.container import ErrorbarContainer
from matplotlib.figure import Figure
from matplotlib.image import imread
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle, StepPatch
from scipy import stats

from bopito_inverse import plots
from bopito_inverse.systems import Prinz, TransferOperator

LAGS = np.arange(100, 1001, 100.0)
FINE = np.linspace(0, 1000, 101)
PANEL_LAGS = [200.0, 10.0, 50.0]


@pytest.fixture(scope="module")
def exact() -> TransferOperator:
    return TransferOperator(Prinz(), grid_size=200)


@pytest.fixture(scope="module")
def cut() -> TransferOperator:
    return TransferOperator(Prinz(), barrier=0.0, grid_size=200)


@pytest.fixture(scope="module")
def curves(exact: TransferOperator, cut: TransferOperator) -> dict[str, Any]:
    def correlation(operator: TransferOperator, lags: np.ndarray) -> np.ndarray:
        return operator.correlation(operator.grid, lags=lags, normalization="variance")

    truth = correlation(exact, LAGS)
    noise = np.random.default_rng(0).normal(0, 0.02, len(LAGS))
    return {
        "lags": LAGS,
        "measured": (truth + noise, np.linspace(0.01, 0.03, len(LAGS))),
        "fitted": (truth + 0.01, truth - 0.02, truth + 0.05),
        "uncorrected": correlation(cut, LAGS),
        "exact": (FINE, correlation(exact, FINE)),
        "fitted_mask": LAGS < 750,
    }


@pytest.fixture(scope="module")
def draws() -> dict[str, np.ndarray]:
    weight = stats.beta(20, 25).rvs((4, 1000), random_state=1)
    n_int = 50 + np.log(weight) / np.log(0.994)
    return {"n_int": n_int, "weight": weight, "timescale": -100 / np.log(0.9 * weight + 0.1)}


@pytest.fixture(scope="module")
def rows(exact: TransferOperator, cut: TransferOperator) -> dict[str, list[Any]]:
    rng = np.random.default_rng(2)
    edges = np.linspace(-1.4, 1.4, 41)
    start = int(np.searchsorted(exact.grid, 0.65))

    def sampled(lag: float) -> tuple[np.ndarray, np.ndarray]:
        p = exact.transition_density(lag)[start] * exact.spacing
        return np.histogram(rng.choice(exact.grid, 2000, p=p), edges, density=True)

    return {
        "uncorrected": [cut.transition_density(lag)[start] for lag in PANEL_LAGS],
        "corrected": [sampled(lag) for lag in PANEL_LAGS],
        "exact": [exact.transition_density(lag)[start] for lag in PANEL_LAGS],
    }


@pytest.fixture(scope="module")
def torsions() -> dict[str, list[Any]]:
    """Samples of phi and psi for three lags, some of them weighted."""
    rng = np.random.default_rng(4)

    def around(phi: float, psi: float, n: int) -> np.ndarray:
        return (rng.normal([phi, psi], 0.4, (n, 2)) + np.pi) % (2 * np.pi) - np.pi

    return {
        "corrected": [around(-1.5, 2.8, n) for n in (100, 200, 300)],
        "MD": [(around(-1.5, 2.8, 400), np.linspace(0, 1, 400)) for _ in range(3)],
    }


@pytest.fixture(scope="module")
def profiles() -> dict[str, tuple[np.ndarray, ...]]:
    angle = np.linspace(-3, 3, 31)
    energy = 5 - 5 * np.cos(angle + 1)
    return {
        "uncorrected": (angle[:12], energy[:12] + 1, np.full(12, 0.5)),
        "MD": (angle, np.where(abs(angle - 1) < 0.35, np.inf, energy), 0.1 + 0.05 * angle**2),
    }


@pytest.fixture(scope="module")
def figures(
    curves: dict[str, Any],
    draws: dict[str, np.ndarray],
    rows: dict[str, list[Any]],
    exact: TransferOperator,
    torsions: dict[str, list[Any]],
    profiles: dict[str, tuple[np.ndarray, ...]],
) -> dict[str, Figure]:
    return {
        "correlation": plots.correlation_figure(**curves),
        "posterior": plots.posterior_figure(draws, 50, 166.8, stats.norm(200, 80)),
        "transition": plots.transition_figure(exact.grid, 0.65, PANEL_LAGS, rows, exact.stationary),
        "stationary": plots.stationary_figure(
            exact.grid, exact.stationary, {name: row[0] for name, row in rows.items()}
        ),
        "ramachandran": plots.ramachandran_figure(
            torsions, [f"lag {lag} ps" for lag in (1, 10, 100)], start=(-1.4, 1.2), bins=30
        ),
        "free energy": plots.free_energy_figure(profiles),
    }


EVERY = pytest.mark.parametrize(
    "name",
    ["correlation", "posterior", "transition", "stationary", "ramachandran", "free energy"],
)


def line(ax: Axes, label: str) -> Line2D:
    (found,) = [item for item in ax.lines if item.get_label() == label]
    return found


def bars(ax: Axes, label: str) -> tuple[np.ndarray, np.ndarray, Line2D]:
    """Points, lower and upper ends of the error bars, and the markers."""
    (found,) = [
        item
        for item in ax.containers
        if isinstance(item, ErrorbarContainer) and item.get_label() == label
    ]
    markers, _, (ends,) = found.lines
    assert isinstance(markers, Line2D)
    return markers.get_xydata(), np.array([s[:, 1] for s in ends.get_segments()]), markers


def band(ax: Axes, label: str) -> tuple[np.ndarray, np.ndarray]:
    """Lower and upper edges of a band, by position."""
    (found,) = [item for item in ax.collections if item.get_label() == label]
    vertices = found.get_paths()[0].vertices
    x = np.unique(vertices[:, 0])
    at = [vertices[vertices[:, 0] == value, 1] for value in x]
    return np.array([y.min() for y in at]), np.array([y.max() for y in at])


def stairs(ax: Axes, label: str) -> StepPatch:
    (found,) = [item for item in ax.patches if item.get_label() == label]
    assert isinstance(found, StepPatch)
    return found


def legend_labels(figure: Figure) -> list[str]:
    return [text.get_text() for text in figure.legends[0].get_texts()]


# correlation


def test_measured_points_and_error_bars(curves: dict[str, Any], figures: dict[str, Figure]) -> None:
    ax = figures["correlation"].axes[0]
    value, sigma = curves["measured"]
    mask = curves["fitted_mask"]
    for label, chosen in (("measured, fitted", mask), ("measured, held out", ~mask)):
        points, ends, _ = bars(ax, label)
        np.testing.assert_allclose(points, np.c_[LAGS, value][chosen])
        np.testing.assert_allclose(ends, np.c_[value - sigma, value + sigma][chosen])


def test_held_out_points_are_open_and_fitted_ones_filled(figures: dict[str, Figure]) -> None:
    ax = figures["correlation"].axes[0]
    face = {
        label: to_hex(bars(ax, label)[2].get_markerfacecolor())
        for label in ("measured, fitted", "measured, held out")
    }
    assert face == {"measured, fitted": "#000000", "measured, held out": "#ffffff"}


def test_without_a_mask_all_points_are_fitted(curves: dict[str, Any]) -> None:
    figure = plots.correlation_figure(LAGS, curves["measured"], curves["fitted"])
    assert len(bars(figure.axes[0], "measured")[0]) == len(LAGS)
    assert legend_labels(figure) == ["measured", "corrected model", "94 % band"]


def test_band_and_curves(curves: dict[str, Any], figures: dict[str, Figure]) -> None:
    ax = figures["correlation"].axes[0]
    mean, low, high = curves["fitted"]
    drawn_low, drawn_high = band(ax, "94 % band")
    np.testing.assert_allclose(drawn_low, low)
    np.testing.assert_allclose(drawn_high, high)
    np.testing.assert_allclose(line(ax, "corrected model").get_xydata(), np.c_[LAGS, mean])
    uncorrected = line(ax, "uncorrected model")
    np.testing.assert_allclose(uncorrected.get_xydata(), np.c_[LAGS, curves["uncorrected"]])
    assert uncorrected.is_dashed()
    np.testing.assert_allclose(line(ax, "exact").get_xydata(), np.c_[curves["exact"]])
    assert line(ax, "exact").get_linewidth() < 1


def test_fitted_model_and_truth_on_either_lags(curves: dict[str, Any]) -> None:
    own = LAGS[:4] / 2
    figure = plots.correlation_figure(
        LAGS, curves["measured"], (own, own, own - 1, own + 1), exact=curves["uncorrected"]
    )
    ax = figure.axes[0]
    np.testing.assert_array_equal(line(ax, "corrected model").get_xydata(), np.c_[own, own])
    np.testing.assert_array_equal(
        line(ax, "exact").get_xydata(), np.c_[LAGS, curves["uncorrected"]]
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lags": LAGS[::-1]}, "lags must increase"),
        ({"lags": LAGS[:-1]}, "sigma of measured must have shape"),
        ({"measured": (LAGS,)}, "measured must be"),
        ({"measured": (LAGS[:3], LAGS)}, "values of measured must have shape"),
        ({"measured": (LAGS, -LAGS)}, "sigma of measured must not be negative"),
        ({"measured": (LAGS * np.nan, LAGS)}, "values of measured must be finite"),
        ({"fitted": (LAGS, LAGS)}, "fitted must be"),
        ({"fitted": (LAGS, LAGS, LAGS[:2])}, "high of fitted must have shape"),
        ({"fitted": (LAGS, LAGS + 1, LAGS)}, "low of fitted must not be above high"),
        ({"uncorrected": LAGS[:2]}, "uncorrected must have shape"),
        ({"exact": (FINE, LAGS)}, "exact must have shape"),
        ({"exact": LAGS[:, None]}, "exact must have shape"),
        ({"fitted_mask": np.ones(3, bool)}, "fitted_mask must be bool"),
        ({"fitted_mask": np.ones(len(LAGS), int)}, "fitted_mask must be bool"),
    ],
)
def test_bad_correlations_are_refused(
    curves: dict[str, Any], change: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        plots.correlation_figure(**curves | change)


# posterior


def test_histograms_hold_the_draws(
    draws: dict[str, np.ndarray], figures: dict[str, Figure]
) -> None:
    for ax, name in zip(figures["posterior"].axes, draws, strict=True):
        density, edges, _ = stairs(ax, "posterior").get_data()
        assert density @ np.diff(edges) == pytest.approx(1)
        assert (edges[0], edges[-1]) == (draws[name].min(), draws[name].max())
        count = np.histogram(draws[name], edges)[0]
        np.testing.assert_allclose(density * np.diff(edges) * draws[name].size, count)


def test_mean_and_hdi_bar(draws: dict[str, np.ndarray], figures: dict[str, Figure]) -> None:
    for ax, name in zip(figures["posterior"].axes, draws, strict=True):
        drawn = line(ax, "94 % HDI").get_xdata()
        np.testing.assert_allclose(drawn, az.hdi(draws[name].ravel(), hdi_prob=0.94))
        assert line(ax, "mean").get_xdata() == pytest.approx(draws[name].mean())


def test_marks_of_the_posterior(figures: dict[str, Figure]) -> None:
    n_int, weight, timescale = figures["posterior"].axes
    assert set(line(n_int, r"$N_\mathrm{max}$").get_xdata()) == {50}
    assert set(line(timescale, "exact timescale").get_xdata()) == {166.8}
    x, y = line(n_int, "prior").get_data()
    np.testing.assert_allclose(y, stats.norm(200, 80).pdf(x))
    assert not {"prior", "exact timescale"} & {item.get_label() for item in weight.lines}


def test_infinite_draws_are_counted_and_the_interval_is_open(draws: dict[str, np.ndarray]) -> None:
    n_int = draws["n_int"].copy()
    n_int[0, :400] = np.inf  # a tenth
    ax = plots.posterior_figure(draws | {"n_int": n_int}).axes[0]
    density, edges, _ = stairs(ax, "posterior").get_data()
    assert density @ np.diff(edges) == pytest.approx(0.9)
    assert re.fullmatch(r"mean ∞, HDI \S+ to ∞\n10 % of the draws at infinity", ax.get_title())
    assert [item.get_marker() for item in ax.lines if item.get_marker() == ">"] == [">"]
    assert "mean" not in {item.get_label() for item in ax.lines}


def test_interval_stays_closed_where_few_draws_are_infinite(draws: dict[str, np.ndarray]) -> None:
    n_int = draws["n_int"].copy()
    n_int[0, :40] = np.inf
    ax = plots.posterior_figure(draws | {"n_int": n_int}).axes[0]
    low, high = line(ax, "94 % HDI").get_xdata()
    assert low < high < n_int[np.isfinite(n_int)].max()
    assert np.mean((n_int >= low) & (n_int <= high)) == pytest.approx(0.94, abs=1e-3)


def test_huge_draws_get_a_logarithmic_axis(draws: dict[str, np.ndarray], tmp_path: Path) -> None:
    n_int = stats.loguniform(60, 1e12).rvs(4000, random_state=3)
    prior = stats.loguniform(60, 1e12)
    figure = plots.posterior_figure(draws | {"n_int": n_int}, lag_max=50, prior=prior)
    ax = figure.axes[0]
    assert ax.get_xscale() == "log"
    density, edges, _ = stairs(ax, "posterior").get_data()
    assert density @ np.diff(np.log10(edges)) == pytest.approx(1)
    inside = line(ax, "prior").get_ydata()[50:-50]  # flat, at the height of the histogram
    np.testing.assert_allclose(inside, 1 / np.log10(1e12 / 60))
    assert all(path.stat().st_size for path in plots.save(figure, tmp_path / "huge"))


@pytest.mark.parametrize("value", [np.full(100, np.inf), np.full(100, 1.0), np.zeros(3), [2.0]])
def test_degenerate_draws_are_drawn(
    draws: dict[str, np.ndarray], value: np.ndarray, tmp_path: Path
) -> None:
    figure = plots.posterior_figure(dict.fromkeys(draws, value), lag_max=50, exact_timescale=100)
    assert len(plots.save(figure, tmp_path / "degenerate")) == 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"n_int": []}, "n_int"),
        ({"weight": [0.5, np.nan]}, "weight"),
        ({"timescale": [-np.inf, 1.0]}, "timescale"),
    ],
)
def test_bad_draws_are_refused(
    draws: dict[str, np.ndarray], change: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        plots.posterior_figure(draws | change)


def test_bad_marks_are_refused(draws: dict[str, np.ndarray]) -> None:
    with pytest.raises(ValueError, match="draws must hold 'weight'"):
        plots.posterior_figure({"n_int": [1.0], "timescale": [1.0]})
    with pytest.raises(ValueError, match="prior must be"):
        plots.posterior_figure(draws, prior=3.0)
    with pytest.raises(ValueError, match="exact_timescale must be one finite number"):
        plots.posterior_figure(draws, exact_timescale=np.inf)


# transition and stationary densities


def test_panels_hold_the_densities_in_order_of_lag(
    exact: TransferOperator, rows: dict[str, list[Any]], figures: dict[str, Figure]
) -> None:
    table = np.array(figures["transition"].axes).reshape(3, 3)
    order = np.argsort(PANEL_LAGS)
    titles = [ax.get_title() for ax in table[0]]
    assert titles == [f"lag {PANEL_LAGS[k]:g} frames" for k in order]
    for name, panels in zip(rows, table, strict=True):
        assert panels[0].get_ylabel() == name
        for ax, k in zip(panels, order, strict=True):
            if name == "corrected":
                values, edges, _ = stairs(ax, "_corrected").get_data()
                np.testing.assert_array_equal(values, rows[name][k][0])
                np.testing.assert_array_equal(edges, rows[name][k][1])
            else:
                drawn = line(ax, f"_{name}").get_xydata()
                np.testing.assert_array_equal(drawn, np.c_[exact.grid, rows[name][k]])


def test_start_stationary_density_and_shared_axes(
    exact: TransferOperator, figures: dict[str, Figure]
) -> None:
    axes = figures["transition"].axes
    assert len({(ax.get_xlim(), ax.get_ylim()) for ax in axes}) == 1
    for ax in axes:
        assert set(line(ax, "start at 0.65").get_xdata()) == {0.65}
        low, high = band(ax, "stationary density")
        np.testing.assert_array_equal(low, 0)
        np.testing.assert_array_equal(high, exact.stationary)
        peaks = [item.get_ydata().max() for item in ax.lines if item.get_label()[0] == "_"]
        assert all(ax.get_ylim()[1] > peak for peak in peaks)


def test_one_row_and_one_lag(exact: TransferOperator) -> None:
    density = exact.transition_density(10)[100]
    figure = plots.transition_figure(exact.grid, exact.grid[100], [10], {"exact": [density]})
    assert len(figure.axes) == 1
    assert "stationary density" not in legend_labels(figure)


def test_stationary_densities(
    exact: TransferOperator, rows: dict[str, list[Any]], figures: dict[str, Figure]
) -> None:
    figure = plots.stationary_figure(
        exact.grid,
        exact.stationary,
        {"uncorrected": rows["uncorrected"][0], "corrected": rows["corrected"][0]},
    )
    ax = figure.axes[0]
    truth = np.c_[exact.grid, exact.stationary]
    np.testing.assert_array_equal(line(ax, "exact").get_xydata(), truth)
    drawn = np.c_[exact.grid, rows["uncorrected"][0]]
    np.testing.assert_array_equal(line(ax, "uncorrected").get_xydata(), drawn)
    np.testing.assert_array_equal(
        stairs(ax, "corrected").get_data().values, rows["corrected"][0][0]
    )
    assert legend_labels(figure) == ["exact", "uncorrected", "corrected"]


@pytest.mark.parametrize(
    ("density", "message"),
    [
        (np.ones(7), "must have shape"),
        (np.full(200, -1.0), "must not be negative"),
        (np.full(200, np.nan), "must be finite"),
        ((np.ones(4), np.arange(4)), "edges of .* must have shape"),
        ((np.ones(2), np.array([0.0, 0.0, 1.0])), "edges of .* must increase"),
    ],
)
def test_bad_densities_are_refused(exact: TransferOperator, density: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plots.stationary_figure(exact.grid, exact.stationary, {"corrected": density})
    with pytest.raises(ValueError, match=message):
        plots.transition_figure(exact.grid, 0.0, [10], {"corrected": [density]})


def test_bad_tables_are_refused(exact: TransferOperator) -> None:
    mu = exact.stationary
    with pytest.raises(ValueError, match="must hold 2 densities"):
        plots.transition_figure(exact.grid, 0.0, [10, 20], {"corrected": [mu]})
    with pytest.raises(ValueError, match="rows must hold at least one density"):
        plots.transition_figure(exact.grid, 0.0, [10], {})
    with pytest.raises(ValueError, match="grid must increase"):
        plots.stationary_figure(exact.grid[::-1], mu, {"corrected": mu})
    with pytest.raises(ValueError, match="start must be one finite number"):
        plots.transition_figure(exact.grid, np.nan, [10], {"corrected": [mu]})
    with pytest.raises(ValueError, match="rows may hold"):
        plots.stationary_figure(exact.grid, mu, {str(k): mu for k in range(9)})


# dihedrals


def mesh(ax: Axes) -> QuadMesh:
    (found,) = [item for item in ax.collections if isinstance(item, QuadMesh)]
    return found


def test_a_panel_is_the_density_of_its_sample(
    torsions: dict[str, list[Any]], figures: dict[str, Figure]
) -> None:
    panels = np.array(figures["ramachandran"].axes[:6]).reshape(2, 3)
    cell = np.radians(12) ** 2
    for name, line_of_panels in zip(torsions, panels, strict=True):
        assert line_of_panels[0].get_ylabel() == name
        for ax, sample in zip(line_of_panels, torsions[name], strict=True):
            angles, weights = sample if name == "MD" else (sample, np.ones(len(sample)))
            shown = mesh(ax).get_array()
            assert shown.filled(0).sum() * cell == pytest.approx(1)
            phi, psi = np.floor((np.degrees(angles) + 180) / 12).astype(int).T
            expected = np.zeros((30, 30))
            np.add.at(expected, (psi, phi), weights)  # psi upwards, phi to the right
            np.testing.assert_allclose(shown.filled(0) * cell, expected / weights.sum(), atol=1e-12)
            np.testing.assert_array_equal(shown.mask, expected == 0)
            corners = mesh(ax).get_coordinates()[[0, -1], [0, -1]]
            np.testing.assert_allclose(corners, [[-180, -180], [180, 180]])


def test_panels_share_colours_and_mark_the_start(figures: dict[str, Figure]) -> None:
    *panels, bar = figures["ramachandran"].axes
    shown = np.concatenate([mesh(ax).get_array().compressed() for ax in panels])
    assert {mesh(ax).norm for ax in panels} == {mesh(panels[0]).norm}
    assert mesh(panels[0]).norm.vmax == shown.max()
    assert mesh(panels[0]).norm.vmin == max(shown.min(), shown.max() / 1e4)
    assert bar.get_yscale() == "log"
    for ax in panels:
        np.testing.assert_allclose(line(ax, "start").get_xydata(), np.degrees([[-1.4, 1.2]]))


def test_panels_are_square_with_ticks_at_right_angles(figures: dict[str, Figure]) -> None:
    figure = figures["ramachandran"]
    figure.draw_without_rendering()
    titles = [ax.get_title() for ax in figure.axes[:3]]
    assert titles == ["lag 1 ps", "lag 10 ps", "lag 100 ps"]
    for ax in figure.axes[:6]:
        box = ax.get_window_extent()
        assert box.width == pytest.approx(box.height, rel=0.01)
        assert ax.get_xlim() == ax.get_ylim() == (-180, 180)
        for axis in (ax.xaxis, ax.yaxis):
            assert axis.get_ticklocs().tolist() == [-180, -90, 0, 90, 180]


@pytest.mark.parametrize("columns", [1, 2, 5])
def test_numbers_of_ticks_do_not_touch(columns: int) -> None:
    figure = plots.ramachandran_figure({"MD": [np.ones((5, 2))] * columns}, ["lag"] * columns)
    figure.draw_without_rendering()
    numbers = [
        label.get_window_extent()
        for ax in figure.axes[:columns]
        for axis in (ax.xaxis, ax.yaxis)
        for label in axis.get_ticklabels(which="both")
        if label.get_visible() and label.get_text()
    ]
    assert len(numbers) >= 6
    assert not any(a.overlaps(b) for a, b in itertools.combinations(numbers, 2))


def test_rare_frames_do_not_stretch_the_colours() -> None:
    weighted = (np.array([[-1.5, 1.0], [1.0, 1.0]]), [1, 1e-30])
    shown = mesh(plots.ramachandran_figure({"MD": [weighted]}, ["umbrella"]).axes[0])
    assert shown.get_array().count() == 2
    assert shown.norm.vmax / shown.norm.vmin == pytest.approx(1e4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rows": {}}, "rows must hold"),
        ({"titles": []}, "titles must hold"),
        ({"titles": ["a", "b"]}, r"rows\['MD'\] must hold 2 samples"),
        ({"rows": {"MD": [np.zeros((0, 2))]}}, r"rows\['MD'\]\[0\] must hold phi and psi"),
        ({"rows": {"MD": [np.zeros((4, 3))]}}, "must hold phi and psi"),
        ({"rows": {"MD": [np.full((4, 2), 90.0)]}}, "must be angles in rad.*got 90 to 90"),
        ({"rows": {"MD": [np.full((4, 2), np.nan)]}}, "must be angles in rad"),
        ({"rows": {"MD": [(np.zeros((4, 2)), np.ones(3))]}}, "weights of .* must have shape"),
        ({"rows": {"MD": [(np.zeros((2, 2)), [1, -1])]}}, "weights of .* must be positive"),
        ({"rows": {"MD": [(np.zeros((2, 2)), [0, 0])]}}, "weights of .* must be positive"),
        ({"start": (-60, 60)}, "start must be angles in rad"),
        ({"start": 1.0}, "start must have shape"),
    ],
)
def test_bad_dihedrals_are_refused(change: dict[str, Any], message: str) -> None:
    good = {"rows": {"MD": [np.zeros((4, 2))]}, "titles": ["lag"]}
    with pytest.raises(ValueError, match=message):
        plots.ramachandran_figure(**good | change)


def test_profiles_with_their_errors(
    profiles: dict[str, tuple[np.ndarray, ...]], figures: dict[str, Figure]
) -> None:
    ax = figures["free energy"].axes[0]
    bands = [item for item in ax.collections if item.get_paths()]
    for drawn, (name, (angle, energy, error)) in zip(bands, profiles.items(), strict=True):
        seen = np.isfinite(energy)
        expected = np.c_[np.degrees(angle), np.where(seen, energy, np.nan)]
        np.testing.assert_allclose(line(ax, name).get_xydata(), expected)
        assert len(drawn.get_paths()) == (2 if name == "MD" else 1)  # interrupted
        corners = np.concatenate([path.vertices for path in drawn.get_paths()])
        edges = np.r_[energy[seen] - error[seen], energy[seen] + error[seen]]
        np.testing.assert_allclose(np.unique(corners[:, 1]), np.unique(edges))
    assert line(ax, "uncorrected").is_dashed()
    assert line(ax, "MD").get_linewidth() < 1
    assert legend_labels(figures["free energy"]) == ["uncorrected", "MD", "± 1 standard error"]


@pytest.mark.parametrize(
    ("profile", "message"),
    [
        ((LAGS[:3] / 1e3, LAGS[:3]), "must be .angle, energy, error., got 2"),
        ((LAGS[:3], LAGS[:3], LAGS[:3]), "angles of .* must be angles in rad"),
        ((-LAGS[:3] / 1e3, LAGS[:3], LAGS[:3]), "angles of .* must increase"),
        ((LAGS[:3] / 1e3, LAGS[:2], LAGS[:3]), r"arrays of shape \(3,\), got \(2,\)"),
        ((LAGS[:3] / 1e3, LAGS[:3] * np.inf, LAGS[:3]), "must be finite somewhere"),
        ((LAGS[:3] / 1e3, LAGS[:3], -LAGS[:3]), "errors of .* must be finite and not negative"),
        ((LAGS[:3] / 1e3, LAGS[:3], LAGS[:3] * np.nan), "errors of .* must be finite"),
        ((LAGS[:3] / 1e3, LAGS[:3], LAGS[:3] * np.inf), "errors of .* must be finite"),
    ],
)
def test_bad_profiles_are_refused(profile: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plots.free_energy_figure({"corrected": profile})


# where MD is the truth


def test_the_truth_is_called_what_it_is(
    curves: dict[str, Any], draws: dict[str, np.ndarray], exact: TransferOperator
) -> None:
    ax = plots.correlation_figure(**curves, truth="MD").axes[0]
    np.testing.assert_allclose(line(ax, "MD").get_xydata(), np.c_[curves["exact"]])
    mu = exact.stationary
    figure = plots.stationary_figure(exact.grid, mu, {"corrected": mu}, truth="MD")
    assert legend_labels(figure) == ["MD", "corrected"]
    ax = plots.posterior_figure(draws, exact_timescale=(160.0, 5.0), truth="MD").axes[2]
    assert set(line(ax, "MD timescale").get_xdata()) == {160}
    (span,) = [item for item in ax.patches if isinstance(item, Rectangle)]
    assert (span.get_x(), span.get_width()) == (155, 10)


# for every figure


@EVERY
def test_axes_are_labelled_with_units(name: str, figures: dict[str, Figure]) -> None:
    figure = figures[name]
    horizontal = {ax.get_xlabel() for ax in figure.axes} | {figure.get_supxlabel()}
    vertical = {ax.get_ylabel() for ax in figure.axes} | {figure.get_supylabel()}
    expected = {
        "correlation": {"lag / frames", "C(lag)"},
        "posterior": {"implied timescale / frames", "posterior density"},
        "transition": {"x / reduced units", "probability density / (reduced units)$^{-1}$"},
        "stationary": {"x / reduced units", "probability density / (reduced units)$^{-1}$"},
        "ramachandran": {"φ / degrees", "ψ / degrees", "density / rad$^{-2}$"},
        "free energy": {"φ / degrees", "free energy / kT"},
    }
    assert expected[name] <= horizontal | vertical


@EVERY
def test_legend_covers_no_data_and_everything_fits(name: str, figures: dict[str, Figure]) -> None:
    figure = figures[name]
    figure.draw_without_rendering()
    legend = figure.legends[0].get_window_extent()
    page = figure.bbox.padded(1)
    assert page.containsx(legend.x0)
    assert page.containsx(legend.x1)
    for ax in figure.axes:
        assert not ax.get_window_extent().overlaps(legend)
        assert not (ax.get_title() and ax.title.get_window_extent().overlaps(legend))
        inside = ax.get_tightbbox()
        assert inside is not None
        for x, y in (inside.min, inside.max):
            assert page.contains(x, y)


@EVERY
def test_headings_do_not_touch(name: str, figures: dict[str, Figure]) -> None:
    figure = figures[name]
    figure.draw_without_rendering()
    boxes = [ax.title.get_window_extent() for ax in figure.axes if ax.get_title()]
    assert not any(a.overlaps(b) for a, b in itertools.combinations(boxes, 2))


@EVERY
def test_width_of_a_journal_and_readable_text(name: str, figures: dict[str, Figure]) -> None:
    figure = figures[name]
    figure.draw_without_rendering()
    width = {"correlation": 3.4, "stationary": 3.4, "free energy": 3.4}.get(name, 7.0)
    assert figure.get_figwidth() == width
    texts = [text for text in figure.findobj(matplotlib.text.Text) if text.get_text()]
    assert all(7 <= text.get_fontsize() <= 10 for text in texts)


@EVERY
def test_colours_are_okabe_ito_or_grey(name: str, figures: dict[str, Figure]) -> None:
    palette = {color.lower() for color in plots.OKABE_ITO.values()}
    for ax in figures[name].axes:
        shapes = [item for item in ax.patches if isinstance(item, StepPatch)]
        colors = [to_hex(item.get_color()) for item in ax.lines]
        colors += [to_hex(item.get_edgecolor()) for item in shapes]
        bands = [item for item in ax.collections if not isinstance(item, QuadMesh)]
        colors += [to_hex(c[:3]) for item in bands for c in item.get_facecolor()]
        for color in colors:
            red, green, blue = to_rgb(color)
            assert color in palette or red == green == blue


def test_colours_of_rows_are_told_apart(exact: TransferOperator) -> None:
    mu = exact.stationary
    names = ["uncorrected", "corrected", "ITO", "relaxed", "umbrella", "long run"]
    figure = plots.stationary_figure(exact.grid, mu, dict.fromkeys(names, mu))
    drawn = [line(figure.axes[0], name) for name in ("exact", *names)]
    colors = {to_hex(item.get_color()) for item in drawn}
    assert len(colors) == len(drawn)
    assert colors <= {color.lower() for color in plots.OKABE_ITO.values()}


def test_colours_follow_the_name_and_not_the_order(exact: TransferOperator) -> None:
    mu = exact.stationary
    for names in itertools.permutations(["uncorrected", "corrected", "other"]):
        ax = plots.stationary_figure(exact.grid, mu, dict.fromkeys(names, mu)).axes[0]
        assert line(ax, "corrected").get_color() == plots.OKABE_ITO["blue"]
        assert line(ax, "uncorrected").get_color() == plots.OKABE_ITO["vermillion"]


@EVERY
def test_files_are_valid(name: str, figures: dict[str, Figure], tmp_path: Path) -> None:
    png, pdf = plots.save(figures[name], tmp_path / "new" / "figure.v2")
    assert (png.name, pdf.name) == ("figure.v2.png", "figure.v2.pdf")
    image = imread(png)
    assert image.shape[1] == round(200 * figures[name].get_figwidth())
    assert image[..., :3].std() > 0.05
    content = pdf.read_bytes()
    assert content.startswith(b"%PDF")
    assert content.rstrip().endswith(b"%%EOF")


def test_the_same_data_give_the_same_files(
    curves: dict[str, Any], draws: dict[str, np.ndarray], tmp_path: Path
) -> None:
    for make in (lambda: plots.correlation_figure(**curves), lambda: plots.posterior_figure(draws)):
        first, second = (
            [path.read_bytes() for path in plots.save(make(), tmp_path / name)]
            for name in ("first", "second")
        )
        assert first == second


def test_a_path_with_a_suffix_is_refused(figures: dict[str, Figure], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"must not end in \.png"):
        plots.save(figures["posterior"], tmp_path / "figure.png")


def test_settings_of_the_user_are_left_alone(
    curves: dict[str, Any], draws: dict[str, np.ndarray], tmp_path: Path
) -> None:
    calls: list[Callable[[], Any]] = [
        lambda: plots.save(plots.correlation_figure(**curves), tmp_path / "figure"),
        lambda: plots.posterior_figure(draws),
        lambda: plots.posterior_figure({}),
    ]
    before = dict(matplotlib.rcParams.copy())
    for call in calls[:2]:
        call()
    with pytest.raises(ValueError, match="draws must hold"):
        calls[2]()
    assert dict(matplotlib.rcParams.copy()) == before


IMPORT = """
import sys
import bopito_inverse
assert "matplotlib" not in sys.modules
from bopito_inverse import plots
plots.save(plots.stationary_figure([0, 1, 2], [1, 2, 1], {"corrected": [1, 1, 1]}), sys.argv[1])
assert "matplotlib" in sys.modules
assert "matplotlib.pyplot" not in sys.modules
"""


def test_pyplot_is_never_imported(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", IMPORT, str(tmp_path / "figure")], capture_output=True, text=True
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
