"""Every documented variant of the public samplers, with the order its documentation gives it."""

import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from torch import Tensor

import samplers
from samplers import kernels
from samplers.angle import angle_form
from samplers.exponential import Form, log_snr


@dataclass(frozen=True)
class Variant:
    """A sampler with knobs, and the order its documentation gives it."""

    sampler: str
    order: int
    knobs: dict[str, Any] = field(default_factory=dict)
    steps: int = 64  # the first N
    level: bool = False  # equal steps in sigma/alpha
    because: str = ""  # where the order is not the one asked for
    mixture: bool = True  # whether to look at it on the mixture, too

    @property
    def name(self) -> str:
        knobs = ", ".join(f"{k}={_shown(v)}" for k, v in self.knobs.items())
        return self.sampler + (f"({knobs})" if knobs else "") + (" level" if self.level else "")

    @property
    def run(self) -> Callable[..., Tensor]:
        return partial(samplers.SAMPLERS[self.sampler], **self.knobs)


def _shown(value: Any) -> str:
    if isinstance(value, Form):
        return {0.0: "x0", math.inf: "eps"}.get(value.d, "v")
    return getattr(value, "__name__", None) or str(value).replace(" ", "")


def falling(r: Tensor) -> Tensor:
    """A tau that depends on r = sigma/alpha."""
    return 1 / (1 + r)


RISE = "a rising start is of order 2, with a corrector 3"
NOISE = "with noise 2 is the highest"
ENDED = "published: the last step is of order 1, its corrector dropped"
DOUBLED = "published: phi_3 where 2 phi_3 is exact"
HALFWAY = "the start's stages are halfway in t, not in sigma/alpha; on the mixture that is below rounding"
EQUAL = "the weights suppose steps equal in sigma/alpha"


