"""Whether a fit may be trusted: a status with a sentence that says what to do."""

import numpy as np
from scipy.stats import chi2, norm
from scipy.stats import t as student_t

POOR_FIT = 1e-3
MONTE_CARLO_LIMIT = 0.5
LEARNED = 0.1


class Status(str):
    """A one-word code, with a `message` for people.

    Codes are `ok`, `bound`, `unidentified`, `poor_fit` and `mc_limited`.
    """

    message: str

    def __new__(cls, code: str, message: str) -> "Status":
        """A status that compares equal to its code."""
        status = super().__new__(cls, code)
        status.message = message
        return status

    def __getnewargs__(self) -> tuple[str, str]:  # type: ignore[override]
        """What a copy in another process is made from."""
        return str(self), self.message


def judge(
    leans_fast: bool, leans_slow: bool, p_value: float, monte_carlo_share: float, learned: float
) -> Status:
    """The status of a posterior.

    Args:
        leans_fast: whether it leans on w = 0, equilibrium in one step.
        leans_slow: whether it leans on the shortest lag.
        p_value: chance of a larger squared residual at the best n_int.
        monte_carlo_share: part of the posterior variance that more replicas would remove.
        learned: part of the spread of the prior that the data took away.
    """
    misfit = f" (and no n_int explains the data, p = {p_value:.1g})" if p_value < POOR_FIT else ""
    if learned < LEARNED and leans_fast == leans_slow:
        return Status(
            "unidentified",
            "the data say next to nothing about n_int, and the posterior is the prior: measure "
            "with smaller errors, or at lags where the correlation changes with n_int",
        )
    if leans_fast:
        return Status(
            "bound",
            "the data do not exclude full relaxation in one step (w = 0): read the interval as a "
            f"lower bound on n_int. Measure shorter lags, or take a shorter step_lag{misfit}",
        )
    if leans_slow:
        return Status(
            "bound",
            "the data are slower than the model at its shortest lag: read the interval as a lower "
            "bound on the timescale. Take a longer step_lag, check the units of the lags, or train "
            "longer where walkers leave wells that no trajectory of the data leaves"
            f"{misfit}",
        )
    if p_value < POOR_FIT:
        return Status(
            "poor_fit",
            f"no n_int explains the data (p = {p_value:.1g}): check sigma, the units of the lags "
            "and the normalisation, or use another composite step",
        )
    if monte_carlo_share > MONTE_CARLO_LIMIT:
        return Status(
            "mc_limited",
            f"{monte_carlo_share:.0%} of the posterior variance is Monte Carlo noise of the "
            "prediction, and the interval may be too narrow: raise n_replicas",
        )
    return Status("ok", "the posterior is inside the family and the fit explains the data")


def p_value(
    residual: np.ndarray,
    covariance: np.ndarray,
    n_parameters: int = 1,
    dof: float | None = None,
) -> float:
    """Chance of a larger squared residual (L,) under its covariance, some parameters fitted.

    Residuals with Student-t errors of `dof` degrees of freedom count as the Gaussian ones that are
    as rare. One where there are no more points than parameters: nothing is left to be checked.
    """
    if len(residual) <= n_parameters:
        return 1.0
    scale = np.sqrt(np.diagonal(covariance))
    z = residual / scale
    if dof is not None:
        z = np.sign(z) * norm.isf(student_t.sf(np.abs(z), dof))
    squared = z @ np.linalg.solve(covariance / np.outer(scale, scale), z)
    return float(chi2.sf(squared, len(residual) - n_parameters))
