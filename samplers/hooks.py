"""What can be done after a step: hooks (i, t_after, x_after); a returned tensor replaces x."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from samplers.kernels import forward_kernel
from samplers.loop import checked
from scoresde.types import SDE, Hook, Noise, Score


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


def inpaint(
    sde: SDE, known: Tensor, mask: Tensor, noise: Noise = torch.randn_like, *, noise_sd: float | Tensor = 0.0
) -> Hook:
    """Replacement: where mask is 1, x <- alpha known + sigma z   (Song 2021, appendix I.2).

    known:    clean data;  mask: 1 where it is known, 0 where not; each of x's shape or of one sample's
              Between 0 and 1 (the soft edge of a background) the two are blended and keep the level's noise:
              x <- m alpha known + (1 - m) x + sigma sqrt(m (2 - m)) z
    noise_sd: of known = data + noise_sd n, one number or one for each entry.  It is replaced while noise_sd <=
              sigma/alpha, with as much less of z, then left to the model: denoising.  A grid point at sigma/alpha =
              noise_sd loses nothing
    The unknown part follows the model given the replaced one, only approximately the posterior: the two are drawn
    apart.  `travel` makes them agree (RePaint).
    """
    if not bool(((mask >= 0) & (mask <= 1)).all()):
        raise ValueError(f"mask must lie in [0, 1], got values in [{float(mask.min())}, {float(mask.max())}]")
    own = torch.as_tensor(noise_sd, dtype=torch.float64)
    if not bool((own >= 0).all()):
        raise ValueError(f"noise_sd must be >= 0, got {float(own.min())}")

    def hook(i: int, t: Tensor, x: Tensor) -> Tensor:
        for name, v in (("known", known), ("mask", mask)):
            if v.shape != x.shape and v.shape != x.shape[1:]:
                raise ValueError(
                    f"{name} has shape {tuple(v.shape)} for a state {tuple(x.shape)}; "
                    "give it the shape of the state or of one sample (use expand)"
                )
        alpha, sigma = float(sde.alpha(t)), float(sde.sigma(t))
        m, carried = mask.to(x), (alpha * own).to(x)
        left = m * (2 - m) * sigma**2 - (m * carried) ** 2
        blend = torch.lerp(x, alpha * known.to(x), m) + left.clamp(min=0).sqrt() * noise(x)
        return torch.where((m > 0) & (carried <= sigma * (1 + 1e-6)), blend, x)

    return hook


def travel(
    sampler: Callable[..., Tensor],
    score: Score,
    sde: SDE,
    ts: Tensor,
    repeats: int,
    *,
    jump: int = 1,
    interval: tuple[float, float] | None = None,
    noise: Noise = torch.randn_like,
    on_step: Hook | Sequence[Hook] = (),
) -> Hook:
    """Time travel: after every `jump` steps, `repeats` times back up in noise and down again   (Lugmayr 2022, RePaint).

        up, by the exact forward kernel:  x <- (alpha/alpha1) x + G z,  G^2 = sigma^2 - (alpha/alpha1)^2 sigma1^2
        down: sampler(score, sde, x, the same steps of ts)

    sampler:  that of the run, with its knobs as functools.partial;  score, sde, ts: those of the run
    repeats:  >= 0; 0 is off.  RePaint's r is repeats + 1; the k of FreeDoM (Yu 2023) and of universal guidance's
              self-recurrence (Bansal 2023) too
    jump:     steps travelled at once (RePaint's jump length); steps beyond the last multiple are not repeated
    interval: (low, high) in sigma/alpha after the step: where to travel
    on_step:  the other hooks: they see every step, the repeated ones again with the same i, each before it is travelled
    RePaint: ddim(score, sde, x, ts, on_step=travel(ddim, score, sde, ts, 9, on_step=inpaint(sde, known, mask)))

    The kernel keeps the marginals p_t of an exact score; what is gained is agreement with what the score or the other
    hooks ask for.  Below the noise of what `inpaint` replaces nothing pulls back to it, so travel above it only:
    interval = (noise_sd, inf).  `repeats` times jump more steps after every jump, and one z a return.
    """
    if not (isinstance(repeats, int) and isinstance(jump, int) and repeats >= 0 and 1 <= jump <= len(ts) - 1):
        raise ValueError(
            f"repeats must be an int >= 0 and jump one from 1 to the {len(ts) - 1} steps of the grid, "
            f"got {repeats} and {jump}"
        )
    if interval is not None and not 0 <= interval[0] < interval[1]:
        raise ValueError(f"interval must be (low, high) in sigma/alpha with 0 <= low < high, got {interval}")
    low, high = (0.0, math.inf) if interval is None else interval
    r = (sde.sigma(ts) / sde.alpha(ts)).tolist()
    ends = [n for n in range(jump, len(ts), jump) if low <= r[n] <= high]
    climbs = {n: tuple(float(c) for c in forward_kernel(sde, ts[[n - jump, n]])) for n in ends} if repeats else {}
    times, others = ts.tolist(), (on_step,) if callable(on_step) else tuple(on_step)

    def hook(i: int, t: Tensor, x: Tensor) -> Tensor:
        if i + 1 >= len(times) or float(t) != times[i + 1]:
            raise ValueError(
                f"step {i + 1} ended at t = {float(t):.6g}, not that of ts; give travel the run's own grid"
            )
        for other in others:
            replaced = other(i, t, x)
            x = x if replaced is None else checked(replaced, x, "a hook")
        if i + 1 in climbs:
            up, G2 = climbs[i + 1]
            first = i + 1 - jump
            again = [shifted(other, first) for other in others]
            for _ in range(repeats):
                x = x.mul(up).add_(noise(x), alpha=math.sqrt(G2))
                x = sampler(score, sde, x, ts[first : i + 2], noise=noise, on_step=again, grad=True)
        return x

    return hook


def shifted(hook: Hook, first: int) -> Hook:
    """The hook of a run for a part of its grid that begins at step `first`."""
    return lambda i, t, x: hook(first + i, t, x)
