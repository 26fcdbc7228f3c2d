"""Bounds on -log p beside the flow's value, in nats, and the I-MMSE estimate.

With r = sigma/alpha, x_t = alpha x + sigma eps, eps_hat = -sigma s(x_t, t) and E over eps,

    -log p(x) <= KL(q(x_T | x) || prior) + int_{log r_0}^{log r_T} E|eps - eps_hat|^2 dlog r + reconstruction
    -log p(x)  = -log N(x; m, C)         + int_0^inf E[|eps - eps_hat|^2 - |eps - eps_G|^2] dlog r

(Kingma 2021, sec. 4; Kong, Brekelmans & Ver Steeg 2023), where eps_G is the eps_hat of N(m, C) data.
The Gaussian's own integral is known: with c_i, d_i the eigenvalues of C and the coordinates of x - m,

    int E|eps - eps_G|^2 dlog r = 1/2 sum_i [ c/(c + r^2) - log(1 + c/r^2) - d^2/(c + r^2) ]_{r_0}^{r_T}

so one Monte Carlo integral of the difference, with the same eps in both, serves the bound and the estimate.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from scoresde.adaptive import rows_of
from scoresde.exact import Mixture
from scoresde.types import SDE, Noise, Score, instant, like, number, wide

Bins = tuple[int, float, float]
"""(levels, low, high): level k is the value low + (k + 1/2) w at the centre of its bin, w = (high - low)/levels."""


class Bound(NamedTuple):
    """Nats for each item, (B,).  total = prior + diffusion + reconstruction."""

    prior: Tensor
    diffusion: Tensor
    reconstruction: Tensor
    total: Tensor
    immse: Tensor
    error: Tensor  # standard error of diffusion, total and immse alike; the other terms are exact


class ChainBound(NamedTuple):
    """Nats for each item.  total = prior + steps.sum(1) + reconstruction."""

    prior: Tensor  # (B,)
    steps: Tensor  # (B, N - 1), in the order of ts
    reconstruction: Tensor  # (B,)
    total: Tensor  # (B,)


def bounds(
    score: Score,
    sde: SDE,
    x: Tensor,
    reference: Mixture,
    *,
    t: float | Tensor | None = None,
    bins: Bins | None = None,
    prior: Mixture | None = None,
    calls: int = 128,
    noise: Noise = torch.randn_like,
    chunk: int = 1024,
) -> Bound:
    """The variational bound on -log p(x) with its terms, and the I-MMSE estimate of -log p(x), in nats, each (B,).

    Bits/dim are bits_per_dim(-total, D, w) of a density, bits_per_dim(-total, D, 1) with bins.

    x (B, ...):  data; quantised data as bin centres
    reference:   N(m, C), the mean and covariance of the data: `gaussian(mean, cov=C)`.  The bound's expectation does
                 not depend on it, only its error; immse takes what lies outside r_0..r_T to be the same for both
    t:           where the integral ends, r_0 = r(t); default sde.t_min.  With bins, r_0 = w/10 is enough (the decoder
                 loses 2e-6 nats a dimension there): below it there is nothing to tell, but the error grows
    bins:        None: a density; the decoder is N(x_t/alpha, r_0^2), reconstruction = D/2 log(2 pi e r_0^2).
                 (levels, low, high): a probability; the decoder is that Gaussian at all bin centres, scaled to sum 1
                 (Kingma 2021, sec. 3.2), and its E[-log P(x | x_t)] is integrated exactly.  immse stays a density
    prior:       N(m, C) data whose p_T is the prior; default N(0, prior_std^2 I)
    calls:       network evaluations of each item, even, at least 4
    chunk:       rows in one network call, if the score has `rows` (`Model`, `rowwise`); otherwise every call is for
                 the batch as it is.  The value does not depend on it

    Unbiased: E[diffusion] is the integral from r_0 to r_T for any score, without quadrature error.  With the exact
    score and prior E[total] = -E log p_r0(x + r_0 eps), p_r0 the density of data + r_0 eps, and -log p(x) for r_0 -> 0;
    a score that errs by e adds int E[sigma^2 |e|^2] dlog r on the mean over the data.
    Log r is stratified in calls/2 strata with two independent draws in each, whose differences give the standard error.
    Error: proportional to calls^(-1/2); 128 calls leave 1.6 nats an item, 0.036 bits/dim, on the digits mixture.
    """
    _check(x)
    level = None if bins is None else _level(x, bins)
    if calls < 4 or calls % 2:
        raise ValueError(f"calls must be even and at least 4, two draws for each stratum; got {calls}")
    t0, tT = instant(sde, sde.t_min if t is None else t), number(sde.T)
    low, high = (-float(sde.lam(s)) for s in (t0, tT))
    if not low < high:
        raise ValueError(f"t must lie below T = {sde.T:.6g}, got {float(t0):.6g}; take sde.t_min")
    r2, R2 = math.exp(2 * low), math.exp(2 * high)
    D, exact = x[0].numel(), x.detach().cpu().double()
    c, n, d2 = _spectrum(reference, exact, "reference")
    if not bool((c > 0).all()):
        raise ValueError(
            "reference has no density, a variance is 0; add the data's resolution^2 / 12 to its covariance"
        )
    at_T = _default_prior_kl(sde, tT, exact) if prior is None else _prior_kl(*_spectrum(prior, exact, "prior"), R2)
    difference, error = _difference(score, sde, x, reference, _inverse_cdf(c, n, low, high), calls, noise, chunk)
    _finite(difference, "bounds")
    known = c / (c + R2) - c / (c + r2) + torch.log1p(c / r2) - torch.log1p(c / R2)
    diffusion = 0.5 * (n * known + d2 * (1 / (c + r2) - 1 / (c + R2))).sum(1) + difference
    if bins is None or level is None:
        reconstruction = torch.full_like(at_T, 0.5 * D * math.log(2 * math.pi * math.e * r2))
    else:
        q = (bins[2] - bins[1]) / bins[0] / math.sqrt(r2)
        reconstruction = _softmax_code(bins[0], q)[level.cpu()].flatten(1).sum(1)
    immse = difference - reference.log_prob(exact)
    terms = (at_T, diffusion, reconstruction, at_T + diffusion + reconstruction, immse, error)
    return Bound(*(q.to(x) for q in terms))


def chain_bound(
    score: Score,
    sde: SDE,
    x: Tensor,
    ts: Tensor,
    *,
    bins: Bins | None = None,
    variance: str = "small",
    noise: Noise = torch.randn_like,
) -> ChainBound:
    """The variational bound of the ancestral chain over ts   (Ho 2020, eq. 5 to 8).

    prior           KL(q(x_T | x) || N(0, prior_std^2 I)) at ts[0]
    steps[:, i]     KL(q(x_{i+1} | x_i, x) || N(mean of q at x0(x_i), v)) in expectation over x_i: one draw
    reconstruction  -log P(x | x_N) of N(x0(x_N), v), a bin's probability, or a density without bins: one draw

    ts (N,):   the chain's times, decreasing, the last above 0: for all labels of a `DiscreteVP`
               sde.label_time(torch.arange(sde.N - 1, -1, -1, dtype=torch.float64)), for a respaced chain some of them
    bins:      (levels, low, high) of quantised x, as bin centres
    variance:  "small": v is the variance of q (the posterior); "large": that of q(x_i | x_{i+1}) (beta).  The decoder
               has q's variance of the step before in both, as in Ho's program: its own is 0
    Unbiased about the chain's bound; N network calls, one draw of noise each, from the noisiest time down.
    """
    _check(x)
    level = None if bins is None else _level(x, bins)
    ts = torch.as_tensor(ts).detach().to("cpu", torch.float64)
    if ts.ndim != 1 or len(ts) < 2 or not bool((ts.diff() < 0).all()):
        raise ValueError(f"ts must be at least two decreasing times, from noise to data; got shape {tuple(ts.shape)}")
    for end in (ts[0], ts[-1]):
        instant(sde, end)
    if variance not in ("small", "large"):
        raise ValueError(f"variance must be 'small' (the posterior's) or 'large' (beta), got {variance!r}")
    alpha, sigma = sde.alpha(ts), sde.sigma(ts)
    share = -torch.expm1(2 * (sde.lam(ts[:-1]) - sde.lam(ts[1:])))  # G^2/sigma^2, G^2 the variance of x_i | x_{i+1}
    pull, small, large = alpha[1:] * share, share * sigma[1:] ** 2, share * sigma[:-1] ** 2
    v = small if variance == "small" else large
    steps: list[Tensor] = []
    with torch.no_grad():
        for i, (t, a, s) in enumerate(zip(ts, alpha.tolist(), sigma.tolist(), strict=True)):
            xt = a * x + s * noise(x)
            x0 = (xt + s**2 * _called(score, xt, t)) / a
            if i < len(v):
                term = normal_kl(pull[i] * x, small[i], pull[i] * x0, v[i])
            elif bins is None or level is None:
                term = 0.5 * ((x - x0).square() / small[-1] + torch.log(2 * math.pi * small[-1]))
            else:
                term = -bin_log_prob(level, x0, small[-1].sqrt(), bins)
            steps.append(term.flatten(1).sum(1))
    prior = _default_prior_kl(sde, ts[0], x.detach().cpu().double()).to(x)
    kl = torch.stack(steps[:-1], 1)
    total = prior + kl.sum(1) + steps[-1]
    _finite(total, "chain_bound")
    return ChainBound(prior, kl, steps[-1], total)


def normal_kl(mean: Tensor, var: Tensor, mean1: Tensor, var1: Tensor) -> Tensor:
    """KL(N(mean, var) || N(mean1, var1)) = (var/var1 - 1 - log(var/var1) + (mean - mean1)^2/var1)/2, elementwise."""
    ratio = var / var1
    return 0.5 * (ratio - 1 - torch.log(ratio) + (mean - mean1).square() / var1)


def bin_log_prob(k: Tensor, mean: Tensor, std: float | Tensor, bins: Bins) -> Tensor:
    """log of the mass of N(mean, std^2) in bin k of `bins`, elementwise; the first and last bin are open outwards.

    k: integers 0..levels-1.  log(Phi(b) - Phi(a)), exact in both tails   (Ho 2020, eq. 13).
    """
    levels, low, high = bins
    w = (high - low) / levels
    edge = (low + k.to(mean) * w - mean) / std
    a = torch.where(k == 0, -torch.inf, edge)
    b = torch.where(k == levels - 1, torch.inf, edge + w / std)
    a, b = torch.where(a > 0, -b, a), torch.where(a > 0, -a, b)  # from the right tail to the left, where Phi is exact
    log_b = torch.special.log_ndtr(b)
    return log_b + torch.log(-torch.expm1(torch.special.log_ndtr(a) - log_b))


def _check(x: Tensor) -> None:
    if x.dtype not in (torch.float32, torch.float64) or x.ndim < 2:
        raise ValueError(
            f"x must be float32 or float64 of shape (B, ...), got {x.dtype} {tuple(x.shape)}; "
            "level k of quantised data is low + (k + 1/2) w, one sample is x[None]"
        )


def _level(x: Tensor, bins: Bins) -> Tensor:
    """k of bin centres, checked."""
    levels, low, high = bins
    if levels < 1 or not low < high:
        raise ValueError(f"bins are (levels, low, high) with levels >= 1 and low < high, got {bins}")
    k = (x.detach() - low) * (levels / (high - low)) - 0.5
    level = k.round().clamp(0, levels - 1)
    off = float((k - level).abs().max())
    if not off < 0.01:
        raise ValueError(
            f"with bins, x must be bin centres low + (k + 1/2) w, k < {levels}, w = {(high - low) / levels:.6g}; "
            f"got a value {off:.3g} w off: no dequantisation, and low, high are the outer edges of the end bins"
        )
    return level.long()


def _finite(value: Tensor, name: str) -> None:
    if not bool(torch.isfinite(value).all()):
        bad = int((~torch.isfinite(value)).nonzero()[0])
        raise FloatingPointError(f"{name} of sample {bad} is {float(value[bad])}; check the score with `x` there")


def _called(score: Score, x: Tensor, t: Tensor) -> Tensor:
    s = score(x, t)
    if s.shape != x.shape:
        raise ValueError(
            f"the score returned {tuple(s.shape)} for a state {tuple(x.shape)}; it must be like its argument"
        )
    return s


def _spectrum(normal: Mixture, x: Tensor, name: str) -> tuple[Tensor, Tensor, Tensor]:
    """Of N(m, C): eigenvalues c (k,), their multiplicities n (k,), and |x - m|^2 in each eigenspace, (B, k)."""
    if len(normal.means) != 1:
        raise ValueError(
            f"{name} must be one Gaussian, got a mixture of {len(normal.means)}; use gaussian(mean, cov=C)"
        )
    D, R = normal.means.shape[1], normal.eig.shape[1]
    if math.prod(x.shape[1:]) != D:
        raise ValueError(f"x has samples of shape {tuple(x.shape[1:])}, the {name}'s are {normal.shape}")
    d = x.flatten(1) - normal.means.to(x)
    U = None if normal.basis is None else normal.basis[0].to(x)
    inside = d[:, :R] if U is None else d @ U
    c, n, d2 = normal.floor.to(x) + normal.eig[0].to(x), x.new_ones(R), inside.square()
    if R == D:
        return c, n, d2
    rest = (d if U is None else d - inside @ U.T).square().sum(1, keepdim=True)
    return torch.cat([c, normal.floor.to(x)]), torch.cat([n, n.new_tensor([D - R])]), torch.cat([d2, rest], 1)


def _prior_kl(c: Tensor, n: Tensor, d2: Tensor, R2: float) -> Tensor:
    """KL(N(x, R2 I) || N(m, C + R2 I)), (B,)."""
    ratio = c / R2
    return 0.5 * (n * (torch.log1p(ratio) - ratio / (1 + ratio)) + d2 / (c + R2)).sum(1)


def _default_prior_kl(sde: SDE, T: Tensor, x: Tensor) -> Tensor:
    """KL(N(alpha_T x, sigma_T^2 I) || N(0, prior_std^2 I)), (B,): that prior is p_T of N(0, c) data."""
    alpha2, sigma2 = sde.alpha(T) ** 2, sde.sigma(T) ** 2
    c, D = (sde.prior_std**2 - sigma2) / alpha2, x[0].numel()
    return _prior_kl(
        c.reshape(1), x.new_tensor([D]), x.flatten(1).square().sum(1, keepdim=True), float(sigma2 / alpha2)
    )


def _inverse_cdf(c: Tensor, n: Tensor, low: float, high: float) -> tuple[Tensor, Tensor]:
    """Where to look: log r at the ends of 512 cells, and a distribution function there, even in each cell.

    Its density is 0.4 sum_i c/(c + r^2) + 0.4 sum_i c r^2/(c + r^2)^2 + 0.2, each scaled to 1: the Gaussian's share of
    eps that cannot be told, where that changes, and everywhere.

    Standard error times sqrt(calls), 64 calls, digits and 2-D mixture of the experiments: as here 19.4, 4.0; even log r
    24.6, 4.6; and Gauss-Legendre nodes instead of strata 30.6, 5.1, or independent draws 56.7, 6.1; and without the
    Gaussian 273, 13.3.  Pairs +-eps: 20.7, 4.5.  One draw in each of twice the strata: 19.9, 4.0.
    """
    u = torch.linspace(low, high, 513, dtype=torch.float64)
    r2, c = torch.exp(2 * u)[:, None], c.clamp(min=math.exp(2 * low))
    parts = torch.stack([-(n * torch.log1p(c / r2)).sum(1), (n * r2 / (c + r2)).sum(1), u])
    parts = (parts - parts[:, :1]) / (parts[:, -1:] - parts[:, :1])
    return u, torch.tensor([0.4, 0.4, 0.2], dtype=torch.float64) @ parts


def _difference(
    score: Score,
    sde: SDE,
    x: Tensor,
    reference: Mixture,
    cdf: tuple[Tensor, Tensor],
    calls: int,
    noise: Noise,
    chunk: int,
) -> tuple[Tensor, Tensor]:
    """int E[|eps - eps_hat|^2 - |eps - eps_G|^2] dlog r and its standard error, (B,) float64 on the CPU."""
    B, strata, (nodes, F) = len(x), calls // 2, cdf
    p = torch.special.ndtr(noise(torch.empty(B, calls, dtype=torch.float64)))
    p = (torch.arange(strata).repeat_interleave(2) + p) / strata
    cell = torch.searchsorted(F, p).clamp(1, len(F) - 1)
    slope = (F[cell] - F[cell - 1]) / (nodes[cell] - nodes[cell - 1])  # the density of log r
    t = sde.time(-(nodes[cell - 1] + (p - F[cell - 1]) / slope))
    gauss, values = reference.score(sde), []
    several = max(1, chunk // B) if rows_of(score, torch.arange(B)) is not None else 1
    with torch.no_grad():
        for i in range(0, calls, several):
            at = t[:, i : i + several].to(x.device, wide(x))
            k = at.shape[1]
            index = torch.arange(B, device=x.device).repeat_interleave(k)
            network = (rows_of(score, index) if several > 1 else None) or score
            eps = noise(x[:, None].expand(B, k, *x.shape[1:])).flatten(0, 1)
            time = at.flatten()
            sigma = like(sde.sigma(time), eps)
            xt = like(sde.alpha(time), eps) * x[index] + sigma * eps
            e, g = -sigma * _called(network, xt, time), -sigma * gauss(xt, time)
            h = ((e - g) * (e + g - 2 * eps)).flatten(1).sum(1)  # |eps - e|^2 - |eps - g|^2
            values.append(h.reshape(B, k).cpu().double())
    pairs = (torch.cat(values, 1) / slope).reshape(B, strata, 2)
    return pairs.mean((1, 2)), pairs.diff(dim=2).square().sum((1, 2)).sqrt() / calls


def _softmax_code(levels: int, q: float) -> Tensor:
    """E over e ~ N(0, 1) of log sum_j exp(e j q - (j q)^2 / 2), j = -k..levels-1-k, for every level k.

    -log of the softmax decoder at r_0 = w/q, which depends on k only near the ends.  The trapezoid rule in e is exact
    to rounding (the integrand is analytic); bins more than 27 r_0 away weigh below e^-90.
    """
    J = min(levels - 1, math.ceil(27 / q))
    e = torch.linspace(-10, 10, 401, dtype=torch.float64)
    weight = torch.softmax(-0.5 * e**2, 0)
    jq = q * torch.arange(-J, J + 1, dtype=torch.float64)
    exponent = e[:, None] * jq - 0.5 * jq**2
    left = torch.arange(levels).clamp(max=J)
    ends, which = torch.unique(torch.stack([left, left.flip(0)], 1), dim=0, return_inverse=True)
    codes = [weight @ exponent[:, J - a : J + b + 1].logsumexp(1) for a, b in ends.tolist()]
    return torch.stack(codes)[which]
