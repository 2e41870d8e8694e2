r"""Training of the scores by denoising score matching.

A batch of frames y (standardised), noised to x_t = alpha y + sigma eps at random t, gives the loss

    L = E |eps - eps_hat(x_t, t | ...)|^2 / alpha(t)^2,

which is the squared error of the velocity alpha eps - sigma y (see `scores`). The equilibrium
score sees frames drawn by weight, the dynamic scores see lagged pairs with their lag. s_eq is
frozen while s_dyn trains (Viguera Diez et al., arXiv 2410.10605, algorithm 1). Times t are
stratified over the batch, and what is returned is the exponential moving average of the parameters.

Where the force field is known, g = -grad U / kT of each frame (standardised, so times the scale)
is the score of mu itself, and the noised score is E[g | x_t] / alpha: target score matching (De
Bortoli et al., arXiv 2402.08667). Its target -(sigma / alpha) g is sharp at low noise, where that
of denoising is not, and the other way round. Where frames follow mu, both have the same mean given
x_t (elsewhere the force wins at low noise), and so has

    (1 - c) eps - c (sigma / alpha) g,    c = 1 / (1 + E[g^2] sigma^2 / alpha^2),

which has no variance at all in a harmonic well.
"""

import copy
import hashlib
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor, nn

from bopito_inverse.arguments import Device, as_count, as_device, as_frames
from bopito_inverse.datasets import Array, Frames, LaggedPairs, LagSampling, Trajectories
from bopito_inverse.models.painn import PaiNN
from bopito_inverse.models.scores import BoPITOScore, DynamicScore, EquilibriumScore, ITOScore
from bopito_inverse.noise import Scaling, VPSchedule, per_replica
from bopito_inverse.systems.molecules import Molecule

FOCUS = (-1.25, 0.5)  # log(alpha / sigma) from which states of a molecule are told apart, and to
GRAPH = ("kind", "atom_types", "bonds")  # what a network must know of a molecule
Batch = tuple[Tensor, ...]
Loss = Callable[[nn.Module, torch.Generator], Tensor]


class NetworkConfig(BaseModel):
    """Size of a network: `width`, `depth`, Fourier frequencies per input, radial functions.

    Width and depth are 128 and 3 by default, of molecules 64 and 5; only these have radial
    functions. By default the s_dyn of a molecule has the size of its s_eq.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    width: int | None = Field(default=None, ge=1)
    depth: int | None = Field(default=None, ge=1)
    n_frequencies: int = Field(default=8, ge=1)
    n_radial: int = Field(default=8, ge=2)

    def arguments(self, like: dict[str, Any] | None) -> dict[str, Any]:
        """What `scores` takes for a network; `like` is the graph of a molecule (see `_graph`),
        and may have sizes that are taken where none are given.
        """
        given = self.model_dump(exclude_none=True)
        if like is None:
            del given["n_radial"]
            return given
        return given | like | self.model_dump(exclude_unset=True, exclude_none=True)


class TrainingConfig(BaseModel):
    """Hyperparameters of one training run.

    The learning rate warms up over `warmup` steps and then falls to zero as a cosine; the moving
    average starts as a plain average, so that it forgets the first steps. `noise_start` is
    log(alpha / sigma) at t = 0: details finer than exp(-noise_start) scales are not resolved. By
    default it is 4, and the batch size 4096; of molecules 5, as their bonds need, and 128.

    `noise_focus` is the share of the noise levels that are drawn where frames of different states
    begin to overlap; the others are spread evenly over all. There it is decided in which state a
    draw ends, which the dynamic score of a molecule learns last.

    With `validation`, that share of the data (of frames, or of whole trajectories) is held out, and
    the moving average is tried on it every `validate_every` steps. With `patience`, training ends
    when so many of these trials in a row were no better than the best before, and the best of the
    tried scores is returned.

    `compile` lets `torch.compile` fuse the layers of a molecular network, which halves the time of
    a step after a minute of compiling; it needs a C++ compiler (on CUDA, Triton). With `precision`
    bfloat16, products of matrices are made in bfloat16 and all else in float32: for GPUs; on the
    CPU it gains little.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    steps: int = Field(default=4000, ge=1)
    batch_size: int | None = Field(default=None, ge=1)
    learning_rate: float = Field(default=2e-3, gt=0)
    warmup: int = Field(default=100, ge=0)
    ema_decay: float = Field(default=0.999, ge=0, lt=1)
    gradient_clip: float = Field(default=1.0, gt=0)
    lag_sampling: LagSampling = "log_uniform"
    noise_start: float | None = Field(default=None, gt=0)
    noise_focus: float = Field(default=0.0, ge=0, lt=1)
    validation: float = Field(default=0.0, ge=0, lt=1)
    validate_every: int = Field(default=500, ge=1)
    patience: int | None = Field(default=None, ge=1)
    checkpoint_every: int = Field(default=500, ge=1)
    compile: bool = False
    precision: Literal["float32", "bfloat16"] = "float32"
    network: NetworkConfig = NetworkConfig()

    @model_validator(mode="after")
    def _patience_fits(self) -> "TrainingConfig":
        if self.patience is not None and self.validation == 0:
            raise ValueError("patience needs data to try on: give validation a share above zero")
        return self

    def completed(self, of_molecule: bool) -> "TrainingConfig":
        """With the defaults that depend on what is trained."""
        own = {"batch_size": 128, "noise_start": 5.0}
        if not of_molecule:
            own = {"batch_size": 4096, "noise_start": 4.0}
        missing = {key: value for key, value in own.items() if getattr(self, key) is None}
        return self.model_copy(update=missing)


