"""The five stages of chapter 8 on a chain whose tilted laws are known, and what becomes of a study that is cut off."""

import dataclasses
import math

import pytest
import torch

from bilevel_core import schedules
from bilevel_core.lab.models import chains, pipelines, rewards
from bilevel_core.lab.studies import memory, rewards_on_any_chain

SD, SIDE, AIM = 0.2, 4, 0.06
MEAN_SD = SD / SIDE  # of the mean pixel
BEST = MEAN_SD / AIM  # tilting the mean pixel by lambda shifts it by MEAN_SD / lambda


@dataclasses.dataclass(frozen=True)
class Gaussian(chains.Chain):
    """p_0 = N(0, SD^2 I) for every prompt, with the exact denoiser."""

    shape: tuple = (1, SIDE, SIDE)

    def denoise(self, prompt):
        def denoiser(x, t):
            a = self.abar[t].item()
            return (1 - a) ** 0.5 * x / (a * SD**2 + 1 - a)

        denoiser.passes = 2  # as with classifier-free guidance
        return denoiser


def low(images):
    return images.mean((1, 2, 3))


def up(images):
    return -10 * (low(images) - AIM).square()


def features(images):
    return torch.stack([low(images), images.square().mean((1, 2, 3))], 1) / SD


@pytest.fixture
def study(tmp_path):
    abar = schedules.abar(torch.tensor([0.0, 0.98, 1.0, 0.008]).double(), 1000)
    chain = Gaussian(None, abar, steps=200)  # with few steps the sampler's variance is too small
    options = {"n": 400, "batch": 100, "shown": 100, "trials": 4}
    return rewards_on_any_chain.Study(
        chain, lambda prompt: (up, low), tmp_path, {"weights": "abc"}, features, **options
    )


def test_algorithm_2_learns_the_known_strength(study):
    """Over seeds the learned strength spreads by 3 %; its optimum follows the sampler's own spread, 4 % below p_0's."""
    found = dataclasses.replace(study, n=20_000, batch=500, shown=1000).learn("a")
    best = found["low"][1] / AIM
    assert "converged" in found["said"] and found["path"][0]["lam"] == 1.0
    assert found["lam"] == pytest.approx(best, rel=0.12) and found["best"] == pytest.approx(best, rel=0.12)
    assert found["interval"][0] < best < found["interval"][1] and best == pytest.approx(BEST, rel=0.05)
    assert found["low"] == [pytest.approx(0, abs=0.004), pytest.approx(MEAN_SD, rel=0.05)]
    curve = {round(lam, 6): mean for lam, mean in zip(found["curve"]["lam"], found["curve"]["mean"], strict=True)}
    assert curve[1.0] == pytest.approx(-10 * ((MEAN_SD - AIM) ** 2 + MEAN_SD**2), rel=0.1)


def test_the_released_estimator_learns_another_one(study):
    other = dataclasses.replace(study, estimator="released", gamma=1000.0, n=1000, shown=100)
    ours = dataclasses.replace(other, estimator="penalty", gamma=math.inf, folder=study.folder / "ours").learn("a")
    theirs = other.learn("a")  # goes on until the reward has fallen back to that of p_0, here to the last sample
    assert "converged" in ours["said"] and "boundary" in theirs["said"] and theirs["lam"] < 0.95 * ours["lam"]


@pytest.mark.parametrize("how", ["guided", "particles"])
def test_what_is_drawn_at_lambda_has_the_tilted_mean(study, how):
    study = dataclasses.replace(study, how=how)
    base = study.learn("a")["low"]
    # guidance is exact for this denoiser, particles for what the sampler makes of it
    variance = MEAN_SD**2 if how == "guided" else low(study.chain.sample("a", 4000, 3, batch=4000)[0]).var().item()
    for lam, weight in ((1.0, 0.0), (0.5, 0.0)):
        found = study.at("a", lam, 200, 7, weight)
        mean, se = study.mean(found, "low")
        assert abs(mean - variance / base[1] / lam) < 4 * se + 0.003
        assert found["images"].shape == (200, 1, 4, 4) and found["cost"] == 200 * study.each[1]
        assert se < 3 * MEAN_SD / 200**0.5 and (how == "particles" or se > 0.7 * MEAN_SD / 200**0.5)
    pulled = study.at("a", 1.0, 200, 7, 3.0)
    assert study.mean(pulled, "up")[0] > study.mean(study.at("a", 1.0, 200, 7), "up")[0]
    assert study.at("a", math.inf, 100, 0)["cost"] == 100 * study.each[0]


