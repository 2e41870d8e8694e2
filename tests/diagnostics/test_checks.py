import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.stats import ks_2samp, kstest, norm
from torch import Tensor, nn

import bopito_inverse as bi
from bopito_inverse.arguments import as_generator
from bopito_inverse.datasets import Frames
from bopito_inverse.diagnostics import checks, replicas
from bopito_inverse.diagnostics.checks import chapman_kolmogorov, stationarity
from bopito_inverse.diagnostics.transitions import Transitions, compare_slowest
from bopito_inverse.noise import Scaling, VPSchedule
from bopito_inverse.sampling import DPMSolver, Interpolate, Propagate, Rollout, renoising_step
from bopito_inverse.sampling.solvers import standard_normal_quantiles
from bopito_inverse.systems import Prinz, TransferOperator

CPU = torch.device("cpu")
LAMBDA_HAT = 0.99
WEIGHT = 0.45  # of the dynamic score
FULL = TransferOperator(Prinz(), grid_size=100)
CUT = TransferOperator(Prinz(), barrier=0.0, grid_size=100)


def prinz(dynamics: TransferOperator, lag_max: int = 50) -> bi.Interpolator:
    """Exact scores; the equilibrium is always that of the full system."""
    s_eq = FULL.equilibrium_score()
    s_dyn = dynamics.dynamic_score(s_eq, LAMBDA_HAT)
    return bi.Interpolator(bi.models.BoPITOScore(s_eq, s_dyn, LAMBDA_HAT, lag_max))


def right(x: Tensor) -> Tensor:
    return (x[:, 0] > 0).long()


def states(x: Tensor) -> Tensor:
    return x[:, 0].round().clamp(0, 2)


class Gaussian(nn.Module):
    """An Ornstein-Uhlenbeck process of unit variance, in closed form, trained up to lag 20.

    At lags below `short` it moves as if the lag were `clock` times as long.
    """

    event_shape = (1,)
    lag_max = 20

    def __init__(self, short: float = 0.0, clock: float = 1.0, decay: float = 0.95) -> None:
        super().__init__()
        self.noise, self.scaling = VPSchedule(), Scaling()
        self.short, self.clock, self.decay = short, clock, decay

    def bind(self, x_0: Tensor, lag: Tensor):
        kept = self.decay ** torch.where(lag < self.short, self.clock * lag, lag)

        def eps(x_t: Tensor, t: Tensor) -> Tensor:
            alpha, sigma = self.noise.alpha(t), self.noise.sigma(t)
            return sigma * (x_t - alpha * kept * x_0) / (alpha**2 * (1 - kept**2) + sigma**2)

        return eps


class Linear:
    """x -> a x + spread z, which keeps N(0, 1) where spread^2 = 1 - a^2."""

    def __init__(self, kept: float, spread: float | None = None) -> None:
        self.kept = kept
        self.spread = math.sqrt(1 - kept**2) if spread is None else spread
        self.largest = 0

    def __call__(self, model, y, n_int, solver, normal) -> Tensor:
        self.largest = max(self.largest, len(y))
        return self.kept * y + self.spread * normal(y)

    def config(self) -> dict:
        return {}


class Chain(Linear):
    """A Markov chain of three states at x = 0, 1, 2."""

    matrix = torch.tensor([[0.7, 0.2, 0.1], [0.3, 0.5, 0.2], [0.1, 0.2, 0.7]])

    def __init__(self) -> None:
        super().__init__(0.0)

    def __call__(self, model, y, n_int, solver, normal) -> Tensor:
        limits = self.matrix.cumsum(1)[y[:, 0].long(), :2]
        u = torch.special.ndtr(normal(y))
        return (u > limits).sum(1, keepdim=True).to(y)


def gaussian_frames(n: int, seed: int) -> Tensor:
    return torch.randn(n, 1, generator=torch.Generator().manual_seed(seed))


