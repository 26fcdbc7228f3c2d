"""Parallel in time: all steps of a one-step sampler at once, by iteration.

The chain x_{i+1} = a_i x_i + b_i s(x_i, t_i) + c_i z_i, with its noise drawn beforehand, is one equation
for all its states.  A round evaluates the score at all of them, then solves the chain that is linear
about them,

    y_{i+1} = a_i y_i + b_i (s_i + J_i (y_i - x_i)) + c_i z_i,   y_0 = x_0,

without a network call.  J_i = 0 is Picard's iteration (Shih 2023, ParaDiGMS); the Jacobian is Newton's
(Lim 2024, DEER).  Here J_i is that of Gaussian data of standard deviation d, -1/(alpha^2 d^2 + sigma^2),
which makes the linear part exact (the exponential form), corrected by secants: the slopes seen between
the last rounds' states of the same step, for each sample (Anderson acceleration of type I, Fang & Saad
2009, in the triangular form of Tang 2024, ParaTAA).  Or it is measured: evaluations are parallel, so in the
same round each stretch of neighbouring steps, where alpha dx0/dx changes little, has its columns by differences,
one coordinate at one of its steps, the next at the next.  After k rounds the first k states are exact, so the
sequential result is the only fixed point; far fewer rounds come close.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from samplers import kernels
from samplers.kernels import Kernel
from samplers.loop import check, checked
from scoresde.adaptive import rows_of
from scoresde.types import SDE, Noise, Score, wide

Round = Callable[[int, Tensor, Tensor], None]
"""(k, x, change) after round k = 1, 2, ...: the states at ts[-1], (B, ...), and by how much each sample's
path moved, (B,), in the unit of tol."""

STEEPEST = 2.0
"""Bound on a slope alpha |dx0/dx|: 0 to 1 where the flow contracts, above 1 between two modes.
Secants across far guesses can be a thousand times that, and throw the later states off."""

STEP = 0.1
"""Length of a difference, in units of sigma."""


def parallel(
    score: Score,
    sde: SDE,
    x: Tensor,
    ts: Tensor,
    *,
    kernel: Kernel = kernels.ddim,
    tol: float = 1e-3,
    memory: int = 3,
    stretches: int = 0,
    sigma_data: float = 0.5,
    max_rounds: int | None = None,
    window: int | None = None,
    chunk: int | None = None,
    noise: Noise = torch.randn_like,
    on_round: Round | None = None,
    grad: bool = False,
) -> Tensor:
    """The state at ts[-1] of the one-step sampler `kernel`, in few rounds of N evaluations each.

    x, ts:      state at ts[0], (B, ...);  decreasing times in (0, T], may end at 0, (N+1,)
    kernel:     a table of `samplers.kernels`; partial(kernels.ddim, eta=1) is the frozen-noise SDE
    tol:        RMS distance of each sample from the sequential result, in units of
                sqrt(alpha^2 sigma_data^2 + sigma^2).  A sample is done when no state of its path has
                moved by more in a round; by then the error is mostly far less
    memory:     secants for each step, >= 0; 0 is Picard's iteration in the exponential form
                (the nine mixtures of `experiments.problems`, 500 steps, 16 samples, tol 1e-3: 9 to 19
                rounds, with secants 7 to 15; for the SDE 12 to 35 and 9 to 25, where most rounds find
                the mode: once it stands five bring 0.5 to 1e-3)
    stretches:  >= 0; in place of secants the whole Jacobian, cut to slopes of 0 to 2, shared by the steps of each
                of so many stretches of the grid: stretches D more rows for each sample and round, and as many
                times D numbers kept, so for D to some hundreds.  With 32 for 500 steps these mixtures take 6 to
                11 rounds, for the SDE 7 to 14; a step and sample are evaluated 4 to 43 times, 112 for D = 256
                (digits, SDE: 38 in 10 rounds, with secants 12 in 19)
    sigma_data: the data's standard deviation d; a wrong one costs rounds, not accuracy
    window:     steps solved at once, default all.  Windows follow each other: their rounds add up, and
                memory is that of one: (2 memory + 4) window B states; stretches are of the whole grid
    chunk:      rows of one network call, default all window B
    noise:      drawn once, in the order of the sequential sampler, so it sees the same draws
    max_rounds: of a window; default its number of steps, after which the result is exact
    on_round:   hook (k, x, change); k counts through all windows: the sequential depth in network calls
    grad:       keep the graph of all rounds (not of the secants)

    Order: the kernel's.  Calls: one a round for a score with `rows` (`scoresde.adaptive`; t arrives as
    (rows,)), and samples that are done leave the batch.  A score without may hold things for its B rows,
    and is called with these, once for each step (and each difference) of a round.  A sample is the same alone
    and in any batch.
    """
    check(sde, x, ts)
    N = len(ts) - 1
    window = N if window is None else window
    for name, value, least in (
        ("memory", memory, 0),
        ("stretches", stretches, 0),
        ("window", window, 1),
        ("chunk", 1 if chunk is None else chunk, 1),
    ):
        if value < least:
            raise ValueError(f"{name} must be at least {least}, got {value}")
    if not (sigma_data > 0 and tol > 0):
        raise ValueError(f"sigma_data and tol must be positive, got {sigma_data} and {tol}")
    share = -(-N // stretches) if stretches else 0
    rounds = 0
    with torch.set_grad_enabled(grad and torch.is_grad_enabled()):
        for start in range(0, N, window):
            part = ts[start : start + window + 1]
            limit = len(part) - 1 if max_rounds is None else max_rounds
            x, rounds = _solve(
                score, sde, x, part, kernel, tol, memory, share, sigma_data, limit, chunk, noise, on_round, rounds
            )
    return x


def _solve(
    score: Score,
    sde: SDE,
    x: Tensor,
    ts: Tensor,
    kernel: Kernel,
    tol: float,
    memory: int,
    share: int,
    d: float,
    limit: int,
    chunk: int | None,
    noise: Noise,
    on_round: Round | None,
    rounds: int,
) -> tuple[Tensor, int]:
    """One window: the states at ts[-1], and the number of rounds so far."""
    N, B, shape, times = len(ts) - 1, len(x), x.shape[1:], ts[:-1]
    A, Bs, C = kernel(sde, ts)
    z = torch.stack([c * noise(x) if c else torch.zeros_like(x) for c in C.tolist()]).flatten(2)  # (N, B, D)
    sigma2, alpha = sde.sigma(times) ** 2, sde.alpha(times)
    slope = -1 / (alpha**2 * d**2 + sigma2)
    size = torch.sqrt((sde.alpha(ts) * d) ** 2 + sde.sigma(ts) ** 2)
    a, b, g, v, wide = A.tolist(), Bs.tolist(), slope.tolist(), sigma2.tolist(), (-1, 1, 1)
    s2, g_, size_ = (q.to(x).reshape(wide) for q in (sigma2, slope, size))
    at, units = _coordinates(N, x[0].numel(), share)
    h, units = STEP * sigma2[at].sqrt().to(x).reshape(wide), units.to(x)

    def chain(S: Tensor, X: Tensor, secants: list[tuple[Tensor, Tensor]], J: Tensor | None) -> Tensor:
        """The states of the chain linear about X, where the score is S."""
        y = [X[0]]
        for i in range(N):
            dx = y[i] - X[i]
            s = S[i] + (g[i] * dx if J is None else (J[i // share] * dx[:, None]).sum(2) / v[i])
            for q, w in secants:
                s = s + w[i] * (q[i] * dx).sum(1, keepdim=True)
            y.append(a[i] * y[i] + b[i] * s + z[i])
        return torch.stack(y)

    index = torch.arange(B, device=x.device)
    leave = rows_of(score, index) is not None
    live = torch.ones_like(index, dtype=torch.bool)
    out, moved = x, torch.full((B,), torch.inf, dtype=x.dtype, device=x.device)
    X = x.flatten(1).expand(N + 1, B, -1)
    X = chain(g_ * X[:-1], X, [], None)  # Gaussian data of standard deviation d
    seen: list[tuple[Tensor, Tensor]] = []
    for _ in range(limit):
        Y = torch.cat([X[:-1], X[at].detach() + h * units]).reshape(-1, len(index), *shape)
        S, Sh = _evaluate(score, Y, torch.cat([times, times[at]]), index, chunk).flatten(2).tensor_split([N])
        if share:
            X1 = chain(S, X, [], _jacobian(s2[at] / h * (Sh - S[at]).detach()))
        else:
            X1 = chain(S, X, _secants([(X[:-1].detach(), S.detach()), *seen], g_, s2, size_[:-1]), None)
        change = ((X1 - X).detach() / size_).square().mean(2).sqrt().amax(0)  # (b,)
        bad = ~torch.isfinite(change)
        if bool(bad.any()):
            raise FloatingPointError(
                f"sample {int(index[bad][0])} is not finite after round {rounds + 1}: the score returned NaN or "
                "infinity, or the sampler itself is unstable on this grid; run it step by step to see where"
            )
        rounds += 1
        out = out.index_copy(0, index[live], X1[-1, live].reshape(-1, *shape))
        moved = moved.index_copy(0, index[live], change[live])
        if on_round is not None:
            on_round(rounds, out, moved)
        live = live & (change > tol)
        if not bool(live.any()):
            return out, rounds
        seen = [] if share else [(X[:-1].detach(), S.detach()), *seen][:memory]
        X = X1
        if leave and not bool(live.all()):
            index, X, z = index[live], X[:, live], z[:, live]
            seen, live = [(p[:, live], q[:, live]) for p, q in seen], live[live]
    if limit < N:
        raise RuntimeError(
            f"{int(live.sum())} of {B} samples are not within tol = {tol:.1g} after {limit} rounds (sample "
            f"{int(index[live][0])} still moves by {float(moved[index[live][0]]):.2g}); raise max_rounds or tol"
        )
    return out, rounds


def _secants(
    seen: list[tuple[Tensor, Tensor]], slope: Tensor, sigma2: Tensor, size: Tensor
) -> list[tuple[Tensor, Tensor]]:
    """Orthonormal directions q and what the score's slope along them has beyond the Gaussian's, (N, b, D) each.

    Gram-Schmidt on the differences of the states seen, newest first; a difference that is not new, or is
    rounding, is left out.  alpha dx0/dx = 1 + sigma^2 ds/dx is cut to `STEEPEST` in length.
    """
    (X, S), *older = seen
    known: list[tuple[Tensor, Tensor]] = []
    floor = 100 * torch.finfo(X.dtype).eps * size * X.shape[2] ** 0.5
    for X0, S0 in older:
        q, v = X - X0, S - S0
        for p, w in known:
            along = (p * q).sum(2, keepdim=True)
            q, v = q - along * p, v - along * w
        length = _norm(q)
        inverse = torch.where(length > floor, 1 / length, 0.0)
        q, v = q * inverse, v * inverse
        x0 = q + sigma2 * v
        x0 = x0 * (STEEPEST / _norm(x0)).clamp(max=1)
        known.append((q, (x0 - q) / sigma2))
    return [(q, v - slope * q) for q, v in known]


def _norm(v: Tensor) -> Tensor:
    return v.square().sum(2, keepdim=True).sqrt()


def _coordinates(N: int, D: int, share: int) -> tuple[Tensor, Tensor]:
    """The steps (n,) at which the D coordinates of each stretch are moved, spread over it, and which, (n, 1, D)."""
    if not share:
        return torch.zeros(0, dtype=torch.long), torch.zeros(0, 1, D)
    j, start = torch.arange(D), torch.arange(0, N, share)
    at = start[:, None] + (2 * j + 1) * min(share, N) // (2 * D)
    return at.flatten().clamp(max=N - 1), torch.eye(D).repeat(len(start), 1)[:, None]


def _jacobian(columns: Tensor) -> Tensor:
    """sigma^2 ds/dx of each stretch and sample, (stretches, b, D, D), from its columns, (stretches D, b, D).

    alpha dx0/dx = 1 + sigma^2 ds/dx is alpha^2/sigma^2 Cov[x0 | x]: made symmetric, its eigenvalues cut to 0 to
    `STEEPEST`.  Not finite is 0: where the states are not either, the round says so.
    """
    D = columns.shape[2]
    J = columns.nan_to_num(0, 0, 0).unflatten(0, (-1, D)).permute(0, 2, 3, 1)
    L, U = torch.linalg.eigh((J + J.mT) / 2)
    return (U * L.clamp(-1, STEEPEST - 1)[..., None, :]) @ U.mT


def _evaluate(score: Score, X: Tensor, times: Tensor, index: Tensor, chunk: int | None) -> Tensor:
    """s at X (N, b, ...), row j of it being row index[j] of the batch the score is made for."""
    N, b, shape = len(X), X.shape[1], X.shape[2:]
    which = index.repeat(N)
    if rows_of(score, index) is None:
        return torch.stack([checked(score(x, t), x) for x, t in zip(X, times.unbind(), strict=True)])
    flat = X.reshape(N * b, *shape)
    t = times.to(X.device, wide(X)).repeat_interleave(b)
    parts = []
    for rows in torch.arange(N * b, device=X.device).split(chunk or N * b):
        some = rows_of(score, which[rows])
        assert some is not None
        parts.append(checked(some(flat[rows], t[rows]), flat[rows]))
    return torch.cat(parts).reshape(X.shape)
