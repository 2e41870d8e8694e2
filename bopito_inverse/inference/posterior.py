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
        hdi_94: shortest interval that holds 94 % of the posterior.
    """

    mean: float
    sd: float
    hdi_94: tuple[float, float]

    def __str__(self) -> str:
        low, high = self.hdi_94
        return f"{self.mean:.4g} +- {self.sd:.2g} (94 % HDI {low:.4g} to {high:.4g})"

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON, which has no infinity: None stands for it."""
        low, high = self.hdi_94
        return {
            "mean": _finite(self.mean),
            "sd": _finite(self.sd),
            "hdi_94": [_finite(low), _finite(high)],
        }


def estimate(draws: np.ndarray) -> Estimate:
    """Summary of posterior draws (chains, draws); where some are infinite, so are mean and sd."""
    if not np.isfinite(draws).all():
        low, high = np.quantile(draws, [(1 - HDI_PROB) / 2, (1 + HDI_PROB) / 2], method="lower")
        return Estimate(np.inf, np.inf, (float(low), float(high)))
    low, high = _arviz().hdi(draws.ravel(), hdi_prob=HDI_PROB)
    return Estimate(float(draws.mean()), float(draws.std()), (float(low), float(high)))


def ess_bulk(draws: np.ndarray) -> float:
    """Bulk effective sample size of posterior draws (chains, draws)."""
    az = _arviz()
    return float(az.ess(az.convert_to_dataset({"x": draws}), method="bulk")["x"])


def inference_data(
    posterior: dict[str, np.ndarray],
    posterior_predictive: np.ndarray,
    log_likelihood: np.ndarray,
    observed: np.ndarray,
    constant: dict[str, Any],
    lags: np.ndarray,
) -> Any:
    """InferenceData with the groups that ArviZ functions expect.

    Arrays are (chains, draws) or (chains, draws, L); `constant` holds what the fit was given.
    """
    return _arviz().from_dict(
        posterior=posterior,
        posterior_predictive={"correlation": posterior_predictive},
        log_likelihood={"correlation": log_likelihood},
        observed_data={"correlation": observed},
        constant_data=constant,
        coords={"lag": lags},
        dims={"correlation": ["lag"], "prediction": ["lag"], "sigma": ["lag"]},
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
