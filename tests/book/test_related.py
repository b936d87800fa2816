"""The page on related work: what it says of our code is what our code says; every paper is among the references."""

import math
import re
from pathlib import Path

import pytest
import torch

from bilevel_core import schedules
from bilevel_core.lab import oracles

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "book" / "related.md").read_text(encoding="utf-8")
COSINE = torch.tensor(schedules.DEFAULT_Q["cosine"], dtype=torch.float64)


def test_papers_are_in_the_references():
    numbers = set(re.findall(r"arxiv\.org/abs/([0-9.]+[0-9])", PAGE))
    references = (ROOT / "book" / "references.bib").read_text(encoding="utf-8")
    assert len(numbers) > 12
    assert {number for number in numbers if f"arXiv:{number}" not in references} == set()


def test_the_log_snrs_quoted_from_the_author_of_a_solver_are_ours():
    abar = schedules.abar(COSINE, 1000)
    half = (0.5 * torch.log(abar / (1 - abar)))[-5:].tolist()
    assert half == pytest.approx([-5.0778, -5.3654, -5.7709, -6.4641, -9.9179], abs=5e-5)  # as the thread prints them
    *first, last = (f"−{-value:.2f}" for value in half)
    assert f"{', '.join(first)} and then {last}" in " ".join(PAGE.split())


def test_the_cliff_is_as_high_as_the_page_says():
    before, last = schedules.abar(COSINE, 1000)[-2:].tolist()
    assert f"{last:.1e}" == "2.4e-09" and "2.4\\cdot 10^{-9}" in PAGE
    assert f"{before:.1e}" == "2.4e-06" and "2.4\\cdot 10^{-6}" in PAGE
    assert f"{1 / math.sqrt(1 - 0.999):.1f}" == "31.6" and "\\sqrt{0.001} = 31.6" in PAGE
    capped = math.cos(math.pi / 2 * (0.9946 + 0.008) / 1.008) ** 2 / math.cos(math.pi / 2 * 0.008 / 1.008) ** 2
    assert f"{capped:.0e}" == "7e-05" and "7\\cdot 10^{-5}" in PAGE


@pytest.mark.parametrize("lam", [0.3, 2.0])
def test_the_first_order_cost_of_a_tilt_is_exact_for_a_gaussian(lam):
    law = oracles.Gaussian(torch.tensor([0.3]).double(), torch.tensor([[0.25]]).double())
    slope = torch.tensor([1.7], dtype=torch.float64)
    deviation = 1.7 * 0.5  # of the reward slope * x under the law
    assert law.kl_tilt(slope, lam).item() == pytest.approx(0.5 * (deviation / lam) ** 2, rel=1e-12)


def test_the_conversions_of_multipliers_are_right():
    (row,) = re.findall(r"\$m\$ = ([\d., ]+): \$\\lambda\$ = ([\d., ]+) \|", PAGE)
    multipliers, lams = ([float(number) for number in text.split(",")] for text in row)
    assert [float(f"{1 / m:.2g}") for m in multipliers] == lams and len(lams) == 4