def train_equilibrium(
    frames: Array | Frames,
    weights: Array | None = None,
    config: TrainingConfig | None = None,
    seed: int = 0,
    folder: str | Path | None = None,
    device: Device | str = "auto",
    progress: bool = False,
    forces: Array | None = None,
    molecule: Molecule | None = None,
) -> EquilibriumScore:
    """Train s_eq on equilibrium frames.

    Args:
        frames: frames (n, *event) in data units, or weighted `Frames`.
        weights: weight of each frame (n,), for example from `simulate.mbar_weights`.
        config: hyperparameters.
        seed: integer; the same seed gives the same score on the same kind of device.
        folder: where the loss is logged (`metrics.csv`) and the state is kept: a run that was
            killed goes on from there when called again, and a finished one is not repeated.
        device: `auto`, `cpu` or `cuda`.
        progress: show a progress bar.
        forces: -grad U / kT at each frame (n, *event), in inverse data units: target score
            matching at low noise. It makes the shape of each well right, from few frames or wrongly
            weighted ones; how many frames are in which well still comes from frames and weights.
            Frames with constrained bonds have no such forces along them: leave this out.
        molecule: what the frames (n, n_atoms, 3) are of; the network is then equivariant.

    Raises:
        ValueError: NaN or infinite frames, weights or forces that do not fit, frames of another
            number of atoms, forces for a molecule with constraints, unknown device, or a folder
            that holds a run with other settings or data.
    """
    if isinstance(frames, Frames):
        if weights is not None:
            raise ValueError("weights must be None where frames are already weighted Frames")
        data = frames
    else:
        data = Frames(as_frames("frames", frames), weights)
    target = as_device(device)
    data = data.to(target)
    config = (config or TrainingConfig()).completed(molecule is not None)
    graph = _graph(molecule, data.x)
    score = _build(EquilibriumScore, data, config, graph, seed)

    known = [data.x, data.weights]
    g = stiffness = data.x.new_empty(0)
    if forces is not None:
        if molecule is not None and molecule.constraints is not None:
            raise ValueError(
                f"forces must be None for {molecule.name!r}, whose bonds are constrained: the "
                "density is sharp along them, but the force field has no force there"
            )
        g = as_frames("forces", forces, data.event_shape, target) * score.scaling.scale.to(target)
        if len(g) != len(data):
            raise ValueError(f"forces must be as many as frames ({len(data)}), got {len(g)}")
        known.append(g)
        stiffness = (data.weights @ g.double().square().flatten(1).mean(1)).float()

    def loss_on(part: Frames, own: Tensor) -> Loss:
        def loss(score: nn.Module, generator: torch.Generator) -> Tensor:
            drawn = part.draw(config.batch_size, generator)  # type: ignore[arg-type]
            force = None if forces is None else (g[own[drawn]], stiffness)
            return _velocity_loss(score, part.x[drawn], (), generator, config.noise_focus, force)

        return loss

    source = {"data": _digest(*known)} if folder is not None else {}
    losses = [loss_on(data.take(rows), rows) for rows in _held_out(len(data), config, target)]
    return _optimise(score, losses, config, seed, target, folder, progress, source)


