"""Data that comes with the package."""

from pathlib import Path


def shipped_data(name: str = "prinz") -> Path:
    """The folder of data that comes with the package: in a wheel inside it, else in `data/`.

    Raises:
        FileNotFoundError: there is none.
    """
    package = Path(__file__).resolve().parent
    places = [package / "data" / name, package.parent / "data" / name]
    for place in places:
        if place.is_dir():
            return place
    raise FileNotFoundError(f"no shipped data {name!r} in {' or '.join(map(str, places))}")
