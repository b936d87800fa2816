"""The ground-truth study: its differences, its verdicts where the answer is known, and its pieces on small data."""

import json
import math

import pytest
import torch

from bilevel_core import estimators, schedules
from bilevel_core.lab.studies import schedule_gradients as study_of

POINT = "far"


@pytest.fixture
def study(tmp_path):
    sizes = {"T": 20, "sample_steps": 3, "train_steps": 4, "batch_size": 16}
    sizes |= {"n_truth": 80, "n": 60, "draws": 2, "inner": 2, "outer": 3}
    return study_of.Study(tmp_path, name="digits8", **sizes)


def test_differences_are_exact_for_a_parabola():
    slope, bend = torch.tensor([2.0, -1.0, 0.5]), torch.tensor([3.0, 1.0, -2.0])
    z = study_of.coordinates(POINT)
    for scale in (1.0, 0.5):
        points = study_of.shifted(z, scale)
        values = [((p - z) @ slope.double() + (p - z).square() @ bend.double()).item() for p in points]
        assert study_of.differences(values, scale) == pytest.approx(slope.tolist())
    for q in study_of.POINTS.values():
        for z in study_of.shifted(schedules.reduce(torch.tensor(q, dtype=torch.float64))):
            schedules.check(schedules.expand(z), 200)  # the whole stencil is admissible


def test_a_verdict_knows_bias_noise_and_cost():
    generator = torch.Generator().manual_seed(0)
    truth = torch.tensor([2.0, -1.0, 0.3], dtype=torch.float64)
    truths = truth + 0.1 * torch.randn(6, 3, generator=generator, dtype=torch.float64)
    noise = torch.tensor([1.0, 0.5, 0.1]) * torch.randn(6, 400, 3, generator=generator, dtype=torch.float64)
    shift = torch.tensor([0.5, 0.0, 0.0])
    found = study_of.judge(truths.tolist(), (truths[:, None] + shift + noise).tolist(), cost=study_of.COST / 4)
    mean = (truths.mean(0) + shift).abs()
    snr = 2 * mean / torch.tensor([1.0, 0.5, 0.1])  # four draws for COST
    assert torch.allclose(torch.tensor(found["snr"], dtype=torch.float64), snr, rtol=0.08)
    assert found["bias"][0].lo < 0.5 < found["bias"][0].hi and found["bias"][1].lo < 0 < found["bias"][1].hi
    assert found["z"][0] > 10 and max(map(abs, found["z"][1:])) < 5
    widths = torch.tensor(study_of.WIDTHS)
    assert found["off"] == pytest.approx(float((shift * widths).norm() / (truth * widths).norm()), rel=0.1)
    turned = study_of.judge(truths.tolist(), (-truths[:, None] + 0 * noise[:, :2]).tolist(), cost=1.0)
    assert turned["cosine"] == pytest.approx(-1) and turned["off"] == pytest.approx(2)


def test_partial_estimators_agree_on_one_objective(study):
    """Forward, reverse and small coordinate differences are one number; cutting the chain changes it; costs count."""
    z = study_of.coordinates(POINT)
    denoiser, cost = study.train(z, 0)
    assert cost == 4 * 16 * 3 and not any(w.requires_grad for w in denoiser.parameters())
    found = study_of.partials(study, denoiser)
    (forward, spent), (reverse, cheap) = (found[name][0](z, 3) for name in ("forward", "reverse"))
    torch.testing.assert_close(forward, reverse, rtol=1e-3, atol=1e-3 * float(forward.abs().max()))
    assert (spent, cheap) == (60 * (1 + 2 + 2) * 3, 60 * 3 + 60 * 2)  # x_T does not depend on z
    cut, _ = found["reverse, last 1"][0](z, 3)
    assert (cut - reverse).abs().max() > 0.01 * reverse.abs().max()
    small, _ = estimators.q_grad_coordinates(study.objective(denoiser, 60), z, seed=3, delta=1e-3)
    torch.testing.assert_close(small, forward, rtol=0.05, atol=0.05 * float(forward.abs().max()))
    assert found["two points"][0](z, 3)[1] == 2 * 60 * 3 and found["one point"][0](z, 3)[1] == 60 * 3
    assert found["released"][0](z, 3)[1] == 2 * 36 * 3


def test_differences_after_no_training_are_differences(study):
    z = study_of.coordinates(POINT)
    denoiser, _ = study.train(z, 0)
    frozen, cost = study_of.warm(study, POINT, denoiser, 0, seed=1)
    plain, _ = estimators.q_grad_coordinates(
        study.objective(denoiser, study.n), z, seed=1, delta=torch.tensor(study_of.WIDTHS, dtype=torch.float64)
    )
    torch.testing.assert_close(frozen, plain, rtol=1e-4, atol=1e-4)
    trained, more = study_of.warm(study, POINT, denoiser, 3, seed=1)
    assert more == cost + 6 * 3 * 16 * 3 and (trained - frozen).abs().max() > 0


@pytest.mark.slow
def test_pieces_are_made_once_shared_and_judged(study, monkeypatch):
    monkeypatch.setattr(study_of, "ABLATIONS", ({"grad_steps": 1},))
    monkeypatch.setattr(study_of, "GAMMAS", {"far": (1.0, 1e4), "near": (1.0,)})
    sizes = (2, (1,))
    halves = [study_of.gather(study, *sizes, share=(i, 2)) for i in range(2)]
    assert len(halves[0]) + len(halves[1]) == len(study_of.pieces(study, *sizes)) == 4 + 4 + 6 + 4 + 2 + 2
    before = {path: path.stat().st_mtime_ns for path in study.folder.iterdir()}
    found = json.loads(json.dumps(study_of.gather(study, *sizes)))
    assert {path: path.stat().st_mtime_ns for path in study.folder.iterdir()} == before
    known = study_of.verdicts(found, POINT)
    names = list(known)
    assert names[0] == "truth" and {"forward", "differences after 1 steps"} <= set(names)
    assert {"Algorithm 6, gamma = 1", "Algorithm 6, gamma = 10000, last 1"} <= set(names)
    assert all(math.isfinite(v) for row in list(known.values())[1:] for v in (*row["z"], row["off"], row["cosine"]))
    rows = next(piece for piece in found if piece["kind"] == "penalty" and piece["config"]["gamma"] == 1.0)["rows"]
    assert len(rows) == 3 and all(row["moved"] > 0 for row in rows)
    other = study_of.Study(study.folder, **{"name": "digits8", "T": 20, "sample_steps": 4, "train_steps": 4})
    with pytest.raises(ValueError, match="was made with other .*sample_steps"):
        study_of.truth(other, POINT, 0)


def test_seeds_are_those_from_the_first_on(study):
    def seeds(*sizes):
        return [
            (make.func.__name__, *[a for a in make.args[1:] if not isinstance(a, int) or a > 99])
            for make in study_of.pieces(study, *sizes)
        ], [make.args[2] for make in study_of.pieces(study, *sizes)]

    kinds, usual = seeds(3, (100,))
    same, shifted = seeds(3, (100,), 7)
    assert kinds == same and set(usual) == {0, 1, 2} and shifted == [seed + 7 for seed in usual]


def test_an_unknown_data_set_is_named(tmp_path):
    with pytest.raises(ValueError, match="name = 'cifar' is not one of digits8, mnist8, mnist28"):
        study_of.Study(tmp_path, name="cifar")
