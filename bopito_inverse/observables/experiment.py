r"""Measured correlation functions.

An experiment is a set of points `(o_i, k_i, y_i, sigma_i)`, i = 1..L: observable `o_i` was found
to have the correlation `y_i` at lag `k_i > 0`, with a Gaussian error of standard deviation
`sigma_i`, or of covariance `Sigma` between all points:

    y = g + e,     e ~ N(0, Sigma),     Sigma = diag(sigma^2) unless it is given.

Lags count frames. A file may give them as times, which are divided by the time of a frame, and
the composite step of a model, `Delta` frames long, reaches lag `k` after `k / Delta` steps.

The file is a CSV table with the columns `observable, lag, value, sigma` in any order, and any
number of comment lines that begin with `#`, one of which may declare the unit of the lags:

    # lag unit: frames
    observable,lag,value,sigma
    x,100,0.312,0.02
    x,200,0.171,0.02
"""

import csv
import io
import re
import zipfile
from collections.abc import Sequence
from os import PathLike
from pathlib import Path
from typing import NamedTuple

import numpy as np

from bopito_inverse.arguments import as_count, as_positive

COLUMNS = ("observable", "lag", "value", "sigma")
_UNIT_SCALE = {"frames": 1.0, "fs": 1e-3, "ps": 1.0, "ns": 1e3, "reduced": 1.0}
LAG_UNITS = tuple(_UNIT_SCALE)
_UNIT_COMMENT = re.compile(r"#\s*lag[ _]unit\s*[:=]\s*(.*?)\s*$", re.IGNORECASE)


