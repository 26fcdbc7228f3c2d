"""The only loop: checks, gradient mode, steps, hooks."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from scoresde.types import SDE, Hook, Noise, Score

Step = Callable[[int, Tensor], Tensor]  # (i, x at ts[i]) -> x at ts[i + 1]


def integrate(
    step: Step,
    sde: SDE,
    x: Tensor,
    ts: Tensor,
    *,
    on_step: Hook | Sequence[Hook] = (),
    grad: bool = False,
    to_zero: bool = True,
) -> Tensor:
    """x at ts[-1] by N = len(ts) - 1 calls of step(i, x).

    x: state at ts[0], (B, ...);  ts: (N+1,) float64 on the CPU, decreasing in (0, T]
    on_step: hooks (i, t_after, x_after), in order; a returned tensor replaces x
    grad: keep the graph, to differentiate through the whole run
    to_zero: whether this sampler may end at t = 0, i.e. never calls the score there

    A step leaves one number on the device, the sum of its state; they are looked at once, at the
    end, so the loop never waits for the device, and a NaN is still named by step and time.  (On the
    CPU a large state is summed every 64th step only: it would cost a third of a one-step update.)
    """
    check(sde, x, ts, to_zero)
    _keep_memory(x)
    hooks = (on_step,) if callable(on_step) else tuple(on_step)
    N = len(ts) - 1
    every = 64 if x.device.type == "cpu" and x.numel() > 2**16 else 1
    sums: list[Tensor] = []
    with torch.set_grad_enabled(grad and torch.is_grad_enabled()):
        for i in range(N):
            x = step(i, x)
            for hook in hooks:
                replaced = hook(i, ts[i + 1], x)
                x = x if replaced is None else checked(replaced, x, "a hook")
            if i % every == every - 1 or i == N - 1:
                sums.append(x.sum())
    if torch.compiler.is_compiling() or (x.is_cuda and torch.cuda.is_current_stream_capturing()):
        return x  # a run that is made into a graph cannot look at a value
    bad = ~torch.isfinite(torch.stack(sums).detach())
    if bool(bad.any()):
        k = int(bad.nonzero()[0])
        first, last = k * every, min((k + 1) * every, N)
        one = last - first == 1
        which = f"step {last}" if one else f"one of the steps {first + 1} to {last}"
        raise FloatingPointError(
            f"the state is not finite after {which} of {N}, from t = {ts[first]:.6g} to {ts[last]:.6g}; "
            "the score returned NaN or infinity there: evaluate it at that t, or start and end the grid "
            "inside the times the network was trained on" + ("" if one else "; on_step=hooks.finite() tells which step")
        )
    return x


def _keep_memory(x: Tensor) -> None:
    """Keep freed memory for the next step: twice the time of a step was seen to go into page faults.

    glibc returns memory above twice the largest block it has mapped and unmapped (at most 32 MiB), which is one
    state too few; so it is shown a larger block, which nothing touches.
    """
    if x.device.type == "cpu":
        torch.empty(min(16 * x.numel() * x.element_size(), 31 * 2**20), dtype=torch.uint8)


def one_step(
    score: Score,
    sde: SDE,
    x: Tensor,
    ts: Tensor,
    kernel: Callable[[SDE, Tensor], tuple[Tensor, Tensor, Tensor]],
    *,
    noise: Noise = torch.randn_like,
    on_step: Hook | Sequence[Hook] = (),
    grad: bool = False,
) -> Tensor:
    """x1 = a x + b s(x, t) + c z, with the table a, b, c (N,) = kernel(sde, ts): one number a step.

    One network call a step.  z is not drawn where c = 0.
    """
    check(sde, x, ts)
    A, B, C = (column.tolist() for column in kernel(sde, ts))
    times, combine = ts.unbind(), combiner(x)

    def step(i: int, x: Tensor) -> Tensor:
        s = checked(score(x, times[i]), x)
        x1 = combine(A[i], x, B[i], s)
        return x1.add_(noise(x), alpha=C[i]) if C[i] else x1

    return integrate(step, sde, x, ts, on_step=on_step, grad=grad)


def combiner(x: Tensor) -> Callable[[float, Tensor, float, Tensor], Tensor]:
    """(a, x, b, s) -> a x + b s, a new tensor: by one kernel where that cannot touch a sample's bits, else by two.

    addr rounds otherwise in the tail of its vector loop than inside, so on the CPU it is used only where no
    sample is ever in a tail: one thread, and a multiple of 64 numbers a sample.
    """
    whole = x.device.type == "cpu" and x[0].numel() % 64 == 0 and torch.get_num_threads() == 1
    if not whole and not x.is_cuda:
        return lambda a, x, b, s: x.mul(a).add_(s, alpha=b)
    one, last = x.new_ones(1), (x, x.reshape(1, -1))

    def fused(a: float, x: Tensor, b: float, s: Tensor) -> Tensor:
        nonlocal last
        row = last[1] if x is last[0] else x.reshape(1, -1)  # a view takes a fortieth of the update
        row = torch.addr(row, one, s.reshape(-1), beta=a, alpha=b)
        last = row.view_as(x), row
        return last[0]

    return fused


def check(sde: SDE, x: Tensor, ts: Tensor, to_zero: bool = True) -> None:
    """The rules of the module, each with its cure; before any table is made."""
    if not isinstance(x, Tensor) or x.dtype not in (torch.float32, torch.float64):
        got = x.dtype if isinstance(x, Tensor) else type(x).__name__
        raise ValueError(f"x must be a float32 or float64 tensor, got {got}; use x.float() (the network may run lower)")
    if x.ndim < 2:
        raise ValueError(f"x must be (B, ...), got shape {tuple(x.shape)}; add a batch axis with x[None]")
    if not isinstance(ts, Tensor) or ts.ndim != 1 or len(ts) < 2:
        raise ValueError("ts must be a 1-D tensor of at least two times, from noise to data; use grids.uniform(sde, n)")
    if ts.dtype != torch.float64 or ts.device.type != "cpu":
        raise ValueError(f"ts must be float64 on the CPU, got {ts.dtype} on {ts.device}; use ts.double().cpu()")
    if not bool(torch.isfinite(ts).all()):
        raise ValueError(f"ts must be finite, got {ts[~torch.isfinite(ts)][0]:.3g}")
    if not bool((ts.diff() < 0).all()):
        k = int((ts.diff() >= 0).nonzero()[0])
        raise ValueError(
            f"ts must decrease from noise to data, but ts[{k}] = {ts[k]:.6g} and ts[{k + 1}] = {ts[k + 1]:.6g}; "
            "use grids.uniform(sde, n), or ts.flip(0) if it runs the other way"
        )
    if ts[0] > sde.T * (1 + 1e-12) or ts[-1] < 0:
        raise ValueError(f"ts must lie in (0, T = {sde.T:.6g}], got {ts[0]:.6g} .. {ts[-1]:.6g}")
    if ts[-1] == 0 and not to_zero:
        raise ValueError(
            "ts ends at t = 0, where the score is singular and this sampler would call it; "
            f"end the grid at sde.t_min = {sde.t_min:.3g}"
        )


def checked(s: Tensor, x: Tensor, who: str = "the score") -> Tensor:
    """What the score or a hook returned: it must look like the state; in the state's dtype."""
    if s.shape != x.shape or s.device != x.device:
        raise ValueError(
            f"{who} returned {tuple(s.shape)} on {s.device} for a state {tuple(x.shape)} on {x.device}; "
            "it must return a tensor like its argument"
        )
    return s if s.dtype == x.dtype else s.to(x.dtype)
