"""The shipped 8x8 denoiser that is told the level, and how it was made."""

import pytest
import torch

from bilevel_core import schedules
from bilevel_core.lab.models import level_model, networks


def test_the_shipped_denoiser_is_told_the_angle_and_its_grids_are_better():
    network, card = level_model.load(), networks.card(level_model.NAME)
    assert network.scale is schedules.ANGLE and list(network.seen) == pytest.approx(card["seen"])
    assert not any(parameter.requires_grad for parameter in network.parameters())
    for N, row in card["grids"].items():
        abar = schedules.check_abar(torch.tensor(row["abar"], dtype=torch.float64))
        level = schedules.angle(abar[1:])
        assert len(level) == int(N) and card["seen"][0] <= level[0] and level[-1] <= card["seen"][1]
        assert 0 < row["learned"] < row["cosine"]
    x, eps = torch.randn(2, 400, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    level = torch.tensor([network.seen[1]])
    assert (network.network(eps, level) - eps).square().mean() < 0.05  # at the last level all is noise
    assert (network.network(x, level) - x).square().mean() < 0.05


def test_even_angles():
    abar = level_model.even(0.25, 0.75, 3)
    assert torch.allclose(schedules.angle(abar[1:]) / torch.pi * 2, torch.tensor([0.25, 0.5, 0.75]).double())
    assert abar[0] == 1


@pytest.mark.slow
@pytest.mark.mnist
def test_a_small_training_goes_on_where_it_stopped(tmp_path):
    recipe = level_model.Recipe(steps=4, batch_size=8, grids=(2,), grid_steps=2, samples=40, marked=40)
    said = []
    card = level_model.make(recipe, tmp_path, tmp_path / "work", said.append)
    again = level_model.make(recipe, tmp_path, tmp_path / "work", said.append)
    assert card["sha256"] == again["sha256"] and card["grids"] == again["grids"] and card["log"] == again["log"]
    assert len(card["log"]["loss"]) == 4 and card["cost"] == 4 * 3 * 8 and list(card["grids"]) == ["2"]
    assert said[0] == said[1] and said[0].startswith("2 steps: Frechet distances {'learned': ")
