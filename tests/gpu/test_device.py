"""Everything that runs on a GPU, on the CPU as well, against the CPU's numbers: the same random draws in both places.

Tolerances are those of float32 sums in another order; TF32 is off. Random numbers come from a generator on the CPU
wherever a value is compared: the two devices' generators give different streams.
"""

import copy
import math

import pytest
import torch

from bilevel_core import estimators, schedules
from bilevel_core.algorithms import ScoreTraining, TiltSamples, learn_lam, train_score
from bilevel_core.guidance import CostMeter, LookAhead
from bilevel_core.lab import distances, files, metrics
from bilevel_core.lab.comparisons import path_kl
from bilevel_core.lab.models import chains, graphs, networks, pipelines, rewards
from bilevel_core.lab.studies import schedule_race, setting
from bilevel_core.samplers import draw_x_T, sample_ancestral, sample_ddim, sample_particles, timesteps
from bilevel_core.schedule_learning import ScheduleLearning, learn_schedule

CLOSE = {"rtol": 1e-3, "atol": 2e-4}  # of float32 networks over some steps
Q = torch.tensor(schedules.DEFAULT_Q["cosine"], dtype=torch.float64)
T = 50

devices = ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)]


@pytest.fixture(params=devices)
def device(request):
    """The CPU, and the GPU where there is one; without TF32."""
    before = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    yield torch.device(request.param)
    torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = before


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def network(device, seed=0):
    return networks.Denoiser("tiny", seed=seed).eval().requires_grad_(False).to(device)


def reward(images):
    return images.mean((1, 2, 3)) - 0.1 * images.square().mean((1, 2, 3))


def on(device, tensor):
    assert tensor.device.type == device.type, tensor.device
    return tensor.detach().cpu()


# ---------------------------------------------------------------- schedules, samplers, guidance


@pytest.mark.parametrize("kind", ["cosine", "sigmoid", "linear"])
def test_schedules(device, kind):
    q = torch.tensor(schedules.DEFAULT_Q[kind], dtype=torch.float64)
    here = q.clone().to(device).requires_grad_()
    abar = schedules.abar(here, T, kind)
    torch.testing.assert_close(on(device, abar), schedules.abar(q, T, kind), rtol=1e-12, atol=1e-14)
    (grad,) = torch.autograd.grad(schedules.log_snr(abar[1:]).sum(), here)
    there = q.clone().requires_grad_()
    (want,) = torch.autograd.grad(schedules.log_snr(schedules.abar(there, T, kind)[1:]).sum(), there)
    torch.testing.assert_close(on(device, grad), want, rtol=1e-9, atol=1e-9)
    z = schedules.reduce(q.to(device), kind)
    on(device, z)
    torch.testing.assert_close(on(device, schedules.expand(z, kind)), schedules.expand(schedules.reduce(q, kind), kind))
    x0, eps, t = draw(4, 1, 2, 2), draw(4, 1, 2, 2, seed=1), torch.tensor([1, 10, 30, T])
    noisy = schedules.noise(x0.to(device), eps.to(device), abar.detach()[t.to(device)])
    want = schedules.noise(x0, eps, schedules.abar(q, T, kind)[t])
    torch.testing.assert_close(on(device, noisy), want)


@pytest.mark.parametrize("abar_here", [True, False], ids=["abar on the device", "abar on the CPU"])
@pytest.mark.parametrize("name", ["ddim", "ancestral"])
def test_samplers(device, name, abar_here):
    abar, ts, x = schedules.abar(Q, T), timesteps(T, 6), draw(5, 1, 8, 8)
    noise = [draw(5, 1, 8, 8, seed=10 + i) for i in range(6)]
    call = {"ddim": lambda *a, **k: sample_ddim(*a, eta=0.7, **k), "ancestral": sample_ancestral}[name]
    with torch.no_grad():
        want = call(network("cpu"), x, abar, ts, noise=noise)
        moved = abar.to(device) if abar_here else abar
        found = call(network(device), x.to(device), moved, ts, noise=[z.to(device) for z in noise])
    torch.testing.assert_close(on(device, found), want, **CLOSE)


