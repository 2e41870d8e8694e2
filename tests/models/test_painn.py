"""The molecular network: symmetries, derivatives, parts of a batch, training and files."""

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.spatial.transform import Rotation

from bopito_inverse.datasets import Trajectories
from bopito_inverse.models import painn, train_bopito, train_equilibrium, train_ito
from bopito_inverse.models.checkpoint import load, save
from bopito_inverse.models.painn import PaiNN
from bopito_inverse.models.train import NetworkConfig, TrainingConfig
from bopito_inverse.sampling import Propagate, Renoise, Rollout, generate, sample
from bopito_inverse.shipped import shipped_data
from bopito_inverse.systems import AlanineDipeptide, Molecule

ALANINE = AlanineDipeptide()
DIALANINE = Molecule(shipped_data("ala2") / "dialanine.pdb")
SIZE = NetworkConfig(width=8, depth=2, n_radial=4)
SHORT = TrainingConfig(steps=30, batch_size=16, noise_start=5.0, network=SIZE)


def network(molecule: Molecule = ALANINE, conditional: bool = True) -> PaiNN:
    """A network in float64 whose every parameter matters."""
    torch.manual_seed(0)
    made = PaiNN(
        molecule.event_shape,
        conditional,
        molecule.atom_types.tolist(),
        molecule.bonds.tolist(),
        width=8,
        depth=3,
        n_radial=5,
    ).double()
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    frames = noised(molecule, 50)
    made.learn_distances(frames, torch.ones(50, dtype=torch.float64))
    return made


def noised(molecule: Molecule = ALANINE, n: int = 6, noise: float = 0.3) -> torch.Tensor:
    """Standardised frames around the structure, with no centroid."""
    y = molecule.positions.double() / 0.17
    y = y + noise * torch.randn(n, *y.shape, dtype=torch.float64)
    return y - y.mean(1, keepdim=True)


def moved(x: torch.Tensor, seed: int = 0) -> torch.Tensor:
    """Each frame turned in a way of its own."""
    turn = Rotation.random(len(x), rng=np.random.default_rng(seed)).as_matrix()
    return x @ torch.from_numpy(turn).mT


@pytest.mark.parametrize("molecule", [ALANINE, DIALANINE], ids=lambda m: m.name)
def test_rotations_and_translations(molecule: Molecule) -> None:
    net, x, x_0 = network(molecule), noised(molecule), noised(molecule)
    ratio, lag = torch.linspace(-4, 5, 6).double(), torch.arange(1.0, 7).double()
    out = net(x, ratio, net.context(x_0, lag))
    turned = net(moved(x) + 3.0, ratio, net.context(moved(x_0, 1) - 2.0, lag))
    torch.testing.assert_close(turned, moved(out))
    assert out.mean(1).abs().max() < 1e-12
    assert out.abs().mean() > 1e-3


def test_mirror_images_differ() -> None:
    net, x, x_0 = network(), noised(), noised()
    mirror = torch.tensor([1.0, 1.0, -1.0], dtype=torch.float64)
    ratio, lag = torch.tensor(1.0).double(), torch.tensor(5.0).double()
    out = net(x, ratio, net.context(x_0, lag))
    of_mirrored = net(x * mirror, ratio, net.context(x_0, lag)) * mirror
    assert (out - of_mirrored).abs().mean() > 0.01 * out.abs().mean()
    given_mirrored = net(x, ratio, net.context(x_0 * mirror, lag))
    assert (out - given_mirrored).abs().mean() > 0.01 * (out - net(x, ratio)).abs().mean()


def test_equivalent_atoms_are_interchangeable() -> None:
    net, x, x_0 = network(), noised(), noised()
    ratio, lag = torch.tensor(1.0).double(), torch.tensor(5.0).double()
    out = net(x, ratio, net.context(x_0, lag))
    methyl = [i for i in range(22) if ALANINE.atom_types[i] == ALANINE.atom_types[1]]
    assert len(methyl) == 3
    order = list(range(22))
    order[methyl[0]], order[methyl[1]] = methyl[1], methyl[0]
    swapped = net(x[:, order], ratio, net.context(x_0[:, order], lag))
    torch.testing.assert_close(swapped, out[:, order])
    order = list(range(22))
    order[4], order[5] = 5, 4  # a carbon and an oxygen are not
    assert (net(x[:, order], ratio) - net(x, ratio)[:, order]).abs().max() > 0.01


