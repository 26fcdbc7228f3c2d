"""Twisted sequential Monte Carlo: the exact posterior as the number of particles grows   (Wu 2023, TDS).

    s, particles = twisted(score, sde, A, y, noise_sd, ts)
    x = ancestral(s, sde, x, ts, on_step=[particles, relax(s, sde)])
    print(particles)

The steps by s are proposals.  A particle that moved from x to x1 is weighted by what they miss,

    w = p(x1 | x) L_1(x1) / (p'(x1 | x) L(x)),    L(x_T) for the first

p the ancestral step by the score, p' that by s, L_t the likelihoods of `guidance.anneal`; and where the weights have
become unequal, particles are drawn anew by them.  Any L_t > 0 would do: a poor one makes heavier weights, not a bias.
"""

import math

import torch
from torch import Tensor

from guidance.anneal import likelihood
from guidance.operators import Linear, check_linear, check_noise, measured
from guidance.resample import effective, systematic, temper
from scoresde.types import SDE, Noise, Score, like, wide


def twisted(
    score: Score,
    sde: SDE,
    A: Linear,
    y: Tensor,
    noise_sd: float,
    ts: Tensor,
    *,
    sigma_data: float = 0.5,
    group: int | None = None,
    threshold: float = 0.5,
    alarm: float = 0.01,
    noise: Noise = torch.randn_like,
) -> "tuple[Score, Particles]":
    """(the score of `anneal`, the hook that weighs and resamples), for `ancestral` on the grid ts, t_end > 0.

    Samples of p_t(x) N(y; A x/alpha, noise_sd^2) at t = ts[-1], unweighted: the posterior where sigma << noise_sd.
    A, y, sigma_data: as in `anneal`;  noise_sd: positive
    group:     rows that are particles of one posterior, one after the other; they share their y.  Default: all rows
    threshold: in (0, 1).  Where the effective share of a group's particles falls below it they are drawn anew,
               systematically, by w^tau with the largest tau that keeps it there; w^(1 - tau) stays with them.  After
               the last step everything left is resampled
    alarm:     a run in which it fell below this share at some step, in some group, ends in an error: a few particles
               stand for all; 0 never
    noise:     for one uniform number a group and step

    Bias: O(1/group), from the ratio of averages.  A row depends on its group: that is the method.
    Steps of `relax` after each resampling keep the particles' law and make copies differ: without them a grid must be
    far finer.  Half the pixels of the digits mixture, 256 particles, sliced W2 (0.030 for exact draws): 300 steps
    0.18; 100 steps with 2 of relax 0.08; 150 with 3, 600 calls, 0.035, and 0.036 in groups of 16, 0.050 of 4.
    One network call a step, no Jacobian product.
    """
    check_linear(A)
    check_noise(noise_sd, positive=True, finite=True)
    if not 0 <= alarm < threshold < 1:
        raise ValueError(f"0 <= alarm < threshold < 1 wanted, got alarm = {alarm}, threshold = {threshold}")
    if group is not None and group < 1:
        raise ValueError(f"group must be at least 1, got {group}")
    if ts[-1] <= 0:
        raise ValueError(f"ts must end above 0, where a step has noise of its own; got {float(ts[-1]):.3g}")
    push, log = likelihood(sde, A, y, noise_sd, sigma_data)
    particles = Particles(sde, A, y, noise_sd, ts, log, group, threshold, alarm, noise)

    def guided(x: Tensor, t: Tensor) -> Tensor:
        s, g = score(x, t), push(x, t)
        particles.seen = x, s, g
        return s + g

    return guided, particles


