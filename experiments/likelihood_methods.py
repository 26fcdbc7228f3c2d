"""Likelihood methods laid beside each other: what they cost, counted; the classical protocols; exact problems.

A `Case` has points x at time t, a score, and what log p_t(x) is.  `Tally` counts, for each point, network passes and
products with the Jacobian.  Passes are counted on the way in, products on the way back: nothing is told by a formula.

The classical protocols integrate path and divergence in one system, with one step for the batch:

    score_sde     x and l over the SDE's own t from the data's time to T: dx/dt = u = f x - g^2 s/2, dl/dt = v'(du/dx)v;
                  scipy's RK45, rtol = atol; u by one network pass, its product by another   (Song 2021, D.2)
    k_diffusion   y = x/alpha and l over r = sigma/alpha: dy/dr = -r s_y(y, r), dl/dr = v'(d./dy)v; torchdiffeq's dopri5
                  on the pair, which steps over the end and reads the state inside the last step

and log p = log prior(x(T)) + l, v one fixed probe, or the exact trace.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
import torchdiffeq
from scipy.integrate import solve_ivp
from torch import Tensor

from experiments.digits import load
from experiments.problems import Problem, problem
from scoresde import SDE, VE, VP, Mixture, Score, Streams, SubVP, log_prob, prior_log_prob, rowwise, velocity
from scoresde.adaptive import rows_of
from scoresde.checkpoint import load_model
from scoresde.divergence import score_and_trace
from scoresde.noise import rademacher
from scoresde.types import like

NOISE = 0.002
"""sigma/alpha at the data's time, for every SDE: EDM's end."""
PROCESSES: dict[str, SDE] = {"VP": VP(), "sub-VP": SubVP(), "VE": VE(sigma_min=0.001)}
F64 = torch.float64


# ---------------------------------------------------------------------------------------------- counted


class _Entry:
    """One network call: the samples it was for, and the products made with its Jacobian."""

    def __init__(self, samples: Tensor) -> None:
        self.samples, self.products = samples, 0


class _Tick(torch.autograd.Function):
    """The identity on a row vector that was multiplied with the Jacobian; tells how many there were."""

    @staticmethod
    def forward(g: Tensor, entry: _Entry) -> Tensor:
        entry.products += 1
        return g.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        """Nothing is kept: it is not differentiated again."""

    @staticmethod
    def vmap(info: Any, in_dims: Any, g: Tensor, entry: _Entry) -> tuple[Tensor, Any]:
        entry.products += info.batch_size
        return g.clone(), in_dims[0]


class _Watch(torch.autograd.Function):
    """The identity on a score; each vector pulled back through it ticks."""

    @staticmethod
    def forward(s: Tensor, entry: _Entry) -> Tensor:
        return s.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.entry = inputs[1]

    @staticmethod
    def backward(ctx: Any, *g: Tensor) -> tuple[Tensor, None]:
        return _Tick.apply(g[0], ctx.entry), None


class Tally:
    """The same score; keeps for each network call which of the B samples it was for, and the products made with it."""

    def __init__(self, score: Score, samples: Tensor, calls: list[_Entry] | None = None) -> None:
        self.score, self.samples = score, samples
        self.calls: list[_Entry] = [] if calls is None else calls

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        entry = _Entry(self.samples)
        self.calls.append(entry)
        return _Watch.apply(self.score(x, t), entry)

    def rows(self, index: Tensor) -> "Tally | None":
        some = rows_of(self.score, index)
        return None if some is None else Tally(some, self.samples[index], self.calls)

    def cost(self) -> "Cost":
        """For each sample (B,): passes, those of them without a product, products; and calls of any batch size."""
        count = torch.zeros(3, 1 + max(int(e.samples.max()) for e in self.calls), dtype=F64)
        for e in self.calls:
            each = torch.tensor([1.0, float(e.products == 0), float(e.products)], dtype=F64)
            count.index_add_(1, e.samples, each[:, None].expand(3, len(e.samples)))
        passes, path, products = count
        return Cost(passes, path, products, len(self.calls), sum(e.products == 0 for e in self.calls))


class Cost(NamedTuple):
    passes: Tensor
    path: Tensor
    products: Tensor
    calls: int
    path_calls: int


# ---------------------------------------------------------------------------------------------- exact scores


def jacobian(target: Mixture, sde: SDE, x: Tensor, t: Tensor) -> Tensor:
    """ds/dx (B, D, D) of a mixture with full covariances, t () or (B,).

    With P_k = V_k^-1, p_k = P_k d_k and q_k as in `scoresde.exact`: -sum_k q_k P_k + sum_k q_k p_k p_k' - s s'
    """
    if t.ndim:
        out = x.new_empty(len(x), *[x[0].numel()] * 2)
        for time in t.unique():
            at = t == time
            out[at] = jacobian(target, sde, x[at], time)
        return out
    alpha, sigma, U = sde.alpha(t), sde.sigma(t), target.basis
    if U is None or U.shape[1] != U.shape[2]:
        raise ValueError("the closed Jacobian is for mixtures with full covariances (covs=)")
    var = alpha**2 * (target.eig + target.floor[:, None]) + sigma**2  # (K, D)
    P = (U / var[:, None]) @ U.mT
    d = x.flatten(1)[:, None] - alpha * target.means
    p = torch.einsum("kde,bke->bkd", P, d)
    q = torch.softmax(target.log_weights - 0.5 * ((d * p).sum(2) + var.log().sum(1)), 1)
    s = (q[..., None] * p).sum(1)
    return (p * q[..., None]).mT @ p - torch.einsum("bk,kde->bde", q, P) - s[:, :, None] * s[:, None]


class _Product(torch.autograd.Function):
    """J g, (B, D, D) with (B, ...); many g at once by one matrix product."""

    @staticmethod
    def forward(J: Tensor, g: Tensor) -> Tensor:
        return (J @ g.flatten(1)[:, :, None]).reshape(g.shape)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        """Nothing is kept: it is not differentiated again."""

    @staticmethod
    def vmap(info: Any, in_dims: Any, J: Tensor, g: Tensor) -> tuple[Tensor, int]:
        g = g.movedim(in_dims[1], 0)
        return (J @ g.flatten(2).permute(1, 2, 0)).permute(2, 0, 1).reshape(g.shape), 0


class _Closed(torch.autograd.Function):
    """score(x, t), whose products with the Jacobian come from its closed form."""

    @staticmethod
    def forward(x: Tensor, t: Tensor, score: Score, target: Mixture, sde: SDE) -> Tensor:
        return score(x, t)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        x, ctx.t, _, ctx.target, ctx.sde = inputs
        ctx.save_for_backward(x)

    @staticmethod
    def backward(ctx: Any, *g: Tensor) -> tuple[Tensor | None, ...]:
        J = jacobian(ctx.target, ctx.sde, ctx.saved_tensors[0], ctx.t)
        return _Product.apply(J, g[0]), None, None, None, None


def closed(target: Mixture, sde: SDE) -> Score:
    """`target.score(sde)` with quick products: the same numbers, five times sooner in 64 dimensions."""
    score = target.score(sde)
    return rowwise(lambda x, t: _Closed.apply(x, t, score, target, sde))


@dataclass(frozen=True, eq=False)
class Case:
    """Points x (B, ...) at time t, and log p_t(x) in nats (B,) of the flow model with this score and prior.

    d: the data's standard deviation;  probe: None: exact trace; (B, ...): the one fixed probe the value is defined with
    """

    name: str
    score: Score
    sde: SDE
    x: Tensor
    t: float
    d: float
    prior: Callable[[Tensor], Tensor]
    truth: Tensor
    probe: Tensor | None = None
    target: Mixture | None = None

    @property
    def D(self) -> int:
        return self.x[0].numel()

    def bits(self, log_p: Tensor) -> Tensor:
        """Error in bits/dim."""
        return (log_p - self.truth) / (self.D * math.log(2))


def data_time(sde: SDE, noise: float = NOISE) -> float:
    """t where sigma/alpha = noise."""
    return float(sde.time(torch.tensor(-math.log(noise), dtype=F64)))


def exact_case(name: str, process: str, points: int, seed: int) -> Case:
    """Draws of p_t of a problem's target under one of `PROCESSES`."""
    of, sde = problem(name), PROCESSES[process]
    p = Problem(name, sde, of.target, data_time(sde))
    x, target = p.draw(points, seed, p.t_end), of.target
    truth = target.log_prob(x, sde, torch.tensor(p.t_end, dtype=F64))
    T = torch.tensor(sde.T, dtype=F64)
    return Case(
        f"{name} {process}", closed(target, sde), sde, x, p.t_end, p.sigma_data,
        lambda y: target.log_prob(y, sde, T), truth, target=target,
    )  # fmt: skip


