"""What a guided step takes: the branches that want a GPU, steps of a loaded chain, and the survey's processes."""

import json

import pytest
import torch

from bilevel_core.lab.models import pipelines
from bilevel_core.lab.studies import memory, rewards_on_any_chain


def test_on_cuda_the_peak_is_the_allocators_during_the_steps(monkeypatch):
    """Reset after the weights are there, the device waited for before and after each time is taken."""
    calls = []
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: calls.append("reset"))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: calls.append("wait"))
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 3 * memory.GIB * (device.index == 1))
    monkeypatch.setattr(memory, "_set_up", lambda *args, **options: ([], lambda guided: calls.append(guided)))
    found = memory.measured("tiny", device="cuda:1", repeats=2)
    assert found["peak"] == 3 and calls == ["reset", *(["wait", False, "wait", "wait", True, "wait"] * 2)]


@pytest.mark.parametrize(("needed", "fits"), [(4.9, True), (5.1, False)])
def test_on_cuda_it_fits_where_the_card_has_room(monkeypatch, needed, fits):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (5 * memory.GIB, 16 * memory.GIB))
    if fits:
        assert memory.check_fits(needed, "cuda") == 5
    else:
        with pytest.raises(MemoryError, match="needs about 5.1 GiB and 5.0 are free on cuda: dtype = 'float16'"):
            memory.check_fits(needed, "cuda")


def test_steps_of_a_loaded_chain():
    """Its own networks take them, and a chain that is used so is not altered."""
    chain = pipelines.load(pipelines.random_pipeline("tiny"), steps=3, micro_batch=2)
    calls = []
    chain.denoiser.unet.register_forward_hook(lambda network, inputs, output: calls.append(len(inputs[0])))
    before = chain.sample("a fox", 2, 0, batch=2)[0]
    calls.clear()
    found = memory.measured(chain, rows=2, reward=None)
    assert 0 < found["plain"] and 0 < found["seconds"] and calls[0] == 4  # two rows, with and without the text
    parts = [*chain.denoiser.parameters(), *chain.vae.parameters()]
    assert found["weights"] * memory.GIB == sum(w.numel() for w in parts) * 4
    assert torch.equal(chain.sample("a fox", 2, 0, batch=2)[0], before)


@pytest.mark.slow
def test_a_survey_measures_in_processes_and_keeps_what_it_has(tmp_path, monkeypatch):
    size = {"size": "tiny", "side": 16, "reward": ""}
    settings = [(size, True), (size | {"block_checkpoint": True, "checkpoint": False}, False)]
    rows = memory.survey(tmp_path, "cpu", settings)
    assert rows[1]["measured"] is None and 0 < rows[0]["measured"]["plain"] < rows[0]["measured"]["seconds"]
    assert rows[0]["counted"] == memory.counted(**size) != rows[1]["counted"]
    monkeypatch.setattr(memory, "counted", None)
    assert memory.survey(tmp_path, "cpu", settings) == json.loads(json.dumps(rows))


def test_a_clip_that_open_clip_does_not_know_is_named():
    for name in ("", "ViT-Z-1"):
        with pytest.raises(ValueError, match=f"open_clip knows no model '{name}': see open_clip.list_models"):
            rewards_on_any_chain.downloads(".", "float16", "clip", "random", (name, "openai"))
    (row,) = rewards_on_any_chain.downloads(".", "float16", "clip", "random", ("hf-hub:a/b", "openai"))
    assert row["gib"] != row["gib"]  # not known before
