"""Products of densities: weighted sums of scores."""

from collections.abc import Sequence

from torch import Tensor

from guidance.rows import by_rows
from guidance.weights import Weight, check_weight, is_number, weight_at
from scoresde.model import evaluate
from scoresde.types import SDE, Score


@by_rows("scores", lists=["weights"])
def product(scores: Sequence[Score], weights: Sequence[Weight], *, sde: SDE | None = None) -> Score:
    """s = sum_i w_i s_i, the score of prod_i p_i^(w_i) at sigma -> 0   (Hinton 2002; Du 2023).

    weights: numbers, (B,) each, or functions of sigma/alpha (then sde is needed); 0 is off
    Bias: at sigma > 0 the sum of noised scores is not the score of the noised product.
    Network calls: one for all `Model`s of the same network, one for each other score.
    """
    if len(scores) != len(weights) or not scores:
        raise ValueError(f"give one weight a score, got {len(scores)} scores and {len(weights)} weights")
    for w in weights:
        check_weight(w, sde, None)
    on = [(s, w) for s, w in zip(scores, weights, strict=True) if isinstance(w, Tensor) or callable(w) or w != 0]
    if not on:
        raise ValueError("every weight is 0: nothing is left of the product")

    def composed(x: Tensor, t: Tensor) -> Tensor:
        values = evaluate([s for s, _ in on], x, t)
        total = values[0] * weight_at(on[0][1], sde, x, t)
        for value, (_, w) in zip(values[1:], on[1:], strict=True):
            total = total + value * weight_at(w, sde, x, t)
        return total

    return composed


@by_rows("uncond", "conds", lists=["weights"])
def conjunction(uncond: Score, conds: Sequence[Score], weights: Sequence[Weight], *, sde: SDE | None = None) -> Score:
    """AND / NOT: s = s_u + sum_i w_i (s_i - s_u)   (Liu 2022, Composable Diffusion, eq. 11 and 12).

    w_i > 0: AND condition i (1 is p(x | c_i)); w_i < 0: NOT; 0 is off
    With independent conditions, w_i = 1 is the score of p(x | c_1, ..., c_n) at sigma -> 0.
    Bias and network calls as `product`, with s_u as one more score; one condition of weight 1 is that score alone.
    """
    if len(conds) != len(weights):
        raise ValueError(f"give one weight a condition, got {len(conds)} conditions and {len(weights)} weights")
    for w in weights:
        check_weight(w, sde, None)
    on = [(s, w) for s, w in zip(conds, weights, strict=True) if isinstance(w, Tensor) or callable(w) or w != 0]
    if len(on) == 1 and is_number(on[0][1], 1):
        return on[0][0]

    def composed(x: Tensor, t: Tensor) -> Tensor:
        s_u, *values = evaluate([uncond, *(s for s, _ in on)], x, t)
        total = s_u
        for value, (_, w) in zip(values, on, strict=True):
            total = total + weight_at(w, sde, x, t) * (value - s_u)
        return total

    return composed
