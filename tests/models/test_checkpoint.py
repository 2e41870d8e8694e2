import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import bopito_inverse as bi
from bopito_inverse.models import (
    BoPITOScore,
    DynamicScore,
    EquilibriumScore,
    ITOScore,
    TrainingConfig,
)
from bopito_inverse.models.checkpoint import read_header
from bopito_inverse.noise import Scaling, VPSchedule
from bopito_inverse.systems import Prinz, TransferOperator

SIZE = {"width": 8, "depth": 1, "n_frequencies": 2}


def bopito() -> BoPITOScore:
    scaling, noise = Scaling([0.25], 1.5), VPSchedule(3.0, -5.0)
    s_eq = EquilibriumScore((1,), SIZE, noise, scaling)
    return BoPITOScore(s_eq, DynamicScore((1,), SIZE, noise, scaling), 0.994, 50)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "model.safetensors"
    training = TrainingConfig(steps=7).model_dump() | {"seed": 3}
    bi.models.save(bopito(), path, system="Prinz", training=training)
    return path


def rewrite(path: Path, **changes: str | None) -> None:
    """The same tensors under a changed header; `None` removes a key."""
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        header = file.metadata() | changes
    save_file(load_file(path), path, {k: v for k, v in header.items() if v is not None})


def test_header_has_all_that_made_the_model(path: Path) -> None:
    header = read_header(path)
    assert header["format"] == "bopito_inverse"
    assert header["kind"] == "BoPITOScore"
    assert header["system"] == "Prinz"
    assert header["package_version"] == bi.__version__
    assert header["training"]["steps"] == 7
    assert header["training"]["seed"] == 3
    assert header["config"]["lambda_hat"] == 0.994
    assert header["config"]["lag_max"] == 50
    assert header["config"]["s_dyn"]["network"] == SIZE
    assert header["config"]["s_eq"]["noise"] == {"start": 3.0, "end": -5.0}


def test_load_restores_both_scores_and_the_standardisation(path: Path) -> None:
    loaded: Any = bi.models.load(path, system="Prinz")
    assert isinstance(loaded, BoPITOScore)
    assert (loaded.lambda_hat, loaded.lag_max) == (0.994, 50)
    assert loaded.noise == VPSchedule(3.0, -5.0)
    assert loaded.scaling.matches(Scaling([0.25], 1.5))
    assert loaded.s_dyn.scaling.matches(Scaling([0.25], 1.5))


def test_shared_tensors_are_accepted(tmp_path: Path) -> None:
    score = bopito()
    score.s_dyn.scaling = score.s_eq.scaling
    bi.models.save(score, tmp_path / "shared.safetensors")
    assert bi.models.load(tmp_path / "shared.safetensors").scaling.matches(score.scaling)


def test_load_leaves_the_global_random_state(path: Path) -> None:
    before = torch.get_rng_state()
    bi.models.load(path)
    assert torch.equal(before, torch.get_rng_state())


def test_another_system_is_refused(path: Path) -> None:
    with pytest.raises(ValueError, match=r"model.safetensors was trained on 'Prinz', not on 'Doub"):
        bi.models.load(path, system="DoubleWell")
    assert read_header(path)["system"] == "Prinz"


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def truncate_header(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:40])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def not_safetensors(path: Path) -> None:
    path.write_text("step,loss\n0,1.0\n" * 100)


def a_pickle(path: Path) -> None:
    path.write_bytes(pickle.dumps({"a": list(range(1000))}))


def a_torch_file(path: Path) -> None:
    torch.save({"weight": torch.ones(3)}, path)


def foreign(path: Path) -> None:
    save_file({"weight": torch.ones(3)}, path)


def foreign_with_header(path: Path) -> None:
    save_file({"weight": torch.ones(3)}, path, {"format": "pt"})


def newer(path: Path) -> None:
    rewrite(path, format_version="2", package_version="7.1.0")


def unknown_kind(path: Path) -> None:
    rewrite(path, kind="FlowMatcher")


def no_kind(path: Path) -> None:
    rewrite(path, kind=None)


def broken_json(path: Path) -> None:
    rewrite(path, config="{")


def changed_config(path: Path, change: Callable[[dict], Any]) -> None:
    config = read_header(path)["config"]
    change(config)
    rewrite(path, config=json.dumps(config))