class Particles:
    """The hook of `twisted`, for one run, and its record; see there.

    ess:   effective share of the particles after each step, before they are resampled, (N, groups)
    log_z: log p(y) in nats, (groups,), of the noised p_t at t = ts[-1]; exp(log_z) is unbiased
    """

    def __init__(
        self,
        sde: SDE,
        A: Linear,
        y: Tensor,
        noise_sd: float,
        ts: Tensor,
        log: Score,
        group: int | None,
        threshold: float,
        alarm: float,
        noise: Noise,
    ) -> None:
        self._sde, self._A, self._y, self._sd, self._ts, self._log = sde, A, y, noise_sd, ts, log
        self._group, self._threshold, self._alarm, self._noise = group, threshold, alarm, noise
        r, sigma = sde.alpha(ts[:-1]) / sde.alpha(ts[1:]), sde.sigma(ts)
        G2 = -(sigma[:-1] ** 2) * torch.expm1(2 * (sde.lam(ts[:-1]) - sde.lam(ts[1:])))
        self._table = (1 / r).tolist(), (G2 / r).tolist(), (G2 * (sigma[1:] / sigma[:-1]) ** 2).tolist()
        self.seen: tuple[Tensor, Tensor, Tensor] | None = None  # x, s, g of the last call
        self.log_z: Tensor
        self._z2: Tensor

    @property
    def ess(self) -> Tensor:
        return torch.stack(self._ess)

    def __str__(self) -> str:
        k = int(self.ess.amin(1).argmin())
        r, share = float(torch.exp(-self._sde.lam(self._ts[k + 1]))), float(self.ess[k].min())
        return f"effective particles at least {share * self.size:.1f} of {self.size}, at sigma/alpha = {r:.3g}"

    def __call__(self, i: int, t: Tensor, x: Tensor) -> Tensor:
        if self.seen is None:
            raise ValueError("the sampler did not call the score that twisted returned: give it both")
        before, s, g = self.seen
        last, t0 = i == len(self._ts) - 2, self._ts[i]
        if i == 0:
            self._start(x)
            self._log_w = self._log(before, t0)
        a, b, C2 = (column[i] for column in self._table)
        d = (x - a * before - b * s).to(wide(x))  # b g + C z
        step = -(b / C2) * (g * (d - b / 2 * g)).flatten(1).sum(1)  # log p/p'
        self._z2 = self._z2 + (d - b * g).square().mean() / C2
        arrived = self._exact(x, t) if last else self._log(x, t)
        log_w = (self._log_w + step + arrived - self._log(before, t0)).reshape(-1, self.size)
        self._ess.append(effective(log_w))
        tau = torch.ones_like(log_w[:, :1]) if last else temper(log_w, self._threshold)
        due = (self._ess[-1] < self._threshold)[:, None] | last
        drawn = self._drawn(torch.softmax(tau * log_w, 1), x)
        self.log_z = (
            self.log_z + torch.where(due, (tau * log_w).logsumexp(1, keepdim=True) - math.log(self.size), 0)[:, 0]
        )
        index = torch.where(due, drawn, self._rows).flatten()
        self._log_w = torch.where(due, (1 - tau) * log_w, log_w).flatten()[index]
        if last:
            self._check(x)
        return x[index]

    def _start(self, x: Tensor) -> None:
        self.size = self._group or len(x)
        if len(x) % self.size:
            raise ValueError(f"{len(x)} rows are no whole number of groups of {self.size} particles")
        rows = torch.arange(len(x), device=x.device).reshape(-1, self.size)
        if len(self._y) == len(x) and self._y.ndim == self._A(x).ndim:
            each = self._y.reshape(*rows.shape, -1)
            if not torch.equal(each, each[:, :1].expand_as(each)):
                raise ValueError(f"the rows of a group are particles of one posterior: {self.size} rows must share y")
        self._rows = rows
        self._ess: list[Tensor] = []
        self.log_z = x.new_zeros(len(rows), dtype=wide(x))
        self._z2 = x.new_zeros((), dtype=wide(x))

    def _exact(self, x: Tensor, t: Tensor) -> Tensor:
        """log N(y; A x/alpha, noise_sd^2)."""
        e = measured(self._A, self._y, x.to(wide(x)) / like(self._sde.alpha(t), x)).flatten(1) / self._sd
        return -0.5 * (e.square() + math.log(2 * math.pi * self._sd**2)).sum(1)

    def _drawn(self, w: Tensor, x: Tensor) -> Tensor:
        """Systematic resampling: row j of w (groups, n) where (j + u)/n falls, as rows of x."""
        z = self._noise(x.new_zeros(len(x), 1))[self._rows[:, 0]]
        return self._rows[:, :1] + systematic(w, z[:, 0])

    def _check(self, x: Tensor) -> None:
        """Looks at values, once: the noise that `ancestral` must have added, at six standard errors; and the alarm."""
        N = len(self._ts) - 1
        z2, bar = float(self._z2) / N, 6 * math.sqrt(2 / (N * x.numel()))
        if abs(z2 - 1) > bar + 1e-3:
            raise ValueError(
                f"the steps were not those of ancestral on this grid (their noise has variance {z2:.4g} instead of 1), "
                "and their weights mean nothing; run ancestral(s, sde, x, ts, on_step=[particles, ...]) on the same ts"
            )
        if not bool((self.ess >= self._alarm).all()):
            raise FloatingPointError(
                f"{self}: a few stand for all.  Take more steps there, steps of `relax` after each, or more particles; "
                "alarm=0 goes on regardless"
            )
