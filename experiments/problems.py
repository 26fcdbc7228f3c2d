"""Exact sampling problems: data whose score is known, an SDE, an end, and endpoints of the exact flow.

A `Problem` starts from exact draws of p_T and ends at t_end, where x1 is what the probability flow
makes of x.  Reference endpoints come from Adams with each sample's own steps at 1e-12
(`scoresde.flow`), kept in an .npz so that a second run is quick.

Errors are in data units, on y = x1/alpha(t_end):

    rms95      RMS over coordinates and over the 95 % of samples with the smallest error: a few samples
               beside a separatrix end in another mode and would hide the rest
    rms        the same over all of them
    sliced_w2  the 2-Wasserstein distance of projections, RMS over directions; say beside it what two
               exact sets of the same size give (`Problem.floor`)
"""

import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from scoresde import EDM, VP, Streams, flow
from scoresde.exact import Mixture, mixture
from scoresde.files import whole
from scoresde.types import SDE, Score


@dataclass(frozen=True, eq=False)
class Problem:
    """A target under an SDE, from sde.T to t_end; sigma_data is the data's standard deviation a coordinate."""

    name: str
    sde: SDE
    target: Mixture
    t_end: float
    sigma_data: float = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "sigma_data", math.sqrt(float(moments(self.target)[1].diagonal().mean())))

    @property
    def score(self) -> Score:
        return self.target.score(self.sde)

    def noise_levels(self) -> tuple[float, float]:
        """sigma/alpha at the start and at the end."""
        ends = torch.tensor([self.sde.T, self.t_end], dtype=torch.float64)
        r = torch.exp(-self.sde.lam(ends))
        return float(r[0]), float(r[1])

    def draw(self, n: int, seed: int, t: float) -> Tensor:
        """n exact draws of p_t: alpha x0 + sigma z, (n, *shape) float64."""
        at = torch.tensor(t, dtype=torch.float64)
        x0 = self.target.sample(n, seed)
        return self.sde.alpha(at) * x0 + self.sde.sigma(at) * Streams(seed + 1_000_003, n)(x0)

    def start(self, n: int, seed: int = 0) -> Tensor:
        """n exact draws of p_T."""
        return self.draw(n, seed, self.sde.T)

    def endpoints(self, x: Tensor, folder: Path | None = None, tol: float = 1e-12) -> Tensor:
        """The exact flow's x(t_end) from x at sde.T; kept in folder under a name made of all it depends on."""
        file = None
        if folder is not None:
            parts = [x, self.target.log_weights, self.target.means, self.target.floor, self.target.eig]
            parts += [] if self.target.basis is None else [self.target.basis]
            key = hashlib.sha256(f"{self.sde} {self.t_end} {tol}".encode())
            for part in parts:
                key.update(part.contiguous().numpy().tobytes())
            file = folder / f"{self.name}-{key.hexdigest()[:16]}.npz"
            if file.exists():
                return torch.from_numpy(np.load(file, allow_pickle=False)["x1"])
        x1 = flow(self.score, self.sde, x, self.sde.T, self.t_end, rtol=tol, atol=tol)
        if file is not None:
            folder.mkdir(parents=True, exist_ok=True)  # type: ignore[union-attr]
            with whole(file) as temporary, open(temporary, "wb") as f:
                np.savez_compressed(f, x1=x1.numpy())
        return x1

    def data_units(self, x1: Tensor) -> Tensor:
        """y = x1/alpha(t_end)."""
        return x1 / float(self.sde.alpha(torch.tensor(self.t_end, dtype=torch.float64)))

    def floor(self, n: int, seed: int = 0) -> float:
        """Sliced W2 between two sets of n exact draws of p_t_end, RMS over four pairs."""
        pairs = [
            sliced_w2(*(self.data_units(self.draw(n, s, self.t_end)) for s in (k, k + 1)), seed=seed)
            for k in range(10_000 + seed, 10_008 + seed, 2)
        ]
        return math.sqrt(sum(d * d for d in pairs) / len(pairs))


def rms(x: Tensor, exact: Tensor, keep: float = 1.0) -> float:
    """sqrt of the mean square over coordinates, over the share `keep` of samples where it is smallest.

    A sample that is not finite counts as infinitely wrong.
    """
    e = (x - exact).double().flatten(1).square().mean(1)
    e = torch.where(torch.isfinite(e), e, torch.inf).sort().values
    return float(e[: max(1, math.ceil(keep * len(e) - 1e-9))].mean().sqrt())