def listed() -> Iterator[Variant]:
    """Every documented variant of the public samplers, the default first."""
    V = Variant
    x0_eps = ("x0", "eps")
    forms = {"x0": Form(), "eps": Form(math.inf, log_snr), "v": angle_form(0.5)}
    yield from (V(name, 1) for name in ("euler_maruyama", "flow_euler", "reverse_diffusion", "ancestral"))
    yield V("ancestral", 1, {"large": True})
    yield from (V("ddim", 1, {"eta": eta} if eta else {}) for eta in (0, 0.5, 1))
    yield from (V("heun", 2, {"churn": churn} if churn else {}) for churn in (0, 8))
    yield from (V(name, 2) for name in ("midpoint", "ralston"))
    yield V("dpm_solver", 2)
    yield from (V("dpm_solver", p, {"order": p, "predict": k}) for k in x0_eps for p in (1, 2, 3))
    yield V("singlestep", 3)
    yield from (
        V("singlestep", p, {"order": p, "form": f}, 16 if p == 5 else 32) for f in forms.values() for p in range(1, 6)
    )
    yield V("dpmpp", 2)
    for k in x0_eps:
        yield from (V("dpmpp", p, {"order": p, "predict": k}) for p in (1, 2, 3))
        for p in (1, 2, 3):
            knobs = {"order": p, "predict": k, "published": True}
            yield V("dpmpp", min(p, 2), knobs, because=DOUBLED if p == 3 else "")
    yield V("multistep", 3)
    for f in forms.values():
        yield from (V("multistep", p, {"order": p, "form": f}, 128 if p > 3 else 64) for p in range(1, 6))
        yield from (
            V("multistep", min(p, 2), {"order": p, "form": f, "start": "rise"}, because=RISE if p > 2 else "")
            for p in (2, 3, 4)
        )
        yield from (
            V("multistep", p + 1, {"order": p, "form": f, "correct": p}, 128 if p == 1 else 64) for p in range(1, 5)
        )
        yield V("multistep", 3, {"order": 3, "form": f, "correct": 3, "start": "rise"}, 256, because=RISE)
    yield from (V("multistep", 3, {"order": p, "correct": 5 - p}, 256) for p in (2, 3))
    yield V("deis", 3)
    for u in ("t", "r", "lam"):
        yield from (V("deis", p, {"order": p, "variable": u}, 256 if p == 4 else 64) for p in (1, 2, 3, 4))
        yield V("deis", 2, {"order": 3, "variable": u, "start": "rise"}, because=RISE)
    yield V("pndm", 2, because=EQUAL)
    yield V("pndm", 2, {"start": "runge-kutta"}, because=EQUAL)
    for p in (1, 2, 3, 4):
        yield V("pndm", min(p, 2), {"order": p}, 256, level=True, because=RISE if p > 2 else "")
    yield from (V("pndm", p, {"order": p, "start": "runge-kutta"}, level=True) for p in (1, 2, 3))
    yield V("pndm", 3, {"order": 4, "start": "runge-kutta"}, 1024, level=True, because=HALFWAY, mixture=False)
    yield V("unipc", 4)
    for k in x0_eps:
        yield from (V("unipc", p + 1, {"order": p, "predict": k}, 128 if p == 1 else 64) for p in (1, 2, 3, 4))
        for p in (1, 2, 3):
            knobs = {"order": p, "predict": k, "published": True}
            yield V("unipc", 2, knobs, 128, because=ENDED if p > 1 else "")
    yield V("angle", 3)
    yield from (V("angle", min(p + 1, 3), {"order": p}, 256, because=RISE if p > 2 else "") for p in (1, 2, 3, 4))
    yield from (V("angle", p + 1, {"order": p, "start": "order"}) for p in (1, 2, 3, 4))
    yield from (V("angle", 2, {"order": p, "tau": 1.0}, 512, because=NOISE if p > 1 else "") for p in (1, 2, 3))
    yield V("angle", 2, {"tau": falling}, 256)
    yield V("exponential_euler", 1)
    yield from (V("exponential_euler", 1, {"tau": tau}) for tau in (0.0, 0.5, falling))
    yield V("sde_dpmpp", 2)
    for more in ({}, {"tau": 0.5}, {"tau": falling}, {"published": True}, {"published": True, "tau": 0.5}):
        yield from (V("sde_dpmpp", min(p, 2), {"order": p, **more}, because=NOISE if p > 2 else "") for p in (1, 2, 3))
    yield V("sa_solver", 2, steps=256)
    for k in x0_eps:
        yield V("sa_solver", 1, {"order": 1, "correct": 0, "predict": k})
        for p, q in ((1, 1), (2, 0), (2, 1), (3, 0), (3, 3)):
            knobs = {"order": p, "correct": q, "predict": k}
            yield V("sa_solver", 2, knobs, 256, because=NOISE if p > 2 else "")
    yield V("sa_solver", 2, {"published": True}, 256)
    yield from (V("sa_solver", 2, {"tau": tau}, 512) for tau in (0.5, falling))
    yield V("seeds", 2)
    yield from (V("seeds", p, {"order": p, "predict": k}) for k in x0_eps for p in (1, 2))
    yield V("er_sde", 2)
    yield V("er_sde", 1, {"order": 1})
    yield V("er_sde", 2, {"order": 3}, because=NOISE)
    up = {"intervals": ((0.7, 1.2, 2),)}
    yield V("restart", 2)
    yield V("restart", 2, up)
    yield V("restart", 1, {**up, "sampler": samplers.ddim})
    yield V("restart", 2, {**up, "sampler": samplers.dpmpp})
    no_langevin = {"n_correct": 0}
    yield V("predictor_corrector", 1, no_langevin, because="a Langevin step's own bias does not vanish: n_correct = 0")
    one_step = (kernels.euler_maruyama, kernels.flow_euler, kernels.ancestral, kernels.ancestral_large, kernels.ddim)
    yield from (V("predictor_corrector", 1, {"predictor": kernel, **no_langevin}) for kernel in one_step)
    yield V("gotta_go_fast", 2, {"rtol": math.inf}, because="whole steps")
    orders = {"rk4": 4, "euler": 1, "midpoint": 2, "heun2": 2, "heun3": 3}
    yield from (V("ode", p, {"method": m}, 32) for m, p in orders.items())


def variants() -> list[Variant]:
    """`listed`, and every other public sampler as called, with the order its docstring states."""
    found = list(listed())
    for name in samplers.SAMPLERS.keys() - {v.sampler for v in found}:
        stated = re.search(r"\border (\d)\b(?! values)", samplers.SAMPLERS[name].__doc__ or "", re.IGNORECASE)
        if stated is None:
            raise ValueError(f"the docstring of {name} states no order; write 'Order 2', or list its variants here")
        found.append(Variant(name, int(stated[1])))
    return found
