"""Guided scores of some rows of their batch: what solvers need that let finished samples go   (`scoresde.adaptive`)."""

import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any, ParamSpec

from torch import Tensor

from scoresde.adaptive import rows_of

Made = Callable[..., Tensor]  # a score or an energy
P = ParamSpec("P")


class Guided:
    """What a rule makes, with the `rows` that `by_rows` gives it."""

    def __init__(self, score: Made, some: Callable[[Tensor], Made | None]) -> None:
        self.score, self.some = score, some

    def __call__(self, *args: Tensor) -> Tensor:
        return self.score(*args)

    def rows(self, index: Tensor) -> Made | None:
        """The rule of rows index (n,) of its parts; None if one of them has no such thing."""
        return self.some(index)


def by_rows(
    *parts: str, each: Sequence[str] = (), lists: Sequence[str] = ()
) -> Callable[[Callable[P, Made]], Callable[P, Made]]:
    """For rules: what they make has `rows(index)`, the same rule with rows index of these arguments.

    parts: names of arguments that are scores or energies, or sequences of them.  Those with `rows` are `Model`, exact
           targets, `rowwise` and other guided scores; if one has none, neither has the rule
    each:  names of arguments that may hold one number a sample, (B,);  lists: of sequences of such
    What a rule is given beside them holds nothing for a row.  A rule that is off, and returns a part, is that part.
    """

    def decorate(rule: Callable[P, Made]) -> Callable[P, Made]:
        signature = inspect.signature(rule)

        @functools.wraps(rule)
        def made(*args: P.args, **kwargs: P.kwargs) -> Made:
            score = rule(*args, **kwargs)
            if any(score is v for v in (*args, *kwargs.values())):
                return score

            def some(index: Tensor) -> Made | None:
                given = signature.bind(*args, **kwargs)
                held: dict[str, Any] = given.arguments
                for name in parts:
                    many = isinstance(held[name], Sequence)
                    found = [rows_of(part, index) for part in (held[name] if many else [held[name]])]
                    if any(part is None for part in found):
                        return None
                    held[name] = found if many else found[0]
                for name in held.keys() & set(each):
                    held[name] = _picked(held[name], index)
                for name in lists:
                    held[name] = [_picked(v, index) for v in held[name]]
                return made(*given.args, **given.kwargs)

            return Guided(score, some)

        return made

    return decorate


def _picked(v: Any, index: Tensor) -> Any:
    return v[index.to(v.device)] if isinstance(v, Tensor) and v.ndim else v
