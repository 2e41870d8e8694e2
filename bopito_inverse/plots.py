r"""Figures for papers: correlations, the posterior, densities in one dimension and of dihedrals.

Each function returns a `matplotlib.figure.Figure`, made without pyplot: nothing is shown, no
backend is chosen and no global setting changes. Widths are those of journal columns. Colours are
from the palette of Okabe and Ito, which readers with any colour vision can tell apart, and one
colour means one thing in all figures: blue the corrected model, vermillion (dashed) the
uncorrected one, black the truth. Legends stand outside the axes, where they cannot cover data.
Angles are given in rad and shown in degrees.

In a notebook, `%matplotlib inline` shows a figure that is the last expression of a cell.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from numpy.typing import ArrayLike

SINGLE, DOUBLE = 3.4, 7.0  # widths of one and two columns in inches
DPI = 200
HDI_PROB = 0.94
LOG_SPAN = 30.0  # posterior draws that span more than this factor get a logarithmic axis
FRAMES = "frames"
TRUTH = ("exact", "MD")
DECADES = 4.0  # of a density of dihedrals that its colours span
DENSITY_MAP = "magma_r"
RIGHT_ANGLES = (-180, -90, 0, 90, 180)  # ticks of an angle

OKABE_ITO = {
    "black": "#000000",
    "orange": "#E69F00",
    "sky": "#56B4E9",
    "green": "#009E73",
    "yellow": "#F0E442",
    "blue": "#0072B2",
    "vermillion": "#D55E00",
    "purple": "#CC79A7",
}
GREY = "#7F7F7F"
PALE = "#D9D9D9"
MEANING = {
    "exact": OKABE_ITO["black"],
    "MD": OKABE_ITO["black"],
    "corrected": OKABE_ITO["blue"],
    "uncorrected": OKABE_ITO["vermillion"],
}
OTHERS = tuple(OKABE_ITO[name] for name in ("green", "orange", "purple", "sky"))
DASHES = {"uncorrected": (0, (4, 1.5)), "exact": "-", "MD": "-", "corrected": "-"}
OTHER_DASHES = ((0, (1, 1)), (0, (5, 1, 1, 1)), (0, (3, 1, 1, 1, 1, 1)), (0, (8, 2)))

LEGEND = (  # order of the entries; others follow
    "measured",
    "measured, fitted",
    "measured, held out",
    "corrected model",
    "94 % band",
    "uncorrected model",
    "posterior",
    "mean",
    "94 % HDI",
    "prior",
)

STYLE: Any = {  # rcParams, for `rc_context`
    "font.size": 8,
    "axes.labelsize": 8,
    "axes.titlesize": 8,
    "figure.labelsize": 8,
    "axes.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "lines.linewidth": 1.3,
    "lines.markersize": 4,
    "legend.fontsize": 7.5,
    "legend.frameon": False,
    "legend.handlelength": 2.2,
    "legend.columnspacing": 1.4,
    "pdf.fonttype": 42,  # fonts that journals and editors can read
}

Curve = ArrayLike | tuple[ArrayLike, ArrayLike]
Density = ArrayLike | tuple[ArrayLike, ArrayLike]
Torsions = ArrayLike | tuple[ArrayLike, ArrayLike]


@rc_context(STYLE)
def correlation_figure(
    lags: ArrayLike,
    measured: tuple[ArrayLike, ArrayLike],
    fitted: Sequence[ArrayLike],
    uncorrected: Curve | None = None,
    exact: Curve | None = None,
    lag_label: str = "lag / frames",
    ylabel: str = "C(lag)",
    fitted_mask: ArrayLike | None = None,
    truth: str = "exact",
) -> Figure:
    """Measured and fitted correlation function, one column wide.

    Args:
        lags: lags of the measurement, (L,), increasing.
        measured: values and their standard deviations, each (L,).
        fitted: posterior mean and lower and upper edge of the 94 % band of the fitted model, each
            (L,); or four arrays (M,), of which the first holds lags of its own.
        uncorrected: the model before the correction, (L,), or a pair (lags, values).
        exact: the truth where it is known, (L,), or a pair (lags, values).
        lag_label: label of the lag axis, with the unit.
        ylabel: label of the correlation axis.
        fitted_mask: which measured points were fitted, (L,) of bool; the others are drawn as open
            symbols. By default all were.
        truth: what the legend calls `exact`, for example `MD`.

    Raises:
        ValueError: arrays of the wrong shape, values that are not finite, negative sigma, a band
            whose edges are crossed.
    """
    x = _increasing("lags", lags)
    value, sigma = _measured(x, measured)
    mask = _mask(x, fitted_mask)
    figure, (ax,) = _figure(SINGLE, 2.8)
    if exact is not None:
        ax.plot(*_curve("exact", x, exact), color=MEANING["exact"], lw=0.8, label=truth)
    if uncorrected is not None:
        curve = _curve("uncorrected", x, uncorrected)
        ax.plot(*curve, **_line("uncorrected"), label="uncorrected model")
    _draw_band(ax, *_band(x, fitted))
    if mask.any():
        label = "measured" if mask.all() else "measured, fitted"
        _draw_points(ax, x[mask], value[mask], sigma[mask], "black", label)
    if not mask.all():
        _draw_points(ax, x[~mask], value[~mask], sigma[~mask], "white", "measured, held out")
    ax.set(xlabel=lag_label, ylabel=ylabel)
    _legend(figure, columns=2)
    return figure


@rc_context(STYLE)
def posterior_figure(
    draws: Mapping[str, ArrayLike],
    lag_max: float | None = None,
    exact_timescale: float | tuple[float, float] | None = None,
    prior: Any = None,
    truth: str = "exact",
) -> Figure:
    """Posterior of N_int, of the weight and of the implied timescale, two columns wide.

    Each panel is a histogram of the draws, with the mean (dot) and the shortest interval that holds
    94 % of the draws (bar) below it. Draws at infinity are left out of the histogram, whose area is
    the share of the finite ones, and counted in the heading. Draws that span more than a factor of
    30 are shown on a logarithmic axis, as density per decade.

    Args:
        draws: `n_int` and `timescale` in frames and `weight`, of any shape; `n_int` and `timescale`
            may be infinite.
        lag_max: N_max in frames, marked in the panel of N_int.
        exact_timescale: the true timescale in frames, marked in its panel; or a pair of it and its
            standard error, drawn as a band.
        prior: frozen `scipy.stats` distribution of N_int, as in `fit`, drawn in the panel of N_int.
        truth: what the legend calls the true timescale, for example `MD`.

    Raises:
        ValueError: draws that are missing, empty or NaN; a prior without a density.
    """
    if prior is not None and not hasattr(prior, "pdf"):
        raise ValueError(f"prior must be a frozen scipy.stats distribution, got {prior!r}")
    panels = {
        "n_int": r"interpolation parameter $N_\mathrm{int}$ / frames",
        "weight": r"weight $w$ (dimensionless)",
        "timescale": "implied timescale / frames",
    }
    figure, axes = _figure(DOUBLE, 2.3, columns=len(panels))
    for ax, (name, label) in zip(axes, panels.items(), strict=True):
        _draw_posterior(ax, _draws(name, draws))
        ax.set(xlabel=label, yticks=[])
        ax.spines["left"].set_visible(False)
    axes[0].set_ylabel("posterior density")
    if lag_max is not None:
        axes[0].axvline(_number("lag_max", lag_max), color=GREY, ls=":", label=r"$N_\mathrm{max}$")
    if exact_timescale is not None:
        pair = exact_timescale if isinstance(exact_timescale, tuple) else (exact_timescale, 0.0)
        value, error = (_number("exact_timescale", part) for part in pair)
        axes[2].axvline(value, color=MEANING["exact"], lw=0.8, label=f"{truth} timescale")
        axes[2].axvspan(value - error, value + error, color=PALE, lw=0, zorder=0)
    if prior is not None:
        _draw_prior(axes[0], prior)
    _legend(figure, columns=6)
    return figure


@rc_context(STYLE)
def transition_figure(
    grid: ArrayLike,
    start: float,
    lags: ArrayLike,
    rows: Mapping[str, Sequence[Density]],
    stationary: ArrayLike | None = None,
    position_label: str = "x / reduced units",
    lag_unit: str = FRAMES,
) -> Figure:
    """Transition densities p(x, lag | start): a row for each model, lags increasing to the right.

    Args:
        grid: positions (G,), increasing.
        start: position at lag 0.
        lags: lags (L,); panels are put in increasing order.
        rows: for each name (`uncorrected`, `corrected`, `exact`, or others) one density per
            lag: its values on `grid`, (G,), or a pair (density, edges) as from `numpy.histogram`.
        stationary: stationary density on the grid (G,), drawn in grey in each panel.
        position_label: label of the position axis, with the unit.
        lag_unit: unit of the lags.

    Raises:
        ValueError: arrays of the wrong shape, densities that are negative or not finite, no rows.
    """
    x, times = _increasing("grid", grid), _vector("lags", lags)
    _check_rows(rows)
    order = np.argsort(times)
    x_0 = _number("start", start)
    still = None if stationary is None else _density("stationary", x, stationary)[1]
    figure, axes = _figure(DOUBLE, 0.95 + 0.95 * len(rows), len(rows), len(times))
    table = axes.reshape(len(rows), len(times))
    for line, (name, style) in zip(table, _styles(rows).items(), strict=True):
        if len(rows[name]) != len(times):
            raise ValueError(f"rows[{name!r}] must hold {len(times)} densities (one per lag), "
                             f"got {len(rows[name])}")  # fmt: skip
        for ax, k in zip(line, order, strict=True):
            _draw_reference(ax, x, x_0, still)
            density = _density(f"rows[{name!r}][{k}]", x, rows[name][k])
            _draw_density(ax, *density, style, label=f"_{name}")
        line[0].set_ylabel(name, color=style["color"], fontweight="bold")
    for ax, k in zip(table[0], order, strict=True):
        ax.set_title(f"lag {times[k]:g} {lag_unit}")
    table[0, 0].set(xlim=(x[0], x[-1]), ylim=(0, None))
    figure.supxlabel(position_label)
    figure.supylabel(f"probability density{_inverse_unit(position_label)}")
    _legend(figure, columns=2)
    return figure


@rc_context(STYLE)
def ramachandran_figure(
    rows: Mapping[str, Sequence[Torsions]],
    titles: Sequence[str],
    start: ArrayLike | None = None,
    bins: int = 60,
) -> Figure:
    """Densities of phi and psi: a row for each model, panels as titled, for example lags.

    Each panel is a histogram in two dimensions, on a logarithmic colour scale that all panels share
    and that ends four decades below the highest density: rarer bins have its last colour. White
    where there is no frame.

    Args:
        rows: for each name (`uncorrected`, `corrected`, `MD`, or others) one sample per title:
            angles phi and psi in rad, (n, 2), or a pair (angles, weights), weights (n,).
        titles: of the columns.
        start: phi and psi at lag 0 in rad, (2,), marked in each panel.
        bins: bins per angle.

    Raises:
        ValueError: samples that are missing or empty, angles beyond pi (degrees?), bad weights.
    """
    _check_rows(rows)
    if not len(titles):
        raise ValueError("titles must hold at least one title, got none")
    if start is not None:
        _check_angles("start", _vector("start", start, 2))
    width = DOUBLE if len(titles) > 2 else SINGLE
    figure, axes = _figure(width, 2.0 + len(rows), len(rows), len(titles))
    panels: list[np.ndarray] = []
    for name, samples in rows.items():
        if len(samples) != len(titles):
            raise ValueError(f"rows[{name!r}] must hold {len(titles)} samples (one per title), "
                             f"got {len(samples)}")  # fmt: skip
        panels += [_torsions(f"rows[{name!r}][{k}]", part, bins) for k, part in enumerate(samples)]
    scale = LogNorm(*_color_range(panels))
    for ax, panel in zip(axes, panels, strict=True):
        _draw_torsions(ax, panel, scale, start)
        _degrees(ax.xaxis, every=1 if width / len(titles) > 1.9 else 2)
        _degrees(ax.yaxis, every=1 if width / len(titles) > 1.3 else 2)
    table = axes.reshape(len(rows), len(titles))
    for line, (name, style) in zip(table, _styles(rows).items(), strict=True):
        line[0].set_ylabel(name, color=style["color"], fontweight="bold")
    for ax, title in zip(table[0], titles, strict=True):
        ax.set_title(title)
    figure.supxlabel("φ / degrees")
    figure.supylabel("ψ / degrees")
    bar = figure.colorbar(axes[0].collections[0], ax=list(axes), aspect=16 * len(rows), pad=0.02)
    bar.set_label("density / rad$^{-2}$")
    bar.ax.tick_params(labelsize=7.5, width=0.6, length=2.5)
    bar.ax.tick_params(which="minor", width=0.4, length=1.5)
    _legend(figure, columns=1)
    _make_square(figure, axes[0], len(rows))
    return figure


@rc_context(STYLE)
def free_energy_figure(
    rows: Mapping[str, tuple[ArrayLike, ArrayLike, ArrayLike]],
    angle_label: str = "φ / degrees",
    ylabel: str = "free energy / kT",
) -> Figure:
    """Free-energy profiles along an angle with bands of one standard error, one column wide.

    Args:
        rows: for each name (`uncorrected`, `corrected`, `MD`, or others) three arrays (G,): angle
            in rad, increasing, free energy and its standard error. Where the free energy is
            infinite or NaN (nothing was seen there) the curve is interrupted. Profiles are drawn
            as they are, so give them a common zero.
        angle_label: label of the angle axis.
        ylabel: label of the other axis, with the unit.

    Raises:
        ValueError: arrays of the wrong shape, angles beyond pi, free energies that are nowhere
            finite, errors that are negative or not finite where the free energy is.
    """
    _check_rows(rows)
    figure, (ax,) = _figure(SINGLE, 2.5)
    for name, style in _styles(rows).items():
        angle, energy, error = _profile(f"rows[{name!r}]", rows[name])
        color, width = style["color"], 0.8 if name in TRUTH else 1.3
        ax.fill_between(angle, energy - error, energy + error, color=color, alpha=0.25, lw=0)
        ax.plot(angle, energy, lw=width, label=name, **style)
    ax.fill_between([], [], color=GREY, alpha=0.25, lw=0, label="± 1 standard error")
    _degrees(ax.xaxis)
    ax.set(xlim=(-180, 180), xlabel=angle_label, ylabel=ylabel)
    _legend(figure, columns=2)
    return figure


@rc_context(STYLE)
def stationary_figure(
    grid: ArrayLike,
    exact: ArrayLike,
    rows: Mapping[str, Density],
    position_label: str = "x / reduced units",
    truth: str = "exact",
) -> Figure:
    """Stationary densities of models beside the exact one, one column wide.

    Args:
        grid: positions (G,), increasing.
        exact: exact density on the grid (G,).
        rows: for each name a density: its values on `grid`, (G,), or a pair (density, edges) as
            from `numpy.histogram`.
        position_label: label of the position axis, with the unit.
        truth: what the legend calls `exact`, for example `MD`.

    Raises:
        ValueError: arrays of the wrong shape, densities that are negative or not finite, no rows.
    """
    x = _increasing("grid", grid)
    _check_rows(rows)
    known = _density("exact", x, exact)[1]
    figure, (ax,) = _figure(SINGLE, 2.5)
    ax.fill_between(x, known, color=PALE, lw=0)
    ax.plot(x, known, color=MEANING["exact"], lw=0.8, label=truth)
    for name, style in _styles(rows).items():
        _draw_density(ax, *_density(f"rows[{name!r}]", x, rows[name]), style, label=name)
    unit = _inverse_unit(position_label)
    ax.set(xlabel=position_label, ylabel=f"probability density{unit}")
    ax.set(xlim=(x[0], x[-1]), ylim=(0, None))
    _legend(figure, columns=3)
    return figure


@rc_context(STYLE)
def save(figure: Figure, path_without_suffix: str | Path) -> list[Path]:
    """Write a figure as PNG (200 dpi) and PDF; folders are made. Returns the two paths.

    The files hold no date, so that the same data give the same bytes.
    """
    stem = Path(path_without_suffix)
    if stem.suffix in (".png", ".pdf"):
        raise ValueError(f"path_without_suffix must not end in {stem.suffix}, got {str(stem)!r}")
    stem.parent.mkdir(parents=True, exist_ok=True)
    metadata = {"png": {"Software": None}, "pdf": {"CreationDate": None}}
    paths = []
    for kind, entries in metadata.items():
        path = stem.with_name(f"{stem.name}.{kind}")
        figure.savefig(path, format=kind, dpi=DPI, metadata=entries)
        paths.append(path)
    return paths


def _figure(width: float, height: float, rows: int = 1, columns: int = 1) -> tuple[Figure, Any]:
    """A figure and its axes (rows * columns,); those of a grid of several rows are shared."""
    figure = Figure(figsize=(width, height), dpi=DPI, layout="constrained")
    shared = rows > 1
    axes = figure.subplots(rows, columns, sharex=shared, sharey=shared, squeeze=False).ravel()
    for ax in axes:  # ticks are made late, when STYLE no longer holds
        ax.tick_params(labelsize=7.5, width=0.6, length=2.5)
    return figure, axes


def _legend(figure: Figure, columns: int) -> None:
    """One legend for all panels, above them."""
    known: dict[str, Any] = {}
    for ax in figure.axes:
        for handle, label in zip(*ax.get_legend_handles_labels(), strict=True):
            known.setdefault(label, handle)
    if known:
        labels = sorted(known, key=lambda name: LEGEND.index(name) if name in LEGEND else 99)
        columns = min(columns, len(labels))
        handles = [known[label] for label in labels]
        figure.legend(handles, labels, loc="outside upper center", ncols=columns)


def _line(name: str) -> dict[str, Any]:
    return {"color": MEANING[name], "ls": DASHES[name]}


def _styles(names: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Colour and dashes for each name; the known names always have the same ones."""
    known = {name: _line(name) for name in names if name in MEANING}
    other = [name for name in names if name not in MEANING]
    if len(other) > len(OTHERS):
        raise ValueError(f"rows may hold {len(OTHERS)} names besides {list(MEANING)}, got {other}")
    free = zip(other, OTHERS, OTHER_DASHES, strict=False)
    known |= {name: {"color": color, "ls": dashes} for name, color, dashes in free}
    return {name: known[name] for name in names}


