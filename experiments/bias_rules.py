"""Guidance rules against the density they are named after: what `experiments.bias_card` runs.

A `Case` is a mixture with classes under an SDE; a method is a function (case, w, n, seed) -> (samples, network calls a
sample), and the density it is held against is p_u^(1-w) p_c^w unless `target` says otherwise.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

import guidance
import samplers
from scoresde import SDE, Mixture, Score, Streams, counted
from scoresde.types import Hook


@dataclass(frozen=True, eq=False)
class Case:
    """A mixture of classes, the class that is asked for, and the scale of its data."""

    target: Mixture
    label: int
    other: int  # a second class, for AND, OR and NOT
    d: float  # standard deviation of the data
    width: float  # of the narrowest mode that Langevin moves are to explore
    sde: SDE
    t_end: float

    def scores(self) -> tuple[Score, Score]:
        return self.target.given(self.label).score(self.sde), self.target.score(self.sde)

    @property
    def pair(self) -> list[Score]:
        """Scores of the asked class and of the other one."""
        return [self.target.given(k).score(self.sde) for k in (self.label, self.other)]

    def energy(self, x0: Tensor) -> Tensor:
        """-log p(label | x0), of a clean image."""
        return -self.target.class_log_prob(x0)[:, self.label]

    @property
    def weak(self) -> Mixture:
        """A worse model of the asked class: every variance larger by a tenth of the data's."""
        cond = self.target.given(self.label)
        return replace(cond, floor=cond.floor + 0.1 * self.d**2)

    def grid(self, n: int, low: float | None = None, high: float | None = None) -> Tensor:
        """n steps, geometric in sigma/alpha, from `high` (sde.T) to `low` (t_end)."""
        ends = torch.tensor([self.sde.T, self.t_end], dtype=torch.float64)
        r = torch.exp(-self.sde.lam(ends))
        high, low = float(r[0]) if high is None else high, float(r[1]) if low is None else low
        r = torch.linspace(math.log(high), math.log(low), n + 1, dtype=torch.float64).exp()
        return samplers.grids.of_levels(self.sde, r)

    def start(self, n: int, seed: int) -> Tensor:
        return self.sde.prior_std * Streams(seed, n)(torch.empty(n, *self.target.shape, dtype=torch.float64))


Method = Callable[[Case, float, int, int], tuple[Tensor, float]]
Rule = Callable[[Case, float, Tensor], Score | tuple[Score, Hook]]  # (case, w, grid of the run) -> guided score


def flow(rule: Rule, steps: int = 60, sampler: Callable[..., Tensor] = samplers.heun) -> Method:
    """A rule's score on the probability flow, so finely that what is left is the rule's (see the card)."""

    def run(case: Case, w: float, n: int, seed: int) -> tuple[Tensor, float]:
        ts = case.grid(steps)
        made = rule(case, w, ts)
        guided, hook = made if isinstance(made, tuple) else (made, ())
        s = counted(guided)
        x = sampler(s, case.sde, case.start(n, seed), ts, on_step=hook)
        return x, s.samples / n

    return run


def noisy(rule: Callable[[Case, float, Tensor], Score], steps: int, moves: int = 0) -> Method:
    """A rule's score by the reverse SDE, with `moves` Metropolis-adjusted Langevin moves after each step."""

    def run(case: Case, w: float, n: int, seed: int) -> tuple[Tensor, float]:
        ts, noise = case.grid(steps), Streams(seed + 1, n)
        s = counted(rule(case, w, ts))
        hook = samplers.metropolis(s, case.sde, ts, moves, width=case.width, noise=noise)
        x = samplers.ancestral(s, case.sde, case.start(n, seed), ts, noise=noise, on_step=hook)
        return x, s.samples / n

    return run


