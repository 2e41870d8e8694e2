r"""The interpolator: one continuous family of scores between the data and equilibrium.

    eps(x_t, t | x_0, n) = eps_eq(x_t, t) + lambda_hat^n eps_dyn(x_t, t | x_0, min(n, N_max))

for n > 0. Above N_max only the weight of the dynamic score changes (Viguera Diez et al., arXiv
2410.10605, eq. 11), by the identifiable coordinate w = lambda_hat^(n - N_max):

    eps(n) = (1 - w) eps_eq + w eps_BoPITO(N_max).

At n = N_max this is the trained model at its longest lag, at n = inf it is equilibrium. Below N_max
it is the trained model at a shorter lag, for experiments that are slower than the data.
"""

import math

import torch
from torch import Tensor, nn

from bopito_inverse.models.scores import BoPITOScore, BoundScore
from bopito_inverse.noise import Scaling, VPSchedule


class Interpolator(nn.Module):
    """A score that wraps the two scores of a BoPITO model.

    Args:
        bopito: the model.

    >>> import bopito_inverse as bi, torch
    >>> exact = bi.systems.TransferOperator(bi.systems.Prinz(), grid_size=200)
    >>> s_eq = exact.equilibrium_score()
    >>> bopito = bi.models.BoPITOScore(s_eq, exact.dynamic_score(s_eq, 0.99), 0.99, lag_max=50)
    >>> model = bi.Interpolator(bopito)
    >>> x, t, n_int = torch.zeros(2, 1), torch.tensor(0.5), torch.tensor([80.0, float("inf")])
    >>> bool(model(x, t, x, n_int)[1] == s_eq(x, t)[1])
    True
    """

    def __init__(self, bopito: BoPITOScore) -> None:
        super().__init__()
        self.bopito = bopito

    @property
    def noise(self) -> VPSchedule:
        """Noise schedule of the model."""
        return self.bopito.noise

    @property
    def scaling(self) -> Scaling:
        """Standardisation of the frames."""
        return self.bopito.scaling

    @property
    def event_shape(self) -> tuple[int, ...]:
        """Shape of a frame."""
        return self.bopito.event_shape

    @property
    def lag_max(self) -> int:
        """Longest trained lag N_max, in frames."""
        return self.bopito.lag_max

    @property
    def lambda_hat(self) -> float:
        """Assumed decay per frame of the slowest process."""
        return self.bopito.lambda_hat

    def bind(self, x_0: Tensor, n_int: Tensor) -> BoundScore:
        """Eps as a function of (x_t, t), for `n_int` > 0 of shape () or (B,), which may be inf."""
        n_int = n_int.to(x_0.dtype)
        lag = n_int.clamp(max=self.lag_max)
        return self.bopito.bind(x_0, lag, decay=self.bopito.decay(n_int))

    def forward(self, x_t: Tensor, t: Tensor, x_0: Tensor, n_int: Tensor) -> Tensor:
        """Predicted noise, shape of `x_t` (B, *event)."""
        return self.bind(x_0, n_int)(x_t, t)

    def weight(self, n_int: Tensor) -> Tensor:
        """w = lambda_hat^(n_int - N_max), one at and below N_max, same shape as `n_int`."""
        return torch.pow(self.lambda_hat, (n_int - self.lag_max).clamp(min=0))

    def n_int(self, weight: Tensor) -> Tensor:
        """n_int of a weight in [0, 1]: N_max + log w / log lambda_hat, inf at zero."""
        return self.lag_max + torch.log(weight) / math.log(self.lambda_hat)
