"""Posterior rules: exact scores of Gaussian posteriors, the published formulas written out, other programs' numbers."""

import math

import pytest
import torch
from guided import D64, SDE, T, close
from measured import (
    COV,
    DENSE,
    GRID,
    MATRIX,
    MEAN,
    MIXED,
    OPERATORS,
    SHAPE,
    X,
    draw,
    every_operator,
    matrix,
    measurement,
)
from reference import Levels, load, recorded

from guidance import cfg
from guidance import operators as ops
from guidance.nullspace import ddnm, ddnm_plus, ddrm, diffpir
from guidance.posterior import dps, mmps, pigdm, tmpd
from samplers import ancestral, ddim, hooks
from scoresde import EDM, VE, counted, denoised, gaussian
from scoresde.types import number


def posterior(mean, cov, A, y, noise_sd, sde, x, t):
    """The score of N(alpha m', alpha^2 C' + sigma^2) with N(m', C') the posterior of N(mean, cov) data given y."""
    M = matrix(A)
    S = M @ cov @ M.T + noise_sd**2 * torch.eye(len(M), dtype=D64)
    K = torch.linalg.solve(S, M @ cov).T
    m1, C1 = mean.flatten() + K @ (y.flatten() - M @ mean.flatten()), cov - K @ M @ cov
    a, s = sde.alpha(t), sde.sigma(t)
    return -torch.linalg.solve(a**2 * C1 + s**2 * torch.eye(6, dtype=D64), (x.flatten(1) - a * m1).T).T.reshape(x.shape)


# --- exact posteriors ------------------------------------------------------------------------------------------------


@every_operator
@pytest.mark.parametrize("sde", [SDE, VE(), EDM()], ids=lambda s: type(s).__name__)
def test_mmps_is_exact_for_gaussian_data(A, sde):
    """With as many gradients as measured numbers it is the score of the exact posterior; with fewer it is not."""
    y, score = measurement(A), gaussian(MEAN, cov=COV).score(sde)
    n = y.numel()
    for t in (number(0.2), number(0.6)):
        exact = posterior(MEAN, COV, A, y, 0.1, sde, X, t)
        close(mmps(score, sde, A, y, 0.1, iterations=n + 2)(X, t), exact, 1e-9)
        assert (score(X, t) - exact).abs().max() > 1e-2
    if n > 2:
        t = number(0.6)
        assert (
            mmps(score, sde, A, y, 0.1, iterations=1)(X, t) - posterior(MEAN, COV, A, y, 0.1, sde, X, t)
        ).abs().max() > 1e-3


def test_mmps_stops_where_the_jacobian_is_no_covariance():
    """x0 = (alpha/sigma^2) V x with V < 0, where A A* = 1/2: V/2 + noise_sd^2 has to be half of noise_sd^2 at least."""
    A, k = OPERATORS["gray"], SDE.alpha(T) / SDE.sigma(T) ** 2
    y = measurement(A)
    for V, stops in ((-5.0, True), (-0.0101, True), (-0.0099, False)):
        falling = lambda x, t, V=V: (SDE.alpha(t) * k * V - 1) * x / SDE.sigma(t) ** 2  # noqa: E731
        s = falling(X, T)
        push = (k * V) * A.adjoint(y - A(k * V * X)) / (V / 2 + 0.01)
        close(mmps(falling, SDE, A, y, 0.1)(X, T), s if stops else s + push)


@every_operator
def test_pigdm_is_exact_for_data_of_one_width(A):
    y, d = measurement(A), 0.7
    score, cov = gaussian(MEAN, var=d**2).score(SDE), d**2 * torch.eye(6, dtype=D64)
    for noise_sd in (0.1, 1e-5, 0.0):
        if noise_sd == 0 and A is OPERATORS["blur"]:
            continue  # every direction is known, some hardly: the solve is as bad as the blur
        exact = posterior(MEAN, cov, A, y, noise_sd, SDE, X, T)
        close(pigdm(score, SDE, A, y, noise_sd, sigma_data=d)(X, T), exact, 1e-8)
    ts = torch.tensor([0.05, 0.3, 0.9, 0.4, 0.02], dtype=D64)
    together = pigdm(score, SDE, A, y, 0.1, sigma_data=d)(X, ts)
    for i, t in enumerate(ts):
        close(together[i : i + 1], posterior(MEAN, cov, A, y, 0.1, SDE, X[i : i + 1], t), 1e-10)


def test_tmpd_is_exact_for_independent_entries():
    A, var = OPERATORS["mask"], 0.1 + draw(*SHAPE, seed=8).square()
    y = measurement(A)
    exact = posterior(MEAN, torch.diag(var.flatten()), A, y, 0.1, SDE, X, T)
    close(tmpd(gaussian(MEAN, var=var).score(SDE), SDE, A, y, 0.1)(X, T), exact)


