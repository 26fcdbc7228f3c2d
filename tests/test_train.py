"""Training reaches the known optimum; checkpoints are whole, resumable and safe."""

import math
import os
import pickle
import signal
import subprocess
import sys
import textwrap
from dataclasses import replace

import pytest
import torch

from scoresde import EDM, VP, DiscreteVP, Model, gaussian, linear_betas
from scoresde import checkpoint as ck
from scoresde.loss import lognormal_times, uniform_times
from scoresde.nets import MLP, UNet
from scoresde.train import train
from scoresde.types import number


def toy(seed=0, width=32, sde=None, kind="F", classes=None):
    torch.manual_seed(seed)
    return Model(MLP(2, width, 2, classes=classes), sde or EDM(T=20.0), kind, sigma_data=0.5, classes=classes)


def batch(n):
    """Two classes of N(+-0.5, 0.1^2) in the plane: data variance 0.26 a coordinate."""
    y = torch.randint(2, (n,))
    return (y[:, None] - 0.5) + 0.1 * torch.randn(n, 2), y


def weights(model):
    return torch.cat([p.flatten() for p in model.net.parameters()])


@pytest.mark.parametrize(("sde", "kind"), [(EDM(T=20.0), "F"), (VP(), "eps"), (VP(), "v")])
def test_training_finds_the_score_of_gaussian_data(sde, kind):
    """N(0.3, 0.4^2 I): the learned score against the exact one, weighted as the loss weighs it."""
    target = gaussian(torch.tensor([0.3, 0.3]), var=0.16)
    model = train(
        toy(sde=sde, kind=kind), lambda n: (0.3 + 0.4 * torch.randn(n, 2), None), steps=700, progress=False, lr=4e-3
    )
    for r in (0.2, 0.7, 2.0):
        t = sde.time(number(-math.log(r)))
        a, s = float(sde.alpha(t)), float(sde.sigma(t))
        x = a * (0.3 + 0.4 * torch.randn(400, 2)) + s * torch.randn(400, 2)
        error = s * (model(x, t) - target.score(sde)(x, t))
        assert error.square().mean().sqrt() < 0.08  # of an eps of size 1


def test_training_learns_the_condition_and_its_absence():
    model = train(toy(classes=2), batch, steps=700, progress=False, lr=4e-3, label_dropout=0.2)
    t = number(1.0)
    x = torch.randn(200, 2)
    for y, mean, var in ((0, -0.5, 0.01), (1, 0.5, 0.01)):
        exact = gaussian(torch.full((2,), mean), var=var).score(model.sde)
        assert (model.given(y)(x, t) - exact(x, t)).square().mean().sqrt() < 0.12
    assert (model(x, t) - model.given(1)(x, t)).abs().mean() > 0.1


def test_equal_seeds_equal_bits_and_the_callers_generator_is_left_alone():
    torch.manual_seed(5)
    state = torch.get_rng_state()
    a = train(toy(), batch, steps=15, progress=False, seed=3)
    torch.set_rng_state(state)
    before = torch.get_rng_state()
    b = train(toy(), batch, steps=15, progress=False, seed=3)
    assert torch.equal(weights(a), weights(b))
    torch.manual_seed(5)
    assert torch.equal(before, torch.get_rng_state())
    assert not torch.equal(weights(a), weights(train(toy(), batch, steps=15, progress=False, seed=4)))


def test_a_broken_run_resumes_to_the_same_bits(tmp_path):
    """Stopped by an exception at step 23 of 40, resumed from the checkpoint of step 20."""
    whole = train(toy(classes=2), batch, steps=40, progress=False)

    calls = 0

    def failing(n):
        nonlocal calls
        calls += 1
        if calls == 24:
            raise KeyboardInterrupt
        return batch(n)

    path = tmp_path / "t.safetensors"
    with pytest.raises(KeyboardInterrupt):
        train(toy(classes=2), failing, steps=40, progress=False, path=path, every=10)
    assert ck.read(path)[1]["step"] == 20
    resumed = train(toy(seed=9, classes=2), batch, steps=40, progress=False, path=path, every=10)
    assert torch.equal(weights(whole), weights(resumed))
    loaded, header = ck.load_model(path)
    assert header["step"] == 40
    assert torch.equal(weights(loaded), weights(whole))


def test_ema_is_the_recursion():
    """decay min(ema, (1 + k)/(10 + k)), k = 1.. counting updates after the first copy."""
    from scoresde.train import _ema

    avg, update = [torch.tensor([0.0])], _ema(0.5)
    value = 0.0
    for k, x in enumerate((1.0, 2.0, -1.0, 4.0, 4.0, 4.0, 4.0, 4.0, 4.0, 4.0), start=1):
        update(avg, [torch.tensor([x])], torch.tensor(k))
        d = min(0.5, (1 + k) / (10 + k))
        value = d * value + (1 - d) * x
        assert abs(float(avg[0]) - value) < 1e-6


