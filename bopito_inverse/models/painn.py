r"""Equivariant message passing between all atoms of one molecule.

Atoms i carry scalars s_i (F) and vectors v_i (3, F). With unit vectors n_ij and K radial functions
phi_k of the distance d_ij, a layer adds to atom i

    ds_i = sum_j sum_k phi_k(d_ij) A_k a_j,
    dv_i = sum_j sum_k phi_k(d_ij) (B_k b_j v_j + C_k c_j n_ij),

where an MLP of s_j gives a_j, b_j and c_j, and A_k, B_k and C_k scale each feature (Schuett et al.,
arXiv 2102.03150, eqs. 7 and 8, with filters that are linear in the radial functions). The sum over
j and k is then a product of a matrix (A, K A) of radial functions with features of atoms (K A, F):
nothing of size (A, A, F) is made. Then features mix at each atom, through p . q and p . (q x r) of
three combinations p, q and r of its vectors, shortened to below one. A cross product turns as a
vector does but keeps its sign under reflection, so that a molecule differs from its mirror image
(Schreiner et al., arXiv 2305.18046).

Distances are seen in units of what is known of each pair. With mean m and standard deviation s over
the frames of the training, the distance d in a noised frame has about

    E[d]^2 = alpha^2 m^2 + 4 sigma^2,    Var[d] = alpha^2 s^2 + 2 sigma^2,

and phi_k are Gaussians of u = (d - E[d]) / sd[d]: they resolve stiff bonds and loose pairs alike,
at every noise level. Pairs of atoms of the same two types, equally many bonds apart, are of one
*kind* and share m and s. Beside the messages, each kind of pair has a *spring*, a force along n_ij
that is linear in phi_k and u with coefficients that depend on t.

The frame x_0 is read as scalars of its atoms. What is learnt is therefore a density of shapes: the
orientation of the next frame is uniform, whatever that of x_0.
"""

import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import layer_norm, silu

from bopito_inverse.models.networks import Fourier, in_parts

CLEAN_WIDTH = 0.02  # least width of a distance in a frame without noise, in scales
FRAMES_AT_ONCE = {"cpu": 32, "cuda": 4096}  # that stay in the cache; that keep a GPU busy
READER_DEPTH = 2
RECOMPILE_LIMIT = 64  # kinds of layers, of parts of a batch, and of derivatives, in one process