def prinz_frames(n: int, seed: int = 1) -> Tensor:
    return FULL.sample(n, torch.Generator().manual_seed(seed))


def assert_uniform(p_values: list[float]) -> None:
    assert kstest(p_values, "uniform").pvalue > 1e-3


def composite_matrix(model: bi.Interpolator, step: Rollout, n_int: float) -> np.ndarray:
    """Transition matrix of one composite step on the grid, by quantiles of the noise."""
    n, cells = 101, len(FULL.grid)
    centres, matrix = torch.from_numpy(FULL.grid).float(), torch.eye(cells)
    draw = standard_normal_quantiles(n).repeat(cells, 1)
    for move in step.moves:
        starts = centres.repeat_interleave(n)[:, None]
        single = Rollout([move], 1, step.solver)
        x = single.step(model, starts, torch.tensor(n_int), lambda like: draw)[:, 0]
        position = ((x - centres[0]) / FULL.spacing).clamp(0, cells - 1.001)
        low, kernel = position.long(), torch.zeros(cells, cells)
        rows = torch.arange(cells).repeat_interleave(n)
        for cell, weight in ((low, 1 - (position - low)), (low + 1, position - low)):
            kernel.index_put_((rows, cell), weight / n, accumulate=True)
        matrix = matrix @ kernel
    return matrix.double().numpy()


def binned(density: np.ndarray) -> np.ndarray:
    """Probabilities in 20 bins of equal probability under mu, of probabilities on the grid."""
    edges = FULL.grid + FULL.spacing / 2
    mu = np.cumsum(FULL.stationary) * FULL.spacing
    inner = np.interp(np.arange(1, 20) / 20, mu, edges)
    return np.diff(np.concatenate([[0.0], np.interp(inner, edges, np.cumsum(density)), [1.0]]))


N_STEPS = 3
STEPS = {
    "interpolate": Rollout([Interpolate()], 100),
    "relaxed": Rollout([Interpolate(), Propagate(50)], 100),
    "renoise": renoising_step(50, 100),
    "coarse": Rollout([Propagate(50)], 50, DPMSolver(8)),
}


@pytest.fixture(scope="module")
def across_the_barrier() -> dict:
    """Each composite step from the dynamics with a barrier: the check, and the exact distance."""
    model, mu = prinz(CUT), FULL.stationary * FULL.spacing
    n_int = float(model.n_int(torch.tensor(WEIGHT)))
    starts, found = prinz_frames(40_000), {}
    for name, step in STEPS.items():
        with torch.no_grad():
            matrix = np.linalg.matrix_power(composite_matrix(model, step, n_int), N_STEPS)
        exact = 0.5 * np.abs(binned(mu @ matrix) - binned(mu)).sum()
        result = stationarity(model, step, n_int, starts, N_STEPS, n_replicas=8000, device="cpu")
        found[name] = (result, exact)
    return found


def test_distances_from_mu_against_the_grid(across_the_barrier: dict) -> None:
    for result, exact in across_the_barrier.values():
        tv, ks = result.total_variation["x"], result.kolmogorov_smirnov["x"]
        assert abs(tv.excess - exact) < 2.5 * tv.error
        assert ks.excess < tv.value
        assert exact < tv.upper


def test_interpolation_alone_loses_mu_and_renoising_keeps_it(across_the_barrier: dict) -> None:
    result, exact = across_the_barrier["interpolate"]
    assert exact == pytest.approx(0.228, abs=0.005)
    assert result.status == "large"
    assert result.p_value < 1e-3
    assert "the step does not keep mu: total variation 0." in result.verdict
    assert "take `renoising_step`, or relax longer" in result.verdict
    result, exact = across_the_barrier["relaxed"]
    assert exact == pytest.approx(0.02, abs=0.004)
    assert result.total_variation["x"].excess < 0.04
    result, exact = across_the_barrier["renoise"]
    assert exact < 0.007
    assert result.p_value > 0.01
    assert result.status == "ok"
    assert result.total_variation["x"].upper < 0.03


