"""The price of the loop: time a step beyond the network, against a bare x.mul_(a).add_(s, alpha=b).

    python -m experiments.loop_overhead

The score is a tensor that is there already, so what is timed is the sampler alone, at (64, 3, 32, 32)
in float32; the best of several rounds, bare loop and sampler taken in turn.
Claim: DDIM at most 1.5 times the bare loop.  (Noise is a tensor that is there already, too.)
To expect: DDIM 1.4, stochastic one-step samplers 2.0, Heun 3.0 (two scores a step).
"""

import time
from collections.abc import Callable

import torch
from torch import Tensor

import samplers
from experiments.common import Claim, parser, report, start
from samplers import grids
from scoresde import VP


def best(runs: dict[str, Callable[[], None]], steps: int, rounds: int) -> dict[str, float]:
    """Microseconds a step, the least over rounds taken in turn."""
    least = dict.fromkeys(runs, float("inf"))
    for _ in range(rounds):
        for name, run in runs.items():
            tick = time.perf_counter()
            run()
            least[name] = min(least[name], (time.perf_counter() - tick) / steps * 1e6)
    return least


def main(argv: list[str] | None = None) -> list[Claim]:
    args = (p := parser(__doc__, "loop_overhead")).parse_args(argv)
    device = start(args)
    if device.type != "cpu":
        p.error("this benchmark times CPU work; on a device the loop runs ahead of it")
    steps, rounds = (100, 5) if args.quick else (200, 60)
    shape = (64, 3, 32, 32)
    s = torch.randn(shape)
    x = torch.randn(shape)
    ts = grids.uniform(sde := VP(), steps)
    zeros = torch.zeros(shape)

    def bare() -> None:
        y = x.clone()
        for _ in range(steps):
            y.mul_(0.999).add_(s, alpha=0.001)

    def score(x: Tensor, t: Tensor) -> Tensor:
        return s

    def sampling(name: str) -> Callable[[], None]:
        return lambda: void(samplers.SAMPLERS[name](score, sde, x, ts, noise=lambda x: zeros))

    def void(_: Tensor) -> None:
        return None

    names = [n for n in samplers.SAMPLERS if n != "ode"]
    least = best({"bare": bare, **{n: sampling(n) for n in names}}, steps, rounds)
    for name, us in least.items():
        print(f"{name:<20} {us:8.1f} us a step  {us / least['bare']:5.2f} x bare")
    claims = [Claim("DDIM: time a step against a bare loop", least["ddim"] / least["bare"], "<=", 1.5)]
    report(claims, args.json)
    return claims


if __name__ == "__main__":
    main()