def train_bopito(
    trajectories: Trajectories,
    s_eq: EquilibriumScore,
    lag_max: int,
    lambda_hat: float,
    config: TrainingConfig | None = None,
    seed: int = 0,
    folder: str | Path | None = None,
    device: Device | str = "auto",
    progress: bool = False,
    s_dyn: DynamicScore | None = None,
) -> BoPITOScore:
    """Train s_dyn on lagged pairs, with s_eq frozen.

    Of a molecule, s_dyn starts from the layers of s_eq where both networks have the same width, and
    then learns in some hundred steps to read x_0. Without that start it first has to find out what
    a molecule is, from the little that s_eq leaves unexplained, which took more than 6,000 steps
    for alanine dipeptide: leave the width to its default, that of s_eq.

    Args:
        trajectories: the dynamics, biased or not.
        s_eq: trained equilibrium score, in the unbiased equilibrium; it is not changed.
        lag_max: longest lag N_max in frames, shorter than the longest trajectory.
        lambda_hat: assumed decay per frame of the slowest process, in (0, 1).
        config, seed, folder, device, progress: as in `train_equilibrium`.
        s_dyn: trained dynamic score to go on from, which is not changed; `config.network` is then
            not used. By default a new one.

    Raises:
        ValueError: lag_max not below the longest trajectory, lambda_hat outside (0, 1), frames of
            another shape than s_eq's, or an s_dyn of another diffusion.
    """
    target = as_device(device)
    if trajectories.event_shape != s_eq.event_shape:
        raise ValueError(
            f"trajectories must hold frames of shape {s_eq.event_shape}, as s_eq does, "
            f"got {trajectories.event_shape}"
        )
    of_molecule = isinstance(getattr(s_eq, "network", None), PaiNN)
    config = (config or TrainingConfig()).completed(of_molecule)
    frozen = copy.deepcopy(s_eq).requires_grad_(False)
    begin = _build_like(s_eq, config, seed) if s_dyn is None else copy.deepcopy(s_dyn)
    bopito = BoPITOScore(frozen, begin.requires_grad_(True), lambda_hat, lag_max)
    return _train_on_pairs(bopito, trajectories, lag_max, config, seed, target, folder, progress)


def train_ito(
    trajectories: Trajectories,
    lag_max: int,
    config: TrainingConfig | None = None,
    seed: int = 0,
    folder: str | Path | None = None,
    device: Device | str = "auto",
    progress: bool = False,
    molecule: Molecule | None = None,
) -> ITOScore:
    """Train an implicit transfer operator, with no equilibrium prior.

    Arguments and errors are those of `train_bopito`, and `molecule` of `train_equilibrium`.
    """
    target = as_device(device)
    config = (config or TrainingConfig()).completed(molecule is not None)
    graph = _graph(molecule, trajectories.frames)
    score = _build(ITOScore, Frames(trajectories.frames), config, graph, seed)
    return _train_on_pairs(score, trajectories, lag_max, config, seed, target, folder, progress)


def _train_on_pairs(
    score: nn.Module,
    trajectories: Trajectories,
    lag_max: int,
    config: TrainingConfig,
    seed: int,
    device: torch.device,
    folder: str | Path | None,
    progress: bool,
) -> Any:
    lag_max = as_count("lag_max", lag_max)
    data = trajectories.to(device)

    def loss_on(part: Trajectories) -> Loss:
        pairs = LaggedPairs(part, lag_max, config.lag_sampling)

        def loss(score: nn.Module, generator: torch.Generator) -> Tensor:
            x_0, x, lag = pairs.sample(config.batch_size, generator)  # type: ignore[arg-type]
            x_0 = score.scaling.standardise(x_0)  # type: ignore[union-attr, operator]
            return _velocity_loss(score, x, (x_0, lag), generator, config.noise_focus)

        return loss

    parts = [data.take(rows) for rows in _held_out(len(data), config, device)]
    losses = [loss_on(part) for part in parts]

    source: dict[str, Any] = {"lag_max": lag_max}
    if folder is not None:
        source["data"] = _digest(trajectories.frames, trajectories.lengths)
        if isinstance(score, BoPITOScore):
            source["lambda_hat"] = score.lambda_hat
            source["s_eq"] = _digest(*score.s_eq.state_dict().values())
            source["s_dyn"] = _digest(*score.s_dyn.state_dict().values())
    return _optimise(score, losses, config, seed, device, folder, progress, source)


