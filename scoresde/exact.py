"""Targets whose every noised density is known: Gaussians, mixtures, finite data sets.

With x = alpha x0 + sigma eps and x0 ~ sum_k w_k N(m_k, C_k), C_k = U_k diag(e_k) U_k' + r_k I:

    V_k = alpha^2 C_k + sigma^2 I,   d_k = x - alpha m_k
    log p(x) = logsumexp_k [ log w_k + log N(d_k; 0, V_k) ],   q_k = softmax of the same
    score = -sum_k q_k V_k^-1 d_k,   E[x0 | x] = sum_k q_k (m_k + alpha C_k V_k^-1 d_k)

A Gaussian is one component; a data set is N components with C = 0, and its posterior mean is the
"ideal denoiser" (Karras 2022, eq. 57).
"""

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from scoresde.adaptive import rowwise
from scoresde.noise import Streams
from scoresde.types import SDE, Score, like


@dataclass(frozen=True, eq=False)
class Mixture:
    """Mixture of Gaussians on data of any shape; build it with `gaussian`, `mixture` or `dataset`.

    log_weights (K,);  means (K, D);  floor r (K,);  eig e (K, R);  basis U (K, D, R), or None for
    the identity (R = D: diagonal; R = 0: a multiple of the identity)
    labels (K,) class of each component, or None;  shape: of one sample
    """

    log_weights: Tensor
    means: Tensor
    floor: Tensor
    eig: Tensor
    basis: Tensor | None
    labels: Tensor | None
    shape: tuple[int, ...]

    def given(self, label: int) -> "Mixture":
        """p(x | label): the components of that class, weights renormalised."""
        if self.labels is None:
            raise ValueError("this target has no labels; pass labels= when building it")
        if not isinstance(label, int):
            raise ValueError(f"give one label, an int, for the whole batch; got {label!r}")
        keep = self.labels == label
        if not bool(keep.any()):
            raise ValueError(f"label {label} is not among {sorted(set(self.labels.tolist()))}")
        logw = self.log_weights[keep]
        return replace(
            self,
            log_weights=logw - logw.logsumexp(0),
            means=self.means[keep],
            floor=self.floor[keep],
            eig=self.eig[keep],
            basis=None if self.basis is None else self.basis[keep],
            labels=self.labels[keep],
        )

    def sample(self, n: int, seed: int = 0) -> Tensor:
        """n exact draws at t = 0, float64 (n, *shape); one stream per sample."""
        noise = Streams(seed, n)
        u = torch.special.ndtr(noise(self.means.new_empty(n, 1)))  # (n, 1) uniform
        cut = self.log_weights.exp().cumsum(0)
        k = torch.searchsorted(cut / cut[-1], u[:, 0]).clamp(max=len(cut) - 1)
        x = self.means[k] + self.floor[k].sqrt()[:, None] * noise(self.means[k])
        if self.eig.shape[1]:
            z = noise(self.eig[k]) * self.eig[k].sqrt()
            x = x + (z if self.basis is None else torch.einsum("ndr,nr->nd", self.basis[k], z))
        return x.reshape(n, *self.shape)

    def log_prob(self, x: Tensor, sde: SDE | None = None, t: Tensor | None = None) -> Tensor:
        """log p_t(x) in nats, (B,); without sde and t, of the data itself."""
        alpha, sigma = self._noise_level(x, sde, t)
        if t is None and bool((self.floor == 0).any()) and not (self._full_rank() and bool((self.eig > 0).all())):
            raise ValueError("without noise this target is not a density (a component has no width); pass sde and t")
        return self._joint(x, alpha, sigma)[0].logsumexp(1)

    def _full_rank(self) -> bool:
        return self.eig.shape[1] == self.means.shape[1]

    def score(self, sde: SDE) -> Score:
        """s(x, t) = grad_x log p_t(x)."""

        def score(x: Tensor, t: Tensor) -> Tensor:
            alpha, sigma = self._noise_level(x, sde, t)
            logp, pull = self._joint(x, alpha, sigma)
            return -(torch.softmax(logp, 1)[..., None] * pull).sum(1).reshape(x.shape)

        return rowwise(score)

    def denoiser(self, sde: SDE) -> Score:
        """The posterior mean E[x0 | x] as a function of (x, t)."""

        def denoiser(x: Tensor, t: Tensor) -> Tensor:
            alpha, sigma = self._noise_level(x, sde, t)
            logp, pull = self._joint(x, alpha, sigma)  # pull = V^-1 d, (B, K, D)
            cov_pull = self.floor.to(x)[:, None] * pull
            if self.eig.shape[1]:
                eig = self.eig.to(x)
                if self.basis is None:
                    cov_pull = cov_pull + eig * pull
                else:
                    U = self.basis.to(x)
                    c = torch.einsum("kdr,bkd->bkr", U, pull) * eig
                    cov_pull = cov_pull + torch.einsum("kdr,bkr->bkd", U, c)
            mean = self.means.to(x) + alpha[..., None] * cov_pull
            return (torch.softmax(logp, 1)[..., None] * mean).sum(1).reshape(x.shape)

        return denoiser

    def class_log_prob(self, x: Tensor, sde: SDE | None = None, t: Tensor | None = None) -> Tensor:
        """log p(label | x_t), (B, number of classes), for labels 0, 1, ... ."""
        if self.labels is None:
            raise ValueError("this target has no labels; pass labels= when building it")
        alpha, sigma = self._noise_level(x, sde, t)
        logp = self._joint(x, alpha, sigma)[0]
        classes = range(int(self.labels.max()) + 1)
        joint = torch.stack([logp[:, self.labels == c].logsumexp(1) for c in classes], 1)
        return joint - joint.logsumexp(1, keepdim=True)

    def _noise_level(self, x: Tensor, sde: SDE | None, t: Tensor | None) -> tuple[Tensor, Tensor]:
        """alpha, sigma shaped (1, 1) or (B, 1)."""
        if math.prod(x.shape[1:]) != self.means.shape[1]:
            raise ValueError(f"x has samples of shape {tuple(x.shape[1:])}, the target's are {self.shape}")
        if (sde is None) != (t is None):
            raise ValueError("give both sde and t for the noised density, or neither for that of the data")
        if sde is None or t is None:
            return x.new_ones(1, 1), x.new_zeros(1, 1)
        return sde.alpha(t).to(x).reshape(-1, 1), sde.sigma(t).to(x).reshape(-1, 1)

    def _joint(self, x: Tensor, alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        """log w_k + log N(d_k; 0, V_k), (B, K), and V_k^-1 d_k, (B, K, D)."""
        D = self.means.shape[1]
        d = x.reshape(len(x), 1, D) - alpha[..., None] * self.means.to(x)  # (B, K, D)
        floor = alpha**2 * self.floor.to(x) + sigma**2  # (B|1, K)
        R = self.eig.shape[1]
        if R == 0:
            pull = d / floor[..., None]
            logdet = D * floor.log()
        else:
            var = alpha[..., None] ** 2 * self.eig.to(x) + floor[..., None]  # (B|1, K, R)
            logdet = var.log().sum(-1)
            if self.basis is None:
                pull = d / var
            else:
                U = self.basis.to(x)
                c = torch.einsum("kdr,bkd->bkr", U, d)
                pull = torch.einsum("kdr,bkr->bkd", U, c / var)
                if R < D:
                    rest = d - torch.einsum("kdr,bkr->bkd", U, c)
                    pull = pull + rest / floor[..., None]
                    logdet = logdet + (D - R) * floor.log()
        logp = -0.5 * ((d * pull).sum(-1) + logdet + D * math.log(2 * math.pi))
        return logp + self.log_weights.to(x), pull


def gaussian(
    mean: Tensor, *, var: Tensor | float | None = None, cov: Tensor | None = None, factor: Tensor | None = None
) -> Mixture:
    """N(mean, C) on data shaped like mean.

    var:    number or tensor like mean: diagonal C
    cov:    (D, D): full C
    factor: (D, R): C = factor factor' + var I, low rank; var a number (default 0)
    """
    if var is not None:
        v = torch.as_tensor(var, dtype=torch.float64)
        if factor is not None and v.ndim:
            raise ValueError(f"with factor, var must be one number, got shape {tuple(v.shape)}")
        var = v[None] if factor is not None else v.expand(mean.shape)[None]
    cov, factor = (None if c is None else c[None] for c in (cov, factor))
    return mixture(torch.ones(1), mean[None], var=var, covs=cov, factors=factor)


def mixture(
    weights: Tensor,
    means: Tensor,
    *,
    var: Tensor | None = None,
    covs: Tensor | None = None,
    factors: Tensor | None = None,
    labels: Tensor | None = None,
) -> Mixture:
    """sum_k w_k N(m_k, C_k).

    weights (K,), positive, scaled to sum 1;  means (K, *shape)
    var:     (K,) for C = var I, or (K, *shape) for a diagonal C
    covs:    (K, D, D) full;   factors (K, D, R): C = factor factor' + var I, var (K,), default 0
    labels:  (K,) integer class of each component
    """
    w = torch.as_tensor(weights, dtype=torch.float64)
    m = torch.as_tensor(means, dtype=torch.float64)
    K, shape = len(m), tuple(m.shape[1:])
    m = m.reshape(K, -1)
    if w.shape != (K,) or not bool((w > 0).all()):
        raise ValueError(f"weights must be {K} positive numbers, one a mean; got shape {tuple(w.shape)}, min {w.min()}")
    floor, eig, basis = torch.zeros(K, dtype=torch.float64), m.new_zeros(K, 0), None
    if covs is not None:
        if var is not None or factors is not None:
            raise ValueError("give the covariance once: covs, or factors with var, or var")
        C = torch.as_tensor(covs, dtype=torch.float64)
        if not torch.allclose(C, C.mT, rtol=1e-8, atol=1e-12 * float(C.abs().max())):
            raise ValueError("covs must be symmetric; a Cholesky factor L is factors=L")
        eig, basis = torch.linalg.eigh(C)
        if bool((eig < -1e-10 * eig.abs().max()).any()):
            raise ValueError(f"covs must be positive semi-definite, got an eigenvalue {eig.min():.3g}")
        eig = eig.clamp(min=0)
    elif factors is not None:
        U, S, _ = torch.linalg.svd(torch.as_tensor(factors, dtype=torch.float64), full_matrices=False)
        eig, basis = S**2, U
    if var is not None:
        v = torch.as_tensor(var, dtype=torch.float64)
        if not bool((v >= 0).all()):
            raise ValueError(f"var must be >= 0, got {v.min()}")
        if v.ndim <= 1 and (v.ndim == 0 or v.shape == (K,)):
            floor = v.expand(K).clone()
        elif factors is None and v.shape == (K, *shape):
            eig = v.reshape(K, -1).expand(K, m.shape[1])
        else:
            full = "" if factors is not None else f" or {(K, *shape)}"
            raise ValueError(f"var must be one number for each component, ({K},){full}; got {tuple(v.shape)}")
    lab = None if labels is None else torch.as_tensor(labels)
    if lab is not None and lab.shape != (K,):
        raise ValueError(f"labels must be {K} integers, one a component; got shape {tuple(lab.shape)}")
    return Mixture((w / w.sum()).log(), m, floor, eig, basis, lab, shape)


def dataset(x: Tensor, labels: Tensor | None = None) -> Mixture:
    """The finite data set as a density: the ideal denoiser of x (N, ...)."""
    return mixture(torch.ones(len(x)), x, labels=labels)


def gaussian_of(x: Tensor, rank: int | None = None) -> Mixture:
    """N(m, C) with the mean and covariance of data x (N, ...): a prior for `log_prob`, a reference for `bounds`.

    rank: None: the full covariance, N > D items wanted; R: its R largest directions, and the mean of the other
          eigenvalues in all the rest   (Tipping & Bishop 1999)
    """
    flat = x.detach().flatten(1).to("cpu", torch.float64)
    N, D = flat.shape
    mean = flat.mean(0)
    if rank is None:
        if N <= D:
            raise ValueError(f"{N} items do not give a covariance in {D} dimensions; give more, or rank={N // 2}")
        return gaussian(mean.reshape(x.shape[1:]), cov=(flat - mean).T @ (flat - mean) / (N - 1))
    if not 0 < rank < min(N, D):
        raise ValueError(f"rank must lie between 1 and {min(N, D) - 1}, got {rank}")
    _, S, V = torch.linalg.svd((flat - mean) / math.sqrt(N - 1), full_matrices=False)
    rest = float((S[rank:] ** 2).sum() / (D - rank))
    if rest <= 1e-12 * float(S[0] ** 2):
        raise ValueError(f"data of rank {rank} or less have no density; dequantise them, or give a smaller rank")
    factor = V[:rank].T * (S[:rank] ** 2 - rest).clamp(min=0).sqrt()
    return gaussian(mean.reshape(x.shape[1:]), factor=factor, var=rest)


def gaussian_flow(mean: Tensor, var: Tensor | float, sde: SDE, x: Tensor, t: Tensor, t1: Tensor) -> Tensor:
    """The exact probability-flow map of N(mean, diag(var)) data from t to t1.

    x1 = alpha1 mean + sqrt(V1/V) (x - alpha mean),   V = alpha^2 var + sigma^2
    """
    a, s, a1, s1 = sde.alpha(t), sde.sigma(t), sde.alpha(t1), sde.sigma(t1)
    V, V1 = like(a**2, x) * var + like(s**2, x), like(a1**2, x) * var + like(s1**2, x)
    return like(a1, x) * mean + (V1 / V).sqrt() * (x - like(a, x) * mean)