def test_tmpd_divides_by_row_sums():
    """Written with matrices."""
    score = gaussian(MEAN, cov=COV).score(SDE)
    a, s = SDE.alpha(T), SDE.sigma(T)
    J = a * COV @ torch.linalg.inv(a**2 * COV + s**2 * torch.eye(6, dtype=D64))
    rows = (MATRIX @ (s**2 / a * J) @ MATRIX.T).sum(1)
    y = measurement(DENSE)
    R = y - denoised(score(X, T), X, T, SDE).flatten(1) @ MATRIX.T
    push = (R / (rows + 0.01)) @ MATRIX @ J
    close(tmpd(score, SDE, DENSE, y, 0.1)(X, T), score(X, T) + push.reshape(X.shape), 1e-10)


def test_dps_by_autograd():
    A = lambda x0: torch.sin(x0).cumsum(-1)  # noqa: E731
    y = measurement(A)
    x = X.clone().requires_grad_()
    R = y - A(denoised(MIXED(x, T), x, T, SDE))
    grad = torch.autograd.grad(R.square().sum() / 2, x)[0]
    close(dps(MIXED, SDE, A, y, 0.3)(X, T), MIXED(X, T) - grad / 0.09)


@pytest.mark.parametrize("ts", [torch.tensor(v, dtype=D64) for v in ([0.6, 0.3, 0.1], [0.3, 0.0], [0.3, 0.299, 0.298])])
def test_dps_published_step(ts):
    """x1 of ancestral less zeta grad |y - A x0|, step by step."""
    A, z = OPERATORS["dense"], draw(2, *X.shape, seed=9)
    y, x = measurement(A), X
    for i in range(len(ts) - 1):
        v = x.clone().requires_grad_()
        distance = (y - A(denoised(MIXED(v, ts[i]), v, ts[i], SDE))).norm(dim=1)
        grad = torch.autograd.grad(distance.sum(), v)[0]
        x = ancestral(MIXED, SDE, x, ts[i : i + 2], noise=lambda x, i=i: z[i]) - 0.7 * grad
    close(ancestral(dps(MIXED, SDE, A, y, 0.1, zeta=0.7, ts=ts), SDE, X, ts, noise=recorded(z)), x, 1e-11)


# --- what all have in common -----------------------------------------------------------------------------------------


RULES = {
    "dps": dps,
    "dps, published": lambda *a: dps(*a, zeta=0.5, ts=GRID),
    "pigdm": pigdm,
    "mmps": mmps,
    "tmpd": tmpd,
    "ddnm": lambda score, sde, A, y, noise_sd: ddnm(score, sde, A, y),
    "diffpir": diffpir,
    "ddnm_plus": lambda *a: ddnm_plus(*a, GRID)[0],
    "ddrm": lambda *a: ddrm(*a, GRID)[0],
}
every_rule = pytest.mark.parametrize("rule", RULES.values(), ids=RULES)


@every_rule
def test_a_sample_does_not_see_its_batch(rule):
    """Alone or in a batch, one measurement or one each, one time or one each."""
    A = OPERATORS["dense, known"]
    ys, ts = torch.stack([measurement(A, seed=20 + i) for i in range(5)]), GRID[:5]
    together, times = rule(MIXED, SDE, A, ys, 0.1)(X, T), rule(MIXED, SDE, A, ys, 0.1)(X, ts)
    for i in range(5):
        alone = rule(MIXED, SDE, A, ys[i], 0.1)
        close(alone(X[i : i + 1], T), together[i : i + 1], 1e-11)
        close(alone(X[i : i + 1], ts[i]), times[i : i + 1], 1e-11)
    single = rule(MIXED, SDE, A, ys, 0.1)(X.float(), T)
    assert single.dtype == torch.float32
    close(single.double(), together, 3e-4)


@every_rule
def test_rules_nest_and_are_differentiated(rule):
    A = OPERATORS["downsample"]
    y = measurement(A)
    score, v, h = rule(MIXED, SDE, A, y, 0.3), draw(*X.shape, seed=14), 1e-6
    numeric = (score(X + h * v, T) - score(X - h * v, T)) / (2 * h)
    close(torch.func.jvp(lambda x: score(x, T), (X,), (v,))[1], numeric, 1e-6)
    other = gaussian(MEAN, cov=COV).score(SDE)
    with torch.no_grad():
        close(cfg(score, other, 2.0)(X, T), 2 * score(X, T) - other(X, T))
        inner = cfg(MIXED, other, 2.0)
        s = inner(X, T)
        tangent = lambda x, t: s + torch.func.jvp(lambda x: inner(x, t), (X,), (x - X,))[1]  # noqa: E731
        close(rule(inner, SDE, A, y, 0.3)(X, T), rule(tangent, SDE, A, y, 0.3)(X, T), 1e-10)


