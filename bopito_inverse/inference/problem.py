r"""The posterior of a fit over the levels of its priors: design, likelihood and prior together."""

from collections.abc import Sequence

import numpy as np
import torch

from bopito_inverse.inference.design import Design
from bopito_inverse.inference.explore import Explored, explore
from bopito_inverse.inference.likelihood import Likelihood, Parameters
from bopito_inverse.inference.prior import Levels, Prior
from bopito_inverse.observables.relaxation import timescale

NEGLIGIBLE = 1e-12  # posterior weight


class Problem:
    """Design, likelihood and prior together: a posterior over levels."""

    def __init__(
        self, design: Design, keep: np.ndarray, likelihood: Likelihood, prior: Prior | None
    ) -> None:
        self.design, self.keep, self.likelihood = design, keep, likelihood
        self.emulator = likelihood.emulator
        self.levels = Levels(prior, self.emulator.coordinate, self.timescale)
        self.low, self.high = design.box(self.levels, self.emulator.interval)

    def parameters(self, levels: np.ndarray) -> Parameters:
        """Parameters at levels (B, D), of the points that are fitted."""
        made = self.design.parameters(levels, self.levels)
        low, high = self.emulator.interval
        keep = self.keep
        return Parameters(
            np.clip(made.u, low, high),
            made.scale[:, keep],
            made.offset[:, keep],
            made.sigma_scale[:, keep],
        )

    def log_likelihood(self, levels: np.ndarray) -> np.ndarray:
        """At levels (B, D)."""
        return self.likelihood(self.parameters(levels))

    def explore(self, seed: int) -> Explored:
        """The posterior."""
        rng = np.random.default_rng([seed, 0])
        return explore(self.log_likelihood, self.low, self.high, rng)

    def timescale(self, u: np.ndarray) -> np.ndarray:
        """Implied timescale of the emulated step at u (G,), in frames."""
        low, high = self.emulator.interval
        column = np.array([self.emulator.eigenvalue])
        mean = self.emulator(np.clip(u, low, high)[:, None], column).mean[:, 0]
        return timescale(torch.from_numpy(mean), self.design.step_lag).numpy()

    def shares(self, explored: Explored) -> dict[str, float]:
        """What the variance of u would lose without each source of error but the experiment."""
        kept = explored.above(NEGLIGIBLE)
        parameters = self.parameters(kept.levels)
        total = kept.variance(parameters.u).sum()
        without = {
            "monte_carlo": self.likelihood.varied(mc_scale=0.0),
            "emulator": self.likelihood.varied(with_error=False),
            "discrepancy": self.likelihood.varied(discrepancy=None),
        }
        shares = {}
        for name, other in without.items():
            ratio = other(parameters) - kept.log_density
            left = kept.variance(parameters.u, ratio).sum()
            shares[name] = float(np.clip(1 - left / total, 0, 1)) if total > 0 else 0.0
        return shares

    def predict(
        self,
        explored: Explored,
        lags: np.ndarray | Sequence[float],
        observable: str | None,
        experiment: int,
    ) -> np.ndarray:
        """See `FitResult.predict`."""
        design = self.design
        name = design.names[design.points.observable[0]] if observable is None else observable
        if name not in design.names:
            raise ValueError(f"observable must be one of {design.names}, got {name!r}")
        wanted = np.atleast_1d(np.asarray(lags, dtype=np.float64))
        group = np.full(len(wanted), experiment)
        if design.mode == "direct":
            if not np.isin(wanted, design.group_lags).all():
                raise ValueError(f"lags must be among those fitted, {design.group_lags.tolist()}")
            group = np.searchsorted(design.group_lags, wanted)
        else:
            if not 0 <= experiment < design.n_groups:
                raise ValueError(
                    f"experiment must be below {design.n_groups}, one for each n_int, "
                    f"got {experiment}"
                )
            self.emulator.prediction.steps_of(wanted)
            if wanted.max() > design.n_steps * design.step_lag:
                longest = design.n_steps * design.step_lag
                raise ValueError(
                    f"lags must be at most {longest:g} (the longest fitted), got {lags}"
                )
        columns = design.column(np.full(len(wanted), design.names.index(name)), wanted)
        parameters = self.parameters(explored.draws.reshape(-1, explored.draws.shape[2]))
        rng = np.random.default_rng([1, len(wanted)])
        drawn = self.likelihood.draw(parameters, parameters.u[:, group], columns, rng)
        return drawn.reshape(*explored.draws.shape[:2], -1)