def test_time_distributions():
    u = (torch.arange(4001, dtype=torch.float64) + 0.5) / 4001
    sde = VP()
    t = uniform_times(sde)(u)
    assert abs(float(t.mean()) - (sde.t_min + 1) / 2) < 1e-9
    r = -EDM(T=1e4).lam(lognormal_times(EDM(T=1e4))(u))
    assert abs(float(r.mean()) + 1.2) < 1e-3
    assert abs(float(r.std()) - 1.2) < 2e-3


@pytest.mark.parametrize("sde", [EDM(T=20.0), VP(beta_max=10.0), DiscreteVP.from_betas(linear_betas(50))])
def test_a_model_comes_back_from_its_file(tmp_path, sde):
    model = toy(sde=sde, kind="v", classes=3)
    with torch.no_grad():
        for p in model.net.parameters():
            p.add_(torch.randn_like(p))
    model = replace(model, sigma_data=0.7)
    ck.save_model(tmp_path / "m.safetensors", model, data={"levels": 17})
    loaded, header = ck.load_model(tmp_path / "m.safetensors")
    x, t = torch.randn(4, 2), number(0.3)
    assert torch.equal(loaded.given(1)(x, t), model.given(1)(x, t))
    assert header["data"] == {"levels": 17}
    assert loaded.sigma_data == 0.7
    assert not loaded.net.training
    assert not any(p.requires_grad for p in loaded.net.parameters())


def test_bad_files_are_told_apart(tmp_path):
    good = tmp_path / "good.safetensors"
    ck.save_model(good, toy())
    cases = {"empty": b"", "cut": good.read_bytes()[:-100], "noise": b"\x00\x01garbage" * 9}
    cases["pickled"] = pickle.dumps({"a": 1})
    for name, data in cases.items():
        (tmp_path / name).write_bytes(data)
    torch.save({"a": torch.zeros(2)}, tmp_path / "torch")
    from safetensors.torch import save_file

    save_file({"w": torch.zeros(2)}, tmp_path / "foreign")
    for name, words in {
        "empty": "is empty",
        "cut": "truncated",
        "noise": "truncated or not a safetensors",
        "pickled": "is a pickle",
        "torch": "is a pickle",
        "foreign": "of another program",
    }.items():
        with pytest.raises(ValueError, match=words):
            ck.load_model(tmp_path / name)
    with pytest.raises(FileNotFoundError, match="no checkpoint at"):
        ck.load_model(tmp_path / "absent")
    with pytest.raises(ValueError, match="checkpoint of another model"):
        train(toy(width=16), batch, steps=3, progress=False, path=good)
    with pytest.raises(ValueError, match="without its training state"):
        train(toy(), batch, steps=3, progress=False, path=good)
    tensors, _ = ck.read(good)
    with pytest.raises(ValueError, match=r"another architecture: .*the network has"):
        ck.load_weights(MLP(2, 16, 2), tensors, "ema.", good)


def test_every_header_length_is_a_checkpoint(tmp_path):
    """A safetensors file may start with any byte, also a pickle's."""
    for n in range(0, 300, 8):
        ck.save(tmp_path / "f", {"a": torch.zeros(1)}, {"pad": "x" * n})
        assert ck.read(tmp_path / "f")[1]["pad"] == "x" * n


def test_a_full_disk_leaves_the_previous_file_whole(tmp_path, monkeypatch):
    path = tmp_path / "m.safetensors"
    ck.save_model(path, toy(seed=1))
    old = path.read_bytes()

    def full(data, name, metadata):
        with open(name, "wb") as f:
            f.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(ck, "save_file", full)
    with pytest.raises(OSError, match="No space left"):
        ck.save_model(path, toy(seed=2))
    assert path.read_bytes() == old
    assert os.listdir(tmp_path) == ["m.safetensors"]  # nothing half-written stays


def test_ctrl_c_while_writing_leaves_the_previous_file_whole(tmp_path):
    """A process that writes one checkpoint after another is interrupted at random moments."""
    script = textwrap.dedent("""
        import signal, sys, torch
        from scoresde.checkpoint import save
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background inherits "ignore"
        k = 0
        while True:
            save(sys.argv[1], {"a": torch.full((400_000,), float(k)), "b": torch.full((9,), float(k))}, {"k": k})
            if k == 0:
                print("ready", flush=True)
            k += 1
    """)
    path = tmp_path / "c.safetensors"
    for wait in (0.01, 0.05):
        p = subprocess.Popen(
            [sys.executable, "-c", script, str(path)], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
        )
        assert p.stdout is not None
        p.stdout.readline()
        with pytest.raises(subprocess.TimeoutExpired):
            p.wait(wait)
        p.send_signal(signal.SIGINT)
        p.wait(60)
        tensors, header = ck.read(path)
        assert float(tensors["a"][0]) == float(tensors["a"][-1]) == float(tensors["b"][0]) == header["k"]


