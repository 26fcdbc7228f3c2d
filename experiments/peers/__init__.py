"""Samplers of other libraries on the same exact score and starts.

All deterministic diffusion sampling is one equation, dy/dr = eps(y, r) with y = x/alpha and
r = sigma/alpha; with noise it is an SDE of the same eps.  A peer is a function of (eps, y, grid) -> y at
the grid's end, so that each library runs on every grid: its own and the others'.  Each is given its best:

diffusers      its tables are float32 and its time steps rounded; here the noise levels are written into
               the scheduler after `set_timesteps`, and the model is told the level the step uses
k-diffusion    its `sampling` module as it is, in float64; its stochastic samplers with independent draws, which
               is the law of the Brownian tree they would take
azula          its noise schedules as they are (with the ends set), and tables for the other grids
torchdiffeq    its fixed-grid methods on the flow in two coordinates
flow_matching  its solver on x = (1 - t) x0 + t eps in t, by torchdiffeq's fixed-grid methods
smalldiffusion its sampler in float64, its gam and mu those of its documentation

dpm-solver, EDM and score_sde have no package in the registry.  Their samplers are here in the hands of others: those of
dpm-solver in diffusers and k-diffusion, EDM's in k-diffusion (`heun`, with and without churn), score_sde's ancestral in
diffusers (`DDPM`) and azula.

Nothing here is imported before it is asked for: `pip install scoresde[bench]` brings all of them.
"""

import importlib
import importlib.util

from experiments.peers.grids import Grid, grids
from experiments.peers.k_diffusion import k_sampling
from experiments.peers.kinds import Eps, Peer, eps_of

__all__ = [
    "LIBRARIES",
    "SHIPPED",
    "Eps",
    "Grid",
    "Peer",
    "eps_of",
    "grids",
    "installed",
    "k_sampling",
    "peers",
    "shipped",
]

LIBRARIES = ("diffusers", "k_diffusion", "azula", "torchdiffeq", "flow_matching", "smalldiffusion")

SHIPPED = {
    "diffusers": ("time", "scaled_linear", "cosine", "karras", "exponential", "beta", "flow", "flow_shift3"),
    "k_diffusion": ("time", "karras", "rho3", "rho5", "rho10", "exponential", "poly0.8", "poly1.25", "its own"),
    "azula": ("azula VE", "azula VP", "azula Cosine", "azula Rectified", "azula Decay"),
    "flow_matching": ("flow",),
    "smalldiffusion": ("time", "scaled_linear", "cosine", "exponential"),
}
"""The grids that are in each library; torchdiffeq has none and leaves every one to the user."""


def shipped(library: str, grid: str) -> bool:
    """Whether the library has that grid itself, rather than taking it from outside."""
    return library not in SHIPPED or grid in SHIPPED[library]


def installed(library: str) -> bool:
    return importlib.util.find_spec(library) is not None


def peers(libraries: tuple[str, ...] = LIBRARIES, *, noisy: bool = False) -> list[Peer]:
    """The samplers of the libraries asked for, those on the flow or those that draw noise.

    A missing library is an error that says what to install.
    """
    for library in libraries:
        if library not in LIBRARIES:
            raise ValueError(f"unknown library {library!r}; choose from {', '.join(LIBRARIES)}")
        if not installed(library):
            raise ImportError(f"{library} is not installed; pip install 'scoresde[bench]'")
    found = [peer for library in libraries for peer in importlib.import_module(f"{__name__}.{library}").peers()]
    return [peer for peer in found if peer.noisy == noisy]
