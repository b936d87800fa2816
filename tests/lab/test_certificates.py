"""What certificates say of laws that are known: right ones pass, stuck and truncated ones do not."""

import math

import pytest
import torch

from bilevel_core import tempering
from bilevel_core.lab import certificates

LADDER = [math.inf, 4.0, 2.0, 1.2, 0.8, 0.6, 0.5]


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def autoregressive(phi, chains, n, seed=0):
    """Stationary, N(0, 1), of which one draw in (1 + phi)/(1 - phi) counts."""
    x = normal(chains, n, seed=seed)
    for t in range(1, n):
        x[:, t] = phi * x[:, t - 1] + (1 - phi**2) ** 0.5 * x[:, t]
    return x


# ---------------------------------------------------------------- R-hat


def test_rhat_is_one_for_chains_of_one_law_and_above_for_others():
    same = normal(8, 400)
    assert 0.99 < certificates.split_rhat(same) < 1.01
    moved, wider, drift = same.clone(), same.clone(), same + torch.linspace(-1, 1, 400)
    moved[0] += 1
    wider[0] *= 3
    for x in (moved, wider, drift):
        assert certificates.split_rhat(x) > 1.05
    assert certificates.split_rhat(autoregressive(0.99, 8, 400)) > 1.05
    assert certificates.split_rhat(moved.exp() * 1e9) == pytest.approx(certificates.split_rhat(moved), abs=1e-12)


def test_rhat_by_hand():
    """Location only, whose ranks are normal scores: two chains of four draws, halves of two."""
    x = torch.tensor([[0.0, 1.0, 2.0, 3.0], [10.0, 11.0, 12.0, 13.0]], dtype=torch.float64)
    score = torch.special.ndtri((torch.arange(1, 9).double() - 0.375) / 8.25).reshape(4, 2)
    within, between = score.var(1).mean(), score.mean(1).var()
    assert certificates.split_rhat(x) == pytest.approx(float((1 / 2 + between / within) ** 0.5), rel=1e-12)


def test_rhat_of_chains_that_do_not_move():
    still = torch.arange(4.0)[:, None].expand(4, 10)
    assert certificates.split_rhat(still) == math.inf
    assert certificates.split_rhat(torch.ones(4, 10)) == 1.0
    coins = (normal(8, 400) > 0).double()  # many ties
    assert 0.99 < certificates.split_rhat(coins) < 1.01
    coins[0] = (normal(400, seed=1) > 1).double()
    assert certificates.split_rhat(coins) > 1.015


# ---------------------------------------------------------------- independent draws


@pytest.mark.parametrize("phi", [0.0, 0.5, 0.9])
def test_draws_of_an_autoregression_are_counted_by_its_correlation(phi):
    found = torch.tensor([certificates.effective_draws(autoregressive(phi, 8, 1500, seed)) for seed in range(12)])
    assert found.mean().item() == pytest.approx(8 * 1500 * (1 - phi) / (1 + phi), rel=0.08)
    assert found.std() < 0.15 * found.mean()


def test_draws_are_the_square_of_spread_over_error():
    """The means of independent runs vary as those of so many independent draws."""
    runs = [autoregressive(0.8, 4, 300, seed) for seed in range(200)]
    spread = torch.stack([run.mean() for run in runs]).var()
    found = torch.tensor([certificates.effective_draws(run) for run in runs]).mean()
    assert (1 / spread / found).item() == pytest.approx(1, abs=0.3)


def test_draws_at_the_ends():
    assert certificates.effective_draws(autoregressive(-0.5, 8, 500)) == 4000  # never more than there are
    apart = normal(4, 500) + 10 * torch.arange(4)[:, None]
    assert certificates.effective_draws(apart) < 8 < certificates.effective_draws(apart[:1])
    assert certificates.effective_draws(torch.ones(4, 500)) == 1.0
    for chains, n in ((1, 2), (1, 1), (3, 1), (2, 3)):
        assert 1 <= certificates.effective_draws(normal(chains, n)) <= chains * n
    shifted = 1e6 + 1e3 * autoregressive(0.5, 4, 500)
    assert certificates.effective_draws(shifted) == pytest.approx(
        certificates.effective_draws(autoregressive(0.5, 4, 500)), rel=1e-4
    )


# ---------------------------------------------------------------- certificates


def gaussian(beta, chains, sweeps, seed, reward=lambda x: x):
    """Independent draws of N(beta, 1), the tilt of N(0, 1) by exp(beta x), as a run; `reward` of them is r_low."""
    x = normal(sweeps, len(beta), chains, seed=seed) + beta[:, None]
    replica = torch.arange(x.numel()).reshape(x.shape)
    history = {"low": reward(x), "measured": x[..., None][..., :0], "replica": replica.double()}
    lams = [math.inf, *(1 / beta[1:]).tolist()]
    return tempering.Tempered({"lams": lams, "warmup": 0, "measured": False}, 0, 0, history, {})


