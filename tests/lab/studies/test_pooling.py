"""Several strengths at once, the front they draw, and what guidance and pooling make of lambda."""

import itertools
import math

import pytest
import torch

from bilevel_core import estimators
from bilevel_core.lab.studies import guidance_bias, mixture, pooling, strengths
from bilevel_core.seeds import derive_seed

S = torch.tensor([[0.5, 0.2], [0.2, 0.4]], dtype=torch.float64)
SLOPES = torch.tensor([[1.0, 0.0], [-0.4, 1.0]], dtype=torch.float64)
TARGET = torch.tensor([0.3, 0.35], dtype=torch.float64)


def gaussian(n, kappa=0.0, seed=0):
    """p_0 = N(0, S), r_j = <g_j, x>, r_up = -|x - a|^2/2; the samples are whitened, so that their mean is 0 and their
    covariance S exactly, and the problem on them is nearly the problem itself."""
    z = torch.randn(n, 2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    z = z - z.mean(0)
    z = z @ torch.linalg.inv(torch.linalg.cholesky(z.T @ z / n)).T
    x = z @ torch.linalg.cholesky(S).T
    return strengths.Strengths(-((x - TARGET) ** 2).sum(1) / 2, SLOPES @ x.T, kappa)


@pytest.mark.parametrize("kappa, gamma", [(0.0, 3.0), (0.5, 40.0)])
def test_penalty_gradient_of_several_strengths_is_the_derivative_of_the_penalty(kappa, gamma):
    problem, beta = gaussian(500, kappa), torch.tensor([0.6, -0.3], dtype=torch.float64)

    def penalty(beta):
        h, scale = beta @ problem.r_low, 1 + kappa / gamma
        tilted = ((h + problem.r_up / gamma) / scale).logsumexp(0) - math.log(500)
        return -gamma * scale * tilted + gamma * (h.logsumexp(0) - math.log(500))

    star, tilted = problem.solve_star(beta), problem.solve_gamma(beta, gamma)
    # the lower-level solutions are minimisers: no other tilt does better
    for other in (problem.solve_star(beta + 0.1), tilted):
        assert problem.g(beta, star) <= problem.g(beta, other)
        both = [(problem.f(beta, p) / gamma + problem.g(beta, p)).item() for p in (tilted, other)]
        assert both[0] <= both[1] + 1e-12
    value = problem.f(beta, tilted) + gamma * (problem.g(beta, tilted) - problem.g(beta, star))
    assert value.item() == pytest.approx(penalty(beta).item(), abs=1e-9)
    grad, info = estimators.penalty_grad(problem, beta, star, tilted, gamma)
    steps = 1e-5 * torch.eye(2, dtype=torch.float64)
    slopes = [((penalty(beta + s) - penalty(beta - s)) / 2e-5).item() for s in steps]
    assert grad.tolist() == pytest.approx(slopes, abs=1e-6) and info["gap"] > 0


def test_its_limit_is_the_covariance_and_the_closed_form_of_the_gaussian():
    problem, beta = gaussian(400_000), torch.tensor([0.6, -0.3], dtype=torch.float64)
    exact = SLOPES @ S @ (S @ SLOPES.T @ beta - TARGET)  # of |m(beta) - a|^2/2, m = S sum beta_j g_j
    assert problem.hypergrad(beta).tolist() == pytest.approx(exact.tolist(), abs=0.01)
    star, tilted = problem.solve_star(beta), problem.solve_gamma(beta, 1e5)
    grad, _ = estimators.penalty_grad(problem, beta, star, tilted, 1e5)
    assert grad.tolist() == pytest.approx(problem.hypergrad(beta).tolist(), abs=1e-4)
    lam = torch.tensor([2.0, 0.7], dtype=torch.float64)
    cov, _ = estimators.lam_grad_cov(problem.r_up, problem.r_low, lam)
    assert cov.tolist() == pytest.approx((-problem.hypergrad(1 / lam) / lam**2).tolist(), rel=1e-9)


def test_two_strengths_are_learned():
    """With a price kappa the optimum on the Gaussian solves (S + kappa) in closed form; here, on the same samples."""
    problem = gaussian(20_000, kappa=0.3)
    beta, path = strengths.learn_strengths(problem)
    assert problem.hypergrad(beta).abs().max() < 1e-3 and len(path) == 61
    # -|S G' b - a|^2/2 - kappa b'G S G' b/2 is largest where G S (S + kappa) G' b = G S a
    closed = torch.linalg.solve(SLOPES @ S @ (S + 0.3 * torch.eye(2)) @ SLOPES.T, SLOPES @ S @ TARGET)
    assert beta.tolist() == pytest.approx(closed.tolist(), abs=0.05)
    worth = problem.worth(beta)
    for shift in (0.1, -0.1):
        for j in range(2):
            other = beta.clone()
            other[j] += shift
            assert problem.worth(other)["J"] < worth["J"]


def test_shapes_are_checked():
    with pytest.raises(ValueError, match="r_up"):
        strengths.Strengths(torch.zeros(5), torch.zeros(5), 0.1)


def test_no_law_beats_the_front():
    """Every point is better than random laws of no larger divergence, in the direction that it is made for."""
    generator = torch.Generator().manual_seed(0)
    r = torch.randn(2, 300, generator=generator, dtype=torch.float64)
    budgets, angles = (0.1, 0.5), [i * math.pi / 8 for i in range(5)]
    lines = strengths.front(r[0] - r[1], r, budgets, angles)
    for budget, line in zip(budgets, lines, strict=True):
        for point in line:
            assert point["kl"] == pytest.approx(budget, abs=1e-6)
            assert point["up"] == pytest.approx(point["r1"] - point["r2"], abs=1e-9)
            way = torch.tensor([math.cos(point["angle"]), math.sin(point["angle"])], dtype=torch.float64)
            reached = way[0] * point["r1"] + way[1] * point["r2"]
            for _ in range(50):
                scores = torch.randn(300, generator=generator, dtype=torch.float64)
                scores = scores + 2 * torch.rand(1, generator=generator, dtype=torch.float64) * (way @ r)
                low, high = 0.0, 50.0
                for _ in range(50):
                    middle = (low + high) / 2
                    low, high = (middle, high) if strengths._tilt(middle * scores)[1] < budget else (low, middle)
                assert strengths._tilt(low * scores)[0] @ (way @ r) <= reached + 1e-6
        ends = [(point["r1"], point["r2"]) for point in line]
        assert all(a[0] > b[0] and a[1] < b[1] for a, b in itertools.pairwise(ends))


def test_top_and_root():
    lams = [0.5, 0.7, 1.0, 1.5, 2.0]
    values = [-((math.log(lam) - 0.1) ** 2) for lam in lams]
    assert guidance_bias.top(lams, values) == pytest.approx(math.exp(0.1), rel=1e-9)
    assert guidance_bias.top(lams, [1, 2, 3, 4, 5]) == 2.0
    assert guidance_bias.root(lams, [math.log(lam) for lam in lams]) == pytest.approx(1.0)
    assert guidance_bias.root(lams, [1.0] * 5) is None


def test_the_shifted_oracle():
    assert mixture.Shifted(1.2).lam == pytest.approx(1.20841, abs=1e-4)
    one = mixture.Shifted(3.0)
    assert abs(one.problem.hypergrad(one.lam)) < 1e-6 and one.regret(one.lam) == 0 and one.regret(1.0) > 0.1
    samples = one.draw(0.5, 4000, 1)
    assert samples.log_w.exp().sum().item() == pytest.approx(1, abs=0.5) and samples.at == 0.5


def test_pooling_has_the_smaller_regret_at_one_budget():
    rows = {row["method"]: row for row in pooling.mixture_pooling(3.0, 24)}
    assert rows["covariance"]["gain"] == [0.0, 0.0, 0.0]
    assert rows["covariance, pooled, ESS 100"]["regret"][0] < 0.5 * rows["covariance"]["regret"][0]
    assert rows["curve of p_0"]["error"] > 2 * rows["pooled curve"]["error"]
    assert all(400 <= row["cost"] <= 1000 for row in rows.values())


@pytest.mark.slow
def test_another_first_seed_draws_anew(monkeypatch):
    """The so-and-so-many-th repeats of the mixture; the default is the first."""
    drawn = []
    one = pooling.Shifted.first
    monkeypatch.setattr(pooling.Shifted, "first", lambda self, n, seed: (drawn.append(seed), one(self, n, seed))[1])
    rows = {first: pooling.mixture_pooling(1.2, 2, first=first) for first in (0, 3)}
    assert sorted(set(drawn)) == sorted(derive_seed("mixture, p_0", repeat) for repeat in (0, 1, 6, 7))
    assert rows[0] == pooling.mixture_pooling(1.2, 2) != rows[3]


def test_guidance_is_biased_and_particles_are_not():
    lams = (0.8, 1.0, 1.2, 1.4, 1.8)
    found = guidance_bias.guidance_bias(lams, T=50, n=1500, seeds=2)
    guided, particles = (torch.tensor(found[name]).mean(0) for name in ("guided", "particles"))
    assert (guided[:4] < particles[:4] - 0.04).all()
    # the path gradient has the wrong sign below lam*, the covariance of the particles the right one
    assert torch.tensor(found["path"]).mean(0)[0] > 0.3 and torch.tensor(found["cov"]).mean(0)[0] < -0.5
    for chosen in found["lam"]:
        assert abs(chosen["reweighted"] - 1.15) < 0.15 and abs(chosen["particles"] - 1.15) < 0.15
        assert chosen["path"] is None or chosen["path"] < 0.9


def test_the_study_is_kept_in_pieces_and_goes_on(tmp_path, monkeypatch):
    calls = []

    def mixture_pooling(centre, repeats, **own):
        calls.append((centre, repeats, own))
        return [{"centre": centre}]

    def bias_of(**options):
        calls.append(options)
        return {"lams": list(options["lams"])}

    monkeypatch.setattr(pooling, "mixture_pooling", mixture_pooling)
    monkeypatch.setattr(pooling, "guidance_bias", bias_of)
    sizes = {"repeats": 3, "bias": {"lams": (0.5, 1.0), "T": 10}, "folder": tmp_path}
    found = pooling.study(**sizes)
    assert found["mixture"] == [{"centre": 1.2}, {"centre": 3.0}] and found["bias"]["lams"] == [0.5, 1.0]
    assert calls == [(1.2, 3, {}), (3.0, 3, {}), {"lams": (0.5, 1.0), "T": 10}]
    (tmp_path / "mixture_3.json").unlink()  # killed before it
    assert pooling.study(**sizes)["mixture"] == found["mixture"] and calls[3:] == [(3.0, 3, {})]
    with pytest.raises(ValueError, match="was made with other repeats"):
        pooling.study(**sizes | {"repeats": 4})
    pooling.study(**sizes | {"folder": tmp_path / "7"}, first=7)
    assert calls[4:6] == [(centre, 3, {"first": 7}) for centre in (1.2, 3.0)] and calls[6]["first"] == 7