def _draw_points(
    ax: Axes, x: np.ndarray, value: np.ndarray, sigma: np.ndarray, face: str, label: str
) -> None:
    bars = ax.errorbar(x, value, sigma, label=label, color="black", ls="none", marker="o", zorder=4,
                       ms=3, mfc=face, mew=0.8, elinewidth=0.8, capsize=2)  # fmt: skip
    for cap in bars[1]:
        cap.set_markeredgewidth(0.8)


def _draw_band(
    ax: Axes, x: np.ndarray, mean: np.ndarray, low: np.ndarray, high: np.ndarray
) -> None:
    color = MEANING["corrected"]
    ax.fill_between(x, low, high, color=color, alpha=0.25, lw=0, label="94 % band")
    ax.plot(x, mean, color=color, label="corrected model")


def _draw_density(
    ax: Axes, x: np.ndarray, y: np.ndarray, style: dict[str, Any], label: str
) -> None:
    """A line through (G,) values on a grid, or stairs where there is one more edge than values."""
    if len(x) == len(y):
        ax.plot(x, y, label=label, **style)
    else:
        ax.stairs(y, x, label=label, lw=1.0, color=style["color"])


def _draw_reference(ax: Axes, x: np.ndarray, start: float, stationary: np.ndarray | None) -> None:
    if stationary is not None:
        ax.fill_between(x, stationary, color=PALE, lw=0, label="stationary density")
    ax.axvline(start, color=GREY, ls=":", lw=1.0, label=f"start at {start:g}")