def test_too_few_evaluations_of_the_solver_are_seen(across_the_barrier: dict) -> None:
    result, exact = across_the_barrier["coarse"]
    assert exact > 0.04
    assert result.status == "large"


@pytest.mark.parametrize(("kept", "n_starts"), [(0.0, 3000), (0.97, 3000), (0.97, 300)])
def test_p_values_are_uniform_where_mu_is_invariant(kept: float, n_starts: int) -> None:
    """Pairs that are hardly and strongly correlated, starts that are more and fewer."""
    step, found = Rollout([Linear(kept)], 10), []
    for seed in range(50):
        starts = gaussian_frames(n_starts, 1000 + seed)
        found.append(stationarity(Gaussian(), step, 1, starts, 2, n_replicas=1000, seed=seed))
    assert_uniform([r.kolmogorov_smirnov["x"].p_value for r in found])
    assert_uniform([r.total_variation["x"].p_value for r in found])
    values = np.array([r.total_variation["x"].value for r in found])
    tv = found[0].total_variation["x"]
    assert values.mean() == pytest.approx(tv.floor, abs=4 * tv.spread / math.sqrt(50))
    assert values.std() == pytest.approx(tv.spread, rel=0.4)


def test_pairs_make_the_floor_low() -> None:
    """A difference between replicas and the very frames they began at is more certain."""
    starts = gaussian_frames(4000, 3)
    paired, unpaired = (
        stationarity(Gaussian(), Rollout([Linear(a)], 10), 1, starts, 1, n_replicas=4000)
        for a in (0.97, 0.0)
    )
    assert paired.total_variation["x"].floor < 0.9 * unpaired.total_variation["x"].floor
    assert paired.kolmogorov_smirnov["x"].floor < 0.6 * unpaired.kolmogorov_smirnov["x"].floor


def test_weighted_starts() -> None:
    """Frames of a wide density with weights of mu pass; the same without weights do not."""
    step, weighted, unweighted = Rollout([Linear(0.6)], 10), [], []
    for seed in range(40):
        x = 1.3 * gaussian_frames(2000, seed)
        frames = Frames(x, np.exp(norm.logpdf(x[:, 0]) - norm.logpdf(x[:, 0], scale=1.3)))
        run = {"n_steps": 5, "n_replicas": 1000, "seed": seed}
        weighted.append(stationarity(Gaussian(), step, 1, frames, **run).p_value)
        if seed < 5:
            unweighted.append(stationarity(Gaussian(), step, 1, x, **run).p_value)
    assert np.mean(np.array(weighted) < 0.1) < 0.25
    assert np.mean(weighted) > 0.4
    assert max(unweighted) < 0.01


def test_excess_and_its_error_against_the_closed_form() -> None:
    """A step that ends in a wider Gaussian, of known distance."""
    step, spread = Rollout([Linear(0.0, 1.25)], 10), 1.25
    edges = norm.ppf(np.arange(21) / 20)
    exact = np.abs(np.diff(norm.cdf(edges / spread)) - 0.05).sum() / 2
    levels = norm.ppf(np.arange(1, 100) / 100)
    exact_ks = np.abs(norm.cdf(levels / spread) - norm.cdf(levels)).max()
    for n_replicas in (1000, 5000):
        z, inside = [], []
        for seed in range(25):
            starts = gaussian_frames(2 * n_replicas, 500 + seed)
            result = stationarity(
                Gaussian(), step, 1, starts, 1, n_replicas=n_replicas, seed=seed, tolerance=0.05
            )
            tv, ks = result.total_variation["x"], result.kolmogorov_smirnov["x"]
            z += [(tv.excess - exact) / tv.error, (ks.excess - exact_ks) / ks.error]
            inside += [tv.upper > exact, ks.upper > exact_ks]
        assert abs(np.mean(z)) < 0.5
        assert 0.6 < np.std(z) < 1.5
        assert np.mean(inside) > 0.85
    assert result.status == "large"


