"""Replica exchange in a sampler's noise: laws in closed form and by quadrature, and faults that must be noticed."""

import importlib.util
import inspect
import math

import pytest
import torch

from bilevel_core import algorithms, samplers, schedules, tempering
from bilevel_core.lab import certificates, oracles

T = 20
ABAR = schedules.abar(torch.tensor(schedules.DEFAULT_Q["cosine"]), T)
LAW = oracles.Gaussian(
    torch.tensor([1.0, -0.5], dtype=torch.float64), torch.tensor([[0.5, 0.2], [0.2, 0.3]], dtype=torch.float64)
)
SLOPE = torch.tensor([0.7, -1.0], dtype=torch.float64)
MIXTURE = oracles.Mixture1D()
LADDER = [math.inf, 2.0, 1.0, 0.5]
PLAIN = tempering.NoiseMap(lambda z: z, (3,))


def first(x):
    return x[:, 0]


def run(G=PLAIN, reward=first, lams=LADDER, seed=0, **options):
    options = {"sweeps": 30, "warmup": 10, "chains": 4, "dtype": torch.float64} | options
    return tempering.sample_tempered(G, reward, lams, generator=torch.Generator().manual_seed(seed), **options)


def within(values, exact, sigmas=4.0):
    """Means of independent chains (C, ...) agree with exact values (...)."""
    error = values.std(0) / len(values) ** 0.5
    return bool(((values.mean(0) - exact).abs() < sigmas * error).all())


# ---------------------------------------------------------------- laws


@pytest.mark.parametrize("eta, gradient", [(0.0, False), (0.0, True), (1.0, False), (1.0, True)])
def test_every_level_has_the_law_of_the_tilted_gaussian_chain(eta, gradient):
    ts = samplers.timesteps(T, 5)
    G = tempering.noise_map(LAW.denoiser(ABAR), ABAR, ts, (2,), eta=eta)
    assert G.shape == (5 if eta else 1, 2) and G.cost == 5
    chain = LAW.chain_law(ABAR, ts, eta)
    options = {"gradient": gradient, "measure": lambda x: x, "chains": 64, "sweeps": 80, "warmup": 40}
    found = run(G, lambda x: x @ SLOPE, **options)
    assert found.cost == 5 * 4 * 64 * (80 + 40 + 1) * (1 + gradient)
    x = tempering.kept("measured", found).permute(1, 2, 0, 3)  # (L, C, S, 2)
    for lam, rows in zip(LADDER, x, strict=True):
        law = chain.tilt(SLOPE, lam)
        assert within(rows.mean(1), law.mean), lam
        off = rows - law.mean
        assert within((off[..., :, None] * off[..., None, :]).mean(1), law.cov), lam


def quadrature(G, n):
    """A grid of all noise of a map with few numbers: z (n^k, *shape), its log-weights and x_0."""
    k = math.prod(G.shape)
    axes = [torch.linspace(-8, 8, n, dtype=torch.float64)] * k
    z = torch.stack(torch.meshgrid(*axes, indexing="ij"), -1).reshape(-1, *G.shape)
    return -z.reshape(len(z), -1).square().sum(1) / 2, G.run(z)


@pytest.mark.parametrize(
    "steps, sampler, options",
    [
        (3, samplers.sample_ddim, {}),
        (2, samplers.sample_ddim, {"eta": 0.5}),
        (2, samplers.sample_ancestral, {"variance": "beta"}),
    ],
)
def test_every_level_has_the_law_of_the_tilted_mixture_chain(steps, sampler, options):
    """By quadrature over all noise; the reward has two humps, one of them a step."""
    ts = samplers.timesteps(T, steps)
    G = tempering.noise_map(MIXTURE.denoiser(ABAR), ABAR, ts, (), sampler, **options)
    assert G.shape == ((steps,) if options else (1,))

    def reward(x):
        return 2 * (x > 1.5).to(x) - (x + 1).square() / 4

    def measure(x):
        return torch.stack([reward(x), x, x**2, (x > 1.5).to(x)], 1)

    log_w, x = quadrature(G, 4001 if G.shape == (1,) else 401)
    found = run(G, reward, chains=64, sweeps=120, warmup=40, measure=measure)
    for lam, rows in zip(LADDER, tempering.kept("measured", found).mean(0), strict=True):
        assert within(rows, (log_w + reward(x) / lam).softmax(0) @ measure(x)), lam