def test_derivatives_in_float64() -> None:
    net, x_0 = network(), noised(n=1)
    ratio = torch.tensor(1.0).double()
    context = net.context(x_0, torch.tensor(5.0).double())
    x = noised(n=1).requires_grad_()
    assert torch.autograd.gradcheck(lambda y: net(y, ratio, context)[:, :4], (x,), fast_mode=True)
    direction = torch.randn_like(x)
    _, forward = torch.func.jvp(lambda y: net(y, ratio, context), (x.detach(),), (direction,))
    step = 1e-5 * direction
    with torch.no_grad():
        difference = net(x + step, ratio, context) - net(x - step, ratio, context)
    torch.testing.assert_close(forward, difference / 2e-5, rtol=1e-6, atol=1e-6)


def test_parts_of_a_batch_are_the_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    net, x, x_0 = network(), noised(n=7), noised(n=7)
    for ratio, lag in ((torch.linspace(-4, 5, 7), torch.arange(1.0, 8)), (torch.tensor(1.0),) * 2):
        ratio, lag = ratio.double(), lag.double()
        whole = net(x, ratio, net.context(x_0, lag))
        monkeypatch.setitem(painn.FRAMES_AT_ONCE, "cpu", 3)
        torch.testing.assert_close(net(x, ratio, net.context(x_0, lag)), whole)
        monkeypatch.setitem(painn.FRAMES_AT_ONCE, "cpu", 32)


def test_distances_are_those_of_the_frames() -> None:
    net, frames = network(), noised(n=400)
    net.learn_distances(frames, torch.full((400,), 1 / 400, dtype=torch.float64))
    d = torch.cdist(frames, frames)[:, 4, 5]
    kind = net.pair_kind[4, 5]
    assert float(net.pair_mean[kind]) == pytest.approx(float(d.mean()), rel=1e-6)
    assert float(net.pair_std[kind]) == pytest.approx(float(d.std(correction=0)), rel=1e-5)
    assert net.pair_kind[4, 5] == net.pair_kind[5, 4]
    assert net.pair_kind[0, 1] == net.pair_kind[0, 2] != net.pair_kind[0, 4]


def test_noised_distances_have_unit_size() -> None:
    net, x = network(), noised(n=2000, noise=0.02)
    net.learn_distances(x, torch.ones(2000, dtype=torch.float64))
    for ratio in (-4.0, 0.0, 4.0):
        r = torch.tensor(ratio).double()
        alpha, sigma = torch.sigmoid(2 * r).sqrt(), torch.sigmoid(-2 * r).sqrt()
        z = torch.randn_like(x)
        u = net._pairs(alpha * x + sigma * (z - z.mean(1, keepdim=True)), r).u
        only = torch.bincount(net.pair_kind.flatten())[net.pair_kind] == 2  # itself and back
        assert only.sum() > 50
        assert u.mean(0)[only].abs().max() < 0.5
        assert 0.4 < u.std(0)[only].min() < u.std(0)[only].max() < 1.2


def test_start_from_another_network() -> None:
    """All but what is put out is that of the other; a deeper one gives its first layers."""
    known, fresh = network(conditional=False), network()
    fresh.start_from(known)
    for mine, theirs in ((fresh.out[2], known.out[2]), (fresh.springs, known.springs)):
        assert not torch.equal(mine.weight, theirs.weight)
        mine.load_state_dict(theirs.state_dict())
    x, ratio = noised(), torch.tensor(0.3, dtype=torch.float64)
    torch.testing.assert_close(fresh(x, ratio), known(x, ratio))
    for layers in (fresh.layers, fresh.reader):
        for mine, theirs in zip(layers, known.layers, strict=False):
            assert torch.equal(mine.filters, theirs.filters)


def test_start_from_a_network_of_another_size() -> None:
    known = network(conditional=False)
    for other, taken in (({"depth": 2}, True), ({"width": 12}, False)):
        arguments = {k: v for k, v in known.config().items() if k != "kind"} | other
        fresh = PaiNN(ALANINE.event_shape, True, **arguments).double()
        fresh.start_from(known)
        assert torch.equal(fresh.pair_mean, known.pair_mean)
        assert torch.equal(fresh.layers[1].filters, known.layers[1].filters) == taken
        assert not fresh.springs.weight.any()  # as s_eq is, before any training


def frames(n: int = 40) -> torch.Tensor:
    torch.manual_seed(1)
    return moved(ALANINE.positions.double() + 0.005 * torch.randn(n, 22, 3)).float() + 1.0