def test_generators_draw_on_their_device(device):
    abar = schedules.abar(Q, T).to(device)
    g = torch.Generator(device).manual_seed(3)
    x = draw_x_T((4, 1, 8, 8), abar, generator=g, device=device)
    with torch.no_grad():
        first = sample_ddim(network(device), x, abar, timesteps(T, 4), eta=1.0, generator=g)
        g = torch.Generator(device).manual_seed(3)
        again = draw_x_T((4, 1, 8, 8), abar, generator=g, device=device)
        second = sample_ddim(network(device), again, abar, timesteps(T, 4), eta=1.0, generator=g)
    torch.testing.assert_close(on(device, first), on(device, second), rtol=1e-5, atol=1e-5)
    rows = draw_x_T((4, 1, 8, 8), abar, x0=x, generator=g)
    on(device, rows)


def test_the_gradient_of_samples_in_q(device):
    def slope(where):
        q, net, ts = Q.clone().to(where).requires_grad_(), network(where), timesteps(T, 5)
        images = sample_ddim(net, draw(6, 1, 8, 8).to(where), schedules.abar(q, T), ts, checkpoint=True)
        return torch.autograd.grad(images.square().mean(), q)[0]

    torch.testing.assert_close(on(device, slope(device)), slope("cpu"), rtol=2e-3, atol=1e-4)


@pytest.mark.parametrize("options", [{}, {"micro_batch": 2}, {"checkpoint": True}], ids=str)
def test_guidance(device, options):
    abar, ts, x = schedules.abar(Q, T), timesteps(T, 5), draw(5, 1, 8, 8)

    def run(where):
        record = []
        meter = CostMeter(network(where))
        guide = LookAhead(meter, reward, 0.05, abar.to(where), ts, record=record, **options)
        noise = [draw(5, 1, 8, 8, seed=i).to(where) for i in range(5)]
        with torch.no_grad():
            images = sample_ddim(guide, x.to(where), abar.to(where), ts, eta=1.0, noise=noise)
        return images, path_kl(record, abar.to(where), ts), meter.cost

    (images, kl, cost), (want, want_kl, want_cost) = run(device), run("cpu")
    torch.testing.assert_close(on(device, images), want, rtol=5e-3, atol=2e-4)  # an untrained network runs away
    torch.testing.assert_close(on(device, kl), want_kl, rtol=2e-3, atol=1e-6)
    assert cost == want_cost


def test_particles(device):
    """The law's normaliser, by particles on the device and on the CPU, agrees within its error; weights sum to one."""
    abar, ts, n = schedules.abar(Q, T), timesteps(T, 5), 64

    def run(where, seed):
        guide = LookAhead(network(where), reward, 0.2, abar.to(where), ts)
        g = torch.Generator(where).manual_seed(seed)
        x = torch.randn(n, 1, 8, 8, generator=g, device=where)
        with torch.no_grad():
            x, log_w, info = sample_particles(guide, x, abar.to(where), ts, threshold=1.0, generator=g)
        assert len(info["resampled"]) == len(ts)
        assert x.device.type == log_w.device.type == torch.device(where).type
        assert log_w.exp().sum().item() == pytest.approx(1, abs=1e-9) and x.isfinite().all()
        return info["log_z"]

    ours, theirs = ([run(where, seed) for seed in range(8)] for where in (device, torch.device("cpu")))
    ours, theirs = torch.tensor(ours), torch.tensor(theirs)
    error = math.hypot(ours.std().item(), theirs.std().item()) / 8**0.5
    assert abs(ours.mean() - theirs.mean()) <= 4 * error + 1e-6


# ---------------------------------------------------------------- estimators, distances


def test_estimators_in_lam(device):
    r_up, r_low = draw(400, seed=1).double(), draw(400, seed=2).double()

    def run(where):
        up, low = r_up.to(where), r_low.to(where)
        grad, info = estimators.lam_grad_penalty(up, low, torch.tensor(0.7, device=where), 50.0)
        weights, _ = estimators.tilt_weights(low, 0.7)
        assert weights.device.type == "cpu"  # float64 on the CPU, wherever the rewards lie
        last = list(learn_lam(TiltSamples(up, low), 1.0))[-1]
        return float(grad), float(info["se"]), last.lam, last.up

    assert run(device) == pytest.approx(run("cpu"), rel=1e-8)


