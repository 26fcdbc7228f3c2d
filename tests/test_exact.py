"""Exact targets against torch.distributions, autograd, numerical integration and each other."""

import math

import pytest
import torch
from torch.distributions import Categorical, MixtureSameFamily, MultivariateNormal
from truth import F64, SDES, gaussian_map, marginal, tensor, times

from scoresde import VE, VP, dataset, gaussian, gaussian_flow, mixture, velocity

G = torch.Generator().manual_seed(3)
K, D = 3, 4
W = tensor(0.2, 0.5, 0.3)
MEANS = torch.randn(K, D, generator=G, dtype=F64)
VARS = torch.rand(K, D, generator=G, dtype=F64) + 0.1
FACTORS = torch.randn(K, D, 2, generator=G, dtype=F64)
ROOT = torch.randn(K, D, D, generator=G, dtype=F64)
FULL = ROOT @ ROOT.mT / D
X = torch.randn(5, D, generator=G, dtype=F64)
EYE = torch.eye(D, dtype=F64)
LABELS = torch.tensor([0, 1, 0])

FORMS = {  # the target, and its covariances written out
    "isotropic": (
        mixture(W, MEANS, var=tensor(0.3, 0.1, 2.0), labels=LABELS),
        tensor(0.3, 0.1, 2.0)[:, None, None] * EYE,
    ),
    "diagonal": (mixture(W, MEANS, var=VARS, labels=LABELS), torch.diag_embed(VARS)),
    "full": (mixture(W, MEANS, covs=FULL, labels=LABELS), FULL),
    "low rank": (
        mixture(W, MEANS, factors=FACTORS, var=tensor(0.3, 0.1, 2.0), labels=LABELS),
        FACTORS @ FACTORS.mT + tensor(0.3, 0.1, 2.0)[:, None, None] * EYE,
    ),
    "points": (dataset(MEANS, LABELS), 0 * FULL),
}
EVERY = pytest.mark.parametrize("form", FORMS)


def reference(form, a=1.0, s=0.0, keep=slice(None)):
    weights = torch.ones(K, dtype=F64) if form == "points" else W
    cov = a**2 * FORMS[form][1] + s**2 * EYE
    return MixtureSameFamily(Categorical(weights[keep]), MultivariateNormal(a * MEANS[keep], cov[keep]))


@EVERY
@pytest.mark.parametrize("name", ["VP", "SubVP", "VE", "Straight"])
def test_log_prob_and_score(form, name):
    """log p_t by torch.distributions; the score is the gradient of log p_t, of either of them."""
    sde, (target, _) = SDES[name], FORMS[form]
    for t in times(name, 3)[1:]:
        if sde.sigma(t) < 0.02:
            continue  # MultivariateNormal's Cholesky runs out of digits before we do
        a, s = float(sde.alpha(t)), float(sde.sigma(t))
        x = (a * MEANS[0] + (a + s) * X).requires_grad_()
        want = reference(form, a, s).log_prob(x)
        torch.testing.assert_close(target.log_prob(x, sde, t), want, rtol=1e-9, atol=1e-9)
        grad = torch.autograd.grad(want.sum(), x)[0]
        torch.testing.assert_close(target.score(sde)(x, t), grad, rtol=1e-8, atol=1e-8)
        own = torch.autograd.grad(target.log_prob(x, sde, t).sum(), x)[0]
        torch.testing.assert_close(own, grad, rtol=1e-8, atol=1e-8)


@EVERY
def test_score_near_the_data(form):
    """At t_min, where sigma^2 = 1e-6, the score is still the gradient of the log-density."""
    target, sde, t = FORMS[form][0], VP(), tensor(1e-5)
    x = (MEANS[:1] + 1e-3 * X).requires_grad_()
    grad = torch.autograd.grad(target.log_prob(x, sde, t).sum(), x)[0]
    torch.testing.assert_close(target.score(sde)(x, t), grad, rtol=1e-8, atol=1e-8)


