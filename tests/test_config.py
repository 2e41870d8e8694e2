import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from bopito_inverse.config import Config, _known_keys
from bopito_inverse.shipped import shipped_data

MINIMAL = '[system]\nname = "Prinz"\n'
FULL = """
seed = 3
device = "cpu"
output = "out"
[system]
name = "DoubleWell"
a = 4
kT = 1.5
[simulate]
n_trajectories = 10
n_frames = 20
starts = [-1, 1.5]
barrier = 0
[simulate.umbrella]
low = -1
high = 1
n_windows = 5
stiffness = 20
n_frames = 40
[train]
lag_max = 10
lambda_hat = 0.9
equilibrium = { steps = 7 }
dynamic = { steps = 8, network = { width = 16 } }
[step]
step_lag = 20
relax = [10, 5]
[experiment]
file = "data/measured.csv"
covariance = "/elsewhere/covariance.npz"
fit_lags = [20, 40]
[fit]
n_replicas = 128
prior = { distribution = "lognorm", s = 1, scale = 100 }
[sample]
n_int = inf
[data]
frames = "frames.npz"
"""


def read(tmp_path: Path, text: str) -> Config:
    path = tmp_path / "run.toml"
    path.write_text(text)
    return Config.read(path)


def test_prior_on_another_quantity_and_options_of_the_fit(tmp_path: Path) -> None:
    text = '[fit]\nprior = {distribution = "lognorm", on = "timescale", s = 1}\ndiscrepancy = false'
    fit = read(tmp_path, MINIMAL + text).fit
    prior = fit.build_prior()
    assert prior is not None
    assert prior.on == "timescale"
    options = fit.options()
    assert (options["discrepancy"], options["n_replicas"], options["dof"]) == (False, None, None)
    with pytest.raises(ValueError, match="on must be one of n_int, weight, timescale, got 'rate'"):
        read(tmp_path, MINIMAL + text.replace("timescale", "rate"))


def test_every_section_is_read(tmp_path: Path) -> None:
    config = read(tmp_path, FULL)
    assert (config.seed, config.device, config.output) == (3, "cpu", Path("out"))
    system = config.system.build()
    assert (system.name, system.kT, system.friction) == ("DoubleWell", 1.5, 1.0)
    assert config.section("simulate").starts == (-1.0, 1.5)
    assert config.section("simulate.umbrella").n_walkers == 20
    train = config.section("train")
    assert (train.equilibrium.steps, train.dynamic.network.width) == (7, 16)
    for of_molecule, found in ((False, (4096, 4.0)), (True, (128, 5.0))):
        complete = train.equilibrium.completed(of_molecule)
        assert (complete.batch_size, complete.noise_start) == found
    assert config.section("step").relax == (10.0, 5.0)
    assert config.sample.n_int == math.inf
    assert config.fit.build_prior().distribution.mean() == stats.lognorm(s=1, scale=100).mean()


def test_files_are_beside_the_run_file_and_output_is_not(tmp_path: Path) -> None:
    config = read(tmp_path, FULL)
    assert config.data.frames == tmp_path / "frames.npz"
    assert config.section("experiment").file == tmp_path / "data" / "measured.csv"
    assert config.section("experiment").covariance == Path("/elsewhere/covariance.npz")
    assert config.output == Path("out")


