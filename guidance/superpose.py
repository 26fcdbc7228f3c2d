"""Superposition: OR and AND of scores by their own log-densities, followed along the run   (SuperDiff, Skreta 2024).

In y = x/alpha at theta = (sigma/alpha)^2 every density obeys the heat equation, so along a stochastic path whose noise
is the reverse SDE's, E[dy dy'] = -d theta I, Ito's formula has no divergence left in it:

    d log p_i = <s_i, dy> + |s_i|^2 d theta / 2                d theta < 0

    OR    s = sum_i k_i s_i,  k = softmax(log p_i + log v_i): the score of sum_i v_i p_i, exactly where log p_i is
    AND   k with sum 1 that makes every log p_i grow alike in the step that follows
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from scoresde.model import evaluate
from scoresde.types import SDE, Hook, Score, instant, like, wide


def superpose(
    scores: Sequence[Score], sde: SDE, ts: Tensor, kind: str = "or", *, shares: Sequence[float] | None = None
) -> tuple[Score, Hook]:
    """(score, hook) of one run of `ancestral`, or another one-step sampler of the reverse SDE, on the grid ts.

        s, follow = superpose([a, b], sde, ts, "or")
        x = samplers.ancestral(s, sde, x, ts, on_step=follow)

    kind:   "or": the mixture sum_i v_i p_i;  "and": samples that are as likely under each of the p_i, k as above with
            log p_i brought to their mean over what is left of the grid.  For NOT see `conjunction` and `perp_neg`
    shares: v_i > 0 of "or", scaled to sum 1; default equal

    At ts[0] the p_i are taken as equal, which they are where the noise drowns the data.
    Bias: the tracked log p_i err by O(step): each step leaves (z' H z - tr H) h / 2 of the Hessians H behind.  "and" is
    not the product of the p_i (`product` names that).  A deterministic sampler has no dy dy', and would be wrong.
    A sampler that asks more than once a step is refused.
    Network calls: one for all `Model`s of the same network, else one for each score.
    """
    if kind not in ("or", "and"):
        raise ValueError(f"kind must be 'or' or 'and', got {kind!r}")
    if len(scores) < 2:
        raise ValueError(f"superposing takes at least two scores, got {len(scores)}")
    if shares is not None and (
        kind == "and" or len(shares) != len(scores) or not all(0 < u < math.inf for u in shares)
    ):
        raise ValueError(f"shares are positive, one a score, and for kind 'or' only; got {shares} for {len(scores)}")
    v = torch.ones(len(scores), dtype=torch.float64) if shares is None else torch.tensor(shares, dtype=torch.float64)
    log_v, end = v.log(), float(torch.exp(-sde.lam(ts[-1])))
    log_p: Tensor | None = None  # (B, K), up to what all share
    seen: tuple[float, Tensor, Tensor] | None = None  # sigma/alpha, y (B, ...), s_i of y (B, K, D)

    def score(x: Tensor, t: Tensor) -> Tensor:
        nonlocal log_p, seen
        t = instant(sde, t)
        values = torch.stack(evaluate(scores, x, t), 1)  # (B, K, ...)
        alpha, level = sde.alpha(t), float(torch.exp(-sde.lam(t)))
        s = (values.to(wide(x)) * like(alpha, values)).flatten(2)
        if log_p is None:
            log_p = s.new_zeros(len(x), len(scores))
        if seen is not None and abs(seen[0] - level) > 1e-9 * seen[0]:
            raise ValueError(
                f"the score was asked at sigma/alpha = {seen[0]:.4g} and {level:.4g} in one step, and only the last "
                "would count; take a sampler that asks once a step, at its start (ancestral)"
            )
        seen = level, (x / like(alpha, x)).to(s).flatten(1), s
        rest = level**2 - (end**2 if level > end * (1 + 1e-9) else 0)  # a call at the end itself is of no step
        k = torch.softmax(log_p + log_v.to(s), 1) if kind == "or" else _even(s, log_p, rest)
        return torch.einsum("bk,bk...->b...", k.to(x), values)

    def hook(i: int, t: Tensor, x: Tensor) -> None:
        nonlocal log_p, seen
        if seen is None or log_p is None:
            raise ValueError(
                "the sampler did not ask superpose's own score in this step; give it the score of the pair"
            )
        level, y, s = seen
        h = level**2 - float(torch.exp(-sde.lam(t))) ** 2
        if not h > 1e-9 * level**2:
            raise ValueError(
                f"the score was last asked at the end of step {i + 1}, where nothing moves; take a sampler "
                "that asks once a step, at its start (ancestral), and put this hook before others that ask"
            )
        dy = (x / like(sde.alpha(t), x)).to(y).flatten(1) - y
        log_p = log_p + torch.einsum("bkd,bd->bk", s, dy) - h / 2 * s.square().sum(2)
        seen = None

    return score, hook


def _even(s: Tensor, log_p: Tensor, rest: float) -> Tensor:
    """k (B, K), sum 1, so that in a step h = r^2 - r1^2 every log p_i + (what is open of it) h/rest grows alike:

        <s_i, sum_j k_j s_j> - |s_i|^2/2 + log p_i/rest = the same for all i,   by least squares

    E[dy] = h sum_j k_j s_j;  rest = r^2 - r_N^2 closes what is open by the end of the grid.
    """
    K = s.shape[1]
    gram = torch.einsum("bid,bjd->bij", s, s)
    size = gram.diagonal(dim1=1, dim2=2)  # |s_i|^2, (B, K)
    want = size / 2 - log_p / rest
    centre = torch.eye(K).to(s) - 1 / K
    scale = size.mean(1).clamp(min=torch.finfo(s.dtype).tiny)[:, None]  # of the equation sum k = 1; scores may be 0
    rows = torch.cat([centre @ gram, scale[..., None].expand(-1, 1, K)], 1)
    right = torch.cat([want, scale], 1)  # its mean is orthogonal to the rows: nothing to take away
    k = (torch.linalg.pinv(rows, rtol=1e-6) @ right[..., None])[..., 0]
    return k / k.sum(1, keepdim=True)
