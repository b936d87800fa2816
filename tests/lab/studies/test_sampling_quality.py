import json

import pytest
import torch

from bilevel_core import schedules
from bilevel_core.lab import files
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
