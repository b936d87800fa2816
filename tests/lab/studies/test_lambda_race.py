"""Every method at one budget, where the answer is known: r_low is Gaussian and r_up a parabola of it."""

import itertools
import json
import math
from dataclasses import replace

import pytest
import torch

from bilevel_core import algorithms
from bilevel_core.lab import files, places, results
from bilevel_core.lab.models import captions, chains, clip, networks, text_models
from bilevel_core.lab.studies import baselines, lambda_race

A, B = 1.2, 0.5  # r_up = A r_low - B r_low^2 + noise: under the tilt r_low ~ N(1/lam, 1), so lam* = 2 B/A
OPTIMUM = 2 * B / A


def value(lam):
    return A / lam - B * (1 / lam**2 + 1)


def bank(n=20_000, sharp=None):
    r_low, noise = torch.randn(2, n, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return lambda_race.Bank(A * r_low - B * r_low**2 + 0.3 * noise, r_low, 20, sharp or {})


@pytest.fixture(scope="module")
def rows():
    whole = bank()
    return [
        row | {"seed": seed, "prompt": "a two"}
        for seed in range(5)
        for row in lambda_race.compare(whole, 5, seed, trials=8, target=1 / (2 * OPTIMUM**2))
    ]


def test_what_a_lambda_is_worth():
    whole = bank()
    for lam in (0.7, OPTIMUM, 3.0):
        found = whole.worth(lam)
        assert found["how"] == "reweighted" and abs(found["up"] - value(lam)) < 4 * found["up_se"] + 1e-3
        assert found["kl"] == pytest.approx(1 / (2 * lam**2), rel=0.15)
        assert found["low"] == pytest.approx(1 / lam, rel=0.1)
    plain = whole.worth(math.inf)
    assert plain["up"] == pytest.approx(whole.r_up.mean().item()) and plain["low"] == pytest.approx(
        whole.r_low.mean().item()
    )
    assert (plain["kl"], plain["ess"], plain["how"]) == (0.0, 20_000.0, "p_0")
    assert 0.4 < whole.reach() < 0.6  # ESS/n = exp(-1/lam^2), 500 of 20,000 at 0.52


def particles(lam, n=2000, seed=1, cost=0):
    """Exact samples of the tilt, weighted back to p_0, for which log E exp(r_low/lam) = 1/(2 lam^2)."""
    r_low, noise = torch.randn(2, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    r_low = r_low + 1 / lam
    log_w = torch.full((n,), -math.log(n), dtype=torch.float64)
    r_up = A * r_low - B * r_low**2 + 0.3 * noise
    return algorithms.TiltSamples.from_tilt(r_up, r_low, lam, log_w, 1 / (2 * lam**2), cost)


def test_particles_stand_in_where_reweighting_ends():
    sharp = {(lam, 0): particles(lam) for lam in (0.15, 0.2, 0.3, 0.5, 5.0)}
    wrong = {key: replace(s, log_w=s.log_w + 7 / key[0]) for key, s in sharp.items()}  # their own Z is not believed
    twice = {(lam, run): particles(lam, 1000, 1 + run) for lam, _ in sharp for run in (0, 1)}
    for found in ({lam: bank(sharp=s).worth(lam) for lam in (0.15, 0.16, 0.3, 0.35)} for s in (sharp, wrong, twice)):
        for lam, worth in found.items():
            assert worth["how"] == "particles" and worth["ess"] > 300
            assert abs(worth["up"] - value(lam)) < 4 * worth["up_se"] + 0.02 * abs(value(lam))
            assert worth["kl"] == pytest.approx(1 / (2 * lam**2), rel=0.03)
    whole = bank(sharp=sharp)
    assert whole.worth(5.0)["how"] == "reweighted"  # it has samples enough, and they are plain
    assert lambda_race.candidates(whole)[0] == pytest.approx(0.15)


def test_a_far_corner_is_not_taken_for_the_law():
    """Particles at a small lambda that sit far off with equal rewards have a full effective sample size everywhere."""
    far = torch.full((500,), 40.0, dtype=torch.float64)
    corner = algorithms.TiltSamples.from_tilt(far, far, 0.05, torch.full((500,), -math.log(500)).double(), 300.0)
    found = bank(sharp={(0.05, 0): corner, (0.5, 0): particles(0.5)}).worth(0.45)
    assert abs(found["up"] - value(0.45)) < 4 * found["up_se"] + 0.05


def test_algorithm_2_draws_particles_within_its_budget():
    strong = bank()
    r_up = strong.r_up + 4.8 * strong.r_low  # 6 r_low - r_low^2/2: lam* = 1/6, far below what samples of p_0 reach
    whole = replace(strong, r_up=r_up)

    def draw(lam, round):
        found = particles(lam, 200, round, 200 * 20 * 2)
        return replace(found, r_up=found.r_up + 4.8 * found.r_low)

    found = {(lam, 0): particles(lam) for lam in (0.1, 0.15, 0.2, 0.3)}
    sharp = {key: replace(s, r_up=s.r_up + 4.8 * s.r_low) for key, s in found.items()}
    rows = lambda_race.compare(replace(whole, sharp=sharp), 5, 0, trials=8, target=18.0, draw=draw)
    ours, curve = rows[0], rows[1]
    assert ours["lam"] == pytest.approx(1 / 6, rel=0.15) and ours["regret"] < 0.3
    assert 2000 * 20 < ours["cost"] <= 4000 * 20
    assert curve["lam"] > 0.3 and curve["regret"] > 5 * ours["regret"]  # the batch alone cannot see so far


def test_draws_are_independent_priced_and_repeatable():
    whole = bank()
    a, b, c = whole.draws(1.0, 500, 1), whole.draws(1.0, 500, 1), whole.draws(1.0, 500, 2)
    assert a == b and a.mean != c.mean and a.cost == 500 * 20 * 2
    assert whole.draws(math.inf, 500, 1).cost == 500 * 20
    means = torch.tensor([whole.draws(1.0, 500, seed).mean for seed in range(200)])
    assert abs(means.mean() - whole.worth(1.0)["up"]) < 4 * means.std() / 200**0.5
    assert means.std() == pytest.approx(a.se, rel=0.25)


@pytest.mark.slow
def test_what_marks_a_lambda_is_not_what_it_was_chosen_by(study):
    folder, materials, rows = study
    material = materials["a bold two"]
    assert {run for _, run in material.runs("boldness", 0)} == {0}
    assert {run for _, run in material.runs("boldness", "other")} == {1}
    chosen = [row for path in sorted(folder.glob("race_*.json")) for row in json.loads(path.read_text())["rows"]]
    marking = material.bank("boldness", "other")
    for before, row in zip(chosen, rows, strict=True):
        assert (before["method"], before["lam"], before["path"]) == (row["method"], row["lam"], row["path"])
        rest = marking.folds(2, row["seed"])[1]
        lam = math.inf if row["lam"] is None else row["lam"]
        assert row["up"] == rest.worth(lam, row["weight"])["up"]
        best = max(rest.worth(lam)["up"] for lam in lambda_race.candidates(rest))
        assert row["regret"] == pytest.approx(best - row["up"])
    moved = [before["up"] != row["up"] for before, row in zip(chosen, rows, strict=True)]
    assert any(moved)  # other particles, other numbers
    images = material.images("boldness", "other")
    assert len(images) == 260 + 2 * 20 and len(material.images("boldness")) == 260 + 4 * 20


def test_folds_share_nothing():
    whole = bank(1000)
    fold, rest = whole.folds(5, 2)
    assert len(fold.r_up) == 200 and len(rest.r_up) == 800
    assert not set(fold.r_up.tolist()) & set(rest.r_up.tolist())
    assert fold.samples().cost == 200 * 20


def test_all_methods_have_one_budget_and_the_optimum_is_found(rows):
    budget = 4000 * 20
    by_method = {}
    for row in rows:
        by_method.setdefault(row["method"], []).append(row)
        assert row["cost"] <= budget and row["path"][-1][0] == row["cost"]
        if row["method"] != "weighted sum":
            assert row["regret"] >= -1e-3
    assert len(by_method) == 9 and all(len(found) == 5 for found in by_method.values())
    assert {row["cost"] for name in ("Algorithm 2", "reweighted curve", "grid") for row in by_method[name]} == {budget}
    for name in ("Algorithm 2", "reweighted curve", "adaptive KL"):
        assert all(row["lam"] == pytest.approx(OPTIMUM, rel=0.25) for row in by_method[name])
        assert sum(row["regret"] for row in by_method[name]) / 5 < 0.02
    assert all(row["lam"] is None for row in by_method["none"])  # infinity, which JSON has not
    assert sum(row["regret"] for row in by_method["none"]) / 5 > 0.5


def test_the_table_is_a_summary(rows):
    table = {s.method: s for s in baselines.summarise(rows, tie=1e-3)}
    assert table["Algorithm 2"].verdict == "reference" and table["none"].verdict == "worse"
    assert table["reweighted curve"].tied == 5


@pytest.fixture(scope="module")
def chain():
    net = networks.TextDenoiser("tiny_text", seed=3).eval().requires_grad_(False)
    return chains.Chain(net, text_models.abar(text_models.RECIPES["denoiser"]), steps=2)


@pytest.mark.slow
def test_a_prompt_is_drawn_with_all_its_rewards(chain, tmp_path):
    found = lambda_race.draw(chain, "a bold two", 500, 0, folder=tmp_path)
    images = found["images"].float() / 127.5 - 1
    with torch.no_grad():
        torch.testing.assert_close(clip.score(clip.load(), "a bold two")(images), found["clip"], atol=0.3, rtol=0)
    plain = chain.sample("a two", 500, 0)[0].clamp(-1, 1)
    torch.testing.assert_close(images, plain, atol=0.005, rtol=0)
    assert {"clip", "ink", "boldness", "resnet"} < set(found) and int(found["cost"]) == 500 * 2 * 2
    whole = lambda_race.Bank.of(found, "boldness")
    assert whole.each == 4 and torch.equal(whole.r_up, found["clip"].double())
    assert whole.r_low.mean().abs() < 1e-9 and whole.r_low.std() == pytest.approx(1)
    with pytest.raises(ValueError, match="unknown word"):
        lambda_race.draw(chain, "a cat", 500, 0, folder=tmp_path)
    with pytest.raises(ValueError, match=r"for every sample, so it has no scale"):
        lambda_race.Bank.of(found | {"boldness": torch.ones(500)}, "boldness")


@pytest.mark.parametrize("low", lambda_race.LOW)
def test_particles_are_drawn_once_and_count_their_cost(chain, tmp_path, low):
    options = {"mean": 2.0, "sd": 0.5, "folder": tmp_path}
    found = lambda_race.particles(chain, "a two", low, 0.5, 6, 1, **options)
    # two steps of two passes each; the last is not guided, so has no backward
    assert int(found["cost"]) == 6 * 2 * (2 + 1) and found["images"].shape == (6, 1, 28, 28)
    assert found["log_w"].exp().sum() == pytest.approx(1)
    images = found["images"].float() / 127.5 - 1
    again = lambda_race.lower_rewards()[low](images)
    torch.testing.assert_close(again, found[low], atol=0.05, rtol=0.02)  # images are kept in 256 greys
    (path,) = tmp_path.iterdir()
    stamp = path.stat().st_mtime_ns
    assert torch.equal(lambda_race.particles(chain, "a two", low, 0.5, 6, 1, **options)[low], found[low])
    assert path.stat().st_mtime_ns == stamp
    assert found["log_z"].shape == ()
    unkept = lambda_race.particles(chain, "a two", low, 0.5, 6, 1, **(options | {"folder": None}))
    assert unkept.keys() == found.keys()
    assert all(torch.equal(unkept[key], found[key]) for key in found if key != "seconds")
    assert len(list(tmp_path.iterdir())) == 1
    with pytest.raises(ValueError, match="was made with other sd; delete it or use another work_dir"):
        lambda_race.particles(chain, "a two", low, 0.5, 6, 1, **(options | {"sd": 0.6}))
    drawn = {"clip": torch.randn(50), low: torch.randn(50), "cost": torch.tensor(200)}
    whole = lambda_race.Bank.of(drawn, low, {(0.5, 0): found})
    samples, mean, sd = whole.sharp[0.5, 0], drawn[low].double().mean(), drawn[low].double().std()
    torch.testing.assert_close(samples.r_low, (found[low].double() - mean) / sd)
    assert torch.equal(samples.r_up, found["clip"].double())
    torch.testing.assert_close(samples.tilt(0.5)[0], found["log_w"].softmax(0))
    assert samples.tilt(0.5)[1]["log_z"] == pytest.approx(float(found["log_z"]))


def test_p_0_hears_all_but_the_thickness():
    assert lambda_race.heard("a bold two") == "a two" == lambda_race.heard("a two")
    assert lambda_race.heard("a thin two leaning left") == "a two leaning left"
    with pytest.raises(ValueError, match="unknown word"):
        lambda_race.heard("a bald two")


def test_prompts_are_captions_and_validation_is_kept_apart():
    everything = lambda_race.prompts("all")
    assert len(everything) == 10 * 3 * 4 - len(lambda_race.VALIDATION)  # digits, thicknesses, slants or none
    assert set(lambda_race.TEST) < set(everything) and not set(everything) & set(lambda_race.VALIDATION)
    assert all(lambda_race.heard(prompt) != prompt for prompt in everything)
    assert lambda_race.prompts("test") == lambda_race.TEST and lambda_race.prompts("one") == lambda_race.TEST[:1]
    assert set(lambda_race.VALIDATION) < set(captions.CAPTIONS)


SMALL = {"n": 260, "lams": (0.3, 1.0), "count": 20, "runs": 1, "seed": 0}
RACE = {"seeds": 2, "draws": 20, "trials": 5, "target": 0.5}


@pytest.fixture(scope="module")
def shipped():
    return chains.Chain.shipped(steps=3)


@pytest.fixture(scope="module")
def study(shipped, tmp_path_factory):
    chain, folder = shipped, tmp_path_factory.mktemp("study")
    materials = lambda_race.gather(chain, ["a bold two"], **SMALL, folder=folder)
    rows = lambda_race.race(chain, "a bold two", "boldness", materials["a bold two"], **RACE, folder=folder)
    return folder, materials, rows


@pytest.mark.slow
def test_a_race_is_kept_in_pieces_and_goes_on(shipped, study):
    chain, (folder, materials, rows) = shipped, study
    assert len(rows) == 2 * 9 and {(row["prompt"], row["reward"]) for row in rows} == {("a bold two", "boldness")}
    ours = [row for row in rows if row["method"] == "Algorithm 2"]
    # half a fold of plain samples (three steps of two passes), then guided particles, whose last step is plain
    for row in ours:
        extra = row["cost"] - 65 * 6
        assert extra in (0, 20 * 2 * (3 + 2))  # one round is all that 390 forwards allow
    pieces = sorted(folder.glob("race_*.json"))
    assert len(pieces) == 2
    pieces[1].unlink()  # killed before the second seed
    stamp = pieces[0].stat().st_mtime_ns
    again = lambda_race.race(chain, "a bold two", "boldness", materials["a bold two"], **RACE, folder=folder)
    assert again == rows and pieces[0].stat().st_mtime_ns == stamp
    with pytest.raises(ValueError, match="was made with other trials; delete it or use another work_dir"):
        changed = RACE | {"trials": 6}
        lambda_race.race(chain, "a bold two", "boldness", materials["a bold two"], **changed, folder=folder)


@pytest.mark.slow
@pytest.mark.mnist
def test_quality_is_that_of_the_law(study):
    _, materials, rows = study
    found = lambda_race.quality(materials, rows, "boldness", seeds=2, n=200)
    assert len(found) == 18
    for row in found:
        assert 0 <= row["caption"] <= row["digit"] <= 1 + 1e-12 and row["frechet"] > 0
    plain = [row for row in found if row["method"] == "none"]
    images = materials["a bold two"].drawn["images"].float() / 127.5 - 1
    classifier = networks.load_classifier("mnist28")
    with torch.no_grad():
        share = (classifier(images).argmax(1) == 2).double()
    assert plain[0]["digit"] == pytest.approx(share[torch.arange(260) % 2 == 1].mean().item())
    assert found == lambda_race.quality(materials, rows, "boldness", seeds=2, n=200)


@pytest.mark.slow
def test_what_is_stored_comes_back(study, tmp_path, monkeypatch):
    _, materials, _ = study
    path = tmp_path / "rewards.safetensors"
    lambda_race.store(path, materials, pictures=3)
    back, pictures = lambda_race.restore(path)
    for low in lambda_race.LOW:
        for which in ("all", 0, "other"):
            ours, theirs = (found["a bold two"].bank(low, which) for found in (materials, back))
            for lam in (0.3, 0.9, 5.0, math.inf):
                assert ours.worth(lam) == theirs.worth(lam)
            assert ours.each == theirs.each
    assert set(pictures) == {("a bold two", lam) for lam in lambda_race.SLIDER_LAMS}
    for images in pictures.values():
        assert images.shape == (3, 1, 28, 28) and images.dtype == torch.uint8
        assert len(images.unique(dim=0)) >= 2  # resampled particles can be twins
    drawn = materials["a bold two"].drawn["images"]
    assert all((drawn == image).flatten(1).all(1).any() for image in pictures["a bold two", math.inf])
    tensors, meta = files.load_state(path)
    files.save_state(tmp_path / "old.safetensors", tensors, {k: v for k, v in meta.items() if k != "prompts"})
    with pytest.raises(ValueError, match=r"old.safetensors was made with other prompts: run the recorded profile"):
        lambda_race.restore(tmp_path / "old.safetensors")
    monkeypatch.setattr(lambda_race, "_about", lambda: {"clip": "another hash"})
    with pytest.raises(ValueError, match=r"rewards.safetensors was made with other clip: run the recorded profile"):
        lambda_race.restore(path)


def test_the_divergence_aimed_at_is_the_best_on_validation():
    whole = bank(4000, sharp={(lam, 0): particles(lam) for lam in (0.1, 0.2, 0.4)})
    # the tilt is Gaussian, so a divergence of t is at lam = (2 t)^(-1/2); the optimum, 0.72, lies between two targets
    up, sd = whole.r_up.mean().item(), whole.r_up.std().item()

    class Known:
        drawn = {"clip": whole.r_up, "ink": whole.r_low, "boldness": -whole.r_low}  # noqa: RUF012

        def bank(self, low):
            return whole

    found = lambda_race.validate({"a": Known(), "b": Known()})
    for t in (0.1, 0.3, 0.5, 1.0):
        assert found["gains"][t] == pytest.approx((value(1 / math.sqrt(2 * t)) - up) / sd, abs=0.08)
    assert found["target"] in (0.5, 1.0)
    assert found["correlations"]["a"]["ink"] == pytest.approx(-found["correlations"]["a"]["boldness"])


def test_another_protocol_is_refused(chain):
    lambda_race.check_protocol(lambda_race.protocol(chain), chain)
    with pytest.raises(ValueError, match=r"by another protocol \(test, kl_target\): run the recorded profile again"):
        lambda_race.check_protocol(lambda_race.protocol(chain) | {"test": ["a two"], "kl_target": 3.0}, chain)
    with pytest.raises(ValueError, match="chain"):
        lambda_race.check_protocol(lambda_race.protocol(chain), replace(chain, steps=3))


@pytest.mark.slow
def test_marks_that_were_recorded_stand():
    """What chapter 5 recorded, marked again from the recorded rewards: no lambda moves by a point, no verdict turns."""
    kept = results.read_result("05_reward_finetuning_mnist")["data"]["rows"]
    materials, _ = lambda_race.restore(places.project_root() / "book" / "results" / "05_rewards.safetensors")
    again = []
    for (prompt, low), rows in itertools.groupby(kept, lambda row: (row["prompt"], row["reward"])):
        again += lambda_race.mark(list(rows), materials[prompt].bank(low, "other"), 5)
    assert len(again) == len(kept) and {row["reward"] for row in kept} == set(lambda_race.LOW)
    for before, now in zip(kept, again, strict=True):
        assert abs(before["regret"] - now["regret"]) < 1
    for low in lambda_race.LOW:
        verdicts = [
            {one.method: one.verdict for one in baselines.summarise([r for r in rows if r["reward"] == low], tie=0.1)}
            for rows in (kept, again)
        ]
        assert verdicts[0] == verdicts[1] and len(verdicts[0]) == 9