class Touched(torch.autograd.Function):
    """The identity, that counts the backward passes through it."""

    generate_vmap_rule = True
    passes = 0

    @staticmethod
    def forward(x):
        return x.clone()

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, g):
        Touched.passes += 1
        return g


COST = dict(zip(RULES, (1, 1, 1, 6, 2, 0, 0, 0, 0), strict=True))  # backward passes, 5 gradients in mmps


@pytest.mark.parametrize("name", RULES)
def test_cost(name):
    """One network call each, and so many products with its Jacobian."""
    score = counted(lambda x, t: MIXED(Touched.apply(x), t))
    Touched.passes = 0
    A = OPERATORS["dense, known"]
    RULES[name](score, SDE, A, measurement(A), 0.1)(X, T)
    assert (score.calls, score.samples, Touched.passes) == (1, 5, COST[name])


@pytest.mark.parametrize("rule", [dps, pigdm, mmps, tmpd, diffpir])
def test_infinite_noise_is_off(rule):
    A = OPERATORS["dense"]
    y = measurement(A)
    assert rule(MIXED, SDE, A, y, math.inf) is MIXED
    close(rule(MIXED, SDE, A, y, 1e7)(X, T), MIXED(X, T), 1e-10)
    assert dps(MIXED, SDE, A, y, 0.1, zeta=0.0, ts=GRID) is MIXED


def law(score, n):
    """Mean and covariance of n ancestral steps from p_T: they are affine in the start and in every draw."""
    ts = SDE.time(torch.linspace(-4, 4, n + 1, dtype=D64))
    rows = torch.eye(6 * (n + 1), dtype=D64).reshape(-1, n + 1, *SHAPE)
    rows = torch.cat([0 * rows[:1], rows])  # row 0 nothing, then 1 in one number of the start or of one draw
    a, s = SDE.alpha(ts[0]), SDE.sigma(ts[0])
    root = torch.linalg.cholesky(a**2 * COV + s**2 * torch.eye(6, dtype=D64))
    start = a * MEAN + (rows[:, 0].flatten(1) @ root.T).reshape(-1, *SHAPE)
    out = ancestral(score, SDE, start, ts, noise=recorded(rows[:, 1:].movedim(1, 0))).flatten(1)
    response = (out[1:] - out[0]).T
    return out[0], response @ response.T


def test_a_run_samples_the_posterior_of_gaussian_data():
    """The exact law of ancestral's chain tends to the posterior, at first order, with mmps; with pigdm it does not."""
    A = OPERATORS["gray"]
    y, M, prior = measurement(A), matrix(A), gaussian(MEAN, cov=COV).score(SDE)
    K = COV @ M.T @ torch.linalg.inv(M @ COV @ M.T + 0.01 * torch.eye(len(M), dtype=D64))
    mean, cov = MEAN.flatten() + K @ (y.flatten() - M @ MEAN.flatten()), COV - K @ M @ COV
    unit = torch.linalg.inv(torch.linalg.cholesky(cov))

    def off(score, n):
        m, C = law(score, n)
        return float((unit @ (m - mean)).norm() + (unit @ C @ unit.T - torch.eye(6, dtype=D64)).norm())

    errors = [off(mmps(prior, SDE, A, y, 0.1), n) for n in (30, 60, 120)]
    assert 1.7 < errors[0] / errors[1] < 2.5
    assert 1.7 < errors[1] / errors[2] < 2.3
    assert off(pigdm(prior, SDE, A, y, 0.1), 120) > 4 * errors[2]


# --- other programs --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["linear_inverse_0", "linear_inverse_1", "inpainting_exact"])
def test_linear_inverse_problems(name):
    case = load(f"guidance/{name}")
    sde, M, y, sd = Levels(case["in_a"], case["in_s"]), case["in_A"], case["in_y"], case.params["sigma_y"]
    score, A = case.target().score(sde), ops.linear(lambda x: x @ M.T, (M.shape[1],))
    for j, x in enumerate(case["in_x_points"]):
        t = number(float(j))
        case.check(pigdm(score, sde, A, y, sd)(x, t) - score(x, t), f"out_pigdm_{j}")
        case.check(mmps(score, sde, A, y, sd, iterations=len(y) + 2)(x, t) - score(x, t), f"out_moment_matched_{j}")
        case.check(dps(score, sde, A, y, sd)(x, t) - score(x, t), f"out_dps_gaussian_{j}")