@pytest.mark.parametrize("sde", [DiscreteVP.from_betas(linear_betas(1000)), EDM(T=20.0)])
def test_own_networks_get_a_noise_label_of_order_one(sde):
    """eps-prediction under integer labels, or sigma up to 20, trains as well as under VP."""
    target = gaussian(torch.tensor([0.3, 0.3]), var=0.16)
    model = toy(sde=sde, kind="eps")
    assert model._label(torch.zeros(1, 2), number(sde.T)).abs() < 2.5
    if isinstance(sde, EDM):
        return  # an unscaled input of size 20 is eps-prediction's own trouble; EDM's F is the cure
    model = train(model, lambda n: (0.3 + 0.4 * torch.randn(n, 2), None), steps=700, progress=False, lr=4e-3)
    for r in (0.2, 0.7, 2.0):
        t = sde.time(number(-math.log(r)))
        a, s = float(sde.alpha(t)), float(sde.sigma(t))
        x = a * (0.3 + 0.4 * torch.randn(400, 2)) + s * torch.randn(400, 2)
        assert (s * (model(x, t) - target.score(sde)(x, t))).square().mean().sqrt() < 0.08


def test_a_nan_in_the_middle_is_neither_returned_nor_saved(tmp_path):
    calls = 0

    def poisoned(n):
        nonlocal calls
        calls += 1
        x, y = batch(n)
        return (x * math.nan if calls == 6 else x), y

    with pytest.raises(FloatingPointError, match="not finite at step 5"):
        train(toy(), poisoned, steps=8, progress=False, path=tmp_path / "m")
    assert not (tmp_path / "m").exists()


def test_the_learning_rate_warms_up_and_decays(monkeypatch):
    """lr min(1, (k+1)/warmup) (0.01 + 0.99 (1 + cos(pi k/N))/2), and gradients are clipped to norm 1."""
    seen, norms = [], []
    step = torch.optim.AdamW.step

    def spy(self, *args, **kwargs):
        seen.append(self.param_groups[0]["lr"])
        grads = [p.grad for g in self.param_groups for p in g["params"]]
        norms.append(float(torch.stack([g.norm() for g in grads]).norm()))
        return step(self, *args, **kwargs)

    monkeypatch.setattr(torch.optim.AdamW, "step", spy)
    train(toy(), lambda n: (1e3 * torch.ones(n, 2), None), steps=20, progress=False, lr=1.0, warmup=5)
    want = [min(1, (k + 1) / 5) * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * k / 20))) for k in range(20)]
    assert seen == pytest.approx(want)
    assert max(norms) < 1 + 1e-4


def test_a_budget_in_seconds_counts_the_time_before_the_break(tmp_path, monkeypatch):
    """With a clock of one second a look, a run of 50 s, resumed from its file, has nothing left to do."""
    from scoresde import train as module

    ticks = iter(range(10**6))
    monkeypatch.setattr(module.time, "process_time", lambda: float(next(ticks)))
    train(toy(), batch, seconds=50, progress=False, path=tmp_path / "m")
    header = ck.read(tmp_path / "m")[1]
    train(toy(), batch, seconds=50, progress=False, path=tmp_path / "m")
    assert ck.read(tmp_path / "m")[1]["step"] == header["step"]
    train(toy(), batch, seconds=80, progress=False, path=tmp_path / "m")
    more = ck.read(tmp_path / "m")[1]["step"] - header["step"]
    assert 0 < more < header["step"]


def test_what_cannot_be_trained_is_told():
    with pytest.raises(ValueError, match="budget once"):
        train(toy(), batch, progress=False)
    with pytest.raises(ValueError, match="only a torch module"):
        train(Model(lambda x, c: x, EDM()), batch, steps=1, progress=False)
    with pytest.raises(FloatingPointError, match="gradient is not finite at step 0"):
        train(toy(), lambda n: (torch.full((n, 2), math.nan), None), steps=1, progress=False)


@pytest.mark.parametrize("size", [(8, 8), (9, 13), (16, 16), (33, 20)])
def test_unet_takes_any_size_and_starts_at_zero(size):
    net = UNet(2, 8, (1, 2, 2), classes=3)
    x = torch.randn(2, 2, *size)
    assert torch.equal(net(x, torch.zeros(2), torch.tensor([0, 3])), torch.zeros_like(x))
    with torch.no_grad():
        for p in net.parameters():
            p.add_(0.1 * torch.randn_like(p))
    out = net(x, torch.tensor([0.1, 0.4]), torch.tensor([0, 3]))
    one = net(x[1:], torch.tensor([0.4]), torch.tensor([3]))
    torch.testing.assert_close(out[1:], one, rtol=1e-4, atol=1e-5)  # samples do not see each other
    with pytest.raises(ValueError, match=r"takes \(B, 2, H, W\)"):
        net(torch.randn(2, 1, *size), torch.zeros(2), torch.tensor([0, 3]))