def model_cases(file: Any, points: int, seed: int) -> tuple[Case, Case]:
    """A trained network in float64 on held-out digits given their classes; its converged values.

    With one fixed probe, by dopri8 at 1e-7; with the exact trace, on the first 4, by 160 multistep calls.
    """
    model, header = load_model(file)
    about = header.get("data", {})
    if about.get("shape") != [1, 8, 8] or about.get("levels") != 17:
        raise ValueError(f"{file} was not trained on scikit-learn's digits; train one with experiments.quickstart")
    model.net.double()  # type: ignore[attr-defined]
    held = load(None, about.get("seed", 0))[1]
    rows = torch.arange(len(held))[:: max(1, len(held) // points)][:points]
    x = held.densities(rows, Streams(seed, len(rows))).double()

    def case(name: str, n: int, probe: Tensor | None, converged: Run) -> Case:
        score = model.given(held.y[rows[:n]]) if model.classes else model
        sde = model.sde
        c = Case(name, score, sde, x[:n], sde.t_min, model.sigma_data, lambda y: prior_log_prob(sde, y), x, probe)
        return Case(**{**vars(c), "truth": converged(c, score)})

    probe = rademacher(Streams(seed + 1, len(x))(x))
    many, few = ours(method="dopri8", tol=1e-7), ours(method="multistep", steps=160)
    return case("network", len(x), probe, many), case("network, exact trace", min(4, len(x)), None, few)


# ---------------------------------------------------------------------------------------------- methods

Run = Callable[[Case, Score], Tensor]  # log p_t(x) in nats, (B,)


def ours(**how: Any) -> Run:
    """`log_prob` with the case's prior and probe."""

    def run(case: Case, score: Score) -> Tensor:
        probe, more = case.probe, dict(how)
        if probe is not None:
            more |= {"probes": 1, "kind": "rademacher", "fresh": False, "noise": lambda x: probe}
        return log_prob(score, case.sde, case.x, t=case.t, prior=case.prior, d=case.d, **more)

    return run


def score_sde(tol: float = 1e-5, signs: bool = True) -> Run:
    """See the module; signs: with a fixed Rademacher probe, unless the case has its own; else the exact trace."""

    def run(case: Case, score: Score) -> Tensor:
        u, shape, B = velocity(score, case.sde), case.x.shape, len(case.x)
        v = _probe(case, signs)

        def rhs(t: float, y: np.ndarray) -> np.ndarray:
            x, time = torch.from_numpy(y[:-B].copy()).reshape(shape), torch.tensor(t, dtype=F64)
            dx = u(x, time)
            dl = score_and_trace(u, x, time, v)[1]
            return torch.cat([dx.flatten(), dl]).numpy()

        start = torch.cat([case.x.flatten(), case.x.new_zeros(B)]).numpy()
        end = solve_ivp(rhs, (case.t, float(case.sde.T)), start, method="RK45", rtol=tol, atol=tol).y[:, -1]
        return case.prior(torch.from_numpy(end[:-B]).reshape(shape)) + torch.from_numpy(end[-B:])

    return run


def k_diffusion(tol: float = 1e-4, signs: bool = True) -> Run:
    """See the module; another SDE than alpha = 1 in y = x/alpha, with log p(x) = log p(y) - D log alpha."""

    def run(case: Case, score: Score) -> Tensor:
        sde, v = case.sde, _probe(case, signs)
        ends = torch.tensor([case.t, float(sde.T)], dtype=F64)
        alpha, r = sde.alpha(ends), torch.exp(-sde.lam(ends))

        def slope(y: Tensor, r: Tensor) -> Tensor:
            t = sde.time(-torch.log(r))
            a = sde.alpha(t)
            return -like(r * a, y) * score(like(a, y) * y, t)

        def rhs(r: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
            return score_and_trace(slope, state[0], r, v)

        start = (case.x / alpha[0], case.x.new_zeros(len(case.x)))
        y, l = torchdiffeq.odeint(rhs, start, r, method="dopri5", rtol=tol, atol=tol)
        return case.prior(alpha[1] * y[-1]) + l[-1] + case.D * float((alpha[1] / alpha[0]).log())

    return run


def _probe(case: Case, signs: bool) -> Tensor | None:
    """(1, B, ...) or None."""
    if case.probe is not None:
        return case.probe[None]
    return rademacher(Streams(3, len(case.x))(case.x))[None] if signs else None


@dataclass(frozen=True)
class Row:
    """One run: costs of a sample on average and of the dearest, calls of the batch; errors of log p in bits/dim."""

    problem: str
    method: str
    setting: str
    points: int
    passes: float
    path: float
    path_most: float
    products: float
    products_most: float
    calls: int
    path_calls: int
    mean: float
    rms: float
    worst: float
    median: float


def measure(case: Case, method: str, setting: str, run: Run) -> Row:
    tally = Tally(case.score, torch.arange(len(case.x)))
    e, cost = case.bits(run(case, tally)), tally.cost()
    return Row(
        case.name, method, setting, len(e), float(cost.passes.mean()), float(cost.path.mean()), float(cost.path.max()),
        float(cost.products.mean()), float(cost.products.max()), cost.calls, cost.path_calls,
        float(e.mean()), float(e.square().mean().sqrt()), float(e.abs().max()), float(e.abs().median()),
    )  # fmt: skip