def test_pooled_levels_are_the_curve_at_every_lambda_between():
    found = run(sweeps=300, warmup=50, chains=16, measure=lambda x: x[:, :2] ** 2)
    sets = certificates.tilt_samples(found, column=1)
    assert [s.at for s in sets] == LADDER and sum(s.cost for s in sets) == found.cost == 351 * 64
    assert all(s.group.tolist() == list(range(16)) * 300 for s in sets) and all(s.size <= 4800 for s in sets)
    pooled = algorithms.TiltSamples.pooled(*sets)
    assert pooled.group.tolist() == list(range(16)) * 1200
    for lam in (3.0, 1.4, 0.7, 0.5):
        p, info = pooled.tilt(lam)
        assert (p @ pooled.r_low).item() == pytest.approx(1 / lam, abs=0.12)
        assert (p @ pooled.r_up).item() == pytest.approx(1, abs=0.12)
        assert info["log_z"] - pooled.log_w.logsumexp(0).item() == pytest.approx(1 / (2 * lam**2), abs=0.15)
    assert certificates.tilt_samples(run())[1].r_up.equal(certificates.tilt_samples(run())[1].r_low)


# ---------------------------------------------------------------- each move leaves each law as it is

CURVE = torch.tensor([1.0, -0.5], dtype=torch.float64)
FAULTS = {
    "the sign of beta": ('beta * (new["r"]', '-beta * (new["r"]'),
    "no root": ("(1 - s**2).clamp(min=0).sqrt()", "(1 - s**2).clamp(min=0)"),
    "states not shrunk": ('c_z * now["z"] + s_z', 'now["z"] + s_z'),
    "half of the drift": ("half * drift", "0.5 * half * drift"),
    "the factor of |drift|^2": ('c_z * u["z"] - half * pull', 'c_z * u["z"] - 2 * half * pull'),
    "a factor of rho": ("sum(2) / (1 + c)", "sum(2)"),
    "rho the wrong way round": ("toward(new, now) - toward(now, new)", "toward(now, new) - toward(new, now)"),
    "exchange the wrong way round": ("(r[i] - r[i + 1])", "(r[i + 1] - r[i])"),
    "rewards that stay behind": ("value[source, columns]", 'value[source, columns] if name == "z" else value'),
}


def keeps_its_laws(module, gradient):
    """Exact draws of each level's law, moved and exchanged a few times, still have it, each level apart.

    The reward <a, x> - |x - 1|^2/2 of x = z tilts N(0, I) to normal laws with a drift that varies.
    """
    n, lams = 20_000, [math.inf, 1.5, 0.6]
    beta = 1 / torch.tensor(lams, dtype=torch.float64)[:, None, None]
    mean, var = beta * (CURVE + 1) / (1 + beta), 1 / (1 + beta)
    z = mean + var.sqrt() * torch.randn(3, n, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)

    def reward(x):
        return x @ CURVE - (x - 1).square().sum(1) / 2

    options = {"z": z, "chains": n, "sweeps": 3, "warmup": 0, "gradient": gradient, "dtype": torch.float64}
    g = torch.Generator().manual_seed(2)
    found = module.sample_tempered(module.NoiseMap(lambda z: z, (2,)), reward, lams, generator=g, **options)
    standard = (found.state["z"] - mean) / var.sqrt()
    numbers = standard.movedim(1, 0).flatten(1)  # (n, 6), of which all are independent and N(0, 1)
    products = numbers[:, :, None] * numbers[:, None, :]
    known = torch.allclose(found.state["r"], reward(found.state["z"].flatten(0, 1)).reshape(3, n))
    return known and within(numbers, 0, 4.5) and within(products, torch.eye(6, dtype=torch.float64), 4.5)


@pytest.mark.parametrize("gradient", [False, True])
def test_moves_and_exchanges_leave_every_law_as_it_is(gradient):
    assert keeps_its_laws(tempering, gradient)


@pytest.mark.parametrize("fault", FAULTS)
def test_a_broken_move_is_noticed(fault, tmp_path):
    source, (right, wrong) = inspect.getsource(tempering), FAULTS[fault]
    assert source.count(right) == 1
    (tmp_path / "broken.py").write_text(source.replace(right, wrong), encoding="utf-8")
    spec = importlib.util.spec_from_file_location("bilevel_core.broken", tmp_path / "broken.py")
    broken = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(broken)
    assert not (keeps_its_laws(broken, True) and keeps_its_laws(broken, False))


# ---------------------------------------------------------------- the loop


