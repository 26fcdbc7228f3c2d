"""A network of any prediction type as a `Score`, with its conditions."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from scoresde.adaptive import rows_of
from scoresde.convert import KINDS, line
from scoresde.types import SDE, Score, like


@dataclass(frozen=True)
class Model:
    """s(x, t) = a x + b net(c_in x, label, **cond), with (a, b) of `scoresde.convert`.

    net:        net(x, label, **cond) -> (B, ...);  label (B,) in the dtype of x
    kind:       what net predicts: score, eps, x0, v, velocity or F (EDM's preconditioned network)
    label:      t -> the number net is told; default: log(sigma/alpha)/4 for F (Karras 2022) and for
                the networks of `scoresde.nets`, else the integer label of a `DiscreteVP`, else t
    sigma_data: the data's standard deviation, for F
    classes:    number of classes if net takes a class label `y`; y = classes means "no label"

    `Model(...)` is the unconditional score; `model.given(3)`, `model.given(labels)` and
    `model.given(encoder_hidden_states=c)` are conditional ones.  One network call an evaluation;
    for F the input is c_in x = x / sqrt(sigma^2 + alpha^2 sigma_data^2).
    """

    net: Callable[..., Tensor]
    sde: SDE
    kind: str = "eps"
    label: Callable[[Tensor], Tensor] | None = None
    sigma_data: float = 0.5
    classes: int | None = None
    cond: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"unknown prediction {self.kind!r}; choose one of {', '.join(KINDS)}")
        if not self.sigma_data > 0:
            raise ValueError(f"sigma_data, the data's standard deviation, must be positive, got {self.sigma_data}")

    def given(self, y: int | Sequence[int] | Tensor | None = None, **context: Any) -> "Model":
        """The same network under a condition: class label(s) y, and any keyword the net takes.

        y: an int for the whole batch, (B,) labels, or None for "no label"; checked here, once.
        """
        cond = {**self.cond, **context}
        if y is None:
            cond.pop("y", None)
        else:
            cond["y"] = self._checked(y)
        return replace(self, cond=cond)

    def rows(self, index: Tensor) -> "Model":
        """The same score for rows index of its batch (which may repeat): what solvers need that let samples go."""

        def pick(name: str, v: Any) -> Any:
            own = isinstance(v, Tensor) and v.ndim and (name == "y" or len(v) > 1)
            return v[index.to(v.device)] if own else v

        return replace(self, cond={name: pick(name, v) for name, v in self.cond.items()})

    def _checked(self, y: int | Sequence[int] | Tensor) -> Tensor | int:
        if self.classes is None:
            raise ValueError("this network takes no class label; build Model(..., classes=n) if it does")
        labels = torch.as_tensor(y)
        if labels.is_floating_point() or labels.dtype == torch.bool or labels.ndim > 1:
            raise ValueError(f"labels must be integers of shape () or (B,), got {labels.dtype} {tuple(labels.shape)}")
        low, high = int(labels.min()), int(labels.max())
        if low < 0 or high > self.classes:
            wrong = low if low < 0 else high
            raise ValueError(
                f"label {wrong} is out of range; classes are 0..{self.classes - 1}, "
                f"and None (or {self.classes}) means no label"
            )
        return labels.long() if labels.ndim else int(labels)

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        return self._evaluate(x, t, self._cond(x))

    def _cond(self, x: Tensor) -> dict[str, Any]:
        """The conditions as the batch sees them: every tensor gets x's batch size and device."""
        cond = dict(self.cond)
        if self.classes is not None:
            y = cond.get("y", self.classes)  # one for all: an int; no label: classes
            if isinstance(y, Tensor) and len(y) != len(x):
                raise ValueError(f"{len(y)} labels were given for a batch of {len(x)}; give one label, or one each")
            cond["y"] = y.to(x.device) if isinstance(y, Tensor) else torch.full((len(x),), y, device=x.device)
        for name, value in cond.items():
            if isinstance(value, Tensor) and name != "y":
                if value.ndim == 0 or len(value) not in (1, len(x)):
                    raise ValueError(
                        f"condition {name!r} has shape {tuple(value.shape)}; "
                        f"its first axis must be 1 or the batch {len(x)}"
                    )
                cond[name] = value.to(x.device).expand(len(x), *value.shape[1:])
        return cond

    def _evaluate(self, x: Tensor, t: Tensor, cond: dict[str, Any]) -> Tensor:
        sde = self.sde
        a, b = line(self.kind, "score", sde, t, self.sigma_data)
        if self.kind == "F":
            c_in = 1 / (sde.sigma(t) ** 2 + (sde.alpha(t) * self.sigma_data) ** 2).sqrt()
            out = self.net(like(c_in, x) * x, self._label(x, t), **cond)
        else:
            out = self.net(x, self._label(x, t), **cond)
        if out.shape != x.shape:
            raise ValueError(
                f"the network returned {tuple(out.shape)} for an input of {tuple(x.shape)}; "
                "a network that also predicts a variance must have it cut off first"
            )
        return like(a, x) * x + like(b, x) * out

    def _label(self, x: Tensor, t: Tensor) -> Tensor:
        if self.label is not None:
            label = self.label(t)
        elif self.kind == "F" or getattr(self.net, "takes_log_noise", False):
            label = -0.25 * self.sde.lam(t)
        elif hasattr(self.sde, "label"):
            label = self.sde.label(t)
        else:
            label = t
        dtype = x.dtype if label.is_floating_point() else label.dtype
        if label.ndim == 0 and label.device.type == "cpu":
            return torch.full((len(x),), label.item(), dtype=dtype, device=x.device)  # no copy to wait for
        return label.to(x.device, dtype).expand(len(x))


def evaluate(scores: Sequence[Score], x: Tensor, t: Tensor) -> list[Tensor]:
    """[s(x, t) for s in scores], with one network call for all scores that share a network.

    `Model`s that differ only in their conditions are evaluated as one batch of len(scores) B.
    """
    groups: list[list[int]] = []
    for i, s in enumerate(scores):
        for group in groups:
            if _same_network(scores[group[0]], s):
                group.append(i)
                break
        else:
            groups.append([i])
    out: dict[int, Tensor] = {}
    for group in groups:
        first = scores[group[0]]
        if len(group) == 1 or not isinstance(first, Model):
            out.update({i: scores[i](x, t) for i in group})
            continue
        conds = [scores[i]._cond(x) for i in group]  # type: ignore[attr-defined]
        cond = {k: torch.cat([c[k] for c in conds]) if isinstance(v, Tensor) else v for k, v in conds[0].items()}
        n = len(group)
        many = first._evaluate(x.repeat(n, *[1] * (x.ndim - 1)), t.repeat(n) if t.ndim else t, cond)
        out.update(zip(group, many.chunk(n), strict=True))
    return [out[i] for i in range(len(scores))]


def _same_network(a: Score, b: Score) -> bool:
    """Both are one network, and their conditions can be stacked."""
    if not (isinstance(a, Model) and isinstance(b, Model)):
        return False
    if a.net is not b.net or replace(a, cond={}) != replace(b, cond={}):
        return False
    keys = (set(a.cond) | set(b.cond)) - {"y"}
    return all(_stackable(a.cond.get(k), b.cond.get(k)) for k in keys)


def _stackable(u: Any, v: Any) -> bool:
    if isinstance(u, Tensor) and isinstance(v, Tensor):
        return u.shape[1:] == v.shape[1:]
    return (u is None and v is None) or (isinstance(u, str | int | float) and type(u) is type(v) and u == v)


def change_sde(score: Score, old: SDE, new: SDE) -> Score:
    """A score made for one SDE, as the score of another, by matching log-SNR.

    With x' the state and alpha', sigma' the coefficients of `new` at t', and t = old.time(new.lam(t')):
        s'(x', t') = (alpha/alpha') s(alpha/alpha' x', t)
    Exact: the two noised densities are the same up to that scale (Karras 2022, eq. 4).  Noise above
    that of old.T, which the score was not made for, is refused.
    """

    def changed(x: Tensor, t: Tensor) -> Tensor:
        t0 = old.time(new.lam(t))
        if bool((t0 > old.T * (1 + 1e-6)).any()):
            raise ValueError(
                f"the new SDE's noise at t = {float(t.max()):.6g} is that of t = {float(t0.max()):.6g} of the old, "
                f"whose T is {old.T:.6g}; start the grid where the noise is no more than the score was made for"
            )
        r = like(old.alpha(t0) / new.alpha(t), x)
        return r * score(r * x, t0)

    return changed


def counted(score: Score) -> "Counted":
    """The same score, with `.calls` and `.samples` (network calls, and rows over all of them)."""
    return Counted(score)


class Counted:
    """See `counted`."""

    def __init__(self, score: Score, whole: "Counted | None" = None) -> None:
        self.score, self.whole, self.calls, self.samples = score, whole or self, 0, 0

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        self.whole.calls += 1
        self.whole.samples += len(x)
        return self.score(x, t)

    def rows(self, index: Tensor) -> "Counted | None":
        """Some rows of the score, if it has such a thing; what they are asked counts here."""
        some = rows_of(self.score, index)
        return None if some is None else Counted(some, self.whole)
