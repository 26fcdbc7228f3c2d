"""Problems with known answers, written from the definitions.

Nothing here shares code with what it is compared with: coefficients are computed with 50 digits by
mpmath, predictions come from Bayes' rule for a Gaussian, derivatives from autograd.  Problems for
samplers take alpha and sigma from the SDE, which `test_sde` checks first.
"""

import itertools
import math

import mpmath as mp
import torch

from scoresde import EDM, VE, VP, CosineVP, DiscreteVP, Straight, SubVP, linear_betas

mp.mp.dps = 50
F64 = torch.float64
BETAS = linear_betas(40)
SDES = {
    "VP": VP(),
    "SubVP": SubVP(),
    "CosineVP": CosineVP(),
    "VE": VE(),
    "EDM": EDM(),
    "Straight": Straight(),
    "DiscreteVP": DiscreteVP.from_betas(BETAS),
}
KINDS = ("score", "eps", "x0", "v", "velocity", "F")
MEAN, VAR = 0.7, 0.25
SD = 0.6  # sigma_data of EDM's F


def tensor(*values):
    return torch.as_tensor(values[0] if len(values) == 1 else values, dtype=F64)


def coefficients(name, t):
    """(alpha, sigma) at a float t of SDES[name], to 50 digits."""
    t = mp.mpf(t)
    B = mp.mpf(0.1) * t + (mp.mpf(20) - mp.mpf(0.1)) * t**2 / 2
    if name == "VP":
        return mp.exp(-B / 2), mp.sqrt(1 - mp.exp(-B))
    if name == "SubVP":
        return mp.exp(-B / 2), 1 - mp.exp(-B)
    if name == "CosineVP":
        s = mp.mpf(0.008)
        alpha = mp.cos((t + s) / (1 + s) * mp.pi / 2) / mp.cos(s / (1 + s) * mp.pi / 2)
        return alpha, mp.sqrt(1 - alpha**2)
    if name == "VE":
        return mp.mpf(1), mp.mpf(0.01) * (mp.mpf(50) / mp.mpf(0.01)) ** t
    if name == "EDM":
        return mp.mpf(1), t
    if name == "Straight":
        return 1 - t, t
    N, alpha2 = len(BETAS), mp.mpf(1)  # DiscreteVP: alpha^2 is a product over whole cells and a power of the last
    for k in range(N):
        alpha2 *= (1 - mp.mpf(BETAS[k].item())) ** min(max(t * N - k, 0), 1)
    return mp.sqrt(alpha2), mp.sqrt(1 - alpha2)


def times(name, n=7):
    """Times over the whole range, both ends included."""
    sde = SDES[name]
    u = torch.linspace(0, 1, n, dtype=F64)
    geometric = sde.t_min * (sde.T / sde.t_min) ** u
    t = torch.cat([geometric, sde.t_min + u * (sde.T - sde.t_min)]).clamp(sde.t_min, sde.T)
    if name == "DiscreteVP":  # f and g jump at the labels: look inside the cells
        t = (torch.floor(t * len(BETAS)).clamp(max=len(BETAS) - 1) + 0.37) / len(BETAS)
    return t


def rates(sde, t):
    """d alpha/dt, d sigma/dt by autograd."""
    return derivative(sde.alpha, t), derivative(sde.sigma, t)


def derivative(q, t):
    """dq/dt by autograd, also of a constant."""
    with torch.enable_grad():
        s = t.detach().clone().requires_grad_()
        value = q(s)
        return torch.autograd.grad(value.sum(), s)[0] if value.requires_grad else torch.zeros_like(s)


def like(c, x):
    """A coefficient () or (B,) to multiply x (B, ...)."""
    return c.to(x).reshape(-1, *[1] * (x.ndim - 1))


def gaussian_score(sde, mean=MEAN, var=VAR):
    """The score of N(mean, var) data, elementwise; mean and var broadcast to a sample."""

    def score(x, t):
        a, s = like(sde.alpha(t), x), like(sde.sigma(t), x)
        return (a * mean - x) / (a * a * var + s * s)

    return score


def marginal(sde, t, mean=MEAN, var=VAR):
    """Mean and variance of x_t for N(mean, var) data."""
    t = torch.as_tensor(t, dtype=F64)
    a, s = sde.alpha(t), sde.sigma(t)
    return a * mean, a * a * var + s * s


def gaussian_map(sde, x, t, t1, mean=MEAN, var=VAR):
    """The probability flow of N(mean, var) data: it keeps the number of standard deviations."""
    (m, v), (m1, v1) = marginal(sde, t, mean, var), marginal(sde, t1, mean, var)
    return m1 + (x - m) / v**0.5 * v1**0.5


def gaussian_prediction(kind, sde, mean=MEAN, var=VAR):
    """What a perfect network of this kind says for N(mean, var) data at (x, t), from Bayes' rule."""

    def predict(x, t):
        a, s, da, ds = (like(q, x) for q in (sde.alpha(t), sde.sigma(t), *rates(sde, t)))
        V = a * a * var + s * s
        x0, eps = mean + a * var / V * (x - a * mean), s / V * (x - a * mean)  # Gaussian conditioning
        return prediction(kind, x, x0, eps, a, s, da, ds)

    return predict