BETA = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0], dtype=torch.float64)


def test_exact_laws_pass_and_the_numbers_are_right():
    runs = [gaussian(BETA, 8, 250, seed) for seed in (1, 2)]
    found = certificates.certify(*runs)
    assert found.down_to == 0.5 and str(found) == "certified down to lambda = 0.5, the end of the ladder"
    for beta, row in zip(BETA.tolist(), found.rows, strict=True):
        assert (
            row["failed"] == [] and row["rhat"] < 1.02 and 3000 < row["draws"] <= 4000 and row["families"] == 2000 * 1
        )
        assert row["low"] == pytest.approx(beta, abs=4 * row["low_se"]) and 0.015 < row["low_se"] < 0.019
        assert row["var"] == pytest.approx(1, abs=0.1) and row["log_z"] == pytest.approx(beta**2 / 2, abs=0.1)
        assert abs(row["identity"]) < 3 and abs(row["area"]) < 3


def test_many_short_chains_are_judged_by_their_starts_and_halves():
    """No chain of six correlated states has the whole law, and all of both runs do; a start that is apart is named."""

    def run(seed, off=0.0):
        one, still = gaussian(BETA, 200, 6, seed), gaussian(BETA, 200, 1, seed + 100)
        moves, stays = (run.history["low"] - BETA[:, None] for run in (one, still))
        low = BETA[:, None] + 0.9 * stays + (1 - 0.9**2) ** 0.5 * moves + off
        return tempering.Tempered(one.config, 0, 0, one.history | {"low": low}, {})

    fine = certificates.certify(run(1), run(2))
    assert fine.down_to == 0.5 and all(row["rhat"] < 1.02 for row in fine.rows)
    by_chain = torch.cat([run(1).history["low"], run(2).history["low"]], 2)[:, 3].T
    assert certificates.split_rhat(by_chain) > 1.3
    apart = certificates.certify(run(1), run(2, 0.8))
    assert apart.down_to is None and "rhat" in apart.rows[0]["failed"]


def test_limits_are_the_callers():
    runs = [gaussian(BETA, 4, 50, seed) for seed in (1, 2)]
    assert certificates.certify(*runs).down_to == 0.5
    few = certificates.certify(*runs, draws=1e4)
    assert few.down_to is None and str(few).startswith("certified nowhere; at inf, draws is ")
    assert certificates.certify(*runs, rhat=0.5).rows[0]["failed"] == ["rhat"]
    assert {*certificates.certify(*runs, sigmas=0.0).rows[1]["failed"]} == {"identity", "area"}
    with pytest.raises(ValueError, match="one run proves nothing"):
        certificates.certify(runs[0])


def test_identities_hold_as_often_as_they_should():
    """Over independent ladders their numbers of standard errors have mean 0 and spread about 1."""
    rows = [certificates.certify(*[gaussian(BETA, 4, 40, 2 * k + i) for i in (0, 1)]).rows for k in range(40)]
    for name in ("identity", "area"):
        z = torch.tensor([[row[name] for row in found[1:]] for found in rows], dtype=torch.float64)
        assert (z.mean(0).abs() < 4 * z.std(0) / 40**0.5).all() and 0.7 < z.std() < 1.4
        assert (z.abs() > 4).double().mean() < 0.01


def test_a_law_without_its_tail_is_noticed_though_chains_agree():
    """The coldest level never goes above 2: R-hat and draws are content, the identities are not."""

    def cut(x):
        return torch.cat([x[:, :-1], 2 - (x[:, -1:] - 2).abs()], 1)

    found = certificates.certify(*[gaussian(BETA, 8, 250, seed, cut) for seed in (1, 2)])
    *right, wrong = found.rows
    assert found.down_to == pytest.approx(1 / 1.5) and "identity" in wrong["failed"] and wrong["rhat"] < 1.02
    assert wrong["identity"] < -4 and wrong["draws"] > 3000 and not any(row["failed"] for row in right)
    assert str(found).startswith("certified down to lambda = 0.666667; at 0.5, identity is -")


def test_a_wrong_level_within_the_ladder_ends_it_there():
    runs = [gaussian(BETA, 8, 250, seed) for seed in (1, 2)]
    for run in runs:
        run.history["low"][:, 2] = run.history["low"][:, 1]  # a level that lags behind
    found = certificates.certify(*runs)
    assert found.down_to == 2.0 and found.rows[2]["identity"] < -4 and found.rows[3]["identity"] > 4