def test_kolmogorov_smirnov_against_scipy() -> None:
    """With as many replicas as starts both sides are plain samples; 1 % is between percentiles."""
    starts, step = gaussian_frames(2000, 8), Rollout([Linear(0.5, 1.1)], 10)
    kept = {}

    def x(frames: Tensor) -> Tensor:
        kept[len(kept)] = frames[:, 0].clone()
        return frames[:, 0]

    result = stationarity(Gaussian(), step, 1, starts, 3, {"x": x}, n_replicas=2000)
    independent = ks_2samp(kept[0].numpy(), kept[1].numpy()).statistic
    found = result.kolmogorov_smirnov["x"].value
    assert independent - 0.01 < found <= independent + 1e-9


def test_functions_by_name_and_their_joint_p_value() -> None:
    class Two(Gaussian):
        event_shape = (2,)

    starts = torch.randn(3000, 2, generator=torch.Generator().manual_seed(0))
    step = Rollout([Linear(0.3)], 10)
    found = stationarity(Two(), step, 1, starts, 2, n_replicas=2000)
    assert list(found.total_variation) == ["x[0]", "x[1]"]
    functions = {"radius": lambda x: x.norm(dim=1), "side": lambda x: (x[:, 0] > 0).long()}
    found = stationarity(Two(), step, 1, starts, 2, functions, n_replicas=2000)
    distances = [*found.kolmogorov_smirnov.values(), *found.total_variation.values()]
    assert found.p_value == min(1.0, 4 * min(d.p_value for d in distances))
    side = found.total_variation["side"]
    assert side.value == pytest.approx(found.kolmogorov_smirnov["side"].value, abs=1e-12)
    assert side.value < 5 * 0.5 / math.sqrt(1000)
    lines = str(found).splitlines()
    assert [line.split("  ")[0].strip() for line in lines[2:6]] == [
        "KS of radius",
        "KS of side",
        "TV of radius",
        "TV of side",
    ]
    assert lines[-1] == found.verdict


def test_few_replicas_leave_the_verdict_open() -> None:
    step, starts = Rollout([Linear(0.3)], 10), gaussian_frames(5000, 1)
    found = stationarity(Gaussian(), step, 1, starts, 2, n_replicas=300)
    assert found.status == "unsure"
    assert "raise n_replicas to at least" in found.verdict
    enough = int(found.verdict.split()[-1])
    found = stationarity(Gaussian(), step, 1, starts[:200], 2, n_replicas=5000)
    assert found.status == "unsure"
    assert "starts, and as many replicas" in found.verdict
    starts = gaussian_frames(4 * enough, 1)
    assert stationarity(Gaussian(), step, 1, starts, 2, n_replicas=2 * enough).status == "ok"


def test_a_certain_distance_within_the_tolerance_is_small() -> None:
    step, starts = Rollout([Linear(0.0, 1.05)], 10), gaussian_frames(60_000, 1)
    found = stationarity(Gaussian(), step, 1, starts, 1, n_replicas=60_000, tolerance=0.05)
    assert found.p_value < 0.01
    assert found.status == "small"
    assert "to within the tolerance of 0.05" in found.verdict


def test_replicas_pass_in_batches_with_their_own_noise() -> None:
    move = Linear(0.2)
    run = {"n_steps": 2, "n_replicas": 9000, "device": "cpu"}
    starts = gaussian_frames(20_000, 1)
    one, again, other = (
        stationarity(Gaussian(), Rollout([move], 10), 1, starts, **run, seed=seed)
        for seed in (0, 0, 1)
    )
    assert move.largest == replicas.BATCH_SIZE["cpu"] < 9000
    assert one == again
    assert one.total_variation["x"].value != other.total_variation["x"].value


