"""The score and the trace of its Jacobian from one network pass, exactly or by random probes.

    tr J = sum_i e_i' J e_i = E[v' J v]   for E[v v'] = I                (Hutchinson 1989; Grathwohl 2019)

All products come from one `vjp` of the pass that gave the score.  Signs cost least: where J is nearly a
multiple of the identity, as a score's is, v'Jv = |v|^2 tr J / D needs |v|^2 = D.
"""

import itertools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from scoresde.exact import Mixture
from scoresde.noise import rademacher
from scoresde.types import Noise, Score

KINDS = ("hadamard", "rademacher", "gaussian", "sphere")
Probes = Callable[[int], Tensor]
"""The probes of evaluation i: (n, B, ...)."""


def probes(kind: str, n: int | Sequence[int], x: Tensor, noise: Noise, fresh: bool) -> Probes:
    """n probes an evaluation, or n[i] in evaluation i, for a state like x (B, ...), each sample's from its own stream.

    rademacher:  random signs
    gaussian:    N(0, I); pays for the identity part of J, ten times the error
    sphere:      uniform on |v|^2 = D
    hadamard:    rows of the Sylvester matrix of 2^k >= D columns, cut to D, in an order of each sample's own, under a
                 random sign for each coordinate.  Rows are orthogonal, so 2^k of them give the trace exactly; the
                 next n rows serve each evaluation, and neighbours on a path, whose J are alike, complete
                 each other
    fresh:       other probes at each evaluation: unbiased where evaluations are fixed beforehand, less noise
                 for nothing.  Not for a solver that looks at the trace: it would follow the noise
    """
    if kind not in KINDS:
        raise ValueError(f"unknown probe {kind!r}; choose one of {', '.join(KINDS)}")
    if min([n] if isinstance(n, int) else n) < 1:
        raise ValueError(f"probes must be at least 1, or None for the exact divergence; got {n}")
    if not isinstance(n, int) and not fresh:
        raise ValueError("a number of probes for each evaluation goes with fresh ones")
    before = [] if isinstance(n, int) else [0, *itertools.accumulate(n)]

    def size(i: int) -> int:
        return n if isinstance(n, int) else n[i]

    if kind == "hadamard":
        D, bits = x[0].numel(), max(0, (x[0].numel() - 1).bit_length())
        sign, order = rademacher(noise(x)), noise(x.new_empty(len(x), 2**bits)).argsort(1)  # (B, 2^bits)

        def rows(i: int) -> Tensor:
            first = (i * size(i) if isinstance(n, int) else before[i]) if fresh else 0
            index = order[:, torch.arange(first, first + size(i)) % 2**bits].T  # (n, B)
            return _walsh(index, D, bits).to(x).reshape(-1, *x.shape) * sign

        return rows

    def draw(i: int) -> Tensor:
        z = torch.stack([noise(x) for _ in range(size(i))])
        if kind == "rademacher":
            return rademacher(z)
        if kind == "sphere":
            flat = z.flatten(2)
            return (flat * (flat.shape[2] ** 0.5 / flat.norm(dim=2, keepdim=True))).reshape(z.shape)
        return z

    if fresh:
        return draw
    kept = draw(0)
    return lambda i: kept


def spread(total: int, weight: Tensor, alpha: Tensor, sigma: Tensor, like: Mixture) -> list[int]:
    """Probes for each node, at least one and `total` in all, in proportion to the noise that signs make there.

    weight (N,): what the trace at each node is multiplied by;  alpha, sigma (N,) there
    like: a Gaussian with the data's covariance C.  Its Jacobian J = -(alpha^2 C + sigma^2)^-1 makes v'Jv vary by
          2 sum_{i /= j} J_ij^2
    """
    if total < len(weight):
        raise ValueError(f"{total} probes do not go round {len(weight)} nodes; give as many at least, or fewer nodes")
    if len(like.log_weights) != 1:
        raise ValueError("probes are spread by the covariance of a Gaussian: gaussian_of(data)")
    floor = alpha[:, None] ** 2 * like.floor + sigma[:, None] ** 2  # (N, 1)
    off = torch.zeros(len(weight), dtype=torch.float64)
    if like.basis is not None:
        g = 1 / (alpha[:, None] ** 2 * like.eig + floor) - 1 / floor  # J = -1/floor - U diag(g) U'
        off = g.square().sum(1) - torch.einsum("dr,nr->nd", like.basis[0] ** 2, g).square().sum(1)
    share = weight.abs() * off.clamp(min=0).sqrt()
    share = share / share.sum() if bool(share.sum() > 0) else torch.full_like(share, 1 / len(share))
    free = total - len(share)
    n = (share * total - 1).clamp(min=0)
    n = n * free / n.sum() if bool(n.sum() > 0) else n
    whole = n.floor()
    rest = (n - whole).argsort(descending=True)[: free - int(whole.sum())]
    whole[rest] += 1
    return [1 + int(k) for k in whole]


def _walsh(row: Tensor, D: int, bits: int) -> Tensor:
    """(-1)^(number of ones in row & column): entries of the Sylvester-Hadamard matrix, (...) -> (..., D)."""
    both = row[..., None] & torch.arange(D, device=row.device)
    odd = torch.zeros_like(both)
    for k in range(bits):
        odd = odd ^ (both >> k)
    return 1 - 2 * (odd & 1)


def score_and_trace(
    score: Score, x: Tensor, t: Tensor, v: Tensor | None = None, chunk: int | None = None
) -> tuple[Tensor, Tensor]:
    """s(x, t), (B, ...), and tr ds/dx, (B,), from one network pass.

    v (n, B, ...): mean of v'Jv over them; None: the exact trace by D products e_i'J.
    chunk: how many products are held in memory at once; default as many as make 2^20 numbers of state.
    """
    linear = torch.func.vjp(lambda y: score(y, t), x)
    s, pull = linear[0], linear[1]
    if s.shape != x.shape:
        raise ValueError(
            f"the score returned {tuple(s.shape)} for a state {tuple(x.shape)}; it must be like its argument"
        )
    size = max(1, 2**20 // x.numel()) if chunk is None else chunk

    def quadratic(v: Tensor) -> Tensor:  # v'Jv, (B,)
        return (pull(v.to(s))[0] * v).flatten(1).sum(1)

    if v is None:
        D = x[0].numel()
        basis = torch.eye(D, dtype=x.dtype, device=x.device).reshape(D, 1, *x.shape[1:]).expand(D, *x.shape)
        return s, torch.vmap(quadratic, chunk_size=size)(basis).sum(0)
    if len(v) == 1:
        return s, quadratic(v[0])
    return s, torch.vmap(quadratic, chunk_size=size)(v).mean(0)