def ramped(above: int, below: int, moves: int, sampler: Callable[..., Tensor]) -> Method:
    """Exact guidance: conditional down to sigma/alpha = d, then w rises to its value at 0.3 d, with moves.

    above, below: steps before (by `angle`) and after (by `sampler`) sigma/alpha = d
    """

    def run(case: Case, w: float, n: int, seed: int) -> tuple[Tensor, float]:
        (cond, uncond), noise = case.scores(), Streams(seed + 1, n)
        first = counted(cond)
        x = samplers.angle(first, case.sde, case.start(n, seed), case.grid(above, low=case.d), d=case.d)
        ts = case.grid(below, high=case.d)
        ramp = guidance.ramp(w, 0.3 * case.d, case.d)
        s = counted(guidance.cfg(cond, uncond, ramp, sde=case.sde))
        hook = samplers.metropolis(s, case.sde, ts, moves, width=case.width, noise=noise)
        x = sampler(s, case.sde, x, ts, on_step=hook)
        return x, (first.samples + s.samples) / n

    return run


def weighted(steps: int, moves: int) -> Method:
    """Feynman-Kac correction of the flow, with moves."""

    def run(case: Case, w: float, n: int, seed: int) -> tuple[Tensor, float]:
        ts, noise, (cond, uncond) = case.grid(steps, high=20 * case.d), Streams(seed + 1, n), case.scores()
        fk = guidance.feynman_kac(cond, uncond, w, case.sde, ts, noise=noise)
        s = counted(fk.score)
        hooks = [fk.hook, samplers.metropolis(s, case.sde, ts, moves, width=case.width, noise=noise)]
        x = float(case.sde.sigma(ts[0])) * Streams(seed, n)(case.start(n, seed))
        return samplers.heun(s, case.sde, x, ts, on_step=hooks), s.samples / n

    return run


def superposed(kind: str, steps: int = 300) -> Method:
    """Two classes by their tracked log-densities; no weight."""

    def run(case: Case, w: float, n: int, seed: int) -> tuple[Tensor, float]:
        ts, noise = case.grid(steps, high=30 * case.d), Streams(seed + 1, n)
        s, hook = guidance.superpose(case.pair, case.sde, ts, kind)
        s = counted(s)
        x = float(case.sde.sigma(ts[0])) * Streams(seed, n)(case.start(n, seed))
        return samplers.ancestral(s, case.sde, x, ts, noise=noise, on_step=hook), s.samples / n

    return run


def _cfg(case: Case, w: float, ts: Tensor, **knobs: object) -> Score:
    return guidance.cfg(*case.scores(), w, sde=case.sde, **knobs)  # type: ignore[arg-type]


def _of_two(rule: Callable[..., Score], **knobs: object) -> Rule:
    return lambda case, w, ts: rule(*case.scores(), w, sde=case.sde, **knobs)


def _auto(case: Case, w: float, ts: Tensor) -> Score:
    return guidance.cfg(case.scores()[0], case.weak.score(case.sde), w)


def _clean(case: Case, w: float, ts: Tensor) -> Score:
    return guidance.energy(case.scores()[1], case.sde, case.energy, w)


def _universal(case: Case, w: float, ts: Tensor) -> Score:
    return guidance.universal(case.scores()[1], case.sde, case.energy, w, steps=1, rate=0.1 * case.d**2)


def _mpgd(case: Case, w: float, ts: Tensor) -> Score:
    """The rate is w times the variance of x0 | x_t for N(0, d^2 I) data: to first order in E, Bayes' rule for them."""
    rate = lambda r: w / (1 / r**2 + 1 / case.d**2)  # noqa: E731
    return guidance.mpgd(case.scores()[1], case.sde, case.energy, rate)


def _momentum(case: Case, w: float, ts: Tensor) -> tuple[Score, Hook]:
    return guidance.apg_momentum(*case.scores(), w, sde=case.sde, beta=-0.5)


def _noise_aware(case: Case, w: float, ts: Tensor) -> Score:
    def log_prob(x: Tensor, t: Tensor) -> Tensor:
        return case.target.class_log_prob(x, case.sde, t)[:, case.label]

    return guidance.classifier(case.scores()[1], log_prob, w)


def _product(case: Case, w: float, ts: Tensor) -> Score:
    return guidance.product(case.pair, [w / 2, w / 2])