@pytest.mark.parametrize("gradient", [False, True])
def test_resume_is_bit_for_bit_from_within_the_warm_up_and_after_it(gradient):
    options = {"gradient": gradient, "measure": lambda x: x[:, 1:], "dtype": torch.float32}
    whole = run(**options)
    for first_sweeps, warmup in ((1, 10), (17, 10)):
        half = run(sweeps=first_sweeps, warmup=warmup, **options)
        other = torch.Generator().manual_seed(99)  # is set to where the run's own was
        rest = tempering.sample_tempered(
            PLAIN, first, LADDER, sweeps=30, warmup=10, chains=4, generator=other, resume=half, **options
        )
        assert rest.cost == whole.cost and rest.config == whole.config and rest.refused == whole.refused
        for one, two in ((rest.history, whole.history), (rest.state, whole.state)):
            assert one.keys() == two.keys() and all(one[name].equal(two[name]) for name in one)
    assert run(sweeps=30, resume=whole, **options).history["low"].equal(whole.history["low"])
    assert whole.state["z"].dtype == torch.float32 and all(v.dtype == torch.float64 for v in whole.history.values())


def test_history_has_a_row_for_each_sweep_and_sizes_rest_after_the_warm_up():
    found = run(measure=lambda x: x[:, :2], sweeps=25)
    shapes = {name: tuple(value.shape) for name, value in found.history.items()}
    assert shapes.pop("measured") == (35, 4, 4, 2) and shapes.pop("accept") == (35, 4) and shapes.pop("swap") == (35, 3)
    assert shapes == {"low": (35, 4, 4), "replica": (35, 4, 4)}
    assert found.history["measured"][..., 0].equal(found.history["low"])
    assert (found.history["accept"][:, 0] == 1).all()
    later = run(measure=lambda x: x[:, :2], sweeps=40)
    assert later.state["log_s"].equal(found.state["log_s"]) and (found.state["log_s"][0] == 0).all()
    hard = run(reward=lambda x: -20 * x.square().sum(1), sweeps=250, warmup=150, chains=8)
    share = hard.history["accept"][150:].mean(0)
    assert share[1:].tolist() == pytest.approx([0.3] * 3, abs=0.07)
    loose = run(reward=lambda x: -20 * x.square().sum(1), sweeps=250, warmup=150, chains=8, accept=0.6)
    assert loose.history["accept"][150:].mean(0)[1:].tolist() == pytest.approx([0.6] * 3, abs=0.07)


def test_a_replica_is_numbered_by_the_draw_it_descends_from():
    found = run(sweeps=40, warmup=0)
    low, replica = found.history["low"], found.history["replica"]
    assert replica[0, 1:].max() < 0 and len(replica[0].unique()) == 16  # starts
    assert replica[:, 0].flatten().tolist() == list(range(160))  # level 0 is drawn afresh
    for k in range(1, 40):  # what is at a level was at one of its chain a sweep ago, or is that chain's fresh draw
        for chain in range(4):
            before = {*replica[k - 1, :, chain].tolist(), k * 4.0 + chain}
            assert set(replica[k, :, chain].tolist()) <= before
    assert replica[-1, 3].max() > 100 and low.shape == replica.shape


def test_where_it_starts():
    z = torch.randn(4, 3, generator=torch.Generator().manual_seed(5), dtype=torch.float64) + 5
    one, each = run(z=z, sweeps=1, warmup=0), run(z=z.expand(4, 4, 3), sweeps=1, warmup=0)
    assert one.history["low"].equal(each.history["low"]) and one.history["low"][0, 1:].min() > 2
    assert abs(one.history["low"][0, 0].mean()) < 2  # drawn afresh all the same
    with pytest.raises(RuntimeError, match="expand"):
        run(z=z[:, :2])


def test_maps_and_rows_at_a_time_change_nothing():
    ts, denoiser = samplers.timesteps(T, 4), MIXTURE.denoiser(ABAR)
    seen = []

    def own(z):
        seen.append(len(z))
        return samplers.sample_ddim(denoiser, z[:, 0], ABAR, ts, eta=1.0, noise=z[:, 1:].unbind(1))

    whole = run(tempering.noise_map(denoiser, ABAR, ts, (), eta=1.0), lambda x: x)
    parts = run(tempering.NoiseMap(own, (4,), cost=4), lambda x: x, micro_batch=5, progress=lambda rows: iter(rows))
    torch.testing.assert_close(parts.history["low"], whole.history["low"])
    assert set(seen) == {5, 1} and parts.cost == whole.cost == sum(seen) * 4
    ancestral = tempering.noise_map(denoiser, ABAR, ts, (2, 2), samplers.sample_ancestral)
    x = ancestral.run(torch.randn(7, *ancestral.shape, dtype=torch.float64))
    assert ancestral.shape == (4, 2, 2) and x.shape == (7, 2, 2)
    with pytest.warns(UserWarning, match="abar_T"):
        tempering.noise_map(denoiser, ABAR[:11], [10, 5], ())