def test_replicas_begin_by_weight() -> None:
    x = torch.arange(30.0)[:, None]
    weights = torch.rand(30, generator=torch.Generator().manual_seed(0)).double() + 0.5
    made = replicas.Replicas.begin(Gaussian(), 1, Frames(x, weights), 1000, 3, "cpu")
    counts = torch.bincount(made.start, minlength=30)
    assert bool(((counts - 1000 * weights / weights.sum()).abs() < 1).all())
    assert bool((made.start.diff() >= 0).all())
    assert torch.equal(made.x_0[:, 0].long(), made.start)


@pytest.mark.parametrize("n_steps", [4])
def test_sets_of_exact_dynamics_against_the_operator(n_steps: int) -> None:
    """Left and right of the barrier: P(1), its powers and the memory, from the grid."""
    lag, n = 100, 20_000
    step = Rollout([Propagate(lag)], lag, DPMSolver(12))
    found = chapman_kolmogorov(
        prinz(FULL, lag), step, 100, prinz_frames(n), n_steps, right, n_replicas=n, device="cpu"
    )
    sets, mu = np.stack([FULL.grid <= 0, FULL.grid > 0]), FULL.stationary * FULL.spacing
    populations = sets @ mu
    exact = np.stack(
        [
            (sets * mu) @ (FULL.transition_density(lag * k) * FULL.spacing) @ sets.T
            for k in range(1, n_steps + 1)
        ]
    )
    exact /= populations[:, None]
    z = (found.estimated - exact) / found.estimated_error
    assert np.abs(z).max() < 4
    np.testing.assert_allclose(found.populations, populations, atol=4 * 0.5 / math.sqrt(n))
    powers = np.stack([np.linalg.matrix_power(exact[0], k) for k in range(1, n_steps + 1)])
    z = ((found.estimated - found.predicted) - (exact - powers))[1:] / found.difference_error[1:]
    assert np.abs(z).max() < 4
    memory = 0.5 * np.einsum("i,kij->k", populations, np.abs(exact - powers))[1:]
    for distance, truth in zip(found.memory, memory, strict=True):
        assert abs(distance.excess - truth) < 3 * distance.error
    assert found.memory_status == "ok"
    assert found.labels.tolist() == [0, 1]
    np.testing.assert_allclose(found.estimated.sum(2), 1)


def test_a_chain_has_no_memory_between_its_states() -> None:
    p_values, z, step = [], [], Rollout([Chain()], 10)
    for seed in range(50):
        generator = torch.Generator().manual_seed(seed)
        starts = torch.randint(3, (1500, 1), generator=generator).float()
        found = chapman_kolmogorov(
            Gaussian(), step, 1, starts, 4, states, n_replicas=1000, seed=seed
        )
        p_values += [found.memory[2].p_value]
        error = found.difference_error[1:]
        z.append((found.estimated - found.predicted)[1:] / error)
    assert_uniform(p_values)
    assert np.std(z) == pytest.approx(1, abs=0.1)
    assert np.abs(np.mean(z, axis=0)).max() < 4.5 / math.sqrt(50)
    chain = Chain.matrix.numpy()
    assert np.abs(found.estimated[0] - chain).max() < 4.5 * found.estimated_error[0].max()


def test_sets_that_relax_slowly_have_memory() -> None:
    """Two halves of one Gaussian well: Markovian after a long step, not after a short one."""
    starts = gaussian_frames(30_000, 2)
    run = {"n_steps": 3, "sets": right, "n_replicas": 20_000, "device": "cpu"}
    short = chapman_kolmogorov(Gaussian(), Rollout([Linear(0.9)], 2), 1, starts, **run)
    assert short.memory_status == "large"
    assert "finer sets or a longer step_lag" in short.verdict
    stay = 0.5 + np.arcsin(0.9 ** np.arange(1, 4)) / np.pi  # orthant probability
    flip = np.array([[stay, 1 - stay], [1 - stay, stay]]).transpose(2, 0, 1)
    assert np.abs((short.estimated - flip) / short.estimated_error).max() < 4
    long = chapman_kolmogorov(Gaussian(), Rollout([Linear(0.3)], 20), 1, starts, **run)
    assert long.memory_status in ("ok", "small")
    assert "the step is Markovian between these sets" in long.verdict