def _draw_posterior(ax: Axes, draws: np.ndarray) -> None:
    """Histogram, mean and HDI of draws, which may be infinite."""
    finite = draws[np.isfinite(draws)]
    low, high, mean = *_hdi(draws), float(draws.mean())
    heading = f"mean {_short(mean)}, HDI {_short(low)} to {_short(high)}"
    if len(finite) < len(draws):
        heading += f"\n{_short(100 * (1 - len(finite) / len(draws)))} % of the draws at infinity"
    ax.set_title(heading, fontsize=7.5)
    if not len(finite):
        return
    density, edges = _histogram(finite, len(draws), ax)
    color, peak = MEANING["corrected"], density.max()
    ax.stairs(density, edges, fill=True, color=color, alpha=0.25, lw=0)
    ax.stairs(density, edges, color=color, lw=1.0, label="posterior")
    level = -0.07 * peak
    right = high if np.isfinite(high) else edges[-1]
    if low < right:
        ax.plot([low, right], [level, level], color="black", lw=2, label="94 % HDI",
                solid_capstyle="butt")  # fmt: skip
    if not np.isfinite(high):
        ax.plot(right, level, ">", color="black", ms=5, clip_on=False)
    if np.isfinite(mean):
        ax.plot(mean, level, "o", color="white", mec="black", mew=0.9, ms=4.5, label="mean")
    ax.set_ylim(-0.14 * peak, 1.08 * peak)


