"""The figure that moves: its data are the recorded ones, the page agrees with Python, and it stops when asked."""

from __future__ import annotations

import math
import warnings

import pytest
from explorer_page import assert_same, document, settle

import landing
from bilevel_core import algorithms
from bilevel_core.lab import certificates, places
from bilevel_core.lab.studies import tilted_truth


@pytest.fixture(scope="module")
def told():
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "lam starts at")  # a start that the samples do not reach would be moved
        return landing.stories()


@pytest.fixture(scope="module")
def explorer(told):
    return landing.explorer(told)


def test_the_stories_are_what_chapter_5_recorded(told):
    record = tilted_truth.restore(places.project_root() / "book" / "results" / "05_tilts.safetensors")
    for story, (prompt, start) in zip(told, landing.STORIES, strict=True):
        truth = record.truths[prompt]
        assert (
            story.prompt == prompt and story.path[0] == start and landing.BOUNDS[0] == truth.runs[0].config["lams"][-1]
        )
        for lam, up in list(zip(story.lams, story.curve, strict=True))[::16]:
            assert up == pytest.approx(truth.means(lam)["clip"], abs=1e-3)
        assert all(truth.certifies(lam) == (k >= story.sure) for k, lam in enumerate(story.lams))
        learns = algorithms.TiltSamples.pooled(*certificates.tilt_samples(truth.runs[0]))
        *_, last = algorithms.learn_lam(learns, start, bounds=landing.BOUNDS, min_ess=20)
        assert story.path[-1] == pytest.approx(last.lam, rel=1e-3) and story.done == last.done
        for row, lam in enumerate(reversed(tilted_truth.LADDER)):
            kept = record.images[prompt][lam][: landing.SHOWN, 0].double() / 255
            assert (story.images[row].double() / 15 - kept).abs().max() <= 0.5 / 15 + 1e-9


def test_what_the_caption_says_is_in_the_data(told):
    weak, strong, two = told
    assert strong.path[-1] == pytest.approx(weak.path[-1], rel=0.02)  # both ends lead to one place
    for story in (strong, weak):
        assert story.worth(story.path[-1]) > story.worth(story.path[0]) + 5
        assert max(story.curve) - story.worth(story.path[-1]) < 1
        assert "stays at" in landing.summary(story)
        gap = max(story.curve) - story.worth(story.path[-1])
        assert gap < 0.05 or f"is worth {gap:.1f} more" in landing.summary(story)
    assert two.path[-1] == landing.BOUNDS[1] and "the optimum is lam -> infinity" in two.done
    assert two.worth(two.path[-1]) > max(two.curve) - 0.05
    assert "not to pull at all" in landing.summary(two)
    # bold strokes cover more of the picture
    ink = (strong.images.double() / 15).mean((1, 2, 3))
    assert ink[0] > 1.5 * ink[-1]


def test_places_between_recorded_ones_are_straight_in_log_lambda():
    assert landing.position([0.1, 1.0, 10.0], 0.1) == (0, 0.0)
    i, part = landing.position([0.1, 1.0, 10.0], math.sqrt(10))
    assert i == 1 and part == pytest.approx(0.5)
    assert landing.position([0.1, 1.0, 10.0], 50.0)[0] == 1
    assert landing.interpolate([0.1, 1.0, 10.0], [0.0, 2.0, 6.0], math.sqrt(10)) == pytest.approx(4.0)


def test_the_figure_is_small_and_fetches_nothing():
    html = landing.figure()
    assert len(html.encode()) < 150_000
    assert "http" not in html.replace("http://www.w3.org/2000/svg", "")


@pytest.mark.browser
def test_the_page_agrees_with_python(page, explorer):
    page.set_content(document(explorer))
    element = page.locator("#blx-learning")
    for key in ("0", "1", "2"):
        last = explorer.controls[0].ranges[key]["step"]["max"]
        for step in (0.0, 0.45, 1.5, 2.0, last - 0.05, last):
            values = {"story": key, "step": step}
            ours = element.evaluate("(node, values) => node.explorer.compute(values)", values)
            assert_same(ours, explorer.evaluate(**values), f"{values}")


def steps(page) -> float:
    return float(page.locator("#blx-learning input[name=step]").input_value())


@pytest.mark.browser
def test_it_moves_pauses_and_obeys(page, site_url):
    page.goto(f"{site_url}/book/index.html")
    button = page.locator("#blx-learning button").first
    assert button.inner_text() == "Pause"
    page.wait_for_function("document.querySelector('#blx-learning input[name=step]').value > 5")
    drawn = page.locator("#blx-learning canvas").first.evaluate("(c) => c.toDataURL()")
    page.wait_for_function("document.querySelector('#blx-learning input[name=step]').value > 60")
    assert page.locator("#blx-learning canvas").first.evaluate("(c) => c.toDataURL()") != drawn
    button.focus()
    page.keyboard.press("Enter")
    assert button.inner_text() == "Play"
    settle(page)
    at = steps(page)
    page.wait_for_timeout(300)
    assert steps(page) == at
    page.keyboard.press("Enter")
    page.wait_for_function(f"document.querySelector('#blx-learning input[name=step]').value > {at}")
    page.locator("#blx-learning input[name=step]").press("Home")  # whoever takes the slider has it
    assert button.inner_text() == "Play"
    page.wait_for_timeout(200)
    assert steps(page) == 0
    page.get_by_label("prompt and start").select_option("2")
    settle(page)
    assert "not to pull at all" in page.locator("#blx-learning [role=status]").inner_text()


@pytest.mark.browser
def test_it_stands_still_for_those_who_ask(new_page, site_url, explorer):
    page = new_page(reduced_motion="reduce", viewport={"width": 390, "height": 844}, color_scheme="dark")
    page.goto(f"{site_url}/book/index.html")
    button = page.locator("#blx-learning button").first
    assert button.inner_text() == "Play"
    assert page.locator("#blx-learning").evaluate("(node) => node.explorer.values()") == explorer.defaults()
    before = steps(page)
    page.wait_for_timeout(300)
    assert steps(page) == before == float(page.locator("#blx-learning input[name=step]").get_attribute("max"))
    button.click()  # their own wish is granted
    page.wait_for_function(f"document.querySelector('#blx-learning input[name=step]').value < {before}")
