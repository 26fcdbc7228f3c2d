"""Time travel, RePaint and image-to-image on Gaussian data, whose laws are exact: no Monte Carlo."""

import itertools
from functools import partial

import pytest
import torch
from truth import F64, Draws, gaussian_map, gaussian_score, log_snr_grid, marginal, moments, tensor

from guidance import energy
from samplers import SAMPLERS, angle, ddim, grids, hooks, perturb
from samplers.loop import integrate
from scoresde import EDM, VP, Streams, counted

SDE, VAR = VP(), 0.25
SCORE = gaussian_score(SDE, 0.0, VAR)
TS = log_snr_grid(SDE, 7, 0.9, 0.02)
KERNEL = partial(angle, d=VAR**0.5, tau=1.0, order=1)  # N(0, d^2) is exact in one step


def travelling(sampler, repeats, noise, ts=TS, score=SCORE, **how):
    return hooks.travel(sampler, score, SDE, ts, repeats, noise=noise, **how)


@pytest.mark.parametrize(
    "how", [{}, {"jump": 3}, {"jump": 7}, {"interval": (0.3, 2.0)}, {"jump": 2, "interval": (0, 1)}]
)
@pytest.mark.parametrize("sampler", [KERNEL, partial(angle, d=VAR**0.5, order=1)], ids=["SDE", "flow"])
def test_marginals_stay_exact(sampler, how):
    def run(score, sde, x, ts, *, noise, repeats):
        return sampler(score, sde, x, ts, noise=noise, on_step=travelling(sampler, repeats, noise, **how))

    for repeats in (0, 1, 3):
        m, v = moments(run, SDE, TS, 0.0, VAR, repeats=repeats)
        m1, v1 = marginal(SDE, TS[-1], 0.0, VAR)
        torch.testing.assert_close(m, torch.full((1,), m1, dtype=F64), rtol=0, atol=1e-12)
        torch.testing.assert_close(v, torch.full((1,), v1, dtype=F64), rtol=1e-10, atol=0)


def test_a_return_forgets():
    """ddim draws nothing itself; each return mixes in one draw of the kernel's size."""
    out = ddim(
        SCORE, SDE, tensor([[1.0]]), TS, on_step=travelling(ddim, 2, Draws(lambda i, x: 0 * x + (i == 1)), jump=7)
    )
    a, s = SDE.alpha(TS), SDE.sigma(TS)
    r = a[0] / a[-1]
    down = ddim(SCORE, SDE, tensor([[1.0]]), TS)  # linear in x
    want = ((down * r * down) * r + (s[0] ** 2 - (r * s[-1]) ** 2).sqrt()) * down
    torch.testing.assert_close(out, want, rtol=1e-12, atol=0)


def test_what_hooks_see_and_what_it_costs():
    """Every step, the travelled ones again with the same i and t: repeats * jump calls more after each jump."""
    seen = []
    score = counted(SCORE)
    spy = lambda i, t, x: seen.append((i, float(t)))  # noqa: E731
    ddim(
        score, SDE, tensor([[1.0]]), TS, on_step=travelling(ddim, 2, torch.randn_like, score=score, jump=3, on_step=spy)
    )
    order = [0, 1, 2, 0, 1, 2, 0, 1, 2, 3, 4, 5, 3, 4, 5, 3, 4, 5, 6]
    assert seen == [(i, float(TS[i + 1])) for i in order]
    assert score.calls == len(order)
    seen.clear()
    r = SDE.sigma(TS) / SDE.alpha(TS)
    inside = travelling(ddim, 1, torch.randn_like, interval=(float(r[4]) * 0.9, float(r[3]) * 1.1), on_step=[spy])
    ddim(SCORE, SDE, tensor([[1.0]]), TS, on_step=inside)
    assert [i for i, _ in seen] == [0, 1, 2, 2, 3, 3, 4, 5, 6]
    drawn = Draws(lambda i, x: x)
    ddim(SCORE, SDE, tensor([[1.0]]), TS, on_step=travelling(ddim, 0, drawn))
    assert drawn.n == 0