class PaiNN(nn.Module):
    """Equivariant network for dense batches of one molecule.

    Args:
        event_shape: (n_atoms, 3).
        conditional: whether it depends on (x_0, lag).
        atom_types: (n_atoms,), whole numbers from zero; atoms of equal type are interchangeable.
        bonds: (n_bonds, 2), indices of atoms.
        width: features of an atom, F.
        depth: number of layers.
        n_radial: radial functions, K.
        n_frequencies: Fourier frequencies of t and of the lag.
    """

    pair_kind: Tensor
    pair_mean: Tensor
    pair_std: Tensor
    types: Tensor

    def __init__(
        self,
        event_shape: tuple[int, ...],
        conditional: bool,
        atom_types: Sequence[int],
        bonds: Sequence[Sequence[int]],
        width: int = 64,
        depth: int = 5,
        n_radial: int = 8,
        n_frequencies: int = 8,
    ) -> None:
        super().__init__()
        if tuple(event_shape) != (len(atom_types), 3):
            raise ValueError(
                f"atom_types must hold one type for each atom of frames {tuple(event_shape)}, got "
                f"{len(atom_types)}"
            )
        self.bonds = [[int(i), int(j)] for i, j in bonds]
        self.register_buffer("types", torch.tensor(list(atom_types)), persistent=False)
        kinds = _pair_kinds(self.types.tolist(), self.bonds)
        n_kinds = int(kinds.max()) + 1
        self.register_buffer("pair_kind", kinds, persistent=False)
        self.register_buffer("pair_mean", torch.ones(n_kinds))
        self.register_buffer("pair_std", torch.ones(n_kinds))
        self.time = Fourier(n_frequencies, 0.2, 3.0)
        self.radial = _Radial(n_radial)
        self.embed_atom = nn.Embedding(int(self.types.max()) + 1, width)
        self.embed_time = nn.Linear(self.time.size(1), depth * width)
        self.layers = nn.ModuleList(_Layer(width, n_radial) for _ in range(depth))
        self.out = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
        self.springs = nn.Linear(self.time.size(1), n_kinds * (n_radial + 1))
        for last in (self.out[2], self.springs):
            nn.init.zeros_(last.weight)  # type: ignore[arg-type]
            nn.init.zeros_(last.bias)  # type: ignore[arg-type]
        if conditional:
            self.log_lag = Fourier(n_frequencies, 0.2, 3.0)
            self.embed_lag = nn.Linear(self.log_lag.size(1), width)
            self.reader = nn.ModuleList(_Layer(width, n_radial) for _ in range(READER_DEPTH))
            self.embed_context = nn.Linear(width, depth * width)

    def config(self) -> dict[str, Any]:
        """Constructor arguments but for the first two."""
        return {
            "kind": "painn",
            "atom_types": self.types.tolist(),
            "bonds": self.bonds,
            "width": self.embed_atom.embedding_dim,
            "depth": len(self.layers),
            "n_radial": len(self.radial.centres),
            "n_frequencies": len(self.time.frequencies),
        }

    @torch.no_grad()
    def learn_distances(self, y: Tensor, weights: Tensor) -> None:
        """Set m and s of each kind of pair from standardised frames (n, *event), weights (n,)."""
        kind = self.pair_kind.flatten().to(y.device)
        sums = y.new_zeros(3, len(self.pair_mean), dtype=torch.float64)
        for part, weight in zip(y.split(4096), weights.split(4096), strict=True):
            d = torch.cdist(part, part).flatten(1).double()
            moments = [weight.sum().expand(d.shape[1]), weight @ d, weight @ d.square()]
            sums.index_add_(1, kind, torch.stack(moments))
        mean = sums[1] / sums[0]
        self.pair_mean.copy_(mean)
        self.pair_std.copy_((sums[2] / sums[0] - mean.square()).clamp(min=0).sqrt())

    @torch.no_grad()
    def start_from(self, other: "PaiNN") -> None:
        """Take over what `other` knows of the molecule; what is put out stays zero.

        Of the layers, as many as both have; those that read the conditioning frame start as the
        first layers of `other`, too. Where the widths differ, or the numbers of radial functions or
        frequencies, only the distances of pairs can be taken.
        """
        self.pair_mean.copy_(other.pair_mean)
        self.pair_std.copy_(other.pair_std)
        mine, theirs = self.config(), other.config()
        if any(mine[key] != theirs[key] for key in mine if key != "depth"):
            return
        self.embed_atom.load_state_dict(other.embed_atom.state_dict())
        self.out[0].load_state_dict(other.out[0].state_dict())
        for own, known in zip(
            self.embed_time.parameters(), other.embed_time.parameters(), strict=True
        ):
            rows = min(len(own), len(known))
            own[:rows] = known[:rows]
        for layers in (self.layers, getattr(self, "reader", ())):
            for layer, known_layer in zip(layers, other.layers, strict=False):
                layer.load_state_dict(known_layer.state_dict())

    def compile_layers(self) -> None:
        """Let `torch.compile` fuse each layer: half the time, after a minute of compiling.

        Forward-mode derivatives do not pass through a compiled layer.
        """
        limit = torch._dynamo.config.recompile_limit  # beyond it, layers are not compiled after all
        torch._dynamo.config.recompile_limit = max(limit, RECOMPILE_LIMIT)
        for layer in [*self.layers, *getattr(self, "reader", ())]:
            layer.compile()

    def context(self, x_0: Tensor, lag: Tensor) -> Tensor:
        """What (x_0, lag) contribute, shape (B, n_atoms, depth * width)."""
        return in_parts(self._context, FRAMES_AT_ONCE, x_0, lag)

    def _context(self, x_0: Tensor, lag: Tensor) -> Tensor:
        log_lag = self.log_lag(lag.to(x_0.dtype).log().reshape(-1, 1))
        s = self._atoms(x_0) + self.embed_lag(log_lag)[:, None]
        s, _ = _pass(self.reader, s, self._pairs(x_0, None), [None] * READER_DEPTH)
        return self.embed_context(silu(s))

    def forward(self, x_t: Tensor, log_ratio: Tensor, context: Tensor | None = None) -> Tensor:
        """Output shaped like `x_t` (B, n_atoms, 3), for `log_ratio` of shape () or (B,)."""
        return in_parts(self._forward, FRAMES_AT_ONCE, x_t, log_ratio, context)

    def _forward(self, x_t: Tensor, log_ratio: Tensor, context: Tensor | None) -> Tensor:
        times = self.time(log_ratio.reshape(-1, 1))
        shifts = self.embed_time(times)[:, None]
        if context is not None:
            shifts = shifts + context
        pairs = self._pairs(x_t, log_ratio)
        layers = shifts.chunk(len(self.layers), -1)
        s, v = _pass(self.layers, self._atoms(x_t), pairs, layers)
        made = (v * self.out(s)[:, :, None]).sum(-1) + self._pulled(times, pairs)
        return made - made.mean(1, keepdim=True)

    def _atoms(self, x: Tensor) -> Tensor:
        return self.embed_atom(self.types).expand(len(x), -1, -1)

    def _pairs(self, x: Tensor, log_ratio: Tensor | None) -> "_Pairs":
        """What is seen of all pairs of a noised frame, or of one without noise."""
        mean, std = self.pair_mean[self.pair_kind], self.pair_std[self.pair_kind]
        if log_ratio is None:
            expected, spread = mean, (std.square() + CLEAN_WIDTH**2).sqrt()
        else:
            signal = torch.sigmoid(2 * log_ratio).reshape(-1, 1, 1)  # alpha^2
            expected = (signal * mean.square() + 4 * (1 - signal)).sqrt()
            spread = (signal * std.square() + 2 * (1 - signal)).sqrt()
        r = (x[:, :, None] - x[:, None]).movedim(-1, 1)
        itself = torch.eye(x.shape[1], device=x.device, dtype=x.dtype)
        d = (r.square().sum(1) + itself).sqrt()
        u = (d - expected) / spread
        return _Pairs(self.radial(u) * (1 - itself), r / d[:, None], u * (1 - itself))

    def _pulled(self, times: Tensor, pairs: "_Pairs") -> Tensor:
        """The sum of springs at each atom, (B, n_atoms, 3)."""
        strength = self.springs(times).reshape(len(times), pairs.phi.shape[1] + 1, -1)
        strength = strength[:, :, self.pair_kind]
        pull = (strength[:, :-1] * pairs.phi).sum(1) + strength[:, -1] * pairs.u
        return torch.einsum("bcij,bij->bic", pairs.unit, pull)