@EVERY
def test_denoiser_is_tweedie(form):
    """E[x0 | x] = (x + sigma^2 s)/alpha, and one time for each sample is the same as one at a time."""
    target, sde = FORMS[form][0], VP()
    t = tensor(0.1, 0.3, 0.5, 0.7, 0.9)
    a, s = sde.alpha(t)[:, None], sde.sigma(t)[:, None]
    score, x0 = target.score(sde)(X, t), target.denoiser(sde)(X, t)
    torch.testing.assert_close(x0, (X + s**2 * score) / a, rtol=1e-9, atol=1e-9)
    for i in range(5):
        alone = slice(i, i + 1)
        torch.testing.assert_close(target.score(sde)(X[alone], t[i]), score[alone], rtol=1e-10, atol=1e-12)
        one = target.log_prob(X[alone], sde, t[i])
        torch.testing.assert_close(target.log_prob(X, sde, t)[alone], one, rtol=1e-12, atol=0)


@pytest.mark.parametrize("dim", [1, 2])
def test_denoiser_by_integration(dim):
    """The posterior mean is the integral of x0 p(x0) N(x; alpha x0, sigma^2), on a fine grid."""
    means, var = tensor([[-1.0, 0.5], [1.2, -0.3]])[:, :dim], tensor([[0.2, 0.1], [0.05, 0.4]])[:, :dim]
    target, sde, t = mixture(tensor(0.3, 0.7), means, var=var), VP(), tensor(0.25)
    a, s = float(sde.alpha(t)), float(sde.sigma(t))
    line = torch.linspace(-6, 6, 601, dtype=F64)
    x0 = torch.cartesian_prod(*[line] * dim).reshape(-1, dim)
    normal = lambda u, v: torch.exp(-(u**2) / (2 * v)) / torch.sqrt(2 * math.pi * v)  # noqa: E731
    prior = sum(w * normal(x0 - m, v).prod(1) for w, m, v in zip((0.3, 0.7), means, var, strict=True))
    h = (12 / 600) ** dim
    for x in ([0.3, -0.2], [-2.0, 1.0]):
        x = tensor([x[:dim]])
        joint = prior * normal(x - a * x0, tensor(s**2)).prod(1)
        assert target.log_prob(x, sde, t).item() == pytest.approx(math.log(joint.sum().item() * h), abs=1e-9)
        mean = (joint[:, None] * x0).sum(0) / joint.sum()
        torch.testing.assert_close(target.denoiser(sde)(x, t)[0], mean, rtol=1e-9, atol=1e-9)


def test_covariance_forms_coincide():
    """The same Gaussian given as a diagonal, as a full matrix and as low rank plus a floor."""
    m, sde, t = MEANS[0], VP(), tensor(0.2)
    var = tensor(1.3, 0.3, 0.3, 2.3)
    factor = torch.zeros(D, 2, dtype=F64)
    factor[0, 0], factor[3, 1] = 1.0, 2**0.5
    forms = [gaussian(m, var=var), gaussian(m, cov=torch.diag(var)), gaussian(m, factor=factor, var=0.3)]
    forms += [mixture(torch.ones(1), m[None], var=var[None])]
    for other in forms[1:]:
        for a, b in ((other.log_prob(X), forms[0].log_prob(X)), *(
            (getattr(other, q)(sde)(X, t), getattr(forms[0], q)(sde)(X, t)) for q in ("score", "denoiser"))
        ):  # fmt: skip
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)
    plain = gaussian(m, factor=FACTORS[0], var=0.1), gaussian(m, cov=FACTORS[0] @ FACTORS[0].T + 0.1 * EYE)
    torch.testing.assert_close(plain[0].score(sde)(X, t), plain[1].score(sde)(X, t), rtol=1e-9, atol=1e-9)
    flat = gaussian(m, factor=FACTORS[0]), gaussian(m, cov=FACTORS[0] @ FACTORS[0].T)  # a flat direction
    torch.testing.assert_close(flat[0].score(sde)(X, t), flat[1].score(sde)(X, t), rtol=1e-9, atol=1e-9)


def test_dataset_is_the_limit_of_narrow_components():
    """And its denoiser is the softmax average of the points   (Karras 2022, eq. 57)."""
    sde, t = VE(), tensor(0.6)
    s = float(sde.sigma(t))
    weights = torch.softmax(-(torch.cdist(X, MEANS) ** 2) / (2 * s * s), 1)
    torch.testing.assert_close(dataset(MEANS).denoiser(sde)(X, t), weights @ MEANS, rtol=1e-9, atol=1e-9)
    narrow = mixture(torch.ones(K), MEANS, var=torch.full((K,), 1e-12))
    torch.testing.assert_close(dataset(MEANS).score(sde)(X, t), narrow.score(sde)(X, t), rtol=1e-9, atol=1e-9)