@pytest.mark.slow
def test_every_method_has_one_budget_and_is_marked_on_fresh_samples(study):
    rivals, budget = study.rivals("a"), int(study.samples("a")["cost"])
    assert budget == 400 * 2 * 200 and list(rivals) == list(rewards_on_any_chain.METHODS)
    for name in rewards_on_any_chain.DRAWING:
        assert 0.8 * budget < rivals[name]["cost"] <= budget, name
        assert rivals[name]["value"] == max(trial[1] for trial in rivals[name]["trials"])
        assert len(rivals[name]["trials"]) == {"grid": 5, "random": 4, "Bayesian": 4, "weighted sum": 4}[name]
    rows = {row["method"]: row for row in study.marks("a")}
    assert rows["none"]["lam"] is None and rows["none"]["cost"] == 0
    assert rows["Algorithm 2"]["up"] > rows["none"]["up"] + 2 * rows["none"]["up_se"]
    assert rows["Algorithm 2"]["low"] > rows["none"]["low"] + 0.5 * MEAN_SD
    assert abs(rows["none"]["kid"]) < 0.1 < rows["Algorithm 2"]["kid"]
    assert rows["none"]["frechet"] < rows["Algorithm 2"]["frechet"]
    many = dataclasses.replace(study, features=lambda x: x.reshape(len(x), -1).repeat(1, 4), folder=study.folder)
    assert many.marks("a")[0]["frechet"] is None  # 100 images, 64 features
    real = dataclasses.replace(study, reference=lambda prompt: torch.randn(300, 2).double() + 9).marks("a")
    assert real[0]["kid"] > 10 * abs(rows["none"]["kid"])
    grid = study.pictures("a", [math.inf, 1.0], 5)
    assert grid.shape == (10, 1, 4, 4) and low(grid[5:]).mean() > low(grid[:5]).mean()


def test_the_dry_run_says_what_the_study_then_spends(study):
    plan = {row["stage"]: row for row in study.plan(["a", "b"], plain=0.5, guided=2.0)}
    assert not list(study.folder.iterdir())  # a dry run leaves nothing
    assert plan["1 samples"]["calls"] == 2 * int(study.samples("a")["cost"])
    assert plan["1 samples"]["seconds"] == 2 * 400 * 200 * 0.5
    guided = study.at("a", 1.0, study.shown, study._seed(9))
    assert plan["3 guided"]["calls"] == 2 * int(guided["cost"])
    assert plan["3 guided"]["seconds"] == 2 * 100 * (199 * 2.0 + 0.5)
    spent = sum(row["cost"] for name, row in study.rivals("a").items() if name in rewards_on_any_chain.DRAWING)
    assert 0.8 * plan["4 rivals"]["calls"] < 2 * spent <= plan["4 rivals"]["calls"] + 4 * 2 * study.each[1]
    assert plan["all"]["calls"] == sum(row["calls"] for row in plan.values()) / 2


def snapshot(study):
    return {path: path.stat().st_mtime_ns for path in study.folder.rglob("*") if path.is_file()}


@pytest.mark.slow
def test_a_study_that_was_cut_off_goes_on_and_ends_as_it_would_have(study, tmp_path, monkeypatch):
    study = dataclasses.replace(study, methods=("none", "Algorithm 2", "grid", "random"))
    whole = study.marks("a")
    other = dataclasses.replace(study, folder=tmp_path / "again")
    real, calls = chains.Chain.sample, []

    def cut(self, *args, **kwargs):
        calls.append(1)
        if len(calls) in (3, 9, 14):
            raise KeyboardInterrupt
        return real(self, *args, **kwargs)

    monkeypatch.setattr(chains.Chain, "sample", cut)
    kept = {}
    for _ in range(3):
        with pytest.raises(KeyboardInterrupt):
            other.marks("a")
        assert all(snapshot(other)[path] == time for path, time in kept.items())  # nothing is computed twice
        kept = snapshot(other)
    ours = other.marks("a")
    for row, expected in zip(ours, whole, strict=True):
        assert {k: v for k, v in row.items() if k != "seconds"} == {k: v for k, v in expected.items() if k != "seconds"}
    before = snapshot(other)
    other.marks("a")
    assert snapshot(other) == before