def test_training_sampling_and_files(tmp_path: Path) -> None:
    trajectories = Trajectories([frames(), frames()], 1.0)
    held_out = SHORT.model_copy(update={"validation": 0.5, "validate_every": 10, "patience": 2})
    s_eq = train_equilibrium(frames(), config=held_out, molecule=ALANINE, folder=tmp_path / "eq")
    rows = (tmp_path / "eq" / "validation.csv").read_text().splitlines()
    assert rows[0] == "step,loss"
    assert int(rows[1].split(",")[0]) == 10
    bopito = train_bopito(trajectories, s_eq, lag_max=4, lambda_hat=0.9, config=SHORT)
    ito = train_ito(trajectories, lag_max=4, config=SHORT, molecule=ALANINE)
    torch.testing.assert_close(bopito.s_dyn.network.pair_mean, s_eq.network.pair_mean)
    drift = bopito.s_dyn.network.layers[0].filters - s_eq.network.layers[0].filters
    assert 0 < drift.abs().max() < 0.1  # s_dyn started from s_eq
    for score in (s_eq, bopito, ito):
        save(score, tmp_path / "score.safetensors")
        loaded = load(tmp_path / "score.safetensors")
        assert loaded.scaling.centred
        for name, value in score.state_dict().items():
            assert torch.equal(value, loaded.state_dict()[name])
    made = generate(s_eq, 3, seed=1)
    assert made.shape == (3, 22, 3)
    assert made.mean(1).abs().max() < 1e-6
    step = Rollout([Propagate(2), Renoise()], step_lag=10)
    from bopito_inverse.interpolator import Interpolator

    model = Interpolator(bopito)
    out = sample(model, step, n_int=20.0, starts=frames(4), n_steps=2)
    assert out is not None
    assert torch.isfinite(out.frames).all()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("option", [{"compile": True}, {"precision": "bfloat16"}], ids=str)
