r"""Files of trained scores: `safetensors` with a header of plain text, nothing unpickled.

The tensors are the `state_dict` of the score, with the standardisation of its frames. The header
says what they belong to: kind of score, all hyperparameters (noise schedule, network, lambda_hat,
lag_max), the system, how it was trained, and the versions of format and package. A BoPITO file
holds both of its scores. A file is written beside its destination and then moved there, so that a
reader meets either the old file or the new one.
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_bytes
from torch import Tensor, nn

from bopito_inverse.arguments import Device, as_device
from bopito_inverse.models.scores import BoPITOScore, DynamicScore, EquilibriumScore, ITOScore

FORMAT = "bopito_inverse"
FORMAT_VERSION = 1
KINDS: dict[str, type] = {kind.__name__: kind for kind in (EquilibriumScore, ITOScore, BoPITOScore)}


def save(
    score: nn.Module,
    path: str | os.PathLike,
    system: str | None = None,
    training: Mapping[str, Any] | None = None,
) -> None:
    """Write a trained score to `path`, complete or not at all.

    Args:
        score: an `EquilibriumScore`, `ITOScore` or `BoPITOScore` made of networks.
        path: destination; an older file there is replaced.
        system: name of the system, checked by `load`.
        training: how it was trained (hyperparameters, seed), as plain JSON values.

    Raises:
        ValueError: a score of another kind, an exact score, or `training` is not plain JSON.
        OSError: `path` cannot be written.
    """
    _refuse_foreign(score)
    header = _header(score, system, training)
    # copies, because safetensors refuses tensors that share memory
    tensors = {k: v.detach().cpu().clone().contiguous() for k, v in score.state_dict().items()}
    _replace(Path(path), to_bytes(tensors, metadata=header))


def load(
    path: str | os.PathLike, system: str | None = None, device: Device | str = "cpu"
) -> EquilibriumScore | ITOScore | BoPITOScore:
    """Read a score that `save` wrote, frozen and ready to be evaluated.

    Args:
        path: the file.
        system: name of the system that it must have been trained on; `None` for any.
        device: `auto`, `cpu` or `cuda`.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is truncated, of another program, of a newer format or of another
            system, or its tensors do not fit its hyperparameters. The message names the file.

    >>> import bopito_inverse as bi, tempfile, os
    >>> path = os.path.join(tempfile.mkdtemp(), "s_eq.safetensors")
    >>> bi.models.save(bi.models.EquilibriumScore((1,)), path, system="Prinz")
    >>> bi.models.load(path, system="DoubleWell")  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    ValueError: ...s_eq.safetensors was trained on 'Prinz', not on 'DoubleWell'
    """
    target = as_device(device)
    header, tensors = _read(path)
    if system is not None and header["system"] not in (None, system):
        raise ValueError(f"{path} was trained on {header['system']!r}, not on {system!r}")
    score = _untrained(path, header)
    _check_fit(path, score.state_dict(), tensors)
    score.load_state_dict(tensors)
    return score.to(target).eval().requires_grad_(False)


def read_header(path: str | os.PathLike) -> dict[str, Any]:
    """The header of a checkpoint, without its tensors.

    Returns:
        `format`, `format_version`, `kind`, `config`, `system`, `training`, `package_version`;
        `system` and `training` are `None` where they were not given.

    Raises:
        FileNotFoundError, ValueError: as `load`.
    """
    return _read(path, with_tensors=False)[0]


def _refuse_foreign(score: nn.Module) -> None:
    """Only networks can be stored: an exact score is computed from its system."""
    if type(score) not in KINDS.values():
        exact = ", which is exact: make it anew from its system" if hasattr(score, "grid") else ""
        raise ValueError(
            f"score must be one of {', '.join(KINDS)}, got {type(score).__name__}{exact}"
        )
    if isinstance(score, BoPITOScore):
        for name, kind in (("s_eq", EquilibriumScore), ("s_dyn", DynamicScore)):
            part = getattr(score, name)
            if type(part) is not kind:
                raise ValueError(
                    f"score.{name} must be a trained {kind.__name__}, got {type(part).__name__}; "
                    "exact scores are not stored, make them anew from their system"
                )


def _header(
    score: nn.Module, system: str | None, training: Mapping[str, Any] | None
) -> dict[str, str]:
    from bopito_inverse import __version__  # the package imports this module

    header = {
        "format": FORMAT,
        "format_version": str(FORMAT_VERSION),
        "kind": type(score).__name__,
        "config": json.dumps(score.config(), allow_nan=False),  # type: ignore[operator]
        "package_version": __version__,
    }
    if system is not None:
        header["system"] = system
    if training is not None:
        try:
            header["training"] = json.dumps(dict(training), allow_nan=False)
        except (TypeError, ValueError) as error:
            raise ValueError(f"training must hold plain JSON values: {error}") from error
    return header


def _replace(path: Path, content: bytes) -> None:
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with partial.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def _read(
    path: str | os.PathLike, with_tensors: bool = True
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    if not Path(path).exists():
        raise FileNotFoundError(f"{path} does not exist")
    try:
        with safe_open(path, framework="pt") as file:
            header = _parse(path, file.metadata() or {})
            keys = file.keys() if with_tensors else []
            return header, {key: file.get_tensor(key) for key in keys}
    except (SafetensorError, OSError) as error:
        raise ValueError(
            f"{path} is no readable safetensors file, it may be truncated: {error}"
        ) from error


def _parse(path: str | os.PathLike, raw: Mapping[str, str]) -> dict[str, Any]:
    """The header with its JSON decoded, after the checks that need no tensors."""
    if raw.get("format") != FORMAT:
        raise ValueError(f"{path} is a safetensors file of another program, not of {FORMAT}")
    try:
        header = {
            **{key: raw[key] for key in ("format", "kind", "package_version")},
            "format_version": int(raw["format_version"]),
            "config": json.loads(raw["config"]),
            "system": raw.get("system"),
            "training": json.loads(raw.get("training", "null")),
        }
    except (KeyError, ValueError) as error:
        raise ValueError(f"{path} has a damaged header: {error}") from error
    if header["format_version"] > FORMAT_VERSION:
        raise ValueError(
            f"{path} has format version {header['format_version']}, written by {FORMAT} "
            f"{header['package_version']}; this version reads up to {FORMAT_VERSION}, update it"
        )
    if header["kind"] not in KINDS:
        raise ValueError(f"{path} holds a {header['kind']!r}, expected one of {', '.join(KINDS)}")
    return header


def _untrained(path: str | os.PathLike, header: dict[str, Any]) -> Any:
    """A score with the hyperparameters of the header, the global random state untouched."""
    with torch.random.fork_rng(devices=[]):
        try:
            return KINDS[header["kind"]].from_config(header["config"])  # type: ignore[attr-defined]
        except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
            raise ValueError(
                f"{path} has hyperparameters that make no {header['kind']}: {error!r}"
            ) from error


def _check_fit(
    path: str | os.PathLike, expected: Mapping[str, Tensor], got: Mapping[str, Tensor]
) -> None:
    missing, unexpected = sorted(expected.keys() - got.keys()), sorted(got.keys() - expected.keys())
    if missing:
        raise ValueError(f"{path} lacks the tensors {missing} that its hyperparameters ask for")
    if unexpected:
        raise ValueError(
            f"{path} has tensors {unexpected} for which its hyperparameters leave no room"
        )
    for name, tensor in got.items():
        if tensor.shape != expected[name].shape:
            raise ValueError(
                f"{path} has {name} of shape {tuple(tensor.shape)}, "
                f"its hyperparameters ask for {tuple(expected[name].shape)}"
            )
        if not torch.isfinite(tensor).all():
            raise ValueError(f"{path} has NaN or infinite values in {name}")
