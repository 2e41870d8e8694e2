"""The folder of a verb: its manifest, and the rules by which a verb starts, resumes or refuses.

`manifest.json` says what made the files beside it: the sections of the run file that matter to the
verb, the SHA-256 of every input, versions, device and times, and, once the verb has finished, the
SHA-256 of every output. A verb that is called again with the same configuration and the same inputs
does nothing when it has finished, and goes on when it was killed; with any others it refuses, so
that no result is ever overwritten by that of another configuration.
"""

import hashlib
import json
import math
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

MANIFEST = "manifest.json"
State = Literal["new", "unfinished", "done"]
Say = Callable[[str], object]


def silent(message: str) -> None:
    """Say nothing."""


@dataclass(frozen=True)
class Job:
    """One verb of one run.

    Attributes:
        verb: name of the verb.
        folder: where its files are.
        settings: what of the run file matters to it, as plain JSON values.
        inputs: files and folders that it reads, by name.
        device: where it computes; recorded, not compared.
    """

    verb: str
    folder: Path
    settings: Mapping[str, Any]
    inputs: Mapping[str, Path] = field(default_factory=dict)
    device: str = "cpu"

    def run(self, make: Callable[[Path], None], say: Say = silent) -> None:
        """Let `make` write the files, unless that is done already.

        Raises:
            ValueError: the folder holds the results of another configuration or other inputs.
        """
        state = self.state()
        if state == "done":
            say(f"{self.verb}: already done, see {self.folder}")
            return
        say(f"{self.verb}: {'resuming in' if state == 'unfinished' else 'writing'} {self.folder}")
        manifest = self._begin()
        clock = time.perf_counter()
        make(self.folder)
        manifest["outputs"] = _hashes(self.folder)
        manifest["finished"] = _now()
        manifest["wall_time_s"] = round(time.perf_counter() - clock, 3)
        write_json(self.folder / MANIFEST, manifest)

    def state(self) -> State:
        """How far the folder is.

        Raises:
            ValueError: it holds another configuration, other inputs, files of unknown origin, or
                lacks files that it had; the message says which keys differ and what to do.
        """
        before = self._before()
        if before is None:
            return "new"
        self._refuse_other(before)
        if before["finished"] is None:
            return "unfinished"
        lost = [name for name in before["outputs"] if not (self.folder / name).is_file()]
        if lost:
            raise ValueError(
                f"{self.folder} has lost {', '.join(lost)}; delete the folder to make it anew"
            )
        return "done"

    def _before(self) -> dict[str, Any] | None:
        """The manifest that is there."""
        path = self.folder / MANIFEST
        if not path.exists():
            if self.folder.is_dir() and any(
                not f.name.startswith(".") for f in self.folder.iterdir()
            ):
                raise ValueError(
                    f"{self.folder} holds files but no {MANIFEST}: they are from elsewhere; choose "
                    "another output (--output), or move them"
                )
            return None
        try:
            before = json.loads(path.read_text())
            needed = ("config", "inputs", "started", "finished", "outputs")
            return before | {key: before[key] for key in needed}
        except (ValueError, TypeError, KeyError):
            raise ValueError(f"{path} is unreadable; delete the folder to make it anew") from None

    def _refuse_other(self, before: dict[str, Any]) -> None:
        now = self._identity()
        old = flat({"config": before["config"], "inputs": _sums(before["inputs"])})
        new = flat({"config": now["config"], "inputs": _sums(now["inputs"])})
        changed = [key for key in sorted(old.keys() | new.keys()) if old.get(key) != new.get(key)]
        if changed:
            what = "; ".join(_difference(key, old, new, now["inputs"]) for key in changed)
            raise ValueError(
                f"{self.folder} holds the results of another configuration: {what}. Choose another "
                "output (--output), or delete that folder"
            )

    def _identity(self) -> dict[str, Any]:
        inputs = {
            name: {"file": str(path), "sha256": sha256(path)} for name, path in self.inputs.items()
        }
        return {"config": json.loads(json.dumps(self.settings)), "inputs": inputs}

    def _begin(self) -> dict[str, Any]:
        """Write the manifest of an unfinished verb; a resumed one keeps when it first started."""
        before = self._before()
        self.folder.mkdir(parents=True, exist_ok=True)
        manifest = {
            "verb": self.verb,
            "versions": _versions(),
            "device": self.device,
            **self._identity(),
            "started": _now() if before is None else before["started"],
            "resumed": None if before is None else _now(),
            "finished": None,
            "wall_time_s": None,
            "outputs": {},
        }
        write_json(self.folder / MANIFEST, manifest)
        return manifest


def sha256(path: Path) -> str:
    """SHA-256 of a file, or of the names and contents of all files in a folder."""
    if path.is_dir():
        return hashlib.sha256(json.dumps(_hashes(path)).encode()).hexdigest()
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def flat(nested: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """The values of nested sections by dotted key."""
    values: dict[str, Any] = {}
    for key, value in nested.items():
        if isinstance(value, Mapping) and value:
            values |= flat(value, f"{prefix}{key}.")
        else:
            values[prefix + key] = value
    return values


def write_text(path: Path, text: str) -> None:
    """Write a file, complete or not at all."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write a JSON file; null stands for infinity and NaN, which JSON lacks."""
    write_text(path, json.dumps(_finite(value), indent=2, allow_nan=False) + "\n")


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _sums(inputs: Mapping[str, Any]) -> dict[str, str]:
    return {name: entry["sha256"] for name, entry in inputs.items()}


def _difference(
    key: str, old: dict[str, Any], new: dict[str, Any], inputs: Mapping[str, Any]
) -> str:
    """One difference in words."""
    kind, name = key.split(".", 1)
    if kind == "inputs":
        file = inputs[name]["file"] if name in inputs else "no file"
        return f"input {name} ({file}) is not the file that was used"
    return f"{name} was {old.get(key, 'not set')!r}, now {new.get(key, 'not set')!r}"


def _hashes(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    kept = [path for path in files if path.name != MANIFEST and not path.name.startswith(".")]
    return {str(path.relative_to(folder)): sha256(path) for path in kept}


def _versions() -> dict[str, str]:
    from bopito_inverse import __version__

    return {"bopito_inverse": __version__, "torch": torch.__version__, "numpy": np.__version__}


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