def test_faster_training_is_the_same_training(
    option: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled, real = [], torch.nn.Module.compile

    def in_little_time(module: torch.nn.Module) -> None:
        compiled.append(type(module).__name__)
        real(module, backend="eager")

    monkeypatch.setattr(torch.nn.Module, "compile", in_little_time)
    config = SHORT.model_copy(update={"steps": 3, "learning_rate": 1e-2, "warmup": 0})
    slow = train_equilibrium(frames(), config=config, molecule=ALANINE)
    fast = train_equilibrium(frames(), config=config.model_copy(update=option), molecule=ALANINE)
    x, t = frames(4), torch.tensor(0.3)
    x = slow.scaling.standardise(x)
    torch.testing.assert_close(fast(x, t), slow(x, t), rtol=0.05, atol=0.02)
    assert (slow(x, t) - slow.noise.sigma(t) * x).abs().max() > 1e-3  # it has learned something
    assert compiled == (["_Layer"] * 2 if "compile" in option else [])


def test_early_stopping_returns_the_best(tmp_path: Path) -> None:
    config = SHORT.model_copy(
        update={
            "steps": 400,
            "learning_rate": 1.0,  # diverges
            "gradient_clip": 1e6,
            "ema_decay": 0.0,
            "validation": 0.25,
            "validate_every": 1,
            "patience": 3,
        }
    )
    train_equilibrium(frames(), config=config, molecule=ALANINE, folder=tmp_path)
    rows = (tmp_path / "validation.csv").read_text().splitlines()[1:]
    losses = [float(row.split(",")[1]) for row in rows]
    assert len(losses) < 400
    assert min(losses) not in losses[-3:]


def test_a_run_that_stopped_early_is_not_trained_on(tmp_path: Path) -> None:
    change = {"validation": 0.25, "validate_every": 1, "patience": 1, "learning_rate": 1e-9}
    config = SHORT.model_copy(update=change | {"warmup": 0, "checkpoint_every": 1, "steps": 400})
    first = train_equilibrium(frames(), config=config, molecule=ALANINE, folder=tmp_path)
    log, state = (tmp_path / "validation.csv").read_text(), tmp_path / "last.ckpt"
    written = state.stat().st_mtime_ns
    again = train_equilibrium(frames(), config=config, molecule=ALANINE, folder=tmp_path)
    assert log.count("\n") < 400
    assert ((tmp_path / "validation.csv").read_text(), state.stat().st_mtime_ns) == (log, written)
    for a, b in zip(first.parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.filterwarnings("ignore:`torch.jit")  # of torch's own compiler
def test_compiling_without_a_compiler_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch._inductor.config.cpp.cxx", ("no-such-compiler",))
    monkeypatch.setattr("torch._inductor.config.force_disable_caches", True)
    config = SHORT.model_copy(update={"compile": True, "batch_size": 7})
    with pytest.raises(ValueError, match="compile must be false where"):
        train_equilibrium(frames(), config=config, molecule=ALANINE)


def test_s_dyn_has_the_size_of_s_eq_and_molecules_their_defaults() -> None:
    s_eq = train_equilibrium(
        frames(), config=TrainingConfig(steps=1, network=SIZE), molecule=ALANINE
    )
    assert s_eq.noise.start == 5.0
    data = Trajectories(frames()[None], frame_time=1.0)
    bopito = train_bopito(data, s_eq, 2, 0.9, config=TrainingConfig(steps=1))
    sizes = bopito.s_dyn.network.config()
    assert (sizes["width"], sizes["depth"], sizes["n_radial"]) == (8, 2, 4)


def test_a_diverging_run_says_so(tmp_path: Path) -> None:
    wild = SHORT.model_copy(update={"steps": 200, "learning_rate": 1e30, "gradient_clip": 1e30})
    with pytest.raises(ValueError, match=r"the loss is (nan|inf) after .* lower learning_rate"):
        train_equilibrium(frames(), config=wild, molecule=ALANINE, folder=tmp_path)


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match=r"frames of shape \(22, 3\), got \(32, 3\)"):
        train_equilibrium(DIALANINE.positions[None].repeat(3, 1, 1), molecule=ALANINE)
    with pytest.raises(ValueError, match="frames must be in nm, with the atoms in the order of"):
        train_equilibrium(10 * frames(), molecule=ALANINE)
    with pytest.raises(ValueError, match="forces must be None for 'alanine dipeptide'"):
        train_equilibrium(frames(), config=SHORT, molecule=ALANINE, forces=frames())
    with pytest.raises(ValueError, match="patience needs data to try on"):
        TrainingConfig(patience=3)
    with pytest.raises(ValueError, match="atom_types must hold one type for each atom"):
        PaiNN((22, 3), False, [0, 1], [])
    alone = SHORT.model_copy(update={"validation": 0.001})
    with pytest.raises(ValueError, match="validation must leave something"):
        train_equilibrium(frames(), config=alone, molecule=ALANINE)


@pytest.mark.gpu
def test_network_on_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both devices agree, whole and in parts."""
    net, x, x_0 = network(), noised(n=7), noised(n=7)
    ratio, lag = torch.linspace(-4, 5, 7).double(), torch.arange(1.0, 8).double()
    cpu = net(x, ratio, net.context(x_0, lag))
    net, x, x_0, ratio, lag = (part.cuda() for part in (net, x, x_0, ratio, lag))
    torch.testing.assert_close(net(x, ratio, net.context(x_0, lag)).cpu(), cpu)
    monkeypatch.setitem(painn.FRAMES_AT_ONCE, "cuda", 3)
    torch.testing.assert_close(net(x, ratio, net.context(x_0, lag)).cpu(), cpu)


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("compiled", [False, True])
def test_training_on_cuda(compiled: bool, precision: str) -> None:
    """Both scores learn there what they learn on the CPU, and make frames with the same bonds."""
    fast = learned_bonds("cuda", compile=compiled, precision=precision)
    torch.testing.assert_close(fast, learned_bonds("cpu"), rtol=0.1, atol=0)


@cache
def learned_bonds(device: str, **options: Any) -> torch.Tensor:
    """Median length of each bond in frames of a small model, trained and sampled on a device."""
    paths = Trajectories.read(shipped_data("ala2") / "biased.npz").take(torch.arange(20))
    config = TrainingConfig(steps=200, network=SIZE, **options)
    s_eq = train_equilibrium(paths.frames, config=config, device=device, molecule=ALANINE)
    bopito = train_bopito(paths, s_eq, 50, 0.999, config=config, device=device)
    step, starts = Rollout([Propagate(50)], 50), paths.frames[:512]
    made = sample(bopito, step, starts=starts, n_steps=1, device=device)
    assert made is not None
    pairs = made.frames.unflatten(0, (512, 2))[:, 1][:, ALANINE.bonds]
    return (pairs[:, :, 0] - pairs[:, :, 1]).norm(dim=-1).median(0).values