def test_what_hooks_return_is_what_is_travelled():
    """A hook that replaces the state has its say before the climb, and again after each repeated step."""
    halve = hooks.project(lambda x: x / 2)
    ts = TS[[0, 3]]
    out = ddim(SCORE, SDE, tensor([[1.0]]), ts, on_step=travelling(ddim, 1, torch.zeros_like, ts, on_step=halve))
    down = gaussian_like_ddim(ts)
    torch.testing.assert_close(out, (down / 2 * SDE.alpha(ts[0]) / SDE.alpha(ts[1]) * down / 2).reshape(1, 1))


def gaussian_like_ddim(ts):
    """x1/x of one ddim step on N(0, VAR): alpha1 x0 + sigma1 eps."""
    a, s = SDE.alpha(ts), SDE.sigma(ts)
    V = a[0] ** 2 * VAR + s[0] ** 2
    return a[1] * a[0] * VAR / V + s[1] * s[0] / V


@pytest.mark.parametrize("name", SAMPLERS)
def test_any_sampler_travels(name):
    """Samples alone and in a batch, with the streams shared by run and hook."""
    knobs = {"ode": {"method": "rk4"}}.get(name, {})
    sampler = partial(SAMPLERS[name], **knobs)
    x = tensor([[0.5, -1.0], [2.0, 0.1], [0.3, 0.4]])

    def run(samples):
        noise = Streams(7, samples)
        travel = travelling(sampler, 2, noise, jump=2, interval=(0.1, 10.0))
        more = {} if name == "ode" else {"noise": noise}
        return sampler(SCORE, SDE, x[list(samples)], TS, on_step=travel, **more)

    whole = run(range(3))
    assert torch.equal(run(range(1, 2)), whole[1:2])
    assert whole.abs().max() < 5


@pytest.mark.parametrize("through", [True, False])
def test_an_energy_that_travels_samples_the_tilt(through):
    """E = c x0 tilts N(0, v) to N(-c v, v), at every t: travelled samples are those of its score, and reach its law."""
    c, repeats = 1.7, 2
    guided = energy(SCORE, SDE, lambda x0: c * x0.flatten(1).sum(1), through=through, sigma_data=VAR**0.5)
    tilted = gaussian_score(SDE, -c * VAR, VAR)

    def run(score, sde, x, ts, *, noise):
        return ddim(score, sde, x, ts, on_step=travelling(ddim, repeats, noise, ts, score))

    x = torch.randn(5, 3, generator=torch.Generator().manual_seed(0), dtype=F64)
    got, want = (run(s, SDE, x, TS, noise=Streams(0, 5)) for s in (guided, tilted))
    torch.testing.assert_close(got, want, rtol=0, atol=1e-12)
    errors = []
    for n in (40, 80):
        ts = log_snr_grid(SDE, n, 0.9, 0.02)
        m, v = moments(run, SDE, ts, -c * VAR, VAR, score=guided)
        m1, v1 = marginal(SDE, ts[-1], -c * VAR, VAR)
        assert abs(float(m[0] - m1)) < 1e-12
        errors.append(float((v[0] - v1).abs()))
    assert 0.5 < errors[1] / errors[0] < 0.55  # DDIM is of order 1


def test_it_is_differentiated():
    x = tensor([[0.7]]).requires_grad_()
    noise = Draws(lambda i, x: torch.full_like(x, 0.1 * i))
    out = ddim(SCORE, SDE, x, TS, grad=True, on_step=travelling(ddim, 2, noise))
    slope = torch.autograd.grad(out.sum(), x)[0]
    ends = [ddim(SCORE, SDE, v, TS, on_step=travelling(ddim, 2, Draws(noise.make))) for v in tensor([[[1.0]], [[0.0]]])]
    torch.testing.assert_close(slope, ends[0] - ends[1])
    assert not ddim(SCORE, SDE, x, TS, on_step=travelling(ddim, 2, noise)).requires_grad