def test_exact_scores_are_consistent_and_a_wrong_clock_is_not() -> None:
    """T(50) = T(25)^2 with exact scores; not where lags below 30 pass at 0.8 of the pace."""

    class Slow(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner, self.event_shape = inner, (1,)
            self.noise, self.scaling = inner.noise, inner.scaling

        def bind(self, x_0: Tensor, lag: Tensor):
            slow = torch.where(lag < 30, 0.8 * lag, lag)
            eps = self.inner.bind(x_0, slow)
            return lambda x_t, t: LAMBDA_HAT ** (slow - lag).reshape(-1, 1) * eps(x_t, t)

    s_eq = FULL.equilibrium_score()
    exact = FULL.dynamic_score(s_eq, LAMBDA_HAT)
    step = Rollout([Propagate(25)], 25, DPMSolver(12))
    for s_dyn, status in ((exact, "ok"), (Slow(exact), "large")):
        model = bi.Interpolator(bi.models.BoPITOScore(s_eq, s_dyn, LAMBDA_HAT, 50))
        found = chapman_kolmogorov(model, step, 100, prinz_frames(12_000), 2, right, 12_000)
        assert found.consistency_status == status
        assert (found.consistency_p_value < 1e-6) == (status == "large")
        whole, halves = found.timescales
        if status == "ok":
            assert abs(found.slowest.ratio - 1) < 4 * found.slowest.error
            assert "the trained model is consistent" in found.verdict
        else:
            assert abs(whole / halves - 0.8) < 4 * found.slowest.error
            assert "the trained model is not consistent" in found.verdict
    with_bound = str(found).splitlines()
    assert with_bound[-2:] == found.verdict.splitlines()
    assert with_bound[3].startswith("T(50) - T(25) T(25)")


def test_consistency_of_a_gaussian_process() -> None:
    """p-values uniform, errors true, and the noise of the last draw cancels."""
    step, found = Rollout([Propagate(20)], 20, DPMSolver(10)), []
    for seed in range(50):
        starts = gaussian_frames(1500, 100 + seed)
        found.append(chapman_kolmogorov(Gaussian(), step, 1, starts, 2, n_replicas=1000, seed=seed))
    assert_uniform([r.consistency.p_value for r in found])
    assert_uniform([r.slowest.p_value for r in found])
    z = [(r.whole - r.halves) / r.halves_error for r in found]
    assert np.std(z) == pytest.approx(1, abs=0.1)
    z = [(r.slowest.ratio - 1) / r.slowest.error for r in found]
    assert np.std(z) == pytest.approx(1, abs=0.3)
    assert found[0].halves_error.mean() < 1.2 * found[0].whole_error.mean()  # 1.41 with fresh noise
    eigenvalues = np.sort(np.linalg.eigvals(found[0].whole).real)
    assert found[0].slowest.eigenvalues[0] == pytest.approx(eigenvalues[-2])
    wrong = chapman_kolmogorov(Gaussian(15, 0.7), step, 1, gaussian_frames(9000, 1), 2)
    assert wrong.consistency_status == "large"
    assert wrong.consistency_p_value < 1e-3


def test_slowest_process_against_finite_differences() -> None:
    """Error of the ratio and p-value, for two matrices that are not symmetric."""
    one = torch.tensor([[0.8, 0.15, 0.05], [0.4, 0.5, 0.1], [0.1, 0.3, 0.6]]).double()
    two = torch.tensor([[0.7, 0.25, 0.05], [0.5, 0.4, 0.1], [0.1, 0.4, 0.5]]).double()
    root = 0.01 * torch.randn(18, 18, generator=as_generator(2, CPU), dtype=torch.float64)
    pair = Transitions(torch.stack([one, two]), root @ root.T)
    found = compare_slowest(pair)

    def second(flat: np.ndarray) -> np.ndarray:
        return np.sort(np.linalg.eigvals(flat.reshape(2, 3, 3)).real, axis=1)[:, 1]

    flat, shifts = pair.value.numpy().ravel(), 1e-6 * np.eye(18)
    eigenvalues = second(flat)
    ratio = np.log(eigenvalues[1]) / np.log(eigenvalues[0])
    slopes = np.array([(second(flat + h) - second(flat - h)) / 2e-6 for h in shifts])
    of_ratio = ratio * (
        slopes[:, 1] / (eigenvalues[1] * np.log(eigenvalues[1]))
        - slopes[:, 0] / (eigenvalues[0] * np.log(eigenvalues[0]))
    )
    covariance = pair.covariance.numpy()
    assert found.eigenvalues == pytest.approx(tuple(eigenvalues))
    assert found.ratio == pytest.approx(ratio)
    assert found.error == pytest.approx(np.sqrt(of_ratio @ covariance @ of_ratio), rel=1e-5)
    apart = slopes[:, 0] - slopes[:, 1]
    z = (eigenvalues[0] - eigenvalues[1]) / np.sqrt(apart @ covariance @ apart)
    assert found.p_value == pytest.approx(2 * norm.sf(abs(z)), rel=1e-4)


def test_a_process_that_never_happens_has_no_timescale() -> None:
    """No crossing in one draw nor in two: eigenvalue one, and nothing to compare."""
    step = Rollout([Propagate(25)], 25, DPMSolver(12))
    found = chapman_kolmogorov(prinz(CUT), step, 100, prinz_frames(2000), 2, right, 2000)
    np.testing.assert_allclose(found.whole, np.eye(2))
    assert found.timescales == (math.inf, math.inf)
    assert math.isnan(found.slowest.ratio)
    assert found.consistency_status == "ok"
    assert found.consistency_p_value == 1


def test_grades() -> None:
    starts, step = gaussian_frames(3000, 1), Rollout([Linear(0.3)], 20)
    found = chapman_kolmogorov(Gaussian(), step, 1, starts, 2, n_replicas=500)
    assert found.memory_status == "unsure"
    assert "raise n_replicas" in found.verdict.splitlines()[0]
    sure = {"p_value": 1e-4, "excess": 0.01, "upper": 0.02}
    small = replace(found, consistency=replace(found.consistency, **sure))
    small = replace(small, slowest=found.slowest._replace(ratio=1.01, error=0.02))
    assert small.consistency_status == "small"
    off = replace(small, slowest=found.slowest._replace(ratio=0.8, error=0.02))
    assert off.consistency_status == "large"
    vague = replace(small, slowest=found.slowest._replace(ratio=1.01, error=0.3))
    assert vague.consistency_status == "unsure"
    assert "raise n_replicas" in vague.verdict.splitlines()[1]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"n_int": 0.0}, "n_int must be above zero"),
        ({"n_int": math.nan}, "n_int must be above zero"),
        ({"n_steps": 0}, "n_steps must be a whole number of at least 1, got 0"),
        ({"n_replicas": 50}, "n_replicas must be a whole number of at least 100, got 50"),
        ({"seed": -1}, "seed must be a whole number"),
        ({"tolerance": 0.0}, "tolerance must be a positive number"),
        ({"device": "tpu"}, "device must be"),
        ({"starts": torch.zeros(50, 2)}, r"starts must hold frames of shape \(1,\)"),
        ({"starts": torch.zeros(10, 1)}, "starts must hold at least 20 effective frames"),
        ({"starts": torch.zeros(50, 1)}, r"functions\['x'\] must vary"),
        ({"functions": {}}, "functions must name at least one function"),
        ({"functions": {"f": lambda x: x.mean()}}, r"functions\['f'\] must return one number"),
        ({"functions": {"f": lambda x: 1.0}}, r"functions\['f'\] must return .* got float"),
        ({"functions": {"f": lambda x: x / 0}}, r"functions\['f'\] must be finite"),
    ],
)
def test_bad_input_of_stationarity_is_refused(change: dict, message: str) -> None:
    arguments = {"n_int": 1.0, "starts": gaussian_frames(200, 0), "n_replicas": 100} | change
    with pytest.raises(ValueError, match=f"^{message}"):
        stationarity(Gaussian(), Rollout([Linear(0.3)], 10), **arguments)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"n_steps": 1}, "n_steps must be a whole number of at least 2, got 1"),
        ({"n_int": -1.0}, "n_int must be above zero"),
        ({"sets": lambda x: x[:, 0]}, "sets must return whole numbers"),
        ({"sets": lambda x: x[:, 0] * 0}, "sets must part the starts into at least 2 sets, got 1"),
        ({"sets": lambda x: (x[:, 0] / 4).trunc()}, "sets must all hold starts, but rollouts meet"),
        ({"model": replace}, "model must have a lag_max"),
    ],
)
def test_bad_input_of_chapman_kolmogorov_is_refused(change: dict, message: str) -> None:
    starts = gaussian_frames(200, 0).clamp(-3, 3)
    starts[0] = 5.0
    arguments = {"n_int": 1.0, "starts": starts, "n_replicas": 100} | change
    model = Gaussian()
    if arguments.pop("model", None):
        model.lag_max = 1
    with pytest.raises(ValueError, match=f"^{message}"):
        chapman_kolmogorov(model, Rollout([Linear(0.3, 8.0)], 10), **arguments)