class _Pairs(NamedTuple):
    """Of all pairs of atoms: phi (B, K, A, A), n_ij (B, 3, A, A), u (B, A, A)."""

    phi: Tensor
    unit: Tensor
    u: Tensor


class _Radial(nn.Module):
    """Gaussians of u with centres from -3 to 3, (B, A, A) -> (B, K, A, A)."""

    centres: Tensor

    def __init__(self, n: int) -> None:
        super().__init__()
        self.register_buffer("centres", torch.linspace(-3, 3, n), persistent=False)

    def forward(self, u: Tensor) -> Tensor:
        """The functions at `u`."""
        width = 6 / (len(self.centres) - 1)
        return torch.exp(-((u[:, None] - self.centres[:, None, None]) / width).square() / 2)


class _Layer(nn.Module):
    """Messages between atoms, then mixing at each atom."""

    def __init__(self, width: int, n_radial: int) -> None:
        super().__init__()
        self.hidden = nn.Linear(width, width)
        self.source = nn.Linear(width, 3 * width)
        self.filters = nn.Parameter(torch.randn(3, n_radial, 1, width) / (2 * math.sqrt(n_radial)))
        self.mix = nn.Linear(width, 3 * width, bias=False)
        self.update = nn.Sequential(
            nn.Linear(3 * width, width), nn.SiLU(), nn.Linear(width, 4 * width)
        )

    def forward(
        self, s: Tensor, v: Tensor, scalar: Tensor, vector: Tensor, shift: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """The next s (B, A, F) and v (B, A, 3, F).

        `scalar` (B, A, K A) holds phi_k(d_ij), `vector` (B, 3 A, K A) holds phi_k(d_ij) n_ij.
        """
        b, n, f = s.shape
        h = self.hidden(layer_norm(s, (f,)))
        h = silu(h if shift is None else h + shift)
        sources = self.source(h)[:, None].chunk(3, -1)  # (B, 1, A, F) each
        a, gate, c = (h * filters for h, filters in zip(sources, self.filters, strict=True))
        carried = (gate[:, :, :, None] * v[:, None]).flatten(3)  # (B, K, A, 3 F)
        s = s + scalar @ a.flatten(1, 2)
        along = scalar @ carried.flatten(1, 2)
        v = v + along.view(b, n, 3, f) + (vector @ c.flatten(1, 2)).view(b, n, 3, f)
        mixed = self.mix(v)
        mixed = mixed / (1 + mixed.square().sum(-2, keepdim=True)).sqrt()
        p, q, r = mixed.chunk(3, -1)
        normal = torch.linalg.cross(q, r, dim=-2)
        seen = torch.cat([layer_norm(s, (f,)), (p * q).sum(-2), (p * normal).sum(-2)], -1)
        ds, *gates = self.update(seen)[:, :, None].chunk(4, -1)
        return s + ds[:, :, 0], v + gates[0] * p + gates[1] * q + gates[2] * normal


def _pass(
    layers: Iterable[nn.Module], s: Tensor, pairs: _Pairs, shifts: Sequence[Tensor | None]
) -> tuple[Tensor, Tensor]:
    """Scalars (B, A, F) and vectors (B, A, 3, F) after all layers."""
    b, k, n, _ = pairs.phi.shape
    scalar = pairs.phi.movedim(1, 2).reshape(b, n, k * n)
    vector = (pairs.phi[:, None] * pairs.unit[:, :, None]).permute(0, 3, 1, 2, 4)
    vector = vector.reshape(b, 3 * n, k * n)
    v = s.new_zeros(b, n, 3, s.shape[-1])
    for layer, shift in zip(layers, shifts, strict=True):
        s, v = layer(s, v, scalar, vector, shift)
    return s, v


def _pair_kinds(atom_types: Sequence[int], bonds: Sequence[Sequence[int]]) -> Tensor:
    """Number of the kind of each pair, (A, A): the types of both atoms and the bonds between."""
    n = len(atom_types)
    apart = torch.full((n, n), n)
    apart.fill_diagonal_(0)
    for i, j in bonds:
        apart[i, j] = apart[j, i] = 1
    for middle in range(n):  # Floyd and Warshall
        apart = torch.minimum(apart, apart[:, middle, None] + apart[None, middle])
    kinds: dict[tuple[int, ...], int] = {}
    numbers = [
        kinds.setdefault((*sorted((atom_types[i], atom_types[j])), int(apart[i, j])), len(kinds))
        for i in range(n)
        for j in range(n)
    ]
    return torch.tensor(numbers).view(n, n)