# --- RePaint ---------------------------------------------------------------------------------------------------------


RHO, KNOWN = 0.9, 1.4
COV = tensor([[1.0, RHO], [RHO, 1.0]])
EYE = torch.eye(2, dtype=F64)


def exact(score, sde, x, ts, *, noise, on_step=(), grad=False):
    """The reverse kernel p(x1 | x) of N(0, COV) data: from Bayes' rule for x = r x1 + G z."""
    a, s = sde.alpha(ts), sde.sigma(ts)
    steps = []
    for i in range(len(ts) - 1):
        r = a[i] / a[i + 1]
        C1 = a[i + 1] ** 2 * COV + s[i + 1] ** 2 * EYE
        K = r * C1 @ torch.linalg.inv(a[i] ** 2 * COV + s[i] ** 2 * EYE)
        left = C1 - r * K @ C1
        steps.append((K, torch.linalg.cholesky((left + left.T) / 2)))

    def step(i, x):
        K, L = steps[i]
        return x @ K.T + noise(x) @ L.T

    return integrate(step, sde, x, ts, on_step=on_step, grad=grad)


def completed(n, repeats, jump=1):
    """Mean and variance of the unknown coordinate by (re)painting, n steps, as distances from the exact conditional."""
    sde = EDM()
    ts = log_snr_grid(sde, n, 20.0, 0.02)
    known, mask = tensor(KNOWN, 0.0), tensor(1.0, 0.0)

    def run(noise, x):
        inpaint = hooks.inpaint(sde, known, mask, noise)
        how = {"jump": jump, "noise": noise, "on_step": inpaint}
        return exact(None, sde, x, ts, noise=noise, on_step=hooks.travel(exact, None, sde, ts, repeats, **how))

    count = Draws(lambda i, x: torch.zeros_like(x))
    start = torch.zeros(1, 2, dtype=F64)
    run(count, start)
    eye = torch.eye(2, dtype=F64)

    def impulse(i, x):
        z = torch.zeros_like(x)
        z[1 + 2 * i : 3 + 2 * i] = eye
        return z

    out = run(Draws(impulse), start.repeat(1 + 2 * count.n, 1))[:, 1]
    root = 20.0 * run(Draws(lambda i, x: torch.zeros_like(x)), eye)[:, 1] - 20.0 * out[0]  # the start, N(0, 20^2)
    mean, var = RHO * KNOWN, 1 - RHO**2
    spread = (out[1:] - out[0]).square().sum() + root.square().sum()
    return abs(float(out[0] - mean)) / var**0.5, abs(float(spread / var) - 1)


def test_repaint_tends_to_the_conditional_and_replacement_does_not():
    """Exact affine propagation: replacement stays 0.9 deviations off on fine grids; repeats take that away."""
    fine, finer = completed(80, 0), completed(160, 0)
    assert finer[0] > 0.88
    assert finer[1] > 0.6
    assert fine[0] - finer[0] < 0.03
    errors = [completed(20, repeats) for repeats in (0, 1, 4, 16)]
    for worse, better in itertools.pairwise(errors):
        assert better[0] < 0.55 * worse[0]
        assert better[1] < 0.55 * worse[1]
    assert errors[3][0] < 0.3 * errors[2][0]
    assert errors[3][0] < 0.06
    assert errors[3][1] < 0.05
    assert completed(20, 4, jump=4)[0] < 0.35 * errors[0][0]


