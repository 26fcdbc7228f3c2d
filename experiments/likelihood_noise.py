"""What random probes cost: standard deviations of log p, and whether error bars from them are honest.

Along the exact path of P points the score's Jacobians J are kept at quadrature nodes.  An estimate with probes v then
errs by

    sum_i w_i b_i rho_i [ mean_n v'(J_i - A_i) v - tr(J_i - A_i) ]

(weights and variables of `scoresde.likelihood`; A = 0, or a control variate whose trace is known), and thousands of
repeats cost no network call.  The covariance control variate is A = -(alpha^2 C + sigma^2)^-1, the Jacobian of
Gaussian data with the data's covariance C.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from scipy.stats import t as student
from torch import Tensor

from experiments.likelihood_methods import F64, Case, jacobian
from experiments.problems import moments
from scoresde import Noise, flow, gaussian
from scoresde.divergence import probes, spread
from scoresde.likelihood import clenshaw_curtis, fejer

Rule = Callable[[int], tuple[Tensor, Tensor]]  # n -> points and weights on [0, 1], (n,) each


@dataclass(frozen=True, eq=False)
class Along:
    """n nodes on the paths of P points: J (n, P, D, D), its weight in the sum, and the control variate (n, D, D)."""

    J: Tensor
    weight: Tensor
    covariance: Tensor
    shares: Callable[[int], list[int]]  # a total of probes -> each node's, as `log_prob(covariance=)` spreads them
    value: Tensor  # the sum's own value of log p with the exact trace, nats (P,)


def along(case: Case, n: int, rule: Rule = fejer) -> Along:
    """The Jacobians at the rule's n nodes, the paths by `flow` from node to node at 1e-6."""
    target, sde, d, D = case.target, case.sde, case.d, case.D
    assert target is not None
    part, weight = rule(n)
    r = torch.exp(-sde.lam(torch.tensor([case.t, sde.T], dtype=F64)))
    ends = torch.sqrt(torch.atan(r / d))
    u = ends[0] + (ends[1] - ends[0]) * part
    times = sde.time(-torch.log(d * torch.tan(u * u))).clamp(case.t, sde.T)
    alpha, sigma = sde.alpha(times), sde.sigma(times)
    rho2 = alpha**2 * d**2 + sigma**2
    w = weight * (ends[1] - ends[0]) * 2 * u * sigma * rho2 / (alpha * d)
    C = moments(target)[1]
    x, at, J = case.x, case.t, []
    for t in times.tolist():
        x = x if t == at else flow(target.score(sde), sde, x, at, t, rtol=1e-6, atol=1e-6)
        at = t
        J.append(jacobian(target, sde, x, torch.tensor(t, dtype=F64)))
    x = x if at == sde.T else flow(target.score(sde), sde, x, at, sde.T, rtol=1e-6, atol=1e-6)
    kept = torch.stack(J)
    trace = kept.diagonal(dim1=2, dim2=3).sum(2)  # (n, P)
    edge = torch.tensor([case.t, sde.T], dtype=F64)
    rho = torch.hypot(sde.alpha(edge) * d, sde.sigma(edge)).log()
    change = (w[:, None] * (trace + D / rho2[:, None])).sum(0) - D * (rho[1] - rho[0])
    V = alpha[:, None, None] ** 2 * C + (sigma**2)[:, None, None] * torch.eye(D, dtype=F64)
    like = gaussian(torch.zeros(D, dtype=F64), cov=C)
    shares = partial(spread, weight=w, alpha=alpha, sigma=sigma, like=like)
    return Along(kept, w, -torch.linalg.inv(V), shares, case.prior(x) - change)


