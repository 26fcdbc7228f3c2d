"""Rules that rescale or project: lengths, angles and least squares by other means than theirs."""

import math
from functools import partial

import pytest
import torch
from guided import D64, KINDS, SDE, C, N, Net, T, U, X, close, dots

from guidance import apg, cfg, conjunction, perp_neg, rescale, tangential, zero_star
from scoresde import VE, Model, Straight, convert, denoised, flow, velocity
from scoresde.types import number


@pytest.mark.parametrize("kind", KINDS)
def test_rescale_keeps_the_standard_deviation(kind):
    std = lambda s: convert(s(X, T), X, T, SDE, "score", kind).flatten(1).std(1)  # noqa: E731
    plain = cfg(C, U, 7.5)
    full = rescale(C, U, 7.5, sde=SDE, strength=1.0, kind=kind)
    assert (std(plain) / std(C) - 1).abs().max() > 0.1
    close(std(full), std(C))
    close(rescale(C, U, 7.5, sde=SDE, strength=0.0, kind=kind)(X, T), plain(X, T))
    close(rescale(C, U, 7.5, sde=SDE, strength=0.3, kind=kind)(X, T), 0.7 * plain(X, T) + 0.3 * full(X, T), 1e-11)
    k = (std(C) / std(plain)).reshape(5, 1, 1, 1)
    prediction = k * convert(plain(X, T), X, T, SDE, "score", kind)
    close(full(X, T), convert(prediction, X, T, SDE, kind, "score"), 1e-11)


def test_rescale_of_any_rule_is_one_batch():
    net = Net()
    m = Model(net, SDE, "eps", classes=3)
    inner = partial(apg, eta=0.5)
    value, count = net.asked(rescale(m.given(1), m, 4.0, sde=SDE, strength=1.0, rule=inner))
    assert count == (1, 10)
    x0, x0_c = (denoised(s, X, T, SDE) for s in (inner(m.given(1), m, 4.0, sde=SDE)(X, T), m.given(1)(X, T)))
    k = (x0_c.flatten(1).std(1) / x0.flatten(1).std(1)).reshape(5, 1, 1, 1)
    close(denoised(value, X, T, SDE), k * x0)


def test_apg_without_projection_is_cfg_and_its_parts_add_up():
    x0_c, x0_u = (denoised(s(X, T), X, T, SDE) for s in (C, U))
    x0 = lambda **k: denoised(apg(C, U, 4.0, sde=SDE, **k)(X, T), X, T, SDE)  # noqa: E731
    close(apg(C, U, 4.0, sde=SDE, eta=1.0)(X, T), cfg(C, U, 4.0)(X, T))
    across, along = x0() - x0_c, x0(eta=1.0) - x0()
    close(across + along, 3 * (x0_c - x0_u))
    close(dots(across, x0_c), torch.zeros(5, dtype=D64))
    close(dots(along, x0_c) ** 2, dots(along, along) * dots(x0_c, x0_c))
    close(x0(eta=0.3) - x0_c, across + 0.3 * along)


def test_apg_threshold_is_a_length_of_x0():
    x0_c, x0_u = (denoised(s(X, T), X, T, SDE) for s in (C, U))
    size = dots(x0_c - x0_u, x0_c - x0_u).sqrt()
    cut = float(size.sort().values[2]) * 1.01  # two samples are longer
    step = (denoised(apg(C, U, 4.0, sde=SDE, eta=1.0, threshold=cut)(X, T), X, T, SDE) - x0_c) / 3
    close(dots(step, step).sqrt(), size.clamp(max=cut))
    close(dots(step, x0_c - x0_u), size.clamp(max=cut) * size)  # the same direction


@pytest.mark.parametrize("kind", KINDS)
def test_zero_star_is_the_least_squares_fit(kind):
    p_c, p_u = (convert(s(X, T), X, T, SDE, "score", kind).flatten(1) for s in (C, U))
    z = torch.linalg.lstsq(p_u[..., None], p_c[..., None]).solution[:, :, 0]
    p = convert(zero_star(C, U, 3.0, sde=SDE, kind=kind)(X, T), X, T, SDE, "score", kind).flatten(1)
    close(p, z * p_u + 3 * (p_c - z * p_u), 1e-11)