def _histogram(finite: np.ndarray, total: int, ax: Axes) -> tuple[np.ndarray, np.ndarray]:
    """Density (of all `total` draws) and edges; sets a logarithmic axis where the draws need it."""
    low, high = finite.min(), finite.max()
    bins = int(np.clip(np.sqrt(len(finite)), 5, 40))
    if high == low:
        pad = 0.02 * abs(low) or 0.02
        edges = np.linspace(low - pad, low + pad, 6)
    elif low > 0 and high > LOG_SPAN * low:
        ax.set_xscale("log")
        edges = np.geomspace(low, high, bins + 1)
        edges[[0, -1]] = low, high
    else:
        edges = np.linspace(low, high, bins + 1)
    count, _ = np.histogram(finite, edges)
    widths = np.diff(np.log10(edges) if ax.get_xscale() == "log" else edges)
    return count / (total * widths), edges


def _draw_prior(ax: Axes, prior: Any) -> None:
    limits = ax.get_xlim()
    log = ax.get_xscale() == "log"
    x = (np.geomspace if log else np.linspace)(*limits, 400)
    density = prior.pdf(x) * (x * np.log(10) if log else 1.0)
    ax.plot(x, density, color=OKABE_ITO["orange"], ls=(0, (4, 1.5)), label="prior")
    ax.set(xlim=limits, ylim=(ax.get_ylim()[0], max(ax.get_ylim()[1], 1.08 * density.max())))


