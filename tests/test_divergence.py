"""Traces of Jacobians by probes against the trace itself, without Monte Carlo where that is possible."""

import itertools
import math

import pytest
import torch
from truth import F64, gaussian_score, tensor

from experiments.problems import moments
from scoresde import VE, VP, Streams, counted, gaussian, log_prob
from scoresde.divergence import KINDS, probes, score_and_trace, spread

M, C = tensor(0.4, -1.0, 0.2), tensor([[1.0, 0.5, 0.1], [0.5, 0.6, 0.0], [0.1, 0.0, 0.3]])
FULL = gaussian(M, cov=C)
X = tensor([[0.5, -0.7, 0.0], [2.0, 0.4, -1.0], [-1.0, -2.0, 0.3], [0.3, -1.1, 0.2]])
T = tensor(0.3)


def jacobians(score, x, t):
    return torch.stack([torch.autograd.functional.jacobian(lambda y: score(y[None], t)[0], row) for row in x])


def test_exact_trace_in_any_chunks():
    score = FULL.score(VP())
    trace = jacobians(score, X, T).diagonal(dim1=1, dim2=2).sum(1)
    for chunk in (None, 1, 2, 3):
        s, got = score_and_trace(score, X, T, chunk=chunk)
        torch.testing.assert_close(s, score(X, T))
        torch.testing.assert_close(got, trace, rtol=1e-12, atol=0)
    deep = gaussian(M.reshape(1, 3, 1), cov=C).score(VP())
    torch.testing.assert_close(score_and_trace(deep, X.reshape(4, 1, 3, 1), T)[1], trace, rtol=1e-12, atol=0)


def test_quadratic_form_of_given_probes():
    """v'Jv for one probe, its mean for several; the mean over all sign patterns is the trace."""
    score = FULL.score(VP())
    J = jacobians(score, X, T)
    every = torch.stack([tensor(p).expand_as(X) for p in itertools.product((-1.0, 1.0), repeat=3)])
    torch.testing.assert_close(score_and_trace(score, X, T, every)[1], J.diagonal(dim1=1, dim2=2).sum(1))
    one = score_and_trace(score, X, T, every[2:3])[1]
    torch.testing.assert_close(one, torch.einsum("bi,bij,bj->b", every[2], J, every[2]))
    assert ((one - J.diagonal(dim1=1, dim2=2).sum(1)).abs() > 1e-3).all()
    four = torch.einsum("nbi,bij,nbj->nb", every[:4], J, every[:4]).mean(0)
    torch.testing.assert_close(score_and_trace(score, X, T, every[:4], chunk=3)[1], four)