def test_posterior_rules_of_azula():
    """Its denoisers; its DPS takes the norm over the batch (so that is one sample here); its PGDM step is a_s a_t v
    times our gradient without noise; its RePaint step renoises once."""
    case = load("guidance/posterior_rules")
    p, x, M, y = case.params, case["in_x_t"], case["in_A"], case["in_y"]
    sde = Levels(*torch.stack([case["out_a_s_at_s"], case["out_a_s_at_t"]], 1))
    two, t = torch.tensor([1, 0], dtype=D64), number(1.0)
    score, A, sd = case.target().score(sde), ops.linear(lambda x: x @ M.T, (M.shape[1],)), p["sigma_y"]
    x0 = lambda s: denoised(s(x, t), x, t, sde)  # noqa: E731
    case.check(x0(mmps(score, sde, A, y, sd, iterations=4)), "out_mmps")
    case.check(x0(tmpd(score, sde, A, y, sd)), "out_tmpd")
    case.check(x0(diffpir(score, sde, A, y, sd, trust=p["lmbda"])), "out_diffpir")
    (a_s, _), (a, s) = case["out_a_s_at_s"], case["out_a_s_at_t"]
    v = s**2 / (s**2 + a**2)
    grad = v * (pigdm(score, sde, A, y, 0.0)(x, t) - score(x, t))
    step = ddim(score, sde, x, two, eta=p["eta"] ** 0.5, noise=recorded(case["in_noise"]))
    case.check(step + a_s * a * grad, "out_pgdm_step")
    whole = lambda x, t: score(x.reshape(3, 4), t).reshape(1, 12)  # noqa: E731
    blocks = ops.linear(lambda x: (x.reshape(-1, 3, 4) @ M.T).flatten(1), (12,))
    guided = dps(whole, sde, blocks, y.flatten(), sd, zeta=p["zeta"], ts=two)
    out = ancestral(guided, sde, x.reshape(1, 12), two, noise=lambda x: case["in_noise"][0].reshape(1, 12))
    case.check(out.reshape(3, 4), "out_dps_step")
    z, known = case["in_noise"], case["in_known"]
    inpaint = hooks.inpaint(sde, known, case["in_mask"], recorded(z[[1, 4]]))
    again = hooks.travel(ddim, score, sde, two, 1, noise=recorded(z[2:3]), on_step=inpaint)
    case.check(ddim(score, sde, x, two, on_step=again), "out_repaint_step")


# --- errors ----------------------------------------------------------------------------------------------------------


def test_bad_arguments_are_told():
    A, bent = OPERATORS["dense"], torch.sin
    y = measurement(A)
    for rule in (pigdm, mmps, tmpd, diffpir):
        with pytest.raises(ValueError, match=r"needs a Linear operator, got .*; make one by linear\(function, shape\)"):
            rule(MIXED, SDE, bent, X[0], 0.1)
        with pytest.raises(ValueError, match="a number >= 0, got nan"):
            rule(MIXED, SDE, A, y, math.nan)
        with pytest.raises(ValueError, match=r"y has shape \(3,\), A\(x0\) \(5, 4\)"):
            rule(MIXED, SDE, A, y[:3], 0.1)(X, T)
    with pytest.raises(ValueError, match="give zeta and ts together"):
        dps(MIXED, SDE, A, y, 0.1, zeta=1.0)
    with pytest.raises(ValueError, match="noise_sd must be positive"):
        dps(MIXED, SDE, A, y, 0.0)
    with pytest.raises(ValueError, match="zeta must be >= 0 and finite, got -1"):
        dps(MIXED, SDE, A, y, 0.1, zeta=-1, ts=GRID)
    with pytest.raises(ValueError, match="sigma_data must be positive"):
        pigdm(MIXED, SDE, A, y, 0.1, sigma_data=0.0)
    with pytest.raises(ValueError, match="iterations must be at least 1, got 0"):
        mmps(MIXED, SDE, A, y, 0.1, iterations=0)
    with pytest.raises(ValueError, match="trust must be positive, got 0"):
        diffpir(MIXED, SDE, A, y, 0.1, trust=0)
    for chain in (ddrm, ddnm_plus):
        with pytest.raises(ValueError, match=r"spectral\(A\) finds them"):
            chain(MIXED, SDE, A, y, 0.1, GRID)
        with pytest.raises(ValueError, match="must be finite"):
            chain(MIXED, SDE, OPERATORS["mask"], y, math.inf, GRID)
        with pytest.raises(ValueError, match=r"eta must lie in \[0, 1\].*got 2"):
            chain(MIXED, SDE, OPERATORS["mask"], y, 0.1, GRID, eta=2)
    with pytest.raises(ValueError, match="eta_b must lie"):
        ddrm(MIXED, SDE, OPERATORS["mask"], y, 0.1, GRID, eta_b=-0.1)