def test_broken_and_foreign_files_are_noticed(study):
    study = dataclasses.replace(study, methods=("Algorithm 2", "grid", "random"))
    study.rivals("a")
    (row,) = study.status(["a"])
    assert row["samples"] == "4 of 4 batches" and row["learned"] and not row["broken"]
    assert sorted(row["searches"]) == ["grid", "random"]
    assert study.status(["b"]) == [
        {"prompt": "b", "samples": "0 of 4 batches", "searches": [], "learned": False, "files": 0, "broken": []}
    ]
    file = next(path for path in snapshot(study) if path.parent.name == "p_0")
    content = file.read_bytes()
    file.write_bytes(content[: len(content) // 2])
    (row,) = study.status(["a"])
    assert len(row["broken"]) == 1 and file.name in row["broken"][0] and "delete it, and only it" in row["broken"][0]
    with pytest.raises(ValueError, match="cannot be read.*delete it"):
        study.samples("a")
    expected = dataclasses.replace(study, folder=study.folder / "fresh").samples("a")
    file.unlink()
    assert torch.equal(study.samples("a")["up"], expected["up"])
    with pytest.raises(ValueError, match="was made with other weights"):
        dataclasses.replace(study, about={"weights": "other"}).samples("a")
    with pytest.raises(ValueError, match="was made with other gamma"):
        dataclasses.replace(study, gamma=10.0).learn("a")
    with pytest.raises(ValueError, match="was made with other steps"):
        dataclasses.replace(study, chain=dataclasses.replace(study.chain, steps=5)).samples("a")


def test_settings_that_make_no_sense_are_refused(study):
    for change, message in (
        ({"how": "magic"}, "how = 'magic' is not one of guided, particles"),
        ({"estimator": "magic"}, "estimator = 'magic' is not one of penalty, released"),
        ({"n": 150}, "n = 150 must be a whole number of batches of 100"),
        ({"shown": 50}, "shown = 50 must be"),
        ({"methods": ("grid",)}, "must be among .* and hold 'Algorithm 2'"),
        ({"methods": ("Algorithm 2", "luck")}, "must be among"),
        ({"estimator": "released"}, "needs a finite gamma"),
    ):
        with pytest.raises(ValueError, match=message):
            dataclasses.replace(study, **change)


def test_a_full_memory_names_the_remedies(study, monkeypatch):
    def full(self, *args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr(chains.Chain, "sample", full)
    with pytest.raises(MemoryError, match="Tried to allocate.*What was finished is kept.*micro_batch = 1"):
        study.samples("a")
    with pytest.raises(RuntimeError, match="something else"), memory.remedies():
        raise RuntimeError("something else")
    assert memory.check_fits(0.001, "cpu") > 0.001
    with pytest.raises(MemoryError, match="needs about 1000000.0 GiB and .* are free on cpu: dtype = 'float16'"):
        memory.check_fits(1e6, "cpu")


def test_rewards_by_name_share_their_networks(tmp_path):
    from safetensors.torch import save_file

    local = (f"local-dir:{pipelines.random_clip(tmp_path / 'clip')}", "")
    images = torch.rand(3, 3, 20, 20, generator=torch.Generator().manual_seed(0)) * 1.8 - 0.9
    of_prompt, embed = rewards_on_any_chain.load_rewards("clip", "random", clip=local)
    up_fox, low_fox = of_prompt("a fox")
    up_dog, low_dog = of_prompt("two dogs on a hill")
    assert low_fox is low_dog and not torch.equal(up_fox(images), up_dog(images))
    torch.testing.assert_close(low_fox(images), rewards.RandomResNet()(images))
    torch.testing.assert_close(embed(images), rewards.open_clip_model(local[0]).embed(images))
    file = tmp_path / "sa_0_4_vit_b_16_linear.safetensors"
    save_file({"weight": torch.ones(1, 16), "bias": torch.full((1,), 5.0)}, file)
    _, beauty = rewards_on_any_chain.load_rewards("clip", "aesthetic", clip=local, aesthetic_file=str(file))[0]("a fox")
    torch.testing.assert_close(beauty(images), embed(images).sum(1) + 5)
    with pytest.raises(ValueError, match="reward 'beauty' is not one of clip, hps, aesthetic, resnet, random"):
        rewards_on_any_chain.load_rewards("beauty", "random", clip=local)


def test_what_would_be_downloaded_is_counted(tmp_path, monkeypatch):
    monkeypatch.setattr(memory, "counted", lambda size, **options: {"weights": 2.0})
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *args: None)
    rows = rewards_on_any_chain.downloads("a/b", "float16", "clip", "resnet", ("ViT-B-16-quickgelu", "openai"))
    assert [row["what"].split()[0] for row in rows] == ["a/b", "open_clip", "torchvision"]
    assert rows[1]["gib"] * memory.GIB == pytest.approx(149_620_737 * 4)  # the weights of ViT-B/16
    large = rewards_on_any_chain.downloads("a/b", "float16", "hps", "aesthetic", (f"local-dir:{tmp_path}", ""))
    assert [row["what"].split()[0] for row in large] == ["a/b", "xswu/HPSv2", "open_clip"]
    assert not rewards_on_any_chain.downloads(str(tmp_path), "float16", "clip", "random", (f"local-dir:{tmp_path}", ""))
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *args: "/cache/model_index.json")
    assert not rewards_on_any_chain.downloads(
        "a/b", "float16", "clip", "random", ("ViT-B-16", str(tmp_path / "weights.pt"))
    )