@pytest.mark.parametrize("check", [stationarity, chapman_kolmogorov])
def test_frames_that_diverge_are_refused(check) -> None:
    step = Rollout([Linear(1e30, 1.0)], 10)
    with pytest.raises(ValueError, match=r"^model must make finite frames, got .* at step 2"):
        check(Gaussian(), step, 1, gaussian_frames(200, 0), 4, n_replicas=200)


def test_frames_of_many_numbers_need_functions_and_sets() -> None:
    class Many(Gaussian):
        event_shape = (2, 3)

    starts, step = torch.randn(100, 2, 3), Rollout([Linear(0.3)], 10)
    with pytest.raises(ValueError, match=r"^functions must name .* shape \(2, 3\), got None"):
        stationarity(Many(), step, 1, starts)
    with pytest.raises(ValueError, match=r"^sets must be a function .* shape \(2, 3\), got None"):
        chapman_kolmogorov(Many(), step, 1, starts)


def test_levels_of_bins_are_levels_of_cells() -> None:
    assert checks.N_LEVELS % checks.N_BINS == 0
    assert checks.N_LEVELS % checks.N_SETS == 0
    x = torch.rand(5000, generator=as_generator(0, CPU)).double()
    equal = torch.full((5000,), 1 / 5000, dtype=torch.float64)
    fine, coarse = (checks._quantiles(x, equal, n) for n in (checks.N_LEVELS, checks.N_BINS))
    assert bool(torch.isin(coarse, fine).all())
    shares = torch.bincount(torch.searchsorted(coarse, x)) / 5000
    torch.testing.assert_close(shares, torch.full((20,), 0.05), atol=2e-4, rtol=0)


@pytest.mark.gpu
def test_checks_on_cuda() -> None:
    model, starts = prinz(FULL), prinz_frames(20_000)
    step = renoising_step(50, 100)
    kept = stationarity(model, step, 80.0, starts, 3, n_replicas=20_000, device="cuda")
    assert kept.status in ("ok", "small")
    model = prinz(FULL)
    on = {
        device: chapman_kolmogorov(model, step, 80.0, starts, 2, right, 5000, device=device)
        for device in ("cpu", "cuda")
    }
    error = np.hypot(on["cpu"].estimated_error, on["cuda"].estimated_error)
    assert np.abs((on["cpu"].estimated - on["cuda"].estimated) / error).max() < 4
    assert on["cuda"].consistency_status == "ok"
