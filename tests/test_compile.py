"""The loop never waits for the device, and compiles: the network once, the steps as one graph.

A state on the "meta" device has a shape and no values, so whatever reads one, as a wait for a GPU would,
raises: `.item()`, `float`, `bool`, `.tolist()`, `.cpu()`, `.numpy()`, indexing by a mask.  Times are numbers on
the CPU and may be read.
"""

import math

import pytest
import torch
from torch._dynamo.testing import CompileCounter
from truth import F64, log_snr_grid

from samplers import SAMPLERS, hooks, langevin, preconditioned
from scoresde import VP, Model

SDE = VP()
ADAPTIVE = {"ode", "gotta_go_fast"}  # they read errors; the latter's whole steps are looked at below
RUNS = {
    **{name: (SAMPLERS[name], {}) for name in SAMPLERS.keys() - ADAPTIVE},
    "gotta_go_fast, whole steps": (SAMPLERS["gotta_go_fast"], {"rtol": math.inf}),
    "heun, churn": (SAMPLERS["heun"], {"churn": 20.0}),
    "ddim, eta": (SAMPLERS["ddim"], {"eta": 0.5}),
    "multistep, corrector": (SAMPLERS["multistep"], {"correct": 3}),
    "pndm, runge-kutta": (SAMPLERS["pndm"], {"start": "runge-kutta"}),
    "angle, noise": (SAMPLERS["angle"], {"tau": 1.0}),
    "predictor_corrector, langevin": (SAMPLERS["predictor_corrector"], {"corrector": langevin(0.1), "n_correct": 2}),
    "preconditioned": (preconditioned, {"mean": torch.zeros(3), "eig": torch.ones(3)}),
    "preconditioned, basis": (preconditioned, {"mean": torch.zeros(3), "eig": torch.ones(3), "basis": torch.eye(3)}),
}
EVERY = pytest.mark.parametrize("name", RUNS)
cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


def score(x, t):
    return -x * (1 / (1 + float(t)))


# ----------------------------------------------------------------------------------------------- waiting


class Looks:
    """torch.isfinite, which says yes of meta tensors and notes how many steps were made when it was asked."""

    def __init__(self, monkeypatch):
        self.steps, self.at, self.real = 0, [], torch.isfinite
        monkeypatch.setattr(torch, "isfinite", self)

    def __call__(self, x):
        if x.device.type != "meta":
            return self.real(x)
        self.at.append(self.steps)
        return torch.ones(x.shape, dtype=torch.bool)

    def hook(self, i, t, x):
        self.steps += 1


@EVERY
def test_no_step_reads_the_state(name, monkeypatch):
    """N steps without a value; the states' sums are looked at once, after the last."""
    sampler, knobs = RUNS[name]
    looks, N = Looks(monkeypatch), 7
    out = sampler(score, SDE, torch.empty(2, 3, device="meta"), log_snr_grid(SDE, N), on_step=looks.hook, **knobs)
    assert (out.device.type, out.shape, out.dtype) == ("meta", (2, 3), torch.float32)
    assert looks.at == [N]


@pytest.mark.parametrize("kind", ["eps", "x0", "F"])
def test_neither_does_a_model_nor_a_hook(kind, monkeypatch):
    """A `Model` makes its labels on the device; progress, projections and inpainting need no value either."""
    looks, N = Looks(monkeypatch), 5
    model = Model(Net().to("meta"), SDE, kind, sigma_data=0.5)
    on_step = [
        looks.hook,
        hooks.progress(N, disable=True),
        hooks.project(lambda x: x.clamp(-1, 1)),
        hooks.inpaint(SDE, torch.zeros(3), torch.tensor([0.0, 1.0, 0.0])),
    ]
    SAMPLERS["angle"](model, SDE, torch.empty(2, 3, device="meta"), log_snr_grid(SDE, N), on_step=on_step)
    assert looks.at == [N]


@pytest.mark.parametrize(
    "read",
    [
        lambda x: float(x.sum()),
        lambda x: bool((x > 0).any()),
        lambda x: x.tolist(),
        lambda x: x.cpu(),
        lambda x: x.numpy(),
        lambda x: x[x > 0],
        lambda x: x.nonzero(),
        lambda x: torch.equal(x, x),
    ],
)
def test_a_wait_would_be_seen(read):
    def hook(i, t, x):
        read(x)

    with pytest.raises((RuntimeError, NotImplementedError, TypeError)):
        SAMPLERS["ddim"](score, SDE, torch.empty(2, 3, device="meta"), log_snr_grid(SDE, 2), on_step=hook)