@EVERY
def test_labels(form):
    """p(label | x) by Bayes' rule from the class densities; `given` is the density of one class."""
    sde, t, target = VP(), tensor(0.3), FORMS[form][0]
    a, s = float(sde.alpha(t)), float(sde.sigma(t))
    weights = torch.full((K,), 1 / 3, dtype=F64) if form == "points" else W
    joint = []
    for label in (0, 1):
        keep = label == LABELS
        density = reference(form, a, s, keep).log_prob(X)
        torch.testing.assert_close(target.given(label).log_prob(X, sde, t), density, rtol=1e-9, atol=1e-9)
        joint.append(density + weights[keep].sum().log())
    want = torch.stack(joint, 1).log_softmax(1)
    torch.testing.assert_close(target.class_log_prob(X, sde, t), want, rtol=1e-9, atol=1e-9)
    x = X.clone().requires_grad_()  # the identity behind classifier guidance
    grad = torch.autograd.grad(target.class_log_prob(x, sde, t)[:, 1].sum(), x)[0]
    both = target.given(1).score(sde)(X, t) - target.score(sde)(X, t)
    torch.testing.assert_close(grad, both, rtol=1e-8, atol=1e-8)


@EVERY
def test_sample_moments(form):
    """Mean and covariance of 20 000 draws within 5 standard errors; a draw does not depend on how many."""
    target, covs = FORMS[form]
    w = torch.full((K,), 1 / 3, dtype=F64) if form == "points" else W
    x = target.sample(20_000, seed=1)
    mean = w @ MEANS
    d = MEANS - mean
    cov = (w[:, None, None] * (covs + d[:, :, None] * d[:, None, :])).sum(0)
    assert x.dtype == F64
    torch.testing.assert_close(x.mean(0), mean, rtol=0, atol=5 * (cov.diagonal().max() / 20_000).sqrt().item())
    torch.testing.assert_close(torch.cov(x.T), cov, rtol=0, atol=0.05 * cov.diagonal().max().item())
    assert torch.equal(x[:10], target.sample(10, seed=1))
    assert not torch.equal(x[:10], target.sample(10, seed=2))


def test_any_shape():
    """Data (2, 1, 2, 2) deep is the flattened problem; the same for a factor and a full covariance."""
    sde, t, shape = VP(), tensor(0.3), (1, 2, 1, 2)
    for knobs in ({"var": VARS}, {"covs": FULL}, {"factors": FACTORS, "var": W}):
        deep = {k: v.reshape(K, *shape) if k == "var" and v.ndim > 1 else v for k, v in knobs.items()}
        flat, target = mixture(W, MEANS, **knobs), mixture(W, MEANS.reshape(K, *shape), **deep)
        x = X.reshape(5, *shape)
        for q in ("score", "denoiser"):
            want = getattr(flat, q)(sde)(X, t)
            torch.testing.assert_close(getattr(target, q)(sde)(x, t), want.reshape(5, *shape))
        torch.testing.assert_close(target.log_prob(x), flat.log_prob(X))
        assert target.sample(3).shape == (3, *shape)
    assert gaussian(torch.zeros(shape), var=torch.ones(shape)).score(sde)(X.reshape(5, *shape), t).shape == (5, *shape)


@pytest.mark.parametrize("name", SDES)
def test_gaussian_flow_satisfies_the_flow_ode(name):
    """d/dt of the map is f x - g^2 s/2 along it (by autograd), it starts where it is, and keeps standard deviations."""
    sde = SDES[name]
    mean, var, x = tensor(0.7, -1.0), tensor(0.25, 2.0), tensor([[0.4, 1.0]])
    t, t1 = tensor(0.35 * sde.T), tensor(0.21 * sde.T)
    end, slope = torch.autograd.functional.jvp(
        lambda u: gaussian_flow(mean, var, sde, x, t, u), t1, torch.ones_like(t1)
    )
    u = velocity(gaussian(mean, var=var).score(sde), sde)(end, t1)
    torch.testing.assert_close(slope, u, rtol=1e-8, atol=1e-10)
    torch.testing.assert_close(gaussian_flow(mean, var, sde, x, t, t), x)
    torch.testing.assert_close(end, gaussian_map(sde, x, t, t1, mean, var), rtol=1e-10, atol=1e-12)
    m, v = marginal(sde, t1, mean, var)
    assert torch.isfinite((end - m) / v.sqrt()).all()