def _hdi(draws: np.ndarray) -> tuple[float, float]:
    """The shortest interval that holds 94 % of the draws; its upper end may be infinite."""
    ordered = np.sort(draws)
    held = int(np.floor(HDI_PROB * len(ordered)))
    low, high = ordered[: len(ordered) - held], ordered[held:]
    width = np.full(len(low), np.inf)
    np.subtract(high, low, out=width, where=np.isfinite(high))
    best = int(width.argmin())
    return float(low[best]), float(high[best])


def _short(value: float) -> str:
    if not np.isfinite(value):
        return "∞"
    return f"{value:.0f}" if 1000 <= abs(value) < 1e6 else f"{value:.3g}"


def _color_range(panels: Sequence[np.ndarray]) -> tuple[float, float]:
    """Lowest and highest density of panels, at most `DECADES` apart."""
    highest = max(panel.max() for panel in panels)
    lowest = min(panel[panel > 0].min() for panel in panels)
    return max(lowest, highest / 10**DECADES), highest


def _draw_torsions(ax: Axes, panel: np.ndarray, scale: LogNorm, start: Any) -> None:
    """Density (bins, bins) of phi and psi, white where it is zero."""
    edges = np.linspace(-180, 180, len(panel) + 1)
    density = np.ma.masked_equal(panel.T, 0)
    ax.pcolormesh(edges, edges, density, norm=scale, cmap=DENSITY_MAP, rasterized=True)
    if start is not None:
        phi, psi = np.degrees(start)
        ax.plot(phi, psi, "ko", ms=4.5, mfc="white", mew=0.9, label="start")
    ax.set(xlim=(-180, 180), ylim=(-180, 180))
    ax.spines[["top", "right"]].set_visible(True)


