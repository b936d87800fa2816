import json

import pytest
import torch

from bilevel_core import guidance, schedules
from bilevel_core.algorithms import train_score
from bilevel_core.lab import files, levels
from bilevel_core.lab.models import networks
from bilevel_core.lab.studies import sampling_quality, setting

ABAR = schedules.abar(torch.tensor([0.0, 0.98, 1.0, 0.008], dtype=torch.float64), 20)


def test_a_piece_is_computed_once_and_never_mistaken_for_another(tmp_path):
    calls = []

    def compute():
        calls.append(1)
        return {"value": 3}

    path = tmp_path / "piece.json"
    for _ in range(2):
        assert files.piece(path, {"seed": 1}, compute)["value"] == 3
    assert len(calls) == 1 and json.loads(path.read_text())["config"] == {"seed": 1}
    with pytest.raises(ValueError, match="was made with other seed; delete it or use another work_dir"):
        files.piece(path, {"seed": 2}, compute)
    path.write_text('{"config": ')
    with pytest.raises(ValueError, match="is not JSON"):
        files.piece(path, {"seed": 1}, compute)


def test_generated_images_depend_on_seed_and_not_on_how_many_follow():
    def denoiser(x, t):
        return 0.5 * x

    few, many, other = (
        setting.generate(denoiser, ABAR, [20, 10], n, 4, eta=1.0, seed=seed)
        for n, seed in ((500, 1), (700, 1), (500, 2))
    )
    assert many.shape == (700, 1, 4, 4) and many.abs().max() <= 1
    assert torch.equal(few, many[:500]) and not torch.equal(few, other)


@pytest.mark.slow
def test_a_small_study_has_all_rows_and_resumes(tmp_path):
    def study(seeds=2, **first):
        options = {
            "seeds": seeds,
            "ends": [0.98],
            "train_steps": 2,
            "batch_size": 8,
            "T": 20,
            "grids": [2, 4],
            "etas": [0.0],
        }
        return sampling_quality.sampling_study("digits8", **options, **first, n=64, folder=tmp_path, force=True)

    rows = study()
    assert [(row["seed"], row["steps"]) for row in rows] == [(0, 2), (0, 4), (1, 2), (1, 4)]
    assert [row["cost"] for row in rows[:2]] == [64 * 2, 64 * 4] and rows[0]["train_cost"] == 2 * 8 * 3
    assert all(row["frechet"] > 0 for row in rows)
    assert study() == rows
    assert study(seeds=1, first=1) == rows[2:]  # the seeds from 1 on, of the same pieces
    assert {row["seed"] for row in study(seeds=2, first=2)} == {2, 3}


def test_a_denoiser_told_the_level_is_trained_on_a_broad_table_and_refused_as_another(tmp_path):
    x0 = torch.randn(20, 1, 8, 8, generator=torch.Generator().manual_seed(0)).clamp(-1, 1)
    table = levels.Density().abar(50)
    sizes = {"steps": 3, "batch_size": 4, "seed": 1, "path": tmp_path / "run"}

    def run(scale=schedules.ANGLE, **options):
        return setting.train_denoiser(x0, table, "tiny", **sizes, scale=scale, **options)

    state, net = run(jitter=0.01), networks.Denoiser("tiny", told="angle", seed=1, jitter=0.01)
    assert state.step == 3 and state.ema.module.seen == tuple(schedules.angle(table[[1, -1]]).tolist())
    plain = setting.recipe(guidance.LevelDenoiser(net, table), steps=3, batch_size=4, seed=1)
    list(train_score(plain, x0, table, steps=3))
    assert all(torch.equal(a, b) for a, b in zip(plain.denoiser.parameters(), state.denoiser.parameters(), strict=True))
    before = networks.Denoiser("tiny", told="angle", seed=1).unet.state_dict()
    assert any(not torch.equal(w, before[name]) for name, w in net.unet.state_dict().items())
    for scale in (schedules.LOG_NSR, None):
        with pytest.raises(ValueError, match="does not fit this run: the saved run has other weights"):
            run(scale)
    with pytest.raises(ValueError, match="the saved run has other data or schedule"):
        setting.train_denoiser(x0, levels.Density(s=0.4).abar(50), "tiny", **sizes, scale=schedules.ANGLE)
    images = setting.generate(state.ema.module.on(ABAR[[0, 3, 11]]), ABAR[[0, 3, 11]], [2, 1], 5, 8, eta=0.0, seed=0)
    assert images.shape == (5, 1, 8, 8) and torch.isfinite(images).all()