def test_zero_star_ignores_what_is_parallel():
    double = lambda x, t: -2.5 * C(x, t)  # noqa: E731
    close(zero_star(C, double, 6.0, sde=SDE, kind="score")(X, T), C(X, T))
    close(zero_star(C, C, 6.0, sde=SDE)(X, T), C(X, T))
    close(zero_star(C, U, 0.0, sde=SDE, kind="eps")(X, T), C(X, T) - across(C(X, T), U(X, T)))


def across(d, y):
    """What of d is orthogonal to y, by Gram and Schmidt in QR."""
    q = torch.linalg.qr(y.flatten(1)[..., None]).Q
    return (d.flatten(1) - (q @ (q.mT @ d.flatten(1)[..., None]))[..., 0]).reshape(d.shape)


@pytest.mark.parametrize("sde", [SDE, Straight(), VE()])
def test_zeroed_steps_stand_still(sde):
    net = Net()
    m = Model(net, sde, "eps", classes=3)
    score = zero_star(m.given(1), m, 3.0, sde=sde, zeroed=(2.0, math.inf))
    noisy, clean = number(0.95), number(0.2)
    value, count = net.asked(lambda x, t: velocity(score, sde)(x, t), t=noisy)
    assert count == (0, 0)
    assert value.abs().max() < 1e-12
    close(flow(score, sde, X, 0.95, 0.9), X, 1e-5)
    value, count = net.asked(score, t=clean)
    assert count == (1, 10)
    close(value, zero_star(m.given(1), m, 3.0, sde=sde)(X, clean))
    ts = torch.tensor([0.2, 0.95, 0.2, 0.95, 0.95], dtype=D64)
    both = velocity(score, sde)(X, ts)
    for i in range(5):
        close(both[i : i + 1], velocity(score, sde)(X[i : i + 1], ts[i]))


def test_tangential_is_the_singular_value_decomposition():
    rows = torch.stack([C(X, T), U(X, T)], 1).flatten(2)
    v = torch.linalg.svd(rows, full_matrices=False).Vh[:, :1]
    s_v = ((rows[:, 1:] @ v.mT) @ v).reshape(X.shape)
    close(tangential(C, U, 3.0)(X, T), s_v + 3 * (C(X, T) - s_v))
    close(tangential(C, U, 0.0)(X, T), s_v)


def test_tangential_of_parallel_and_orthogonal_scores():
    c = C(X, T)
    side = across(U(X, T), c)
    side = side * (dots(c, c) / dots(side, side)).sqrt().reshape(5, 1, 1, 1)
    fixed = lambda v: lambda x, t: v  # noqa: E731
    close(tangential(C, fixed(-0.7 * c), 3.0)(X, T), cfg(C, fixed(-0.7 * c), 3.0)(X, T))
    close(tangential(C, fixed(0.9 * side), 3.0)(X, T), 3 * c)
    close(tangential(C, fixed(1.1 * side), 3.0)(X, T), 3 * c - 2.2 * side)


def test_perp_neg():
    u, d = U(X, T), C(X, T) - U(X, T)
    close(perp_neg(C, U, 3.0, [N], [0.7])(X, T), u + 3 * (d - 0.7 * across(N(X, T) - u, d)), 1e-11)
    along, side = (lambda x, t: u - 0.4 * d), (lambda x, t: u + across(N(X, T) - u, d))
    close(perp_neg(C, U, 3.0, [along], [0.7])(X, T), cfg(C, U, 3.0)(X, T))
    close(perp_neg(C, U, 3.0, [side], [0.7])(X, T), conjunction(U, [C, side], [3.0, -2.1])(X, T), 1e-11)
    close(perp_neg(C, U, 3.0, [N, along, N], [0.3, 5.0, 0.4])(X, T), perp_neg(C, U, 3.0, [N], [0.7])(X, T))
    close(perp_neg(C, U, 3.0, [N], [0.0])(X, T), cfg(C, U, 3.0)(X, T))
    assert perp_neg(C, U, 0.0, [N], [0.7]) is U
    assert perp_neg(C, U, 1.0, [N], [0.0]) is C