def _degrees(axis: Axis, every: int = 1) -> None:
    """Ticks at right angles over the whole circle, every first or second with its number."""
    axis.set_ticks(RIGHT_ANGLES[::every])
    axis.set_ticks(RIGHT_ANGLES, minor=True)
    axis.set_tick_params(which="minor", width=0.6, length=2.5)


def _make_square(figure: Figure, ax: Axes, n_rows: int) -> None:
    """Change the height of a figure so that its panels, all like `ax`, are square."""
    figure.draw_without_rendering()
    panel = ax.get_window_extent()
    missing = n_rows * (panel.width - panel.height) / figure.dpi
    figure.set_figheight(figure.get_figheight() + missing)


def _inverse_unit(label: str) -> str:
    """` / (unit)^-1` for an axis label `quantity / unit`."""
    _, slash, unit = label.partition(" / ")
    return f" / ({unit})$^{{-1}}$" if slash else ""


def _number(name: str, value: float) -> float:
    if np.ndim(value) != 0 or not np.isfinite(value):
        raise ValueError(f"{name} must be one finite number, got {value!r}")
    return float(value)


def _vector(name: str, value: ArrayLike, length: int | None = None) -> np.ndarray:
    """A finite, non-empty vector, of `length` values where it is given."""
    x = np.asarray(value, dtype=np.float64)
    if x.ndim != 1 or len(x) == 0 or (length is not None and len(x) != length):
        expected = "(n,) with n > 0" if length is None else f"({length},)"
        raise ValueError(f"{name} must have shape {expected}, got {x.shape}")
    if not np.isfinite(x).all():
        raise ValueError(f"{name} must be finite, got {(~np.isfinite(x)).sum()} that are not")
    return x