def network(kind, sde, mean=MEAN, var=VAR):
    """The same as a network that is told t; an F network sees c_in y   (Karras 2022, table 1)."""
    predict = gaussian_prediction(kind, sde, mean, var)

    def net(u, t):
        scale = like(sde.alpha(t) * ((sde.sigma(t) / sde.alpha(t)) ** 2 + SD**2) ** 0.5, u) if kind == "F" else 1
        return predict(u * scale, t)

    return net


def prediction(kind, x, x0, eps, a, s, da, ds, sd=SD):
    """A value of this kind by its definition."""
    if kind == "F":  # Karras 2022, table 1, at noise level r for y = x / alpha: D = c_skip y + c_out F
        r, y = s / a, x / a
        c_skip, c_out = sd**2 / (r**2 + sd**2), r * sd / (r**2 + sd**2) ** 0.5
        return (x0 - c_skip * y) / c_out
    return {
        "score": lambda: -eps / s,
        "eps": lambda: eps,
        "x0": lambda: x0,
        "v": lambda: a * eps - s * x0,
        "velocity": lambda: da * x0 + ds * eps,
    }[kind]()


def log_snr_grid(sde, n, start=None, end=None):
    """n steps, uniform in log(sigma/alpha)."""
    t, t1 = tensor(sde.T if start is None else start), tensor(sde.t_min if end is None else end)
    ts = sde.time(sde.lam(t) + torch.linspace(0, 1, n + 1, dtype=F64) * (sde.lam(t1) - sde.lam(t)))
    ts[0], ts[-1] = t, t1
    return ts


def warped_grid(sde, n):
    """n steps of smoothly changing size in every variable, from sigma/alpha = 5 to 0.5."""
    t, t1 = sde.time(-tensor(5.0).log()), sde.time(-tensor(0.5).log())
    u = torch.linspace(0, 1, n + 1, dtype=F64)
    return t + (u + u**2) / 2 * (t1 - t)


def moments(sampler, sde, ts, mean=MEAN, var=VAR, score=None, **knobs):
    """Exact mean and variance at ts[-1] of a sampler that is affine in x and its noise: no Monte Carlo.

    x1 = A x + b + sum_i C_i z_i over all draws i.  One run gives everything: row 0 starts at the mean
    without noise, row 1 one unit away from it, row 2 + i sees a noise of 1 at draw i only.
    """
    score = gaussian_score(sde, mean, var) if score is None else score
    m, v = marginal(sde, ts[0], mean, var)
    m = m.reshape(1, -1)
    draws = Draws(lambda i, x: torch.zeros_like(x))
    sampler(score, sde, m, ts, noise=draws, **knobs)
    x = m.repeat(draws.n + 2, 1)
    x[1] += 1
    impulse = Draws(lambda i, x: torch.zeros_like(x).index_fill_(0, torch.tensor([2 + i]), 1.0))
    out = sampler(score, sde, x, ts, noise=impulse, **knobs)
    response = out[1:] - out[0]
    return out[0], response[0] ** 2 * v + response[1:].square().sum(0)


class Draws:
    """A noise that knows which draw it is: `make(i, x)`."""

    def __init__(self, make):
        self.make, self.n = make, 0

    def __call__(self, x):
        self.n += 1
        return self.make(self.n - 1, x)


def table(sampler, sde, ts, mean=0.0, var=VAR, **knobs):
    """(A, C) of one step x1 = A x + b + C z with the score of N(mean, var) data; var = 0 is a point mass."""
    score = gaussian_score(sde, mean, var)
    zero, one = torch.zeros(1, 1, dtype=F64), torch.ones(1, 1, dtype=F64)

    def run(x, noise):
        return sampler(score, sde, x, ts, noise=noise, **knobs).item()

    b = run(zero, torch.zeros_like)
    return run(one, torch.zeros_like) - b, run(zero, torch.ones_like) - b


def step_ends(name):
    """A step inside one cell of the table, and alpha, sigma, alpha1, sigma1, f, g^2 (by autograd) as floats."""
    sde = SDES[name]
    ts = {"EDM": tensor(3.0, 2.2), "DiscreteVP": tensor(0.36, 0.33)}.get(name, tensor(0.37, 0.31))
    a, s = sde.alpha(ts), sde.sigma(ts)
    t = ts[0]
    f = derivative(lambda t: sde.alpha(t).log(), t)
    g2 = derivative(lambda t: sde.sigma(t) ** 2, t) - 2 * f * s[0] ** 2
    return sde, ts, *(q.item() for q in (a[0], s[0], a[1], s[1], f, g2))


def kernel_variance(a, s, a1, s1):
    """r and G^2 of x = r x1 + G z, from what x must be: variance s^2 = r^2 s1^2 + G^2, mean a = r a1."""
    r = a / a1
    return r, s**2 - r**2 * s1**2


def order(errors):
    """log2 of how much each halving of the step gains."""
    return [math.log2(abs(e) / abs(e1)) for e, e1 in itertools.pairwise(errors)]