class Experiment:
    """Measured correlation functions with their errors.

    Args:
        lags: positive lags in `lag_unit`, increasing within each observable, shape `(L,)`.
        values: measured correlations, shape `(L,)`.
        sigma: standard errors of `values`, positive, shape `(L,)`.
        covariance: covariance of the errors, symmetric positive definite, shape `(L, L)`; takes
            the place of `diag(sigma^2)`.
        observable: name of the observable, one for all points or one for each.
        lag_unit: `frames`, `fs`, `ps`, `ns` or `reduced`; `to_frames` converts.

    Raises:
        ValueError: names the argument, what was expected and what came.

    >>> experiment = Experiment([100, 200, 400], [0.5, 0.3, 0.1], [0.02, 0.02, 0.02])
    >>> experiment.steps(100)
    array([1, 2, 4])
    >>> experiment[experiment.lags < 400]
    Experiment(x: 2 points, lags 100 to 200 frames)
    """

    def __init__(
        self,
        lags: Sequence[float] | np.ndarray,
        values: Sequence[float] | np.ndarray,
        sigma: Sequence[float] | np.ndarray,
        covariance: Sequence[Sequence[float]] | np.ndarray | None = None,
        observable: str | Sequence[str] | np.ndarray = "x",
        lag_unit: str = "frames",
    ) -> None:
        self.lag_unit = _as_unit(lag_unit)
        self.lags = _as_column("lags", lags, positive=True)
        n = len(self.lags)
        self.values = _as_column("values", values, n)
        self.sigma = _as_column("sigma", sigma, n, positive=True)
        self.observable = _as_names(observable, n)
        if self.lag_unit == "frames":
            self.lags = _whole_frames(self.lags)
        for name in self.observables:
            own = self.lags[self.observable == name]
            if not (np.diff(own) > 0).all():
                raise ValueError(f"lags of {name!r} must increase, got {own.tolist()}")
        if covariance is None:
            covariance = np.diag(self.sigma**2)
        self.covariance = _as_covariance("covariance", covariance, n)

    def __repr__(self) -> str:
        return (
            f"Experiment({', '.join(self.observables)}: {len(self)} points, lags "
            f"{self.lags.min():g} to {self.lags.max():g} {self.lag_unit})"
        )

    def __len__(self) -> int:
        return len(self.lags)

    @property
    def observables(self) -> tuple[str, ...]:
        """The different observables, in the order of their first point."""
        return tuple(dict.fromkeys(self.observable.tolist()))

    def __getitem__(self, keep: slice | np.ndarray | Sequence[bool]) -> "Experiment":
        """The points that `keep` selects: a slice, or a boolean for each point.

        Raises:
            ValueError: `keep` is something else, or selects nothing.
        """
        if not isinstance(keep, slice):
            keep = np.asarray(keep)
            if keep.dtype != bool or keep.shape != (len(self),):
                raise ValueError(
                    f"keep must be a slice or {len(self)} booleans, got shape {keep.shape} of "
                    f"{keep.dtype}"
                )
        index = np.arange(len(self))[keep]
        if len(index) == 0:
            raise ValueError(f"keep must select at least one of the {len(self)} points, got none")
        return Experiment(
            self.lags[index],
            self.values[index],
            self.sigma[index],
            self.covariance[np.ix_(index, index)],
            self.observable[index],
            self.lag_unit,
        )

    def mask(self, keep: np.ndarray | Sequence[bool]) -> "Experiment":
        """The points at which `keep` is true; the others are held out. Same as `self[keep]`."""
        return self[keep]

    def select(self, name: str) -> "Experiment":
        """The points of one observable.

        Raises:
            ValueError: there is no such observable.
        """
        if name not in self.observables:
            raise ValueError(f"observable must be one of {list(self.observables)}, got {name!r}")
        return self[self.observable == name]

    def to_frames(self, frame_time: float | None = None) -> "Experiment":
        """The same experiment with lags in frames.

        Args:
            frame_time: time between frames: in ps where lags are in fs, ps or ns, in reduced units
                where they are in `reduced`; not used where they count frames.

        Raises:
            ValueError: `frame_time` is missing, or a lag is not a whole number of frames.
        """
        frame = _frame_in_unit(self.lag_unit, frame_time)
        return Experiment(
            _whole_frames(self.lags / frame),
            self.values,
            self.sigma,
            self.covariance,
            self.observable,
        )

    def steps(self, step_lag: int) -> np.ndarray:
        """Number of composite steps of `step_lag` frames to each lag, shape `(L,)`, int64.

        Raises:
            ValueError: names the lags that are not multiples of `step_lag`.
        """
        step = as_count("step_lag", step_lag)
        if self.lag_unit != "frames":
            raise ValueError(
                f"lags must be in frames to count steps, got {self.lag_unit}; use to_frames"
            )
        lags = self.lags.astype(np.int64)
        odd = lags[lags % step != 0]
        if len(odd):
            raise ValueError(
                f"lags must be multiples of the step of {step} frames, got {odd.tolist()}"
            )
        return lags // step

    @classmethod
    def read(
        cls,
        path: str | PathLike[str],
        covariance: str | PathLike[str] | None = None,
        frame_time: float | None = None,
    ) -> "Experiment":
        """Read a CSV table; its format is described at the top of this file.

        Args:
            path: the table. Without a comment that declares another unit, lags count frames.
            covariance: an `.npz` with the key `covariance`, shape `(L, L)`, points in file order.
            frame_time: as in `to_frames`; needed where lags are times.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: names file, line, column and what came.
        """
        path = Path(path)
        table = _parse(path)
        try:
            frame = _frame_in_unit(table.unit, frame_time)
        except ValueError as error:
            raise ValueError(f"{path}, line {table.unit_line}: {error}") from None
        rows = [_row_in_frames(path, row, frame, table.unit) for row in table.rows]
        _check_order(path, rows)
        matrix = None if covariance is None else _read_covariance(Path(covariance), len(rows))
        return cls(
            [row.lag for row in rows],
            [row.value for row in rows],
            [row.sigma for row in rows],
            matrix,
            [row.observable for row in rows],
        )

    def write(
        self, path: str | PathLike[str], covariance: str | PathLike[str] | None = None
    ) -> None:
        """Write what `read` reads; numbers keep every digit.

        Args:
            path: the CSV table.
            covariance: the `.npz` for the covariance, needed where that is not `diag(sigma^2)`.

        Raises:
            ValueError: the covariance would be lost.
        """
        if covariance is None and not np.array_equal(self.covariance, np.diag(self.sigma**2)):
            raise ValueError(
                "covariance must name a file, because it is not diag(sigma^2), got None"
            )
        text = io.StringIO()
        text.write(f"# lag unit: {self.lag_unit}\n")
        table = csv.writer(text, lineterminator="\n")
        table.writerow(COLUMNS)
        numbers = zip(self.lags.tolist(), self.values.tolist(), self.sigma.tolist(), strict=True)
        for name, (lag, value, sigma) in zip(self.observable.tolist(), numbers, strict=True):
            table.writerow([name, repr(lag).removesuffix(".0"), repr(value), repr(sigma)])
        if covariance is not None:
            with Path(covariance).open("wb") as file:
                np.savez(file, covariance=self.covariance)
        Path(path).write_text(text.getvalue(), encoding="utf-8")


class _Row(NamedTuple):
    line: int
    observable: str
    lag: float
    value: float
    sigma: float