# --- image-to-image --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("strength", [0.2, 0.5, 0.9])
@pytest.mark.parametrize("tau", [0.0, 1.0])
def test_sdedit(strength, tau):
    """`perturb` to ts[0] and the rest of the grid: exact mean and variance of N(0, v) data, as a function of strength.

    With noise p(x1 | x) is drawn: mean K alpha c, variance K^2 sigma^2 + V1 - K^2 V, K = Cov(x1, x)/V; without,
    x1 = sqrt(V1/V) x.
    """
    ts = grids.log_snr(SDE, 6, t_end=0.02, strength=strength)
    c, (_, V), (_, V1) = 0.8, marginal(SDE, ts[0], 0.0, VAR), marginal(SDE, ts[-1], 0.0, VAR)
    a, s, a1, s1 = SDE.alpha(ts[0]), SDE.sigma(ts[0]), SDE.alpha(ts[-1]), SDE.sigma(ts[-1])
    sampler = partial(angle, d=VAR**0.5, tau=tau, order=1)

    def edited(i, n):
        """The result where draw i is 1, all others 0; i = 0 is perturb's."""
        noise = Draws(lambda k, x: 0 * x + (k == i))
        image = torch.full((1, 1), n, dtype=F64)
        return sampler(SCORE, SDE, perturb(SDE, image, ts[0], noise), ts, noise=noise).item()

    assert len(ts) == 7
    mean = edited(-1, c)
    var = sum((edited(i, c) - mean) ** 2 for i in range(8))
    if tau:
        K = (a * a1 * VAR + a / a1 * s1**2) / V  # Cov(x1, x) / Var(x)
        want = K * a * c, K**2 * s**2 + V1 - K**2 * V
    else:
        want = (V1 / V).sqrt() * a * c, V1 / V * s**2
    assert mean == pytest.approx(float(want[0]), rel=1e-10)
    assert var == pytest.approx(float(want[1]), rel=1e-10)
    assert gaussian_map(SDE, tensor([[1.0]]), ts[0], ts[-1], 0.0, VAR).item() == pytest.approx(float((V1 / V).sqrt()))


def test_strength_says_how_much_is_left_of_the_image():
    left = []
    for strength in (0.2, 0.5, 0.8, 1.0):
        ts = grids.log_snr(SDE, 6, strength=strength)
        zero = torch.zeros_like
        left.append(KERNEL(SCORE, SDE, perturb(SDE, tensor([[1.0]]), ts[0], zero), ts, noise=zero).item())
    assert left[0] > 0.98
    assert all(b < a for a, b in itertools.pairwise(left))
    assert left[-1] < 1e-4


def test_a_background_is_kept():
    """The edited object moves, the background is the image, through travelled steps too, to t = 0 exactly."""
    image, mask = tensor([[0.3, -0.7, 1.1]]), tensor(1.0, 0.0, 1.0)
    ts = torch.cat([grids.log_snr(SDE, 5, strength=0.6, t_end=0.01), torch.zeros(1, dtype=F64)])
    noise = Streams(0, 1)
    keep = hooks.inpaint(SDE, image, mask, noise)
    travel = hooks.travel(ddim, SCORE, SDE, ts, 2, noise=noise, on_step=keep)
    out = ddim(SCORE, SDE, perturb(SDE, image, ts[0], noise), ts, on_step=travel)
    assert torch.equal(out[0, [0, 2]], image[0, [0, 2]])
    assert abs(out[0, 1] - image[0, 1]) > 1e-3


# --- errors ----------------------------------------------------------------------------------------------------------


def test_errors():
    for repeats, jump in ((-1, 1), (1, 0), (1, 8), (1.5, 1), (1, 2.0)):
        with pytest.raises(ValueError, match=f"jump one from 1 to the 7 steps of the grid, got {repeats} and {jump}"):
            hooks.travel(ddim, SCORE, SDE, TS, repeats, jump=jump)
    with pytest.raises(ValueError, match=r"low < high, got \(2.0, 1.0\)"):
        hooks.travel(ddim, SCORE, SDE, TS, 1, interval=(2.0, 1.0))
    with pytest.raises(ValueError, match=r"step 1 ended at t = 0\.5, not that of ts"):
        ddim(SCORE, SDE, tensor([[1.0]]), tensor(0.9, 0.5, 0.1), on_step=hooks.travel(ddim, SCORE, SDE, TS, 1))
    with pytest.raises(ValueError, match="a hook returned"):
        ddim(
            SCORE, SDE, tensor([[1.0]]), TS, on_step=travelling(ddim, 1, torch.zeros_like, on_step=lambda i, t, x: x[0])
        )
