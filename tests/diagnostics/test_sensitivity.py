import json

import numpy as np
import pytest
import torch
from scipy.stats import norm

import bopito_inverse as bi
from bopito_inverse.diagnostics.sensitivity import relaxations, sensitivity, with_lambda_hat
from bopito_inverse.sampling import DPMSolver, Interpolate, Propagate, Rollout, renoising_step

SYSTEM = bi.systems.OrnsteinUhlenbeck()  # timescale 20 frames
EXACT = bi.systems.TransferOperator(SYSTEM, grid_size=40)
LAGS = 20 * np.arange(1, 5)
STEP = Rollout([Interpolate(), Propagate(2)], 20, DPMSolver(6))


def model() -> bi.Interpolator:
    s_eq = EXACT.equilibrium_score()
    s_dyn = EXACT.dynamic_score(s_eq, SYSTEM.decay)
    return bi.Interpolator(bi.models.BoPITOScore(s_eq, s_dyn, SYSTEM.decay, 15))


def table(timescale=20.0, **options):
    obs = bi.observables.Correlation(lambda x: x, normalization="variance")
    exp = bi.observables.Experiment(LAGS, np.exp(-LAGS / timescale), np.full(4, 0.02))
    starts = EXACT.sample(4000, torch.Generator().manual_seed(7))
    options = {"n_replicas": 256, "discrepancy": False, "device": "cpu"} | options
    return sensitivity(model(), STEP, obs, exp, starts, **options)


def test_another_lambda_hat_is_the_same_trained_model() -> None:
    one, other = model(), with_lambda_hat(model(), 0.9)
    x_t, x_0 = torch.randn(2, 6, 1, generator=torch.Generator().manual_seed(0))
    t = torch.tensor(0.4)
    lag = torch.tensor([1.0, 4.0, 15.0, 10.0, 2.0, 7.0])
    torch.testing.assert_close(other.bopito(x_t, t, x_0, lag), one.bopito(x_t, t, x_0, lag))
    weight = torch.tensor(0.3)
    beyond = (m(x_t, t, x_0, m.n_int(weight)) for m in (one, other))
    torch.testing.assert_close(*beyond)
    with pytest.raises(ValueError, match="lambda_hat must lie in"):
        with_lambda_hat(model(), 0.0)


def test_lambda_hat_moves_n_int_and_nothing_else() -> None:
    made = table(12.0, steps={})
    assert len(made.rows) == 3
    first = made.rows[0]
    for row in made.rows[1:]:
        assert row.weight.mean == pytest.approx(first.weight.mean, abs=0.1 * first.weight.sd)
        assert abs(made.shift(row.label)[0]) < 0.1
    beyond = [row.n_int.mean - 15 for row in made.rows]  # goes as the assumed timescale
    assert beyond[1] == pytest.approx(beyond[0] / 2, rel=0.05)
    assert beyond[2] == pytest.approx(beyond[0] * 2, rel=0.05)


def test_a_prior_on_n_int_speaks_of_one_lambda_hat_only() -> None:
    made = table(steps={}, lambda_hats=[0.98], prior=norm(17.0, 0.2))
    assert abs(made.shift("lambda_hat 0.98", "weight")[0]) > 1


def test_relaxation_is_varied() -> None:
    made = table(lambda_hats=[], executor=None)
    labels = [row.label for row in made.rows]
    assert labels == ["as given", "relaxation x 0.5", "relaxation x 2", "relaxation two times"]
    # more relaxation by the model leaves less to be relaxed by interpolation
    assert made["relaxation x 2"].weight.mean > made["as given"].weight.mean
    for label in labels:  # the data say what the timescale is
        assert abs(made.shift(label)[0]) < 3
    assert len(json.loads(json.dumps(made.summary()))) == 4
    assert "relaxation two times" in str(made)


def test_default_relaxations() -> None:
    others = relaxations(renoising_step(50, 100), 50)
    assert {name: len(step.moves) for name, step in others.items()} == {
        "relaxation x 0.5": 3,
        "relaxation x 2": 3,
        "relaxation two times": 5,
    }
    assert others["relaxation x 2"].moves[0].share == 1.0
    long = relaxations(Rollout([Interpolate(), Propagate(40)], 100), 50)
    assert list(long) == ["relaxation x 0.5", "relaxation two times"]
    assert relaxations(Rollout([Interpolate()], 100), 50) == {}
