"""The posterior as an ArviZ InferenceData, and its summaries. ArviZ is touched here alone."""

import math
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

HDI_PROB = 0.94


@dataclass(frozen=True)
class Estimate:
    """Posterior summary of one quantity.

    Attributes:
        mean: posterior mean.
        sd: posterior standard deviation.
        median: posterior median.
        hdi_94: shortest interval that holds 94 % of the posterior; where draws are infinite, the
            one between the quantiles of 3 and 97 %.
    """

    mean: float
    sd: float
    median: float
    hdi_94: tuple[float, float]

    def __str__(self) -> str:
        low, high = self.hdi_94
        centre = f"{self.mean:.4g} +- {self.sd:.2g}"
        if not math.isfinite(self.mean):
            centre = f"median {self.median:.4g}"
        return f"{centre} (94 % HDI {low:.4g} to {high:.4g})"

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON, which has no infinity: None stands for it."""
        low, high = self.hdi_94
        return {
            "mean": _finite(self.mean),
            "sd": _finite(self.sd),
            "median": _finite(self.median),
            "hdi_94": [_finite(low), _finite(high)],
        }


def estimate(draws: np.ndarray) -> Estimate:
    """Summary of posterior draws (chains, draws); where some are infinite, so are mean and sd."""
    tail = (1 - HDI_PROB) / 2
    low, median, high = np.quantile(draws, [tail, 0.5, 1 - tail], method="lower")
    mean, sd = np.inf, np.inf
    if np.isfinite(draws).all():
        mean, sd = draws.mean(), draws.std()
        low, high = _arviz().hdi(draws.ravel(), hdi_prob=HDI_PROB)
    return Estimate(float(mean), float(sd), float(median), (float(low), float(high)))


def ess_bulk(draws: np.ndarray) -> float:
    """Bulk effective sample size of posterior draws (chains, draws)."""
    az = _arviz()
    return float(az.ess(az.convert_to_dataset({"x": draws}), method="bulk")["x"])


def inference_data(
    posterior: dict[str, np.ndarray],
    posterior_predictive: np.ndarray,
    log_likelihood: np.ndarray,
    prior: dict[str, np.ndarray],
    prior_predictive: np.ndarray,
    observed: np.ndarray,
    constant: dict[str, Any],
    lags: np.ndarray,
    observables: list[str],
    groups: np.ndarray,
) -> Any:
    """InferenceData with the groups that ArviZ functions expect.

    Arrays are (chains, draws), (chains, draws, L) for what belongs to points, or
    (chains, draws, n_groups) for what belongs to an experiment or a lag of its own. Points are
    named by their lag where that is enough. `constant` holds what the fit was given.
    """
    distinct = len(set(lags)) == len(lags)
    names = [f"{name}@{lag:g}" for name, lag in zip(observables, lags, strict=True)]
    own = [name for name in ("n_int", "weight", "timescale") if posterior[name].ndim == 3]
    point = "lag" if distinct else "point"
    coords: dict[str, Any] = {point: lags if distinct else names}
    if own:
        coords["group"] = groups
    return _arviz().from_dict(
        posterior=posterior,
        posterior_predictive={"correlation": posterior_predictive},
        log_likelihood={"correlation": log_likelihood},
        prior=prior,
        prior_predictive={"correlation": prior_predictive},
        observed_data={"correlation": observed},
        constant_data={**constant, "observable": np.array(observables)},
        coords=coords,
        dims={
            **{name: [point] for name in ("correlation", "prediction", "sigma", "observable")},
            **{name: ["group"] for name in own},
        },
    )


def write_netcdf(idata: Any, path: str | Path) -> None:
    """Write `posterior.nc`."""
    idata.to_netcdf(str(path))


def read_netcdf(path: str | Path) -> Any:
    """Read what `write_netcdf` wrote."""
    return _arviz().from_netcdf(str(path))


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _arviz() -> Any:
    """ArviZ, which takes a second to import and announces its next version each time."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import arviz
    return arviz