def errors(
    a: Along, kind: str, n: int | list[int], fresh: bool, repeats: int, noise: Noise, control: bool = False
) -> Tensor:
    """Of log p, nats (repeats, P), from the library's probes: n a node, or each node's own number."""
    N, P, D = a.J.shape[:3]
    A = a.J - a.covariance[:, None] if control else a.J
    draw = probes(kind, n, torch.zeros(repeats * P, D, dtype=F64), noise, fresh)
    out = torch.zeros(repeats, P, dtype=F64)
    for i in range(N):
        v = draw(i).reshape(-1, P, D).transpose(0, 1)  # (P, n repeats, D)
        q = ((v @ A[i]) * v).sum(2).reshape(P, -1, repeats).mean(1)
        out -= a.weight[i] * (q - A[i].diagonal(dim1=1, dim2=2).sum(1)[:, None]).T
    return out


def seeded(seed: int) -> Noise:
    generator = torch.Generator().manual_seed(seed)
    return lambda x: torch.randn(x.shape, dtype=x.dtype, generator=generator)


@dataclass(frozen=True)
class Noisy:
    """Standard deviation of log p for a point, RMS over points, and what the nodes miss with the exact trace."""

    problem: str
    probes: str
    nodes: int
    each: float  # on average
    products: int
    nats: float
    bits: float
    quadrature: float  # nats, RMS over points

    @property
    def total(self) -> float:
        """sqrt(noise^2 + quadrature^2), bits/dim."""
        return self.bits * math.hypot(1.0, self.quadrature / self.nats) if self.nats else 0.0


KINDS = (  # name, kind, probes a node, fresh, control variate
    ("one fixed Rademacher probe, the standard", "rademacher", 1, False, False),
    ("one fixed Gaussian", "gaussian", 1, False, False),
    ("one fixed, on the sphere", "sphere", 1, False, False),
    ("fresh Rademacher", "rademacher", 1, True, False),
    ("fresh Hadamard", "hadamard", 1, True, False),
    ("fresh Rademacher", "rademacher", 4, True, False),
    ("fresh Hadamard", "hadamard", 4, True, False),
    ("fresh Hadamard, covariance taken off", "hadamard", 4, True, True),
    ("fresh Hadamard", "hadamard", 16, True, False),
    ("fresh Hadamard, covariance taken off", "hadamard", 16, True, True),
)
BUDGETS = ((7, 14), (15, 6), (31, 3), (63, 1), (63, 2), (127, 1))  # nodes, probes
TURNS = ((24, 4), (32, 3), (48, 2), (96, 1))  # calls of multistep, probes


def noises(case: Case, repeats: int, seed: int, budgets: bool = True) -> Iterator[Noisy]:
    """Kinds of probes on 31 nodes, then ways to spend about 96 products."""
    bits = 1 / (case.D * math.log(2))

    def row(name: str, a: Along, kind: str, n: int | list[int], fresh: bool, control: bool = False) -> Noisy:
        e = errors(a, kind, n, fresh, repeats, seeded(seed), control)
        nats = float(e.square().mean().sqrt())
        missed = float((a.value - case.truth).square().mean().sqrt())
        N = len(a.weight)
        total = N * n if isinstance(n, int) else sum(n)
        return Noisy(case.name, name, N, total / N, total, nats, nats * bits, missed)

    a = along(case, 31)
    for name, kind, n, fresh, control in KINDS:
        yield row(name, a, kind, n, fresh, control)
    for nodes, n in BUDGETS if budgets else ():
        yield row("budget, method apart", along(case, nodes), "hadamard", n, True)
    for nodes, n in TURNS if budgets else ():
        yield row("budget, method multistep", along(case, nodes, clenshaw_curtis), "hadamard", n, True)
    for nodes, rule, name in ((31, fejer, "apart"), (32, clenshaw_curtis, "multistep")) if budgets else ():
        a = along(case, nodes, rule)
        yield row(f"budget, method {name}, spread", a, "hadamard", a.shares(96), True)


def coverage(case: Case, n: int, sets: int, repeats: int, seed: int) -> float:
    """Of `repeats` 95 % bars of the mean over points, from `sets` estimates of n probes, those that hold the exact."""
    e = errors(along(case, 31), "hadamard", n, True, sets * repeats, seeded(seed)).mean(1).reshape(repeats, sets)
    half = float(student.ppf(0.975, sets - 1)) * e.std(1) / math.sqrt(sets)
    return float((e.mean(1).abs() <= half).double().mean())