def test_options_take_the_place_of_keys(tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    path.write_text(FULL)
    config = Config.read(path, device="auto", output="other")
    assert (config.device, config.output) == ("auto", Path("other"))


def test_a_minimal_run_file_has_defaults(tmp_path: Path) -> None:
    config = read(tmp_path, MINIMAL)
    assert (config.seed, config.device, config.simulate, config.train) == (0, "auto", None, None)
    assert config.fit.build_prior() is None
    (correlation,) = config.observable.build().values()
    assert (correlation.name, correlation.normalization) == ("x", "variance")
    with pytest.raises(ValueError, match=r"run\.toml: the section \[train\] is needed"):
        config.section("train")
    with pytest.raises(ValueError, match=r"run\.toml: the section \[simulate\.umbrella\] is"):
        config.section("simulate.umbrella")


TRAIN = MINIMAL + "[train]\nlag_max = 10\nlambda_hat = 0.9\n"
STEP = MINIMAL + "[step]\nstep_lag = 10\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (TRAIN + "lag_maxx = 3", r"unknown key train\.lag_maxx; did you mean train\.lag_max\?"),
        (
            TRAIN + "[train.dynamic.network]\nwidht = 3",
            r"unknown key train\.dynamic\.network\.widht; did you mean "
            r"train\.dynamic\.network\.width\?",
        ),
        ("lambda_hat = 0.9\n" + MINIMAL, r"unknown key lambda_hat; did you mean train\.lambda_hat"),
        (MINIMAL + "[simulte]\n", r"unknown section simulte; did you mean simulate\?"),
        (MINIMAL + "[zzz]\n", r"unknown section zzz$"),
        ('path = "x"\n' + MINIMAL, r"unknown key path"),
        ("seed = 1\n", r"the section system is missing"),
        ('system = "Prinz"\n', r"system must be a section, got 'Prinz'"),
        (MINIMAL + "[train]\nlag_max = 1", r"the key train\.lambda_hat is missing"),
        (MINIMAL.replace("Prinz", "Prince"), r"system\.name must be 'Prinz'.*got 'Prince'"),
        (MINIMAL + "kT = 2", r"system: Prinz takes no arguments, got kT"),
        (
            '[system]\nname = "DoubleWell"\nheight = 2',
            r"system: DoubleWell takes a, b, kT, .*, got height",
        ),
        (
            '[system]\nname = "OrnsteinUhlenbeck"\nkT = -2',
            r"system: kT must be a positive number, got -2",
        ),
        (TRAIN.replace("10", "0"), r"train\.lag_max must be greater than or equal to 1, got 0"),
        (TRAIN.replace("0.9", "1.0"), r"train\.lambda_hat must be less than 1, got 1"),
        (TRAIN.replace("0.9", "nan"), r"train\.lambda_hat must be .*, got nan"),
        (STEP.replace("10", '"long"'), r"step\.step_lag must be a valid integer.* got 'long'"),
        (STEP + "relax = [5]\nslower = false", r"slower must be true where relax is given"),
        (STEP + "relax = [5, -5]", r"step\.relax must hold positive lags, got \[5\.0, -5\.0\]"),
        (MINIMAL + '[observable]\na = "y"', r"observable\.a must be one of x, x\^2, x>0, got 'y'"),
        (
            MINIMAL + '[observable]\nnormalization = "varance"',
            r"observable\.normalization must be one of .*; did you mean variance\?",
        ),
        (
            MINIMAL + '[fit]\nprior = {distribution = "lognrom", s = 1}',
            r"fit\.prior: distribution must be .* got 'lognrom'; did you mean lognorm\?",
        ),
        (
            MINIMAL + '[fit]\nprior = {distribution = "lognorm", sigma = 1}',
            r"fit\.prior: arguments of scipy\.stats\.lognorm: .*sigma",
        ),
        (
            MINIMAL + '[fit]\nprior = {distribution = "lognorm", s = -1}',
            r"fit\.prior: scipy\.stats\.lognorm has no density with",
        ),
        (MINIMAL + "[sample]\nn_int = 0", r"sample\.n_int must be greater than 0, got 0"),
        ('device = "gpu"\n' + MINIMAL, r"device must be 'auto', 'cpu' or 'cuda', got 'gpu'"),
        ("seed = -1\n" + MINIMAL, r"seed must be greater than or equal to 0, got -1"),
        ("seed = 1.5\n" + MINIMAL, r"seed must be a valid integer"),
        (
            FULL.replace("[-1, 1.5]", "[1.5, -1]"),
            r"simulate\.starts must be \[low, high\] with low below high",
        ),
        (
            FULL.replace("high = 1\n", "high = -2\n"),
            r"simulate\.umbrella: low must be below high, got -1 and -2",
        ),
        (
            FULL.replace("n_frames = 40", "n_frames = 30"),
            r"simulate\.umbrella: n_frames must be a multiple of n_walkers \(20\), got 30",
        ),
        ("seed = \n", r"not a TOML file: .*line 1"),
    ],
)
def test_bad_run_files_are_refused_by_key(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ValueError, match=r"run\.toml: .*" + message):
        read(tmp_path, text)


def test_all_problems_are_named_at_once(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"seed must .*; train\.lambda_hat must .*; unknown key tr"
    ):
        read(tmp_path, "seed = -1\n" + TRAIN.replace("0.9", "2") + "lag_mx = 1\n")


def test_missing_and_foreign_run_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no\.toml: there is no such run file"):
        Config.read(tmp_path / "no.toml")
    with pytest.raises(ValueError, match="expected a run file"):
        Config.read(tmp_path)
    (tmp_path / "binary.toml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match=r"binary\.toml: not a TOML file"):
        Config.read(tmp_path / "binary.toml")


@given(key=st.sampled_from(_known_keys()), where=st.integers(0, 100))
def test_a_letter_too_many_is_an_error_that_names_the_key(
    tmp_path_factory: pytest.TempPathFactory, key: str, where: int
) -> None:
    *sections, last = key.split(".")
    at = where % (len(last) + 1)
    wrong = last[:at] + "q" + last[at:]
    text = f"{'.'.join([*sections, wrong])} = 1\n" if sections else f"{wrong} = 1\n"
    text = f"{text}system.name = 'Prinz'\n" if sections[:1] == ["system"] else text + MINIMAL
    with pytest.raises(ValueError, match=rf"unknown key {'.'.join([*sections, wrong])}"):
        read(tmp_path_factory.mktemp("typo"), text)


def test_shipped_run_files_are_good() -> None:
    for name in ("run.toml", "demo.toml"):
        config = Config.read(shipped_data() / name)
        assert config.system.name == "Prinz"
    with pytest.raises(FileNotFoundError, match="no shipped data 'nothing'"):
        shipped_data("nothing")
