"""Superposition: OR and AND of scores by their own log-densities, followed along the run   (SuperDiff, Skreta 2024).

In y = x/alpha at theta = (sigma/alpha)^2 every density obeys the heat equation, so along a stochastic path whose noise
is the reverse SDE's, E[dy dy'] = -d theta I, Ito's formula has no divergence left in it   (their theorem 1):

    d log p_i = <s_i, dy> + |s_i|^2 d theta / 2                d theta < 0

    OR    s = sum_i k_i s_i,  k = softmax(log p_i + log v_i): the score of sum_i v_i p_i, exactly where log p_i is
    AND   k with sum 1 that makes every log p_i grow alike in the step that follows
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from scoresde.model import evaluate
from scoresde.types import SDE, Hook, Score, like, wide


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
    Network calls: one for all `Model`s of the same network, else one for each score.
    """
    if kind not in ("or", "and"):
        raise ValueError(f"kind must be 'or' or 'and', got {kind!r}")
    if len(scores) < 2:
        raise ValueError(f"superposing takes at least two scores, got {len(scores)}")
    if shares is not None and (kind == "and" or len(shares) != len(scores) or min(shares) <= 0):
        raise ValueError(f"shares are positive, one a score, and for kind 'or' only; got {shares} for {len(scores)}")
    v = torch.ones(len(scores), dtype=torch.float64) if shares is None else torch.tensor(shares, dtype=torch.float64)
    log_v, r = (v / v.sum()).log(), torch.exp(-sde.lam(ts))
    log_p: Tensor | None = None  # (B, K), up to what all share
    seen: tuple[float, Tensor, Tensor] | None = None  # sigma/alpha, y (B, ...), s_i of y (B, K, D)

    def score(x: Tensor, t: Tensor) -> Tensor:
        nonlocal log_p, seen
        values = torch.stack(evaluate(scores, x, t), 1)  # (B, K, ...)
        alpha, level = sde.alpha(t), float(torch.exp(-sde.lam(t)))
        s = (values.to(wide(x)) * like(alpha, values)).flatten(2)
        if log_p is None:
            log_p = s.new_zeros(len(x), len(scores))
        seen = level, (x / like(alpha, x)).to(s).flatten(1), s
        h = level**2 - float(r[r < level * (1 - 1e-9)].max() if bool((r < level * (1 - 1e-9)).any()) else 0) ** 2
        k = torch.softmax(log_p + log_v.to(s), 1) if kind == "or" else _even(s, log_p, h, level, float(r[-1]))
        return torch.einsum("bk,bk...->b...", k.to(x), values)

    def hook(i: int, t: Tensor, x: Tensor) -> None:
        nonlocal log_p, seen
        if seen is None or log_p is None:
            raise ValueError(
                "the sampler did not ask superpose's own score in this step; give it the score of the pair"
            )
        level, y, s = seen
        h = level**2 - float(torch.exp(-sde.lam(t))) ** 2
        dy = (x / like(sde.alpha(t), x)).to(y).flatten(1) - y
        log_p = log_p + torch.einsum("bkd,bd->bk", s, dy) - h / 2 * s.square().sum(2)
        seen = None

    return score, hook


def _even(s: Tensor, log_p: Tensor, h: float, level: float, end: float) -> Tensor:
    """k (B, K), sum 1, with <s_i - mean s, s_k> h = |s_i|^2 h/2 - mean - c (log p_i - mean): least squares.

    E[dy] = h sum_k k_k s_k; c = h/(level^2 - end^2) closes what is open by the end of the grid.
    """
    K = s.shape[1]
    gram = torch.einsum("bid,bjd->bij", s, s)
    want = gram.diagonal(dim1=1, dim2=2) / 2 - log_p / max(level**2 - end**2, h)
    centre = torch.eye(K).to(s) - 1 / K
    rows = torch.cat(
        [centre @ gram, gram.new_ones(len(s), 1, K) * gram.diagonal(dim1=1, dim2=2).mean(1)[:, None, None]], 1
    )
    right = torch.cat([want @ centre, gram.diagonal(dim1=1, dim2=2).mean(1)[:, None]], 1)
    k = (torch.linalg.pinv(rows, rtol=1e-6) @ right[..., None])[..., 0]
    return k / k.sum(1, keepdim=True)