def other_width(path: Path) -> None:
    changed_config(path, lambda c: c["s_dyn"]["network"].update(width=9))


def deeper(path: Path) -> None:
    changed_config(path, lambda c: c["s_dyn"]["network"].update(depth=2))


def shallower(path: Path) -> None:
    changed_config(path, lambda c: c["s_eq"]["network"].update(depth=0))


def bad_lambda(path: Path) -> None:
    changed_config(path, lambda c: c.update(lambda_hat=1.5))


def unknown_option(path: Path) -> None:
    changed_config(path, lambda c: c["s_eq"]["network"].update(colour=3))


def no_lag_max(path: Path) -> None:
    changed_config(path, lambda c: c.pop("lag_max"))


def not_finite(path: Path) -> None:
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        header = file.metadata()
    tensors = load_file(path)
    tensors["s_dyn.network.out.bias"][0] = torch.nan
    save_file(tensors, path, header)


DAMAGE = {
    truncate: "no readable safetensors file",
    truncate_header: "no readable safetensors file",
    empty: "no readable safetensors file",
    not_safetensors: "no readable safetensors file",
    a_pickle: "no readable safetensors file",
    a_torch_file: "no readable safetensors file",
    foreign: "of another program",
    foreign_with_header: "of another program",
    newer: r"format version 2, written by bopito_inverse 7\.1\.0",
    unknown_kind: "holds a 'FlowMatcher', expected one of EquilibriumScore",
    no_kind: "damaged header",
    broken_json: "damaged header",
    other_width: r"s_dyn\.network\.\S+ of shape",
    deeper: r"lacks the tensors \['s_dyn.network.layers.1.bias'",
    shallower: r"has tensors \['s_eq.network.layers.0.bias'",
    bad_lambda: r"lambda_hat must lie in \(0, 1\), got 1.5",
    unknown_option: "colour",
    no_lag_max: "lag_max",
    not_finite: "NaN or infinite values in s_dyn.network.out.bias",
}


@pytest.mark.parametrize("damage", DAMAGE, ids=lambda f: f.__name__)
def test_damaged_or_foreign_file_is_refused_by_name(path: Path, damage: Callable) -> None:
    damage(path)
    with pytest.raises(ValueError, match=DAMAGE[damage]) as error:
        bi.models.load(path)
    assert str(path) in str(error.value)


def test_missing_file_and_folder(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nothing.safetensors"):
        bi.models.load(tmp_path / "nothing.safetensors")
    with pytest.raises(ValueError, match=str(tmp_path)):
        bi.models.load(tmp_path)


def test_failed_save_leaves_the_old_file(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = path.read_bytes()
    with pytest.raises(ValueError, match="training must hold plain JSON values"):
        bi.models.save(bopito(), path, training={"schedule": VPSchedule()})
    with monkeypatch.context() as broken:
        broken.setattr("os.fsync", _disk_full)
        with pytest.raises(OSError, match="No space left"):
            bi.models.save(bopito(), path, system="DoubleWell")
    assert path.read_bytes() == before
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def _disk_full(descriptor: int) -> None:
    raise OSError(28, "No space left on device")


def test_save_replaces_the_old_file(path: Path) -> None:
    bi.models.save(ITOScore((2,), SIZE), path)
    assert isinstance(bi.models.load(path), ITOScore)
    assert read_header(path)["system"] is None


def test_exact_and_unknown_scores_are_refused(tmp_path: Path) -> None:
    exact = TransferOperator(Prinz(), grid_size=50)
    s_eq = exact.equilibrium_score()
    s_dyn = exact.dynamic_score(s_eq, 0.99)
    path = tmp_path / "exact.safetensors"
    for score in (s_eq, s_dyn):
        with pytest.raises(ValueError, match="which is exact: make it anew"):
            bi.models.save(score, path)
    with pytest.raises(ValueError, match=r"score.s_eq must be a trained EquilibriumScore"):
        bi.models.save(BoPITOScore(s_eq, s_dyn, 0.99, 50), path)
    mixed = EquilibriumScore((1,), SIZE)
    with pytest.raises(ValueError, match=r"score.s_dyn must be a trained DynamicScore"):
        bi.models.save(BoPITOScore(mixed, s_dyn, 0.99, 50), path)
    with pytest.raises(ValueError, match=r"got Linear$"):
        bi.models.save(torch.nn.Linear(1, 1), path)
    assert not path.exists()