def test_without_noise_in_its_steps_a_chain_is_moved_by_x_T_alone():
    G = tempering.noise_map(MIXTURE.denoiser(ABAR), ABAR, samplers.timesteps(T, 4), (), eta=0.0)
    z = torch.randn(6, 1, dtype=torch.float64)
    assert G.shape == (1,) and G.run(z).equal(
        samplers.sample_ddim(MIXTURE.denoiser(ABAR), z[:, 0], ABAR, samplers.timesteps(T, 4))
    )


# ---------------------------------------------------------------- a tilt with two modes


# ---------------------------------------------------------------- bad input


def test_images_of_probability_zero_are_refused_and_counted():
    def reward(x):
        return torch.where(x[:, 0] < 0.5, -math.inf, x[:, 0])

    for gradient in (False, True):
        found = run(reward=reward, gradient=gradient, chains=64, sweeps=150, warmup=30, lams=[math.inf, 1.0])
        assert found.history["low"].min() >= 0.5 and found.refused > 100
        x = torch.linspace(0.5, 12, 20001, dtype=torch.float64)
        for i, beta in enumerate((0.0, 1.0)):
            p = (beta * x - x**2 / 2).softmax(0)
            assert within(tempering.kept("low", found)[:, i].mean(0), p @ x)
    assert run(reward=lambda x: x[:, 0]).refused == 0
    with pytest.raises(ValueError, match=r"the reward is -inf for 16 of 16 starts"):
        run(reward=lambda x: x[:, 0] - math.inf)
    with pytest.raises(ValueError, match=r"the reward is -inf for 8 of 16 starts"):
        run(reward=reward, z=torch.tensor([1.0, 0.0, 0.0, 2.0])[:, None].expand(4, 3))


@pytest.mark.parametrize(
    "lams",
    [[1.0, 0.5], [math.inf], [math.inf, 0.5, 1.0], [math.inf, 1.0, 1.0], [math.inf, -1.0], [math.inf, math.nan], []],
)
def test_what_is_no_ladder_is_refused(lams):
    with pytest.raises(ValueError, match=r"must be a ladder: infinity \(p_0\), then one or more that fall, above 0"):
        run(lams=lams)


@pytest.mark.parametrize(
    "reward, said",
    [
        (lambda x: torch.where(x[:, 0] > 0, math.nan, x[:, 0]), r"is NaN or \+inf for \d+ of 16 images"),
        (lambda x: torch.where(x[:, 0] > 0, math.inf, x[:, 0]), r"is NaN or \+inf for \d+ of 16 images"),
        (lambda x: 0 * x[:, 0] + 3, "the reward is 3 for every image: each tilt is p_0 itself"),
        (lambda x: x, "the reward has shape"),
    ],
)
def test_rewards_that_say_nothing_are_refused(reward, said):
    with pytest.raises(ValueError, match=said):
        run(reward=reward)


def test_gradients_that_are_missing_or_not_finite_are_refused():
    with pytest.raises(ValueError, match="gives no gradient"):
        run(reward=lambda x: (x[:, 0] > 0).double(), gradient=True)
    with pytest.raises(ValueError, match=r"its gradient, is NaN or \+inf for 16 of 16"):
        run(reward=lambda x: x[:, 0] + (0 * x[:, 1]).sqrt(), gradient=True)


def test_a_run_is_resumed_with_the_settings_it_had():
    half = run()
    for other in ({"lams": [math.inf, 2.0, 1.0, 0.4]}, {"chains": 5}, {"warmup": 11}, {"accept": 0.4}):
        (name,) = other
        with pytest.raises(ValueError, match=rf"the saved run has other parameters \({name}: .* -> .*\)"):
            run(resume=half, **other)
    for other in ({"gradient": True}, {"measure": first}, {"dtype": torch.float32}):
        with pytest.raises(ValueError, match="the saved run has other parameters"):
            run(resume=half, **other)
    with pytest.raises(ValueError, match="the saved run has other settings"):
        certificates.tilt_samples(half, run(measure=first))
    for name, value in (("sweeps", 0), ("warmup", -1), ("chains", 0), ("chains", 1.5)):
        with pytest.raises(ValueError, match=f"{name} is .*; it must be an integer of at least"):
            run(**{name: value})