class _Table(NamedTuple):
    rows: list[_Row]
    unit: str
    unit_line: int


def _parse(path: Path) -> _Table:
    """The rows of a file and the unit of its lags."""
    rows, header = [], None
    unit, unit_line = "frames", 0
    for line, text in enumerate(_lines(path), start=1):
        if text.startswith("#"):
            if match := _UNIT_COMMENT.match(text):
                if unit_line:
                    raise ValueError(
                        f"{path}, line {line}: the lag unit must be declared once, got a second "
                        f"declaration after line {unit_line}"
                    )
                unit, unit_line = _located_unit(path, line, match[1]), line
        elif text:
            fields = _fields(path, line, text)
            if header is None:
                header = _header(path, line, fields)
            else:
                rows.append(_row(path, line, header, fields))
    if not rows:
        missing = "data" if header else f"columns {', '.join(COLUMNS)}"
        raise ValueError(f"{path}: the file must hold an experiment, but it has no {missing}")
    return _Table(rows, unit, unit_line)


def _lines(path: Path) -> list[str]:
    try:
        return [line.strip() for line in path.read_text(encoding="utf-8-sig").split("\n")]
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: there is no such experiment file") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: the file must be UTF-8 text, got {error.reason}") from None


def _fields(path: Path, line: int, text: str) -> list[str]:
    try:
        fields = next(csv.reader([text], skipinitialspace=True, strict=True))
    except csv.Error as error:
        raise ValueError(f"{path}, line {line}: not a row of a CSV table: {error}") from None
    return [field.strip() for field in fields]


def _header(path: Path, line: int, fields: list[str]) -> list[str]:
    for what, columns in (
        ("missing", [c for c in COLUMNS if c not in fields]),
        ("unknown", [c for c in fields if c not in COLUMNS]),
        ("repeated", [c for c in COLUMNS if fields.count(c) > 1]),
    ):
        if columns:
            raise ValueError(
                f"{path}, line {line}: the columns must be {', '.join(COLUMNS)}; {what}: "
                f"{', '.join(map(repr, columns))}"
            )
    return fields


def _row(path: Path, line: int, header: list[str], fields: list[str]) -> _Row:
    if len(fields) != len(header):
        raise ValueError(
            f"{path}, line {line}: a row must have {len(header)} fields, got {len(fields)}"
        )
    cells = dict(zip(header, fields, strict=True))
    if problem := _name_problem(cells["observable"]):
        raise ValueError(f"{path}, line {line}, column observable: {problem}")
    lag, value, sigma = (_number(path, line, c, cells[c]) for c in COLUMNS[1:])
    return _Row(line, cells["observable"], lag, value, sigma)


def _number(path: Path, line: int, column: str, text: str) -> float:
    positive = column != "value"
    try:
        number = float(text)
    except ValueError:
        number = np.nan
    if not np.isfinite(number) or (positive and number <= 0):
        expected = "a positive number" if positive else "a finite number"
        raise ValueError(f"{path}, line {line}, column {column}: expected {expected}, got {text!r}")
    return number


def _row_in_frames(path: Path, row: _Row, frame: float, unit: str) -> _Row:
    try:
        (lag,) = _whole_frames(np.array([row.lag / frame]))
    except ValueError:
        of = "" if unit == "frames" else f" of {frame:g} {unit}"
        raise ValueError(
            f"{path}, line {row.line}, column lag: expected a whole number of frames{of}, got "
            f"{row.lag!r} {unit}"
        ) from None
    return row._replace(lag=float(lag))


def _check_order(path: Path, rows: list[_Row]) -> None:
    """Lags must increase within each observable."""
    seen: dict[str, dict[float, int]] = {}
    for row in rows:
        lines = seen.setdefault(row.observable, {})
        where = f"{path}, line {row.line}, column lag"
        if row.lag in lines:
            raise ValueError(
                f"{where}: duplicate lag of {row.observable!r}, got {row.lag:g} frames again "
                f"after line {lines[row.lag]}"
            )
        if lines and row.lag < max(lines):
            raise ValueError(
                f"{where}: lags of {row.observable!r} must increase, got {row.lag:g} frames "
                f"after {max(lines):g}"
            )
        lines[row.lag] = row.line