@pytest.mark.parametrize(
    "estimator", [estimators.q_grad_reverse, estimators.q_grad_forward, estimators.q_grad_two_point]
)
def test_estimators_in_q(device, estimator):
    """An objective on the device, its schedule on the CPU, as Algorithm 6 has it."""

    def run(where):
        net, ts, x = network(where), timesteps(T, 4), draw(6, 1, 8, 8).to(where)

        def f(q, seed):
            return sample_ddim(net, x, schedules.abar(q, T).to(where), ts).square().mean().double()

        return estimator(f, Q.clone(), seed=1)[0].detach().cpu()

    torch.testing.assert_close(run(device), run("cpu"), rtol=5e-3, atol=2e-3)


def test_distances(device):
    a, b = draw(300, 8).double(), (draw(300, 8, seed=1) * 1.2 + 0.3).double()

    def run(where):
        x = a.clone().to(where).requires_grad_()
        value = distances.frechet(distances.moments(x), distances.moments(b.to(where)))
        return value, torch.autograd.grad(value, x)[0]

    (value, grad), (want, slope) = run(device), run("cpu")
    torch.testing.assert_close(on(device, value), want.detach(), rtol=1e-8, atol=1e-9)
    torch.testing.assert_close(on(device, grad), slope, rtol=1e-6, atol=1e-9)
    assert metrics.frechet(a.to(device), b.to(device)) == pytest.approx(want.item(), rel=1e-4)
    assert metrics.kid(a.to(device), b.to(device), subsets=3, subset_size=100)[0] > 0


# ---------------------------------------------------------------- Algorithms 3 and 6


def trained(device, steps, path=None):
    """Algorithm 3 on the device; from `path` on, and kept there, if given."""
    state = setting.recipe(networks.Denoiser("tiny", seed=0).to(device), steps=8, batch_size=16, seed=0)
    if path is not None and path.exists():
        state.load(*files.load_state(path))
    for _ in train_score(state, draw(64, 1, 8, 8).tanh().to(device), schedules.abar(Q, T).to(device), steps=steps):
        pass
    if path is not None:
        files.save_state(path, state.tensors(), state.meta())
    return state


def test_training_and_resuming(device, tmp_path):
    whole = trained(device, 8)
    for part in (*whole.denoiser.parameters(), *whole.ema.parameters()):
        on(device, part)
    assert whole.generator.device.type == device.type
    assert all(math.isfinite(loss) for loss in whole.losses) and whole.losses[-1] < whole.losses[0]
    trained(device, 5, tmp_path / "state.safetensors")
    again = trained(device, 8, tmp_path / "state.safetensors")
    assert again.losses == pytest.approx(whole.losses, rel=1e-4)
    for a, b in zip(again.ema.parameters(), whole.ema.parameters(), strict=True):
        torch.testing.assert_close(a, b, **CLOSE)


def test_a_step_of_training_is_the_cpus(device):
    """One update from the same gradient: the loss on given inputs, so that no generator is in it."""

    def run(where):
        state = ScoreTraining(networks.Denoiser("tiny", seed=0).to(where), batch_size=8, warmup=0)
        x, eps, t = draw(8, 1, 8, 8).to(where), draw(8, 1, 8, 8, seed=1).to(where), torch.arange(1, 9, device=where)
        losses = [state.update((state.denoiser(x, t) - eps).square().mean()) for _ in range(3)]
        return losses

    assert run(device) == pytest.approx(run("cpu"), rel=2e-3)


def learning(device, estimator=estimators.q_grad_reverse):
    net = networks.Denoiser("tiny", seed=0).to(device)
    options = {
        "sample_steps": 3,
        "samples": 8,
        "draws": 2,
        "g_batch": 16,
        "inner": 2,
        "batch_size": 8,
        "grad_steps": None,
    }

    def quality(images):
        return (images - 0.2).square().mean()

    return ScheduleLearning(net, Q.clone(), quality, T=T, gamma=10.0, estimator=estimator, **options)