# --------------------------------------------------------------------------------------------- compiling


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.a, self.b = torch.nn.Linear(4, 8), torch.nn.Linear(8, 3)

    def forward(self, x, t):
        return self.b(torch.tanh(self.a(torch.cat([x, t[:, None]], 1))))


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def seeded(sampler, score, x, ts, knobs):
    with torch.random.fork_rng():
        torch.manual_seed(2)
        return sampler(score, SDE, x, ts, **knobs)


@EVERY
def test_a_network_is_compiled_once_not_once_a_step(name):
    """As a `Model`'s network, and as a bare score that is told t as a number; the same result as without."""
    sampler, knobs = RUNS[name]
    net, x = Net(), torch.randn(2, 3, generator=torch.Generator().manual_seed(1))
    bare = {"model": Model(net, SDE, "eps"), "score": lambda x, t: net(x, t.to(x).expand(len(x)))}
    frames = {"model": CompileCounter(), "score": CompileCounter()}
    compiled = {
        "model": Model(torch.compile(net, backend=frames["model"], fullgraph=True), SDE, "eps"),
        "score": torch.compile(bare["score"], backend=frames["score"], fullgraph=True),
    }
    for which in ("model", "score"):
        for N in (3, 9):
            ts = log_snr_grid(SDE, N)
            want, got = (seeded(sampler, s, x, ts, knobs) for s in (bare[which], compiled[which]))
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
            assert frames[which].frame_count == 1, (which, N)


LOOPS = {  # one of each kind of step, and the calls of N steps
    "ddim": 1,
    "ancestral": 1,
    "angle": 1,
    "seeds": 2,
    "gotta_go_fast, whole steps": 2,
    "heun": 2,
    "predictor_corrector, langevin": 3,
}


@pytest.mark.parametrize("name", LOOPS)
def test_a_whole_run_compiles_to_one_graph_of_its_steps(name):
    """All calls of all N steps are in one graph (tables and checks before and after are others), made once."""
    sampler, knobs = RUNS[name]
    net, N, calls = torch.nn.Linear(3, 3, dtype=F64), 4, []

    def backend(module, example):
        calls.append(sum("linear" in str(node.target) for node in module.graph.nodes))
        return module.forward

    def run(x, ts):
        return sampler(lambda x, t: torch.tanh(net(x)) * (1 + t), SDE, x, ts, noise=torch.ones_like, **knobs)

    compiled, ts = torch.compile(run, backend=backend), log_snr_grid(SDE, N)
    x, other = torch.ones(2, 3, dtype=F64), torch.arange(6, dtype=F64).reshape(2, 3)
    got = compiled(x, ts)
    assert [n for n in calls if n] == [LOOPS[name] * N]
    made = len(calls)
    again = compiled(other, ts)
    assert len(calls) == made
    torch.testing.assert_close(got, run(x, ts), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(again, run(other, ts), rtol=1e-12, atol=1e-12)


# --------------------------------------------------------------------------------------------------- CUDA


@cuda
@EVERY
def test_no_wait_on_a_gpu(name):
    """The driver's own word: between the first step and the last nothing synchronises."""
    sampler, knobs = RUNS[name]
    knobs = {k: v.cuda() if isinstance(v, torch.Tensor) else v for k, v in knobs.items()}
    N, x = 6, torch.randn(2, 3, device="cuda")
    seen = []

    def hook(i, t, x):
        seen.append(torch.cuda.get_sync_debug_mode())
        torch.cuda.set_sync_debug_mode("error" if i + 1 < N else "default")

    try:
        sampler(score, SDE, x, log_snr_grid(SDE, N), on_step=hook, **knobs)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert seen == [0] + [2] * (N - 1)


@cuda
@pytest.mark.parametrize("name", LOOPS)
def test_a_run_is_captured_in_a_cuda_graph(name):
    """Replayed on another start it gives that start's run."""
    sampler, knobs = RUNS[name]
    net = Net().cuda()
    model, ts, z = Model(net, SDE, "eps"), log_snr_grid(SDE, 4), torch.ones(2, 3, device="cuda")
    x = torch.randn(2, 3, device="cuda")

    def run(x):
        return sampler(model, SDE, x, ts, noise=lambda x: z, **knobs)

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run(x)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = run(x)
    other = torch.randn(2, 3, device="cuda")
    x.copy_(other)
    graph.replay()
    torch.testing.assert_close(out, run(other), rtol=1e-5, atol=1e-5)
