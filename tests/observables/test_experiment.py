import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bopito_inverse.observables import Experiment

GOOD = "observable,lag,value,sigma\nx,100,0.5,0.02\nx,200,0.3,0.02\n"

names = st.text(min_size=1, max_size=8).filter(
    lambda s: s.isprintable() and s == s.strip() and not s.startswith("#")
)
finite = st.floats(-1e300, 1e300)
positive = st.floats(1e-100, 1e100)


@st.composite
def experiments(draw) -> Experiment:
    lags, observable = [], []
    for name in draw(st.lists(names, min_size=1, max_size=3, unique=True)):
        own = sorted(draw(st.sets(st.integers(1, 10**6), min_size=1, max_size=4)))
        lags += own
        observable += [name] * len(own)
    n = len(lags)
    values = draw(st.lists(finite, min_size=n, max_size=n))
    sigma = draw(st.lists(positive, min_size=n, max_size=n))
    return Experiment(lags, values, sigma, observable=observable)


def assert_same(found: Experiment, expected: Experiment) -> None:
    for attribute in ("lags", "values", "sigma", "covariance", "observable"):
        np.testing.assert_array_equal(getattr(found, attribute), getattr(expected, attribute))
    assert found.lag_unit == expected.lag_unit


def written(folder: Path, text: str) -> Path:
    path = folder / "experiment.csv"
    path.write_text(text, encoding="utf-8")
    return path


@settings(deadline=None, max_examples=100)
@given(experiment=experiments())
def test_round_trip_is_exact(experiment):
    with tempfile.TemporaryDirectory() as folder:
        experiment.write(Path(folder) / "e.csv")
        assert_same(Experiment.read(Path(folder) / "e.csv"), experiment)


def test_round_trip_with_covariance(tmp_path):
    covariance = np.array([[4.0, 1.0, 0.0], [1.0, 4.0, 1.0], [0.0, 1.0, 4.0]]) * 1e-4
    experiment = Experiment([1, 2, 3], [0.5, 0.4, 0.3], [0.02] * 3, covariance)
    with pytest.raises(ValueError, match="covariance must name a file"):
        experiment.write(tmp_path / "e.csv")
    assert not (tmp_path / "e.csv").exists()
    experiment.write(tmp_path / "e.csv", tmp_path / "c.npz")
    assert_same(Experiment.read(tmp_path / "e.csv", tmp_path / "c.npz"), experiment)
    held_out = experiment[[True, False, True]]
    np.testing.assert_array_equal(held_out.covariance, np.diag([4e-4, 4e-4]))


def test_columns_in_any_order_comments_and_blank_lines(tmp_path):
    text = (
        "\ufeff# NMR of x, 300 K\n# Lag unit:  frames \n\nsigma, value,lag,observable\n"
        "0.02,0.5,100,x\n# 0.02,9,150,x\n0.01,-3e-1,200.0,x\n"
    )
    experiment = Experiment.read(written(tmp_path, text))
    assert_same(experiment, Experiment([100, 200], [0.5, -0.3], [0.02, 0.01]))
    np.testing.assert_array_equal(experiment.covariance, np.diag([0.02**2, 0.01**2]))
    assert experiment.lags.dtype == np.float64


@pytest.mark.parametrize(
    ("unit", "lags", "frame_time"),
    [
        ("frames", [3, 7], None),
        ("frames", [3, 7], 0.2),
        ("ps", [0.3, 0.7], 0.1),
        ("fs", [600, 1400], 0.2),
        ("ns", [0.0006, 0.0014], 0.2),
        ("reduced", [0.015, 0.035], 5e-3),
    ],
)
def test_units(tmp_path, unit, lags, frame_time):
    table = f"# lag unit: {unit}\nobservable,lag,value,sigma\nx,{lags[0]},1,1\nx,{lags[1]},1,1\n"
    experiment = Experiment.read(written(tmp_path, table), frame_time=frame_time)
    assert experiment.lags.tolist() == [3, 7]
    assert experiment.lag_unit == "frames"
    raw = Experiment(lags, [1, 1], [1, 1], lag_unit=unit)
    raw.write(tmp_path / "again.csv")
    assert_same(Experiment.read(tmp_path / "again.csv", frame_time=frame_time), experiment)
    assert_same(raw.to_frames(frame_time), experiment)


def test_several_observables(tmp_path):
    text = "observable,lag,value,sigma\nx,100,0.5,0.1\ny,50,0.4,0.2\nx,200,0.3,0.3\n"
    experiment = Experiment.read(written(tmp_path, text))
    assert experiment.observables == ("x", "y")
    assert len(experiment) == 3
    assert_same(experiment.select("x"), Experiment([100, 200], [0.5, 0.3], [0.1, 0.3]))
    with pytest.raises(ValueError, match=r"one of \['x', 'y'\], got 'z'"):
        experiment.select("z")


