"""What can be done after a step: hooks (i, t_after, x_after); a returned tensor replaces x."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from scoresde.types import SDE, Hook, Noise, like


def progress(n: int, **bar: Any) -> Hook:
    """A tqdm bar over n steps; it closes itself after the last."""
    pbar = tqdm(total=n, **bar)

    def hook(i: int, t: Tensor, x: Tensor) -> None:
        pbar.set_postfix_str(f"t = {float(t):.3g}", refresh=False)
        pbar.update(1)
        if i + 1 == n:
            pbar.close()

    return hook


def trajectory(store: list[Tensor], every: int = 1) -> Hook:
    """Append x, on the CPU, after every `every`-th step."""
    if every < 1:
        raise ValueError(f"every must be at least 1, got {every}")

    def hook(i: int, t: Tensor, x: Tensor) -> None:
        if (i + 1) % every == 0:
            store.append(x.detach().to("cpu", copy=True))

    return hook


def finite() -> Hook:
    """Stop at once where the state is not finite (the loop itself tells at the end).  Waits for the device."""

    def hook(i: int, t: Tensor, x: Tensor) -> None:
        bad = ~torch.isfinite(x).flatten(1).all(1)
        if bool(bad.any()):
            rows = bad.nonzero().flatten().tolist()
            raise FloatingPointError(
                f"the state is not finite after step {i + 1}, at t = {float(t):.6g}, in samples {rows[:8]} "
                f"({len(rows)} of {len(x)}); evaluate the score there"
            )

    return hook


def project(function: Callable[[Tensor], Tensor]) -> Hook:
    """x <- function(x): clamping, a hard constraint, a symmetry."""
    return lambda i, t, x: function(x)


def inpaint(sde: SDE, known: Tensor, mask: Tensor, noise: Noise = torch.randn_like) -> Hook:
    """Replacement: where mask is 1, x <- alpha known + sigma z   (Song 2021, appendix I.2).

    known: clean data;  mask: 1 where it is known; each of x's shape or of one sample's
    The unknown part follows the model given the replaced one, only approximately the posterior.
    """
    if not bool(((mask == 0) | (mask == 1)).all()):
        raise ValueError(f"mask must be 0 or 1, got values in [{float(mask.min())}, {float(mask.max())}]")

    def hook(i: int, t: Tensor, x: Tensor) -> Tensor:
        for name, v in (("known", known), ("mask", mask)):
            if v.shape != x.shape and v.shape != x.shape[1:]:
                raise ValueError(
                    f"{name} has shape {tuple(v.shape)} for a state {tuple(x.shape)}; "
                    "give it the shape of the state or of one sample (use expand)"
                )
        noised = like(sde.alpha(t), x) * known.to(x) + like(sde.sigma(t), x) * noise(x)
        return torch.where(mask.to(x.device).bool(), noised, x)

    return hook
