"""Exact posteriors of mixtures under linear measurements, and how far samples are from them.

    python -m experiments.posteriors [--samples N]        # a minute

For x0 ~ sum_k w_k N(m_k, C_k) and y = A x0 + noise_sd n the posterior is the mixture of

    weights w_k N(y; A m_k, S_k)/p(y),   means m_k + G_k (y - A m_k),   covariances C_k - G_k A C_k
    S_k = A C_k A' + noise_sd^2 I,   G_k = C_k A' S_k^-1

The library's default, `twisted` with `relax`, on digits of which the left or a random half of the pixels is seen with
noise 0.1.  Claims, of each measurement's posterior, the worst of them:
    sliced W2 <= 0.055, sd ratio 0.95 to 1.05, share in each coordinate's 90 % band 0.88 to 0.92, <= 600 calls

To expect (1000 samples of each of 6 posteriors, seed 0): sliced W2 0.015 to 0.029 where exact draws show 0.014 to
0.018, sd ratio 0.981 to 1.001, band 0.899 to 0.903.

Writes OUT/posteriors.csv.
"""

import csv
import math
from typing import NamedTuple

import torch
from torch import Tensor

from experiments.common import Claim, parser, report, start
from experiments.problems import Problem, moments, problem, sliced_w2
from guidance.operators import Linear, mask
from guidance.twisted import twisted
from samplers import ancestral, grids, relax
from scoresde import Streams, counted
from scoresde.exact import Mixture, mixture
from scoresde.files import whole


class Case(NamedTuple):
    """One measurement of a problem's data, and its exact posterior."""

    name: str
    A: Linear
    y: Tensor  # without a batch axis
    noise_sd: float
    exact: Mixture


class Rating(NamedTuple):
    """What samples miss of an exact posterior; all but the first two are over coordinates."""

    sliced_w2: float  # to as many exact draws
    floor: float  # of two sets of exact draws
    sd_ratio: float  # mean of samples' over exact standard deviation; 1 is right
    band: float  # mean share of samples between the exact 5 % and 95 % quantiles; 0.9 is right
    mean_error: float  # RMS error of the mean, in exact standard deviations; 1/sqrt(n) is right
    modes: float  # total variation between the components' shares and their weights


def covariances(target: Mixture) -> Tensor:
    """C_k, (K, D, D)."""
    eye = torch.eye(target.means.shape[1], dtype=target.means.dtype)
    U = eye.expand(len(target.means), *eye.shape) if target.basis is None else target.basis
    return target.floor[:, None, None] * eye + torch.einsum(
        "kdr,kr,ker->kde", U[:, :, : target.eig.shape[1]], target.eig, U[:, :, : target.eig.shape[1]]
    )


def posterior(target: Mixture, A: Linear, y: Tensor, noise_sd: float) -> tuple[Mixture, float]:
    """p(x0 | y), without components of weight below 1e-12, and log p(y) in nats.  y: without a batch axis."""
    D = target.means.shape[1]
    matrix = A(torch.eye(D, dtype=torch.float64).reshape(D, *target.shape)).flatten(1).T  # (M, D)
    C, M = covariances(target), len(matrix)
    L = torch.linalg.cholesky(matrix @ C @ matrix.T + noise_sd**2 * torch.eye(M, dtype=torch.float64))
    gain = torch.cholesky_solve(matrix @ C, L).mT  # (K, D, M)
    residual = y.double().flatten() - target.means @ matrix.T
    white = torch.linalg.solve_triangular(L, residual[..., None], upper=False)[..., 0]
    log_w = target.log_weights - 0.5 * white.square().sum(1) - L.diagonal(dim1=1, dim2=2).log().sum(1)
    log_w = log_w - M / 2 * math.log(2 * math.pi)
    log_z = float(log_w.logsumexp(0))
    keep = log_w - log_z > math.log(1e-12)
    means = (target.means + (gain @ residual[..., None])[..., 0])[keep]
    covs = (C - gain @ matrix @ C)[keep]
    return mixture(
        (log_w[keep] - log_z).exp(), means.reshape(-1, *target.shape), covs=(covs + covs.mT) / 2,
        labels=torch.arange(len(means)),
    ), log_z  # fmt: skip


def rate(samples: Tensor, exact: Mixture, seed: int = 0) -> Rating:
    """Samples (n, *shape) of x0 against the exact posterior.  Say n with the figures: it decides the floor."""
    x, n = samples.double().flatten(1), len(samples)
    one, two = (exact.sample(n, 20_000 + 2 * seed + k).flatten(1) for k in (0, 1))
    mean, C = moments(exact)
    sd = C.diagonal().sqrt()
    low, high = (_quantile(exact, q) for q in (0.05, 0.95))
    share = exact.class_log_prob(x).exp().mean(0)
    return Rating(
        sliced_w2(x, one, seed=seed),
        sliced_w2(two, one, seed=seed),
        float((x.std(0) / sd).mean()),
        float(((x >= low) & (x <= high)).double().mean()),
        float(((x.mean(0) - mean) / sd).square().mean().sqrt()),
        float(0.5 * (share - exact.log_weights.exp()).abs().sum()),
    )