@pytest.mark.parametrize("D", [1, 2, 5, 8, 12])
def test_all_hadamard_rows_give_the_trace(D):
    """Any 2^k >= D neighbouring rows have sum v v' = 2^k I, whatever the signs and the order; fewer do not."""
    x = torch.zeros(3, D, dtype=F64)
    size = 2 ** math.ceil(math.log2(D)) if D > 1 else 1
    eye = torch.eye(D, dtype=F64).expand(3, D, D)
    for n in (1, 2, 3):
        draw = probes("hadamard", n, x, Streams(5, 3), True)
        if size % n == 0:
            rows = torch.cat([draw(i) for i in range(7, 7 + size // n)])
            torch.testing.assert_close(torch.einsum("nbi,nbj->bij", rows, rows) / size, eye, rtol=0, atol=1e-12)
    assert set(draw(0).unique().tolist()) <= {-1.0, 1.0}
    if D > 2:
        few = probes("hadamard", size // 2, x, Streams(5, 3), True)(0)
        assert (torch.einsum("nbi,nbj->bij", few, few) / len(few) - eye).abs().max() >= 0.5
    kept = probes("hadamard", 2, x, Streams(5, 3), False)
    assert torch.equal(kept(0), kept(4))
    if D > 2:
        assert not torch.equal(draw(0), draw(1))
        assert not torch.equal(draw(0)[:, 0], draw(0)[:, 1])


@pytest.mark.parametrize("kind", KINDS)
def test_probes_are_white(kind):
    """E v v' = I, to 5 standard errors, with the fourth moment that tells the kinds apart."""
    D, B = 4, 20_000
    torch.manual_seed(0)
    v = probes(kind, 1, torch.zeros(B, D, dtype=F64), torch.randn_like, True)(3)[0]
    second, fourth = v.T @ v / B, v.pow(4).mean()
    assert (second - torch.eye(D)).abs().max() < 5 * math.sqrt(2 / B)
    want = {"gaussian": 3.0, "sphere": 3 * D / (D + 2)}.get(kind, 1.0)
    assert fourth.item() == pytest.approx(want, abs=0.1)
    if kind != "gaussian":
        torch.testing.assert_close(v.square().sum(1), torch.full((B,), float(D), dtype=F64))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("fresh", [True, False])
def test_a_sample_has_its_own_probes(kind, fresh):
    """The same alone and in a batch; kept or new at each evaluation, as asked."""
    x = torch.zeros(5, 2, 3, dtype=F64)
    whole = probes(kind, 2, x, Streams(3, 5), fresh)
    alone = probes(kind, 2, x[3:4], Streams(3, range(3, 4)), fresh)
    a, b = [whole(i) for i in (0, 1)], [alone(i) for i in (0, 1)]
    for u, v in zip(a, b, strict=True):
        assert u.shape == (2, 5, 2, 3)
        assert torch.equal(u[:, 3:4], v)
    assert torch.equal(a[0], a[1]) is not fresh


def test_signs_are_exact_for_a_diagonal_jacobian():
    score = gaussian_score(VE(), M, tensor(0.2, 1.0, 3.0))
    exact = log_prob(score, VE(), X, nodes=31, tol=1e-3)
    for kind in ("rademacher", "hadamard"):
        got = log_prob(score, VE(), X, nodes=31, tol=1e-3, probes=1, kind=kind, noise=Streams(0, 4))
        plain = log_prob(score, VE(), X, nodes=31, tol=1e-3, probes=3, kind=kind, noise=Streams(0, 4))
        torch.testing.assert_close(got, plain, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(got, exact, rtol=0, atol=3e-3)


def test_four_rows_a_node_do_what_theory_says():
    """All 2^k rows over the nodes: the 4 rows of D = 4 at each node are the exact trace, to rounding."""
    target = gaussian(torch.zeros(4), cov=torch.diag(tensor(0.1, 0.5, 1.0, 2.0)) + 0.05)
    x, score = target.sample(6), counted(target.score(VP()))
    exact = log_prob(score, VP(), x, method="multistep", steps=12)
    calls = score.calls
    got = log_prob(score, VP(), x, method="multistep", steps=12, probes=4, noise=Streams(0, 6))
    torch.testing.assert_close(got, exact, rtol=1e-11, atol=1e-11)
    assert (calls, score.calls) == (12, 24)
    fewer = log_prob(score, VP(), x, method="multistep", steps=12, probes=1, noise=Streams(0, 6))
    assert (fewer - exact).abs().max() > 1e-3


def off_diagonal(target, alpha, sigma):
    """sqrt of sum_{i /= j} J_ij^2, J = -(alpha^2 C + sigma^2)^-1, with every matrix written out."""
    C = moments(target)[1]
    out = []
    for a, s in zip(alpha, sigma, strict=True):
        J = torch.linalg.inv(a**2 * C + s**2 * torch.eye(len(C), dtype=F64))
        out.append((J - J.diagonal().diag()).square().sum().sqrt())
    return torch.stack(out)


@pytest.mark.parametrize("form", ["full", "low rank", "diagonal"])
def test_probes_are_spread_as_the_noise(form):
    g = torch.Generator().manual_seed(0)
    F = torch.randn(6, 6 if form == "full" else 2, generator=g, dtype=F64)
    like = {
        "full": lambda: gaussian(torch.zeros(6), cov=F @ F.T),
        "low rank": lambda: gaussian(torch.zeros(6), factor=F, var=0.1),
        "diagonal": lambda: gaussian(torch.zeros(6), var=0.1 + F.new_tensor(range(6))),
    }[form]()
    weight, alpha, sigma = (
        torch.tensor([0.1, -3.0, 0.5, 2.0], dtype=F64),
        torch.linspace(1, 0.4, 4),
        torch.ones(4) * 0.3,
    )
    n = spread(1000, weight, alpha.to(F64), sigma.to(F64), like)
    assert sum(n) == 1000
    noise = weight.abs() * off_diagonal(like, alpha.to(F64), sigma.to(F64))
    want = noise / noise.sum() if form != "diagonal" else torch.full((4,), 0.25)
    assert (torch.tensor(n) - 1000 * want).abs().max() < 3
    assert spread(4, weight, alpha.to(F64), sigma.to(F64), like) == [1, 1, 1, 1]


def test_rows_of_uneven_evaluations_complete_each_other():
    """3, 5 and 8 of the 16 rows: together they are all of them, so of one J the trace."""
    x, noise = torch.zeros(4, 16, dtype=F64), Streams(0, 4)
    J = torch.randn(16, 16, generator=torch.Generator().manual_seed(1), dtype=F64)
    draw = probes("hadamard", [3, 5, 8], x, noise, True)
    v = torch.cat([draw(i) for i in range(3)])
    assert v.shape == (16, 4, 16)
    assert (torch.einsum("nbi,ij,nbj->b", v, J, v) / 16 - J.trace()).abs().max() < 1e-11
    with pytest.raises(ValueError, match="fresh"):
        probes("hadamard", [1, 2], x, noise, False)


def test_spread_probes_are_quieter():
    """Gaussian data in 64 dimensions: as many products, 64, less noise; and still the exact log-density in the mean."""
    g, D, n = torch.Generator().manual_seed(3), 64, 200
    F = torch.randn(D, D, generator=g, dtype=F64) * torch.logspace(0, -1.5, D, dtype=F64)
    target, sde = gaussian(torch.zeros(D), cov=1.6 / D * F @ F.T + 1e-3 * torch.eye(D, dtype=F64)), VP()
    x = target.sample(1, 4).expand(n, D)
    exact = target.log_prob(x[:1], sde, tensor(1e-2))
    how = {"t": 1e-2, "prior": target, "method": "curve", "steps": 16, "d": 0.4}
    even, uneven = (
        log_prob(target.score(sde), sde, x, noise=Streams(0, n), **how, **more) - exact
        for more in ({"probes": 4}, {"probes": 64, "covariance": target})
    )
    assert float(uneven.std()) < 0.75 * float(even.std())
    assert abs(float(uneven.mean())) < 4 * float(uneven.std()) / n**0.5
    with pytest.raises(ValueError, match="covariance spreads"):
        log_prob(target.score(sde), sde, x, covariance=target)
    with pytest.raises(ValueError, match="do not go round"):
        log_prob(target.score(sde), sde, x, probes=5, covariance=target)