def rms95(x: Tensor, exact: Tensor) -> float:
    return rms(x, exact, 0.95)


def sliced_w2(x: Tensor, y: Tensor, *, directions: int = 128, seed: int = 0) -> float:
    """sqrt of the mean over directions of W2^2 of the projections; x, y of equal size."""
    a, b = x.double().flatten(1), y.double().flatten(1)
    if a.shape != b.shape:
        raise ValueError(f"sliced_w2 compares sets of one size, got {tuple(x.shape)} and {tuple(y.shape)}")
    v = torch.randn(a.shape[1], directions, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    v = v / v.norm(dim=0)
    return float(((a @ v).sort(0).values - (b @ v).sort(0).values).square().mean().sqrt())


def moments(target: Mixture) -> tuple[Tensor, Tensor]:
    """Mean (D,) and covariance (D, D) of the mixture: C = sum_k w_k (C_k + m_k m_k') - m m'."""
    w, m = target.log_weights.exp(), target.means
    D = m.shape[1]
    mean = w @ m
    C = torch.einsum("k,kd,ke->de", w, m - mean, m - mean) + (w @ target.floor) * torch.eye(D, dtype=m.dtype)
    if target.eig.shape[1]:
        U = torch.eye(D, dtype=m.dtype).expand(len(w), D, D) if target.basis is None else target.basis
        C = C + torch.einsum("k,kdr,kr,ker->de", w, U, target.eig, U)
    return mean, C


def _normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def _rotations(K: int, D: int, seed: int) -> Tensor:
    """K orthogonal matrices (K, D, D)."""
    Q, R = torch.linalg.qr(_normal(K, D, D, seed=seed))
    return Q * torch.sign(R.diagonal(dim1=-2, dim2=-1))[:, None, :]


def _weights(K: int, seed: int) -> Tensor:
    """Unequal by a factor of e^2 at most."""
    u = torch.rand(K, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return torch.softmax(2 * u, 0)


def _spread(weights: Tensor, means: Tensor, covs: Tensor, std: float, *, widths_too: bool) -> Mixture:
    """The mixture centred, with standard deviation std a coordinate: by scaling the means, or everything."""
    means = means - weights @ means
    D = means.shape[1]
    within = float((weights * covs.diagonal(dim1=-2, dim2=-1).mean(1)).sum())
    between = float((weights[:, None] * means**2).sum() / D)
    if widths_too:
        c = std / math.sqrt(within + between)
        return mixture(weights, c * means, covs=c * c * covs)
    return mixture(weights, means * math.sqrt((std**2 - within) / between), covs=covs)


def plane(std: float, thin: float, wide: float, seed: int) -> Mixture:
    """2-D, 8 components with standard deviations thin..wide along their axes, in all std."""
    K = 8
    widths = torch.logspace(math.log10(thin), math.log10(wide), K, dtype=torch.float64)
    axes = torch.stack([widths, widths.roll(3)], 1)  # (K, 2): round to drawn out
    U = _rotations(K, 2, seed)
    covs = torch.einsum("kdr,kr,ker->kde", U, axes**2, U)
    return _spread(_weights(K, seed + 1), _normal(K, 2, seed=seed + 2), covs, std, widths_too=False)


def textures(std: float, apart: float, seed: int, D: int = 64) -> Mixture:
    """6 components: power-law spectra, first-order autoregressions and nearly low rank, two of each; in all std.

    apart: standard deviation of the means a coordinate, before all is scaled to std.
    """
    i = torch.arange(D, dtype=torch.float64)
    covs = []
    for k, decay in enumerate((1.0, 2.0)):
        U = _rotations(1, D, seed + k)[0]
        spectrum = (1 + i) ** -decay
        covs.append(U * (spectrum * D / spectrum.sum()) @ U.T)
    for rho in (0.8, 0.97):
        covs.append(rho ** (i[:, None] - i).abs())
    for k, R in enumerate((4, 10)):
        F = _normal(D, R, seed=seed + 2 + k) / math.sqrt(R)
        covs.append(F @ F.T + 0.003 * torch.eye(D, dtype=torch.float64))
    scale = torch.tensor([1.0, 0.7, 1.0, 0.5, 1.0, 0.6], dtype=torch.float64)
    means = apart * _normal(6, D, seed=seed + 4)
    return _spread(_weights(6, seed + 5), means, torch.stack(covs) * scale[:, None, None], std, widths_too=True)


def crowd(std: float, seed: int, D: int = 16, K: int = 20) -> Mixture:
    """16-D, 20 components of random shapes (axes' standard deviations spread over a factor of 15), in all std."""
    u = torch.rand(K, D, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    U = _rotations(K, D, seed + 1)
    covs = torch.einsum("kdr,kr,ker->kde", U, (0.08 * 15**u) ** 2, U)
    return _spread(_weights(K, seed + 2), _normal(K, D, seed=seed + 3), covs, std, widths_too=True)


def digits() -> Mixture:
    """Ten Gaussians: class means and full covariances of scikit-learn's 8 x 8 digits in [-1, 1].

    Levels 0..16 are x = k/8 - 1; each covariance has (1/8)^2/12 added, one level's uniform noise.
    """
    from sklearn.datasets import load_digits

    data = load_digits()
    x, y = torch.from_numpy(data.images).double().flatten(1) / 8 - 1, torch.from_numpy(data.target)
    parts = [x[y == c] for c in range(10)]
    covs = torch.stack([p.T.cov() for p in parts]) + torch.eye(64, dtype=torch.float64) / 768
    weights = torch.tensor([len(p) for p in parts], dtype=torch.float64)
    means = torch.stack([p.mean(0) for p in parts]).reshape(10, 1, 8, 8)
    return mixture(weights, means, covs=covs, labels=torch.arange(10))


def pictures(std: float, seed: int, side: int = 16, K: int = 5, R: int = 12) -> Mixture:
    """(1, 16, 16), 5 components of rank 12: smooth random fields, and white noise of std 0.02; in all std."""
    k = torch.fft.fftfreq(side, dtype=torch.float64) * side
    decay = 1 / (1 + (k[:, None] ** 2 + k**2)) ** 0.75

    def fields(n: int, seed: int) -> Tensor:
        f = torch.fft.ifft2(torch.fft.fft2(_normal(n, side, side, seed=seed)) * decay).real
        return (f / f.flatten(1).std(1)[:, None, None]).reshape(n, side * side)

    means, w = fields(K, seed), _weights(K, seed + 1)
    factors = torch.stack([fields(R, seed + 2 + j).T for j in range(K)])  # (K, D, R)
    factors = factors * torch.logspace(0, -1, R, dtype=torch.float64)  # standard deviations over a decade
    means = means - w @ means
    within = float((w * factors.square().sum(2).mean(1)).sum())
    c = math.sqrt((std**2 - 0.02**2) / (within + float((w[:, None] * means**2).sum() / means.shape[1])))
    var = torch.full((K,), 0.02**2, dtype=torch.float64)
    return mixture(w, (c * means).reshape(K, 1, side, side), factors=c * factors, var=var)


def _vp(name: str, target: Callable[[], Mixture], t_end: float = 1e-3) -> Callable[[], Problem]:
    return lambda: Problem(name, VP(), target(), t_end)


_MAKERS: dict[str, Callable[[], Problem]] = {
    "2d": _vp("2d", lambda: plane(0.5, 0.034, 0.27, seed=10)),
    "64d": _vp("64d", lambda: textures(0.5, 0.5, seed=20)),
    "16d": _vp("16d", lambda: crowd(0.5, seed=30)),
    "2d-small": _vp("2d-small", lambda: plane(0.1, 0.01, 0.06, seed=40), t_end=1e-4),
    "2d-large": _vp("2d-large", lambda: plane(2.0, 0.2, 1.2, seed=50)),
    "64d-small": _vp("64d-small", lambda: textures(0.1, 0.3, seed=60), t_end=1e-4),
    "64d-large": _vp("64d-large", lambda: textures(2.0, 1.0, seed=70)),
    "digits": lambda: Problem("digits", EDM(T=80.0), digits(), 0.002),
    "pictures": _vp("pictures", lambda: pictures(0.5, seed=80)),
}

TABLE = ("2d", "64d", "16d")
"""The three of the work-precision table: VP, beta 0.1..20, sigma/alpha from 152 to 0.0105, std 0.5."""

AUTO = ("2d-small", "2d-large", "64d-small", "64d-large", "digits", "pictures")
"""The six that `auto` is judged on.  Small and large are the standard deviation of the data, 0.1 and 2."""

NAMES = (*TABLE, *AUTO)


@cache
def problem(name: str) -> Problem:
    """One of `NAMES`."""
    if name not in _MAKERS:
        raise ValueError(f"unknown problem {name!r}; choose from {', '.join(NAMES)}")
    return _MAKERS[name]()