def test_points_are_held_out():
    experiment = Experiment([10, 20, 30, 40], [4, 3, 2, 1], [1, 2, 3, 4])
    assert_same(experiment[1:3], Experiment([20, 30], [3, 2], [2, 3]))
    assert_same(experiment[::2], experiment.mask([True, False, True, False]))
    assert_same(experiment[experiment.lags > 20], experiment[2:])
    with pytest.raises(ValueError, match=r"slice or 4 booleans, got shape \(2,\)"):
        experiment[[True, False]]
    with pytest.raises(ValueError, match=r"slice or 4 booleans, got shape \(4,\) of int"):
        experiment[np.arange(4)]
    with pytest.raises(ValueError, match="at least one of the 4 points"):
        experiment[4:]


def test_steps():
    experiment = Experiment([100, 250, 300, 410], [1] * 4, [1] * 4)
    assert experiment.steps(10).tolist() == [10, 25, 30, 41]
    assert experiment.steps(10).dtype == np.int64
    with pytest.raises(ValueError, match=r"multiples of the step of 100 frames, got \[250, 410\]"):
        experiment.steps(100)
    with pytest.raises(ValueError, match="step_lag must be a whole number of at least 1, got 0"):
        experiment.steps(0)
    with pytest.raises(ValueError, match="must be in frames to count steps, got ps"):
        Experiment([1.0], [1], [1], lag_unit="ps").steps(1)


HEADER = "observable,lag,value,sigma\n"
BAD_FILES = {
    "empty": ("", r": .*has no columns observable, lag, value, sigma"),
    "only comments": ("# lag unit: ps\n", r": .*has no columns"),
    "no rows": (HEADER, r": .*has no data"),
    "missing column": ("observable,lag,value\nx,1,1\n", r", line 1: .*missing: 'sigma'"),
    "extra column": (
        "# c\nobservable,lag,value,sigma,note\nx,1,1,1,a\n",
        r", line 2: .*unknown: 'note'",
    ),
    "repeated column": (
        "observable,lag,value,sigma,lag\nx,1,1,1,1\n",
        r", line 1: .*repeated: 'lag'",
    ),
    "short row": (GOOD + "x,300,0.1\n", r", line 4: a row must have 4 fields, got 3"),
    "long row": (GOOD + "x,300,0.1,1,1\n", r", line 4: a row must have 4 fields, got 5"),
    "bad quote": (GOOD + 'x,300,"0.1"a,1\n', r", line 4: not a row of a CSV table"),
    "text": (GOOD + "x,300,high,1\n", r", line 4, column value: .*finite number, got 'high'"),
    "blank": (GOOD + "x,300,,1\n", r", line 4, column value: .*got ''"),
    "nan": (GOOD + "x,300,nan,1\n", r", line 4, column value: .*got 'nan'"),
    "inf": (GOOD + "x,inf,1,1\n", r", line 4, column lag: .*got 'inf'"),
    "zero sigma": (GOOD + "x,300,1,0\n", r", line 4, column sigma: .*positive number, got '0'"),
    "negative sigma": (GOOD + "x,300,1,-0.1\n", r", line 4, column sigma: .*got '-0.1'"),
    "nan sigma": (GOOD + "x,300,1,nan\n", r", line 4, column sigma: .*got 'nan'"),
    "negative lag": (GOOD + "x,-300,1,1\n", r", line 4, column lag: .*positive number, got '-300'"),
    "zero lag": (GOOD + "x,0,1,1\n", r", line 4, column lag: .*positive number, got '0'"),
    "duplicate lag": (
        "# comment\n" + GOOD + "y,100,1,1\nx,100,1,1\n",
        r", line 6, column lag: duplicate lag of 'x', got 100 frames again after line 3",
    ),
    "decreasing lag": (
        GOOD + "x,150,1,1\n",
        r", line 4, column lag: lags of 'x' must increase, got 150 frames after 200",
    ),
    "broken frame": (
        GOOD + "x,300.5,1,1\n",
        r", line 4, column lag: .*whole number .*300.5 frames",
    ),
    "no name": (GOOD + ",300,1,1\n", r", line 4, column observable: .*got ''"),
    "unknown unit": (
        "# c\n# lag unit: hours\n" + GOOD,
        r", line 2: lag unit must be one of frames, fs, ps, ns, reduced, got 'hours'",
    ),
    "two units": ("# lag unit: ps\n# lag unit: ns\n" + GOOD, r", line 2: .*once.*after line 1"),
    "no frame time": ("# c\n# lag unit: ns\n" + GOOD, r", line 2: frame_time \(in ps\) is needed"),
    "no reduced time": ("# lag unit: reduced\n" + GOOD, r", line 1: frame_time \(in reduced"),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_bad_files_are_refused(tmp_path, case):
    text, message = BAD_FILES[case]
    with pytest.raises(ValueError, match=r"^.*experiment\.csv" + message):
        Experiment.read(written(tmp_path, text))


@pytest.mark.parametrize("lag", ["0.15", "0.1001", "1e-9", "12345.65"])
def test_lags_that_are_not_whole_frames_are_refused(tmp_path, lag):
    path = written(tmp_path, f"# lag unit: ps\n{HEADER}y,0.1,1,1\nx,{lag},1,1\n")
    message = r"experiment\.csv, line 4, column lag: .*whole number of frames of 0.1 ps, got"
    with pytest.raises(ValueError, match=message):
        Experiment.read(path, frame_time=0.1)
    with pytest.raises(ValueError, match="line 1: frame_time must be a positive number, got -1"):
        Experiment.read(path, frame_time=-1)


def test_files_that_are_missing_or_not_text(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none\.csv: there is no such experiment file"):
        Experiment.read(tmp_path / "none.csv")
    (tmp_path / "b.csv").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match=r"b\.csv: the file must be UTF-8 text"):
        Experiment.read(tmp_path / "b.csv")


@settings(deadline=None, max_examples=200)
@given(text=st.text(st.sampled_from(list('x,"#\n 1.e-a;\x00:')), max_size=30))
def test_any_text_is_read_or_refused_with_its_name(text):
    with tempfile.TemporaryDirectory() as folder:
        path = written(Path(folder), GOOD + text)
        try:
            assert len(Experiment.read(path)) >= 2
        except ValueError as error:
            assert str(error).startswith(str(path))  # noqa: PT017


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"other": np.eye(2)}, r"c\.npz: expected the key 'covariance', got \['other'\]"),
        ({"covariance": np.eye(3)}, r"c\.npz, key covariance .*\(2, 2\), got \(3, 3\)"),
        ({"covariance": np.array([[1, 0.5], [0, 1]])}, r"c\.npz, key covariance .*symmetric"),
        ({"covariance": np.ones((2, 2)) - 2}, r"c\.npz, key covariance .*eigenvalue -2"),
        ({"covariance": np.diag([1, np.nan])}, r"c\.npz, key covariance .*NaN"),
        ({"covariance": np.array(["a"])}, r"c\.npz, key covariance .*matrix of numbers"),
        ({"covariance": np.array([None])}, r"c\.npz: expected an \.npz file of numbers"),
    ],
)
def test_bad_covariances_are_refused(tmp_path, arrays, message):
    np.savez(tmp_path / "c.npz", **arrays)
    with pytest.raises(ValueError, match=message):
        Experiment.read(written(tmp_path, GOOD), tmp_path / "c.npz")