def _increasing(name: str, value: ArrayLike, length: int | None = None) -> np.ndarray:
    x = _vector(name, value, length)
    if (np.diff(x) <= 0).any():
        first = int((np.diff(x) <= 0).argmax())
        raise ValueError(f"{name} must increase, got {x[first]:g} before {x[first + 1]:g}")
    return x


def _is_pair(value: Any) -> bool:
    return isinstance(value, tuple) and len(value) == 2 and np.ndim(value[0]) == 1


def _curve(name: str, lags: np.ndarray, value: Any) -> tuple[np.ndarray, np.ndarray]:
    """Lags and values of a curve, on the measured lags or on lags of its own."""
    if not _is_pair(value):
        return lags, _vector(name, value, len(lags))
    own = _increasing(f"lags of {name}", value[0])
    return own, _vector(name, value[1], len(own))


def _band(lags: np.ndarray, fitted: Sequence[ArrayLike]) -> tuple[np.ndarray, ...]:
    """Lags, mean, low and high."""
    if len(fitted) not in (3, 4):
        raise ValueError(
            f"fitted must be (mean, low, high) or (lags, mean, low, high), got {len(fitted)} arrays"
        )
    own = lags if len(fitted) == 3 else _increasing("lags of fitted", fitted[0])
    names = ("mean", "low", "high")
    parts = [
        _vector(f"{name} of fitted", part, len(own))
        for name, part in zip(names, fitted[-3:], strict=True)
    ]
    if (parts[1] > parts[2]).any():
        raise ValueError("low of fitted must not be above high, got a band with crossed edges")
    return own, *parts


def _measured(lags: np.ndarray, measured: Sequence[ArrayLike]) -> tuple[np.ndarray, np.ndarray]:
    if len(measured) != 2:
        raise ValueError(f"measured must be (values, sigma), got {len(measured)} arrays")
    sigma = _vector("sigma of measured", measured[1], len(lags))
    if (sigma < 0).any():
        raise ValueError(f"sigma of measured must not be negative, got {sigma.min()}")
    return _vector("values of measured", measured[0], len(lags)), sigma