def _read_covariance(path: Path, n: int) -> np.ndarray:
    """The checked matrix under the key `covariance` of an npz file."""
    if not path.exists():
        raise FileNotFoundError(f"{path}: there is no such covariance file")
    try:
        with path.open("rb") as stream, np.load(stream, allow_pickle=False) as file:
            keys = list(file)
            matrix = file["covariance"] if "covariance" in keys else None
    except (ValueError, OSError, EOFError, TypeError, AttributeError, zipfile.BadZipFile):
        raise ValueError(f"{path}: expected an .npz file of numbers, got another file") from None
    if matrix is None:
        raise ValueError(f"{path}: expected the key 'covariance', got {keys}")
    return _as_covariance(f"{path}, key covariance", matrix, n)


def _frame_in_unit(unit: str, frame_time: float | None) -> float:
    """Length of a frame in the unit of the lags."""
    if unit == "frames":
        return 1.0
    system = "reduced units" if unit == "reduced" else "ps"
    if frame_time is None:
        raise ValueError(f"frame_time (in {system}) is needed to convert lags in {unit} to frames")
    return as_positive("frame_time", frame_time) / _UNIT_SCALE[unit]


def _whole_frames(frames: np.ndarray) -> np.ndarray:
    """Round away what division leaves, 1e-6 of the lag and at most 0.01 frames."""
    whole = np.round(frames)
    bad = (np.abs(frames - whole) > np.minimum(1e-6 * frames, 1e-2)) | (whole < 1)
    if bad.any():
        raise ValueError(f"lags must be whole numbers of frames, got {frames[bad].tolist()}")
    return whole


def _located_unit(path: Path, line: int, unit: str) -> str:
    try:
        return _as_unit(unit)
    except ValueError as error:
        raise ValueError(f"{path}, line {line}: {error}") from None


def _as_unit(unit: str) -> str:
    if unit not in LAG_UNITS:
        raise ValueError(f"lag unit must be one of {', '.join(LAG_UNITS)}, got {unit!r}")
    return unit


def _as_column(
    name: str,
    value: Sequence[float] | np.ndarray,
    n: int | None = None,
    positive: bool = False,
) -> np.ndarray:
    """A float64 copy of shape `(n,)`, finite, positive on demand."""
    x = np.array(value, dtype=np.float64)
    if x.ndim != 1 or len(x) == 0 or (n is not None and len(x) != n):
        expected = "at least one number" if n is None else f"{n} numbers, one for each lag"
        raise ValueError(f"{name} must hold {expected}, got shape {x.shape}")
    good = np.isfinite(x) & ((x > 0) | (not positive))
    if not good.all():
        first = int(np.argmin(good))
        kind = "positive and finite" if positive else "finite"
        raise ValueError(f"{name} must be {kind}, got {x[first]} at index {first}")
    return x


def _as_names(observable: str | Sequence[str] | np.ndarray, n: int) -> np.ndarray:
    """One name for each point, shape `(n,)`."""
    names = [observable] * n if isinstance(observable, str) else list(observable)
    if len(names) != n:
        raise ValueError(f"observable must be one name or {n} names, got {len(names)}")
    for name in names:
        if problem := _name_problem(name):
            raise ValueError(f"observable: {problem}")
    return np.array(names, dtype=np.str_)


def _name_problem(name: str) -> str | None:
    """What keeps a name from being written to a file and read again, if anything."""
    if not isinstance(name, str) or not name or not name.isprintable():
        return f"expected a name of printable characters, got {name!r}"
    if name != name.strip() or name.startswith("#"):
        return f"expected a name that begins with neither space nor '#', got {name!r}"
    return None


def _as_covariance(name: str, value: Sequence[Sequence[float]] | np.ndarray, n: int) -> np.ndarray:
    """A symmetric positive definite float64 copy of shape `(n, n)`."""
    try:
        matrix = np.array(value, dtype=np.float64)
    except (TypeError, ValueError):
        raise ValueError(f"{name} must be a matrix of numbers, got {type(value)}") from None
    if matrix.shape != (n, n):
        raise ValueError(f"{name} must have shape ({n}, {n}), got {matrix.shape}")
    if not np.isfinite(matrix).all():
        raise ValueError(f"{name} must be finite, got NaN or infinite entries")
    if np.abs(matrix - matrix.T).max() > 1e-8 * np.abs(matrix).max():
        raise ValueError(f"{name} must be symmetric, got differences across the diagonal")
    matrix = (matrix + matrix.T) / 2
    try:
        np.linalg.cholesky(matrix)
    except np.linalg.LinAlgError:
        smallest = np.linalg.eigvalsh(matrix)[0]
        raise ValueError(
            f"{name} must be positive definite, got the eigenvalue {smallest:.3g}"
        ) from None
    return matrix