@pytest.mark.parametrize("content", [b"", b"text", b"PK\x03\x04 truncated"])
def test_foreign_covariance_files_are_refused(tmp_path, content):
    (tmp_path / "c.npz").write_bytes(content)
    with pytest.raises(ValueError, match=r"c\.npz: expected an \.npz file of numbers"):
        Experiment.read(written(tmp_path, GOOD), tmp_path / "c.npz")
    np.save(tmp_path / "c.npy", np.eye(2))
    with pytest.raises(ValueError, match=r"c\.npy: expected an \.npz file of numbers"):
        Experiment.read(written(tmp_path, GOOD), tmp_path / "c.npy")
    with pytest.raises(FileNotFoundError, match="no such covariance file"):
        Experiment.read(written(tmp_path, GOOD), tmp_path / "none.npz")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lags": []}, r"lags must hold at least one number, got shape \(0,\)"),
        ({"lags": [2, 1]}, r"lags of 'x' must increase, got \[2.0, 1.0\]"),
        ({"lags": [1, 1]}, r"lags of 'x' must increase"),
        ({"lags": [0, 1]}, "lags must be positive and finite, got 0.0 at index 0"),
        ({"lags": [1, 1.5]}, r"lags must be whole numbers of frames, got \[1.5\]"),
        ({"values": [1, np.nan]}, "values must be finite, got nan at index 1"),
        ({"values": [1]}, r"values must hold 2 numbers, one for each lag, got shape \(1,\)"),
        ({"sigma": [1, -2]}, "sigma must be positive and finite, got -2.0 at index 1"),
        ({"covariance": np.eye(3)}, r"covariance must have shape \(2, 2\), got \(3, 3\)"),
        ({"observable": ["x"]}, "one name or 2 names, got 1"),
        ({"observable": "#x"}, "neither space nor '#', got '#x'"),
        ({"observable": "x\ny"}, "printable"),
        ({"lag_unit": "s"}, "lag unit must be one of .*, got 's'"),
    ],
)
def test_bad_arguments_are_refused(change, message):
    arguments = {"lags": [1, 2], "values": [1, 1], "sigma": [1, 1]} | change
    with pytest.raises(ValueError, match=message):
        Experiment(**arguments)


def test_arrays_are_copies():
    values = np.array([0.5, 0.3])
    experiment = Experiment([1, 2], values, [1, 1])
    values[0] = 9
    assert experiment.values[0] == 0.5