def _quantile(target: Mixture, q: float) -> Tensor:
    """Of every coordinate, (D,), by bisection."""
    m, sd = target.means, covariances(target).diagonal(dim1=1, dim2=2).sqrt()  # (K, D)
    low, high = (m - 10 * sd).amin(0), (m + 10 * sd).amax(0)
    for _ in range(60):
        at = (low + high) / 2
        below = target.log_weights.exp() @ torch.special.ndtr((at - m) / sd) < q
        low, high = torch.where(below, at, low), torch.where(below, high, at)
    return (low + high) / 2


def average(ratings: list[Rating]) -> Rating:
    return Rating(*(sum(column) / len(ratings) for column in zip(*ratings, strict=True)))


def digits_cases(per_mask: int = 2, noise_sd: float = 0.1) -> list[Case]:
    """Digits of which the left half, or a random half, of the pixels is seen; per_mask different digits each."""
    P = problem("digits")
    left = torch.zeros(1, 8, 8)
    left[..., :4] = 1
    half = torch.zeros(64)
    half[torch.randperm(64, generator=torch.Generator().manual_seed(0))[:32]] = 1
    made = []
    for name, m in (("left", left), ("random", half.reshape(1, 8, 8))):
        A, x0 = mask(m), P.target.sample(per_mask, seed=77)
        y = A(x0) + noise_sd * Streams(78, per_mask)(A(x0))
        made += [Case(f"{name} {i}", A, v, noise_sd, posterior(P.target, A, v, noise_sd)[0]) for i, v in enumerate(y)]
    return made


def run(case: Case, P: Problem, n: int, *, seed: int = 0, steps: int = 150, relaxed: int = 3) -> tuple[Tensor, float]:
    """n samples of x0 by the library's default, and network calls for each: steps (1 + relaxed)."""
    noise, score = Streams(seed, n), counted(P.score)
    ts = grids.karras(P.sde, steps, t_end=P.t_end)
    s, particles = twisted(score, P.sde, case.A, case.y, case.noise_sd, ts, noise=noise)
    x = P.sde.prior_std * noise(P.target.means.new_empty(n, *P.target.shape))
    x = ancestral(s, P.sde, x, ts, noise=noise, on_step=[particles, relax(s, P.sde, relaxed, noise=noise)])
    return P.data_units(x), score.samples / n


def claims_of(ratings: list[Rating], calls: float) -> list[Claim]:
    return [
        Claim("sliced W2, worst posterior", max(r.sliced_w2 for r in ratings), "<=", 0.055),
        Claim("sd ratio, least", min(r.sd_ratio for r in ratings), ">=", 0.95),
        Claim("sd ratio, largest", max(r.sd_ratio for r in ratings), "<=", 1.05),
        Claim("90 % band, least", min(r.band for r in ratings), ">=", 0.88),
        Claim("90 % band, largest", max(r.band for r in ratings), "<=", 0.92),
        Claim("network calls a sample", calls, "<=", 600),
    ]


def main(argv: list[str] | None = None) -> list[Claim]:
    p = parser(__doc__, "posteriors")
    p.add_argument("--samples", type=int, default=1000, metavar="N", help="of each posterior (%(default)s)")
    p.add_argument("--per-mask", type=int, default=3, metavar="N", help="measurements with each mask (%(default)s)")
    args = p.parse_args(argv)
    for name, least in (("samples", 2), ("per_mask", 1)):
        if getattr(args, name) < least:
            p.error(f"--{name.replace('_', '-')} must be at least {least}, got {getattr(args, name)}")
    if start(args).type != "cpu":
        p.error(f"this script runs in float64 on the CPU; got --device {args.device}")
    n, per_mask = (min(args.samples, 100), 1) if args.quick else (args.samples, args.per_mask)
    P, rows, ratings, calls = problem("digits"), [], [], 0.0
    print(f"{n} samples of each\n{'':10}" + "".join(f"{k:>12}" for k in (*Rating._fields, "calls")))
    for case in digits_cases(per_mask):
        x, calls = run(case, P, n, seed=args.seed)
        ratings.append(rate(x, case.exact, args.seed))
        rows.append((case.name, *ratings[-1], calls))
    rows.append(("mean", *average(ratings), calls))
    for name, *values in rows:
        print(f"{name:10}" + "".join(f"{v:12.3g}" for v in values))
    with whole(args.out / "posteriors.csv") as temporary, open(temporary, "w", newline="") as f:
        csv.writer(f).writerows([("measurement", *Rating._fields, "calls"), *rows])
    claims = claims_of(ratings, calls)
    report(claims, args.json)
    return claims


if __name__ == "__main__":
    main()