def _mask(lags: np.ndarray, mask: ArrayLike | None) -> np.ndarray:
    chosen = np.ones(len(lags), bool) if mask is None else np.asarray(mask)
    if chosen.shape != lags.shape or chosen.dtype != bool:
        raise ValueError(
            f"fitted_mask must be bool of shape {lags.shape}, got {chosen.dtype} {chosen.shape}"
        )
    return chosen


def _draws(name: str, draws: Mapping[str, ArrayLike]) -> np.ndarray:
    if name not in draws:
        raise ValueError(f"draws must hold {name!r}, got {sorted(draws)}")
    value = np.asarray(draws[name], dtype=np.float64).ravel()
    if len(value) == 0 or np.isnan(value).any() or np.isneginf(value).any():
        raise ValueError(f"draws[{name!r}] must be numbers or +inf, got none, NaN or -inf")
    return value


def _torsions(name: str, sample: Any, bins: int) -> np.ndarray:
    """Density of phi and psi on a grid of bins, rad^-2, (bins, bins)."""
    weighted = isinstance(sample, tuple) and len(sample) == 2 and np.ndim(sample[0]) == 2
    angles = np.asarray(sample[0] if weighted else sample, dtype=np.float64)
    if angles.ndim != 2 or angles.shape[1] != 2 or len(angles) == 0:
        raise ValueError(f"{name} must hold phi and psi, shape (n, 2), n > 0, got {angles.shape}")
    _check_angles(name, angles)
    weights = _vector(f"weights of {name}", sample[1], len(angles)) if weighted else None
    if weights is not None and ((weights < 0).any() or not weights.sum() > 0):
        raise ValueError(f"weights of {name} must be positive or zero, got {weights.min()}")
    phi, psi = angles.clip(-np.pi, np.pi).T
    limits = [(-np.pi, np.pi)] * 2
    return np.histogram2d(phi, psi, bins, limits, density=True, weights=weights)[0]


def _profile(name: str, profile: Sequence[ArrayLike]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Angle in degrees, free energy, NaN where it is not finite, and standard error."""
    if len(profile) != 3:
        raise ValueError(f"{name} must be (angle, energy, error), got {len(profile)} arrays")
    angle = _increasing(f"angles of {name}", profile[0])
    _check_angles(f"angles of {name}", angle)
    energy, error = (np.array(part, dtype=np.float64) for part in profile[1:])
    if energy.shape != angle.shape or error.shape != angle.shape:
        raise ValueError(f"{name} must hold arrays of shape {angle.shape}, got {energy.shape} and "
                         f"{error.shape}")  # fmt: skip
    seen = np.isfinite(energy)
    if not seen.any():
        raise ValueError(f"{name} must be finite somewhere, got no finite free energy")
    if not (error[seen] >= 0).all() or np.isinf(error[seen]).any():
        raise ValueError(f"errors of {name} must be finite and not negative, got "
                         f"{error[seen].min()} to {error[seen].max()}")  # fmt: skip
    energy[~seen] = np.nan
    return np.degrees(angle), energy, error


def _check_angles(name: str, angles: np.ndarray) -> None:
    if not (abs(angles) <= np.pi + 1e-5).all():
        raise ValueError(f"{name} must be angles in rad, from -pi to pi, got {angles.min():g} to "
                         f"{angles.max():g}")  # fmt: skip


def _density(name: str, grid: np.ndarray, value: Any) -> tuple[np.ndarray, np.ndarray]:
    """Grid or edges, and the density there."""
    if _is_pair(value):
        y = _vector(name, value[0])
        x = _increasing(f"edges of {name}", value[1], len(y) + 1)
    else:
        x, y = grid, _vector(name, value, len(grid))
    if (y < 0).any():
        raise ValueError(f"{name} must not be negative, got {y.min()}")
    return x, y


def _check_rows(rows: Mapping[str, Any]) -> None:
    if not rows:
        raise ValueError("rows must hold at least one density, got none")