@pytest.mark.parametrize("level", [2, 4])
def test_a_law_with_the_right_mean_and_spread_but_not_the_shape_is_noticed_by_log_z(level):
    """Sums of four exponentials of rate 1 - beta, one level turned round its mean."""

    def run(seed, turned):
        beta = torch.tensor([0.0, 0.1, 0.2, 0.3, 0.4], dtype=torch.float64)
        u = torch.rand(4, 250, 5, 8, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        x = -u.log().sum(0) / (1 - beta)[:, None]
        x[:, turned] = 8 / (1 - beta[turned])[:, None] - x[:, turned]
        return gaussian(beta, 8, 250, 0, lambda _: x)

    right, wrong = ([run(seed, turned) for seed in (1, 2)] for turned in ([], [level]))
    whole, found = certificates.certify(*right), certificates.certify(*wrong)
    assert whole.down_to == 2.5
    for beta, row in zip((0.0, 0.1, 0.2, 0.3, 0.4), whole.rows, strict=True):
        assert row["log_z"] == pytest.approx(-4 * math.log(1 - beta), abs=0.02)
    assert found.down_to > 2.5 and any(row["failed"] == ["area"] for row in found.rows[level:])
    assert not any("identity" in row["failed"] for row in found.rows)


# ---------------------------------------------------------------- a tilt with two modes, and a moat between them


class TwoModes:
    """Noise N(0, I), reward w(x_1) - k |rest|^2/2: a hill around 2.2 behind a moat, k makes steps small."""

    def __init__(self, k, rest):
        self.k, self.rest, self.G = k, rest, tempering.NoiseMap(lambda z: z, (1 + rest,))

    def hill(self, x):
        return 2.2 * torch.exp(-((x - 2.2) ** 2) / 0.32) - 8 * torch.exp(-((x - 1.2) ** 2) / 0.18)

    def reward(self, x):
        return self.hill(x[:, 0]) - self.k / 2 * x[:, 1:].square().sum(1)

    def exact(self, lam):
        """E r and the probability of the far mode, by quadrature of one dimension."""
        x = torch.linspace(-8, 8, 16001, dtype=torch.float64)
        p = (self.hill(x) / lam - x**2 / 2).softmax(0)
        low = p @ self.hill(x) - self.k * self.rest / 2 / (1 + self.k / lam)
        return low.item(), p[x > 1.2].sum().item()

    def runs(self, lams, sweeps, chains=16):
        """From p_0, and from the far mode."""
        far = torch.zeros(chains, 1 + self.rest)
        far[:, 0] = 2.2
        options = {"sweeps": sweeps, "warmup": 60, "chains": chains, "measure": lambda x: (x[:, 0] > 1.2).double()}
        starts = ((None, 0), (far, 1))
        return [
            tempering.sample_tempered(
                self.G, self.reward, lams, z=z, generator=torch.Generator().manual_seed(seed), **options
            )
            for z, seed in starts
        ]


def test_exchange_crosses_and_its_certificate_says_so():
    problem = TwoModes(4.0, 1)
    runs = problem.runs(LADDER, 300)
    found = certificates.certify(*runs)
    assert found.down_to == 0.5, str(found)
    far = tempering.kept("measured", *runs)[..., 0].mean((0, 2))
    for i, (lam, row) in enumerate(zip(LADDER, found.rows, strict=True)):
        low, share = problem.exact(lam)
        assert row["low"] == pytest.approx(low, abs=4 * row["low_se"])
        assert far[i].item() == pytest.approx(share, abs=4 * (share * (1 - share) / row["draws"]) ** 0.5)
    assert problem.exact(0.5)[1] > 0.5 > 4 * problem.exact(4.0)[1]  # the modes change places within the ladder


def test_plain_chains_are_stuck_and_their_certificate_says_so():
    problem = TwoModes(4.0, 6)
    share = problem.exact(0.5)[1]
    gaps = []
    for lams in ([math.inf, 0.5], [math.inf, 4.0, 1.6, 0.8, 0.5]):
        runs = problem.runs(lams, 200)
        cold, hot = (tempering.kept("measured", run)[:, -1].mean().item() for run in runs)
        gaps.append((share - cold, hot - share))
        found = certificates.certify(*runs)
        assert {"rhat", "draws"} <= {*found.rows[-1]["failed"]}
    assert gaps[0][0] > 0.2 and gaps[0][1] > 0.1  # each start keeps its side
    assert sum(gaps[1]) < sum(gaps[0]) / 2  # a ladder helps
    assert found.down_to in (4.0, 1.6)  # and its certificate ends where it is not enough
    for row in found.rows:
        if row["lam"] >= found.down_to:
            assert row["low"] == pytest.approx(problem.exact(row["lam"])[0], abs=4 * row["low_se"])