@pytest.mark.parametrize("estimator", [estimators.q_grad_reverse, estimators.q_grad_forward], ids=lambda f: f.__name__)
def test_algorithm_6_and_resuming(device, tmp_path, estimator):
    x0 = draw(64, 1, 8, 8).tanh().to(device)
    state = learning(device, estimator)
    records = list(learn_schedule(state, x0, steps=3))
    assert all(r.grad.isfinite().all() and r.moved > 0 for r in records)
    assert records[-1].q_next.device.type == "cpu"
    for net in (state.star, state.gamma_net):
        for weight in net.ema.parameters():
            on(device, weight)
    half = learning(device, estimator)
    first = list(learn_schedule(half, x0, steps=2))
    files.save_state(tmp_path / "state.safetensors", half.tensors(), half.meta())
    later = learning(device, estimator)
    later.load(*files.load_state(tmp_path / "state.safetensors"))
    rest = list(learn_schedule(later, x0, steps=3))
    for a, b in zip([*first, *rest], records, strict=True):
        torch.testing.assert_close(a.q_next, b.q_next, rtol=1e-3, atol=1e-4)
        assert a.f == pytest.approx(b.f, rel=1e-3) and a.cost == b.cost


def test_the_race_at_its_smallest(device, tmp_path):
    """Search, Algorithm 6 and marks of chapter 7 run where they are told to."""
    plan = schedule_race.Plan(
        name="digits8", T=20, batch_size=16, warm_steps=4, trials=3, trial_steps=2, n_val=70, val_steps=2,
        final_steps=4, n=70, grids=(2,),
    )  # fmt: skip
    race = schedule_race.Race(plan, tmp_path, device, force=True)
    for method in ("random", "Algorithm 6", "zeroth order"):
        rows = race.final(method, 0)
        assert all(math.isfinite(row["frechet"]) for row in rows)
    on(device, race.x0)


# ---------------------------------------------------------------- half precision, pipelines


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_half_precision_networks_with_float32_rewards(device, dtype):
    """A guided sample of a tiny Stable Diffusion, and the gradient of a reward far below the smallest float16.

    Images are kept inside [-1, 1]: a pixel that rounding moves across the edge takes its whole slope with it, and one
    of 1,024 is up to 5 % of this gradient's norm (as a GPU's float16 showed).
    """

    def run(where, dtype, size=1.0):
        pipe = pipelines.random_pipeline("tiny")
        with torch.no_grad():
            for weight in pipe.vae.decoder.conv_out.parameters():
                weight.mul_(0.2)
        for part in (pipe.unet, pipe.vae, pipe.text_encoder):
            part.to(pipelines.DTYPES[dtype])
        chain = pipelines.load(pipe, device=where, dtype=dtype, side=32, steps=3, micro_batch=2)
        record = []
        guide = chain.guide(chain.denoise("a red fox"), lambda images: size * images[:, 0].mean((1, 2)), 1.0)
        guide.record = record
        seen = []
        potential = guide.potential
        guide.potential = lambda x0: seen.append(x0.dtype) or potential(x0)
        x = draw(3, *chain.shape).to(where)
        with torch.no_grad():
            images = chain.decode(guide.look(x, chain.ts[0])[1])
            assert chain.decode(sample_ddim(guide, x, chain.abar, chain.ts)).isfinite().all()
        assert images.dtype == torch.float32 and set(seen) == {torch.float32}
        return on(torch.device(where), images), record[0][1].sqrt().cpu() / size

    images, norms = run(device, dtype)
    want, exact = run("cpu", "float32")
    far = {"float32": 2e-3, "float16": 1e-2, "bfloat16": 0.1}[dtype]
    assert want.abs().max() < 0.9 and (images - want).abs().mean() < far / 5
    torch.testing.assert_close(norms, exact, rtol=far, atol=0)
    torch.testing.assert_close(run(device, dtype, 1e-9)[1], exact, rtol=far, atol=0)


def test_a_chain_of_digits(device):
    chain = chains.Chain.shipped(device, steps=3)
    score = rewards.RandomResNet().to(device)
    images, _ = chain.sample("a two", 4, 0, batch=2, device=device)
    on(device, chain.decode(images))
    got = chains.particles(chain, "a two", lambda x: score(x.expand(-1, 3, -1, -1)), 1.0, 4, 0, {}, device=device)
    assert got["images"].shape == (4, 1, 28, 28) and got["log_w"].exp().sum().item() == pytest.approx(1)