def _velocity_loss(
    score: nn.Module,
    x: Tensor,
    condition: Batch,
    generator: torch.Generator,
    focus: float = 0.0,
    force: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Squared error of the velocity; `force` is g of each frame, (B, *event), and E[g^2], ()."""
    y = score.scaling.standardise(x)  # type: ignore[union-attr, operator]
    noise: VPSchedule = score.noise  # type: ignore[assignment]
    offsets = torch.rand(len(y), generator=generator, device=y.device)
    t = _focused((torch.arange(len(y), device=y.device) + offsets) / len(y), noise, focus)
    eps = torch.randn(y.shape, generator=generator, device=y.device)
    eps = score.scaling.project(eps)  # type: ignore[union-attr, operator]
    alpha, sigma = per_replica(noise.alpha(t), y), per_replica(noise.sigma(t), y)
    eps_hat = score(alpha * y + sigma * eps, t, *condition)
    if force is None:
        return ((eps - eps_hat) / alpha).square().mean()
    g, stiffness = force
    ratio = sigma / alpha
    c = 1 / (1 + stiffness * ratio.square())
    return (((1 - c) * eps - c * ratio * g - eps_hat) / alpha).square().mean()


def _focused(t: Tensor, noise: VPSchedule, share: float) -> Tensor:
    """Uniform t, of which a share is moved to where log alpha / sigma is within FOCUS."""
    if share == 0:
        return t
    first, last = ((noise.start - ratio) / (noise.start - noise.end) for ratio in FOCUS)
    moved = first + (last - first) * t / share
    return torch.where(t < share, moved, (t - share) / (1 - share))


def _graph(molecule: Molecule | None, frames: Tensor) -> dict[str, Any] | None:
    """What a network must know of the molecule of the frames, and None where there is none."""
    if molecule is None:
        return None
    molecule.as_frames("frames", frames[:: max(1, len(frames) // 100)])
    known = ("painn", molecule.atom_types.tolist(), molecule.bonds.tolist())
    return dict(zip(GRAPH, known, strict=True))


def _build(
    kind: type, data: Frames, config: TrainingConfig, graph: dict[str, Any] | None, seed: int
) -> Any:
    """A score with initial parameters drawn from `seed`, and the distances of the frames."""
    noise = VPSchedule(start=config.noise_start)  # type: ignore[arg-type]
    scaling = _scaling_of(data, centred=graph is not None)
    score = _drawn(kind, data.event_shape, config.network.arguments(graph), noise, scaling, seed)
    if isinstance(score.network, PaiNN):
        score.network.learn_distances(scaling.to(data.x.device).standardise(data.x), data.weights)
    return score


def _build_like(s_eq: EquilibriumScore, config: TrainingConfig, seed: int) -> DynamicScore:
    """A dynamic score of the same diffusion and molecule as `s_eq`, which may be exact."""
    own: Any = getattr(s_eq, "network", None)
    known = isinstance(own, PaiNN)
    like = (
        {key: own.config()[key] for key in (*GRAPH, *NetworkConfig.model_fields)} if known else None
    )
    arguments = config.network.arguments(like)
    score = _drawn(DynamicScore, s_eq.event_shape, arguments, s_eq.noise, s_eq.scaling, seed)
    if known:
        score.network.start_from(own)
    return score


def _drawn(kind: type, *arguments: Any) -> Any:
    """A score, the last argument being the seed; the global random state stays as it is."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(arguments[-1])
        return kind(*arguments[:-1])


def _held_out(n: int, config: TrainingConfig, device: torch.device) -> list[Tensor]:
    """Rows to train on and, where asked for, rows to validate on, spread evenly."""
    rows = torch.arange(n, device=device)
    if config.validation == 0:
        return [rows]
    out = (rows + 1) * config.validation % 1 < config.validation - 1e-9
    if out.all() or not out.any():
        raise ValueError(
            f"validation must leave something to train on and to validate on, got a share of "
            f"{config.validation:g} of {n}"
        )
    return [rows[~out], rows[out]]


def _scaling_of(frames: Frames, centred: bool) -> Scaling:
    """Mean of each component and one scale for all, so that directions are not distorted."""
    if centred:
        x = Scaling(centred=True).to(frames.x.device).standardise(frames.x)
        mean: Any = 0.0
        variance = frames.weights @ x.double().square().flatten(1).mean(1)
    else:
        mean, variance = frames.mean().tolist(), frames.std().square().mean()
    if not variance > 0:
        raise ValueError("frames must differ from each other, got frames that are all equal")
    return Scaling(mean, math.sqrt(variance), centred)


def _digest(*tensors: Tensor) -> str:
    """SHA-256 of the values, by which a folder knows the data of its run."""
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def _optimise(
    score: nn.Module,
    losses: list[Loss],
    config: TrainingConfig,
    seed: int,
    device: torch.device,
    folder: str | Path | None,
    progress: bool,
    source: dict[str, Any],
) -> Any:
    """What `loop.optimise` makes of `score`; `source` says what it is trained on."""
    from bopito_inverse.models.loop import optimise  # Lightning takes seconds to import

    kind, training = type(score).__name__, config.model_dump()
    noise = score.noise.config()  # type: ignore[union-attr, operator]
    settings = {"score": kind, "seed": seed, "noise": noise, "training": training, **source}
    where = None if folder is None else Path(folder)
    return optimise(score, losses, config, seed, device, where, progress, settings)