def _and(case: Case, w: float, ts: Tensor) -> Score:
    return guidance.conjunction(case.scores()[1], case.pair, [w, w])


def _not(case: Case, w: float, ts: Tensor) -> Score:
    return guidance.conjunction(case.scores()[1], case.pair, [1.0, -w / 8])


def _perp(case: Case, w: float, ts: Tensor) -> Score:
    return guidance.perp_neg(*case.scores(), w, case.pair[1:], [1 / 8], sde=case.sde)


def _plus(case: Case, w: float, ts: Tensor) -> Score:
    return _cfg(case, guidance.plus_plus(w / 8, case.sde, ts), ts)  # type: ignore[arg-type]


METHODS: dict[str, Method] = {
    "cfg, flow": flow(_cfg),
    "cfg, interval": flow(lambda case, w, ts: _cfg(case, w, ts, interval=(0.2 * case.d, 2 * case.d))),
    "rescale": flow(_of_two(guidance.rescale)),
    "apg": flow(_of_two(guidance.apg)),
    "apg, momentum": flow(_momentum),
    "cfg-zero*": flow(_of_two(guidance.zero_star)),
    "tangential": flow(_of_two(guidance.tangential)),
    "cfg++ (w/8)": flow(_plus, sampler=samplers.ddim),
    "autoguidance": flow(_auto),
    "noise-aware classifier": flow(_noise_aware),
    "clean classifier": flow(_clean),
    "universal": flow(_universal),
    "mpgd": flow(_mpgd),
    "product": flow(_product),
    "conjunction (AND)": flow(_and),
    "negative (NOT)": flow(_not),
    "perp-neg": flow(_perp),
    "cfg, SDE": noisy(_cfg, 160),
    "cfg, SDE + moves": noisy(_cfg, 64, 2),
    "Feynman-Kac": weighted(80, 1),
    "frequency, images": flow(lambda case, w, ts: guidance.frequency(*case.scores(), w, (1 + w) / 2, sde=case.sde)),
    "fast": ramped(12, 8, 2, samplers.ddim),
    "exact": ramped(20, 15, 8, samplers.heun),
}
"""Methods by the name on the card; `frequency` has half the guidance at high frequencies, and no density of its own."""

ONCE: dict[str, Method] = {"superpose OR": superposed("or"), "superpose AND": superposed("and")}
"""Methods without a weight; held against (p_a + p_b)/2 and against sqrt(p_a p_b)/Z."""


def log_target(case: Case, name: str, w: float, x: Tensor) -> Tensor:
    """log f of what `name` is named after, at t_end, up to a constant."""
    t = torch.tensor(case.t_end, dtype=torch.float64)
    log = lambda p: p.log_prob(x, case.sde, t)  # noqa: E731
    cond, whole, other = case.target.given(case.label), case.target, case.target.given(case.other)
    if name == "autoguidance":
        return w * log(cond) + (1 - w) * log(case.weak)
    if name == "cfg++ (w/8)":  # it names no density: held against the conditional one
        return log(cond)
    if name == "negative (NOT)":
        return log(cond) - w / 8 * (log(other) - log(whole))
    if name == "perp-neg":
        return (1 - w) * log(whole) + w * log(cond) - w / 8 * (log(other) - log(whole))
    if name == "product":
        return w / 2 * (log(cond) + log(other))
    if name == "conjunction (AND)":
        return log(whole) + w * (log(cond) + log(other) - 2 * log(whole))
    if name == "superpose OR":
        return torch.logaddexp(log(cond), log(other))
    if name == "superpose AND":
        return (log(cond) + log(other)) / 2
    return (1 - w) * log(whole) + w * log(cond)


def at_one(name: str) -> bool:
    """Whether w = 1 is off, so that the rule is exact there."""
    return name not in (
        "clean classifier", "universal", "mpgd", "product", "conjunction (AND)", "negative (NOT)", "perp-neg",
        "cfg++ (w/8)",
    )  # fmt: skip