def test_copies_stay_on_the_device(device):
    net = network(device)
    for weight in copy.deepcopy(net).parameters():
        on(device, weight)


# ---------------------------------------------------------------- recordings


def test_a_recorded_training_step_is_the_networks(device):
    """Losses and weights of Algorithm 3 with and without the recording, which sees weights change; then it is gone."""
    x0, abar = draw(64, 1, 8, 8).tanh().to(device), schedules.abar(Q, T).to(device)

    def run(recorded):
        state = setting.recipe(networks.Denoiser("tiny", seed=0).to(device), steps=30, batch_size=16, seed=0)
        if recorded:
            with graphs.training(state.denoiser, (16, 1, 8, 8)) as done:
                assert done == (device.type == "cuda")
                list(train_score(state, x0, abar, steps=30))
                with torch.no_grad():  # another shape, and t an int, go to the network itself
                    assert state.denoiser(x0[:3], 5).shape == (3, 1, 8, 8)
                x = x0[:16].clone().requires_grad_()
                t = torch.ones(16, dtype=torch.long, device=device)
                assert torch.autograd.grad(state.denoiser(x, t).sum(), x)[0].abs().sum() > 0
        else:
            list(train_score(state, x0, abar, steps=30))
        assert "forward" not in vars(state.denoiser) and "forward" not in vars(state.ema.module)
        return state

    with_it, without = run(True), run(False)
    assert with_it.losses == pytest.approx(without.losses, rel=2e-2)
    for a, b in zip(with_it.ema.parameters(), without.ema.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-2, atol=1e-3)


def test_a_recorded_sampler_is_the_networks(device):
    net, x = network(device), draw(6, 1, 8, 8).to(device)
    recorded, ts, abar = graphs.sampling(net, torch.zeros_like(x)), timesteps(T, 5), schedules.abar(Q, T).to(device)
    assert (recorded is net) == (device.type == "cpu")
    with torch.no_grad():
        found, want = sample_ddim(recorded, x, abar, ts), sample_ddim(net, x, abar, ts)
        torch.testing.assert_close(found, want, **CLOSE)
        t = torch.arange(1, 7, device=device)
        torch.testing.assert_close(recorded(x, t), net(x, t), **CLOSE)
        assert recorded(x[:2], 3).shape == (2, 1, 8, 8)
        for weight in net.parameters():
            weight.mul_(1.1)
        torch.testing.assert_close(recorded(x, t), net(x, t), **CLOSE)
    free = x.clone().requires_grad_()
    assert torch.autograd.grad(recorded(free, 3).sum(), free)[0].abs().sum() > 0


def test_where_recording_fails_the_network_runs_as_it_is(monkeypatch):
    """A CPU that is taken for a GPU: a warning says so, training and samples are the same, nothing is left behind."""
    x0, abar = draw(64, 1, 8, 8).tanh(), schedules.abar(Q, T)
    states = [setting.recipe(networks.Denoiser("tiny", seed=0), steps=4, batch_size=16, seed=0) for _ in range(2)]
    list(train_score(states[0], x0, abar, steps=4))
    monkeypatch.setattr(graphs, "_records", lambda device: True)
    net = states[1].denoiser
    with pytest.warns(UserWarning, match="no CUDA graph of the training step"):
        with graphs.training(net, (16, 1, 8, 8)) as done:
            assert not done and "forward" not in vars(net)
            list(train_score(states[1], x0, abar, steps=4))
    assert states[1].losses == states[0].losses
    with pytest.warns(UserWarning, match="no CUDA graph of the denoiser"):
        assert graphs.sampling(net.eval(), x0[:4]) is net


@pytest.mark.cuda
def test_a_recording_that_is_off_is_not_used(monkeypatch):
    """A recording with other numbers, or none at all, leaves the network as it was, with a warning."""
    monkeypatch.setattr(graphs, "FAR", -1.0)
    net, x = network("cuda"), torch.zeros(4, 1, 8, 8, device="cuda")
    with pytest.warns(UserWarning, match="no CUDA graph"):
        assert graphs.sampling(net, x) is net
    net = networks.Denoiser("tiny").to("cuda")
    with pytest.warns(UserWarning, match="no CUDA graph"), graphs.training(net, (4, 1, 8, 8)) as done:
        assert not done and "forward" not in vars(net)
