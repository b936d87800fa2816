"""Explorers: the HTML, the widgets, and the page's JavaScript against the Python, in Chromium."""

from __future__ import annotations

import itertools
import json
import math
import re
import sys

import pytest
import torch
from explorer_page import assert_same, curve, document, settle, shown

from bilevel_core import estimators, schedules
from bilevel_core.lab import comparisons, explorers, oracles
from bilevel_core.lab.explorers import Choice, Explorer, Image, Line, Panel, Slider, engine
from bilevel_core.lab.explorers import gamma as gamma_side
from bilevel_core.lab.explorers import lam as lam_side
from bilevel_core.lab.explorers import penalty as penalty_side
from bilevel_core.lab.explorers import schedule as schedule_side
from bilevel_core.lab.explorers import tilt as tilt_side
from bilevel_core.lab.explorers.controls import ROLES
from bilevel_core.lab.writing import format_number

DIGIT = (torch.arange(64, dtype=torch.float64).reshape(8, 8) * 0.37).sin()


@pytest.fixture(scope="module")
def schedule() -> Explorer:
    return explorers.schedule_explorer(DIGIT)


@pytest.fixture(scope="module")
def penalty() -> Explorer:
    return explorers.penalty_explorer()


@pytest.fixture(scope="module")
def lam() -> Explorer:
    return explorers.lam_explorer()


@pytest.fixture(scope="module")
def tilt() -> Explorer:
    return explorers.tilt_explorer(samples=1500, points=60, steps=60)


@pytest.fixture(scope="module")
def gamma() -> Explorer:
    return explorers.gamma_explorer()


def frames(prompt: int, lams=(0.1, 1.0, 10.0, math.inf)) -> list[explorers.Tilted]:
    images = [(torch.arange(2 * 64).reshape(2, 8, 8) * (0.1 + i + prompt)).sin() for i in range(len(lams))]
    for image in images:
        image[:, 2:, 1:6] = -1  # black, as digits mostly are
    return [
        explorers.Tilted(lam, image, 60 + i - prompt * i**2, 0.1 * i, 2 - i, 0.5 / lam, "reweighted")
        for i, (lam, image) in enumerate(zip(lams, images, strict=True))
    ]


@pytest.fixture(scope="module")
def samples() -> Explorer:
    prompts = {"a bold two": frames(0), "a five": frames(1)}
    return explorers.samples_explorer(prompts, up="CLIP", low="boldness", note="made up")


def small(**changes) -> Explorer:
    """A little explorer of its own: y = a x with a picture."""

    def compute(a: float, kind: str) -> dict:
        factor = a if kind == "plain" else -a
        return {
            "line": [Line("y", [0.0, 1.0], [0.0, factor], "star")],
            "picture": [Image("one pixel", [[factor]])],
            "readout": [("slope", factor, ".2f")],
            "message": "",
        }

    js = """const s = values.kind === "plain" ? values.a : -values.a;
    return { line: [{ label: "y", x: [0, 1], y: [0, s], role: "star", shape: "line" }],
             picture: [{ label: "one pixel", pixels: [[s]] }], readout: [["slope", s, ".2f"]], message: "" };"""
    ranges = {"plain": {"a": {"min": 0, "max": 1, "step": 0.1, "value": 0.5}},
              "turned": {"a": {"min": 2, "max": 4, "step": 0.5, "value": 3}}}  # fmt: skip
    options = {
        "name": "small",
        "controls": [
            Choice("kind", "kind", {"plain": "plain", "turned": "turned"}, "plain", ranges),
            Slider("a", "a_{0}", 0, 1, 0.5, step=0.1),
        ],
        "panels": [Panel("line", "A line", "x", "y"), Panel("picture", "A picture", kind="images")],
        "compute": compute,
        "js": js,
        **changes,
    }
    return Explorer(**options)


# ---- the pieces ---------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "value, spec, text",
    [
        (0.5, ".2f", "0.50"),
        (-0.001, ".2f", "0.00"),
        (-1.25, ".1f", "−1.2"),
        (6.0712e-8, ".3g", "6.07 × 10⁻⁸"),
        (-1234567.0, ".3g", "−1.23 × 10⁶"),
        (1000.0, ".2g", "1000"),
        (0.0999999, ".3g", "0.1"),
        (0.0, ".3g", "0"),
        (math.inf, ".3g", "∞"),
        (math.nan, ".3g", "undefined"),
        ("as it is", ".3g", "as it is"),
    ],
)
def test_numbers_are_written_for_readers(value, spec, text):
    assert format_number(value, spec) == text


def test_slider_grid_and_snap():
    gamma = Slider("gamma", "γ", 0.1, 1e4, 1.0, log=20)
    grid = gamma.grid()
    assert len(grid) == 101 and grid[0] == 0.1 and grid[20] == 1.0 and grid[-1] == 1e4 and 0.5 in grid and 2.0 in grid
    assert gamma.snap(10 ** (7 / 20)) == 2.2  # a step of the widget
    assert gamma.snap(2.345) == 2.345  # typed in
    assert Slider("a", "a", 0, 0.9, 0.3).grid()[30] == 0.3
    with pytest.raises(ValueError, match=r"a: value = 0\.333 is not one of its steps"):
        Slider("a", "a", 0, 1, 0.333)
    with pytest.raises(ValueError, match="min < max"):
        Slider("a", "a", 1, 0, 0.5)
    with pytest.raises(ValueError, match="needs min > 0"):
        Slider("a", "a", 0, 1, 0.5, log=10)


def test_wrong_use_is_named():
    with pytest.raises(ValueError, match="'Bad Name'"):
        small(name="Bad Name")
    with pytest.raises(ValueError, match=r"</script"):
        small(js="return '</ScRipt>'")
    with pytest.raises(ValueError, match="no control named b; there are kind, a"):
        small().evaluate(b=1)
    with pytest.raises(ValueError, match="role 'pink'"):
        Line("y", [0], [0], "pink")
    with pytest.raises(ValueError, match="'oval' is not one of plain"):
        Choice("kind", "kind", {"plain": "plain"}, "oval")
    with pytest.raises(ValueError, match=r"shape \(64,\)"):
        explorers.schedule_explorer(DIGIT.flatten())
    with pytest.raises(ValueError, match="must lie in"):
        explorers.schedule_explorer(DIGIT * 16)


def test_embedded_text_cannot_leave_the_script():
    data = {"a": "</script><script>alert(1)</script>", "b": "<!-- \u2028", "c": [1.5, None]}
    text = engine.embed_json(data)
    assert "</" not in text and "<!--" not in text and "\u2028" not in text
    assert json.loads(text) == data
    with pytest.raises(ValueError):
        engine.embed_json([math.nan])
    page = small(data=data, title="<b>&", caption="<i>", alt='"<').html()
    assert page.count("</script>") == 1 and page.lower().count("<script") == 1 + json.dumps(data).count("<script")
    assert "<i>" not in page and 'aria-label="&quot;&lt;"' in page


def test_pages_are_small_self_contained_and_deterministic(schedule, penalty, gamma):
    for explorer in (schedule, penalty, gamma):
        page = explorer.html()
        assert len(page.encode()) < 40_000
        assert set(re.findall(r"https?://[^\"' )]+", page)) <= {"http://www.w3.org/2000/svg"}
        assert "needs JavaScript" in page and f'id="blx-{explorer.name}"' in page
    assert explorers.schedule_explorer(DIGIT).html() == schedule.html()
    assert explorers.schedule_explorer(DIGIT, noise_seed=1).html() != schedule.html()


# ---- the Python side ----------------------------------------------------------------------------------------------
def readout(result: dict) -> dict[str, float]:
    return {row[0]: row[1] for row in result["readout"]}


def corners(explorer: Explorer) -> list[dict]:
    """Every choice combined with the lowest and the highest value of every slider in its range."""
    choices = [c for c in explorer.controls if isinstance(c, Choice)]
    out = []
    for picked in itertools.product(*(c.options for c in choices)):
        values = {c.name: value for c, value in zip(choices, picked, strict=True)}
        ranges = {s.name: (s.min, s.max) for s in explorer.controls if isinstance(s, Slider)}
        for c in choices:
            for name, new in c.ranges.get(values[c.name], {}).items():
                ranges[name] = (new["min"], new["max"])
        out += [values | dict(zip(ranges, point, strict=True)) for point in itertools.product(*ranges.values())]
    return out


def test_schedule_explorer_is_the_core(schedule):
    q = torch.tensor([0.1, 0.8, 1.5, 0.02], dtype=torch.float64)
    result = schedule.evaluate(start=0.1, end=0.8, tau=1.5, epsilon=0.02, form="normalised")
    abar = schedules.abar(q, schedule_side.EXPLORER_T, "cosine", "normalised")
    assert result["abar"][1]["y"] == abar.tolist()
    assert readout(result)["ᾱ_{T}"] == abar[-1].item()
    first, last = result["digits"][0], result["digits"][-1]
    assert torch.allclose(torch.tensor(first["pixels"], dtype=torch.float64), DIGIT, atol=1e-4)
    assert [first["label"], last["label"]] == ["u = 0", "u = 1"]


def test_schedule_explorer_speaks_where_q_is_not_admissible_or_does_not_reach_noise(schedule):
    assert schedule.evaluate()["warn"] is False
    warned = schedule.evaluate(end=0.7)
    assert warned["warn"] and "0.203 is above 0.001" in warned["message"] and "draw_x_T" in warned["message"]
    closed = schedule.evaluate(start=0.9, end=0.5)
    assert "end - start = -0.4 is below 0.05" in closed["message"] and "projection" in closed["message"]
    dark = schedule.evaluate(tau=4.0)
    assert "abar_T" in dark["message"] and readout(dark)["ᾱ_{T}"] >= schedules.MIN_ABAR


def test_no_setting_of_the_sliders_is_dead(schedule, penalty, lam, tilt, gamma):
    for explorer in (schedule, penalty, lam, tilt, gamma):
        for values in corners(explorer):
            result = explorer.evaluate(**values)
            assert result["readout"], f"nothing is drawn at {values}"
            numbers = [v for panel in explorer.panels for s in result[panel.id] for v in s.get("y", [0.0])]
            assert all(map(math.isfinite, numbers)), values


@pytest.mark.parametrize(
    "gamma, lam, value, grad, hyper",
    [(1, 0.5, 0.9443, -1.32472, -6.21693), (10, 2.0, 1.2265, 0.34521, 0.34406), (1000, 1.0, 1.12, -0.46848, -0.46938)],
)
def test_penalty_explorer_has_the_exact_values(penalty, gamma, lam, value, grad, hyper):
    shown = readout(penalty.evaluate(gamma=gamma, lam=lam))
    assert shown["L_{γ}(λ)"] == pytest.approx(value, abs=6e-5)
    assert shown["dL_{γ}/dλ (A)"] == pytest.approx(grad, abs=6e-6)
    assert shown["hypergradient (C)"] == pytest.approx(hyper, abs=6e-6)
    assert shown["λ^{∗}"] == pytest.approx(1.20841, abs=6e-6)
    assert shown["argmin L_{γ}"] == pytest.approx({1: 1.0907, 10: 1.1931, 1000: 1.2082}[gamma], abs=6e-5)


def test_the_small_quadrature_is_as_good_as_the_large_one(penalty):
    exact = oracles.Mixture1D().problem()
    for gamma, lam in itertools.product((0.1, 1.0, 1e4), (0.05, 1.0, 50.0)):
        shown = readout(penalty.evaluate(gamma=gamma, lam=lam))
        assert shown["L_{γ}(λ)"] == pytest.approx(float(exact.penalty(lam, gamma)), rel=1e-8)
        assert shown["hypergradient (C)"] == pytest.approx(float(exact.hypergrad(lam)), rel=1e-8)


def test_penalty_explorer_tells_a_wrong_sign(penalty):
    assert penalty.evaluate(gamma=0.1, lam=1.0)["warn"]  # argmin L_gamma 0.66 < lam < lam* = 1.21
    assert not penalty.evaluate(gamma=1e4, lam=1.0)["warn"]


def test_penalty_explorer_tells_the_size_too(penalty):
    tiny = penalty.evaluate(gamma=0.2, lam=0.16)
    shown = readout(tiny)
    assert shown["dL_{γ}/dλ (A)"] == pytest.approx(-2.93, abs=5e-3)
    assert shown["hypergradient (C)"] == pytest.approx(-169.7, abs=0.05)
    assert tiny["warn"] and "right sign here, but 0.017 times the size" in tiny["message"]
    for gamma, lam, ratio in ((1, 0.5, "0.21"), (1, 0.16, "0.089")):
        assert f"but {ratio} times the size" in penalty.evaluate(gamma=gamma, lam=lam)["message"]
    assert penalty.evaluate(gamma=10, lam=2.0)["message"] == penalty_side._CLOSE  # 0.34521 against 0.34406
    for gamma in (0.1, 1.0, 10.0, 1000.0):  # never a tick where either is more than twice the other
        for lam in (0.05, 0.2, 1.0, 1.2, 1.3, 5.0, 50.0):
            result = penalty.evaluate(gamma=gamma, lam=lam)
            ratio = readout(result)["dL_{γ}/dλ (A)"] / readout(result)["hypergradient (C)"]
            assert result["warn"] == (not 0.5 <= ratio <= 2), (gamma, lam, ratio)
            assert ("wrong sign" in result["message"]) == (ratio < 0)


def test_lam_explorer_shows_the_estimators_and_the_oracle(lam):
    problem = oracles.Mixture1D().problem()
    for n, strength, gamma in (("2000", 0.71, 10.0), ("2000", 4.0, 1000.0), ("200", 1.0, 1.0)):
        result = lam.evaluate(lam=strength, gamma=gamma, n=n)
        found = readout(result)
        assert found["(A), exact"] == pytest.approx(problem.penalty_grad(strength, gamma).item(), rel=1e-8)
        assert found["E r_{up}, exact"] == pytest.approx(-problem.value(strength).item(), rel=1e-8)
        assert abs(found["(A), batch"] - found["(A), exact"]) < 4 * found["its standard error"]
        lines = {line["label"]: line for line in result["grad"]}
        arguments = (problem.r_up, problem.r_low, lines["est1, exact"]["x"][20], gamma, problem.log_p0)
        est1 = comparisons.lam_grad_released_est1(*arguments)[0].item()
        assert lines["est1, exact"]["y"][20] == pytest.approx(est1, rel=1e-6)


def test_lam_explorer_says_what_to_do(lam):
    def said(**values):
        result = lam.evaluate(**values)
        return result["message"], result["warn"]

    assert said(lam=0.71) == (lam_side._LAM_SAYS["raise"], False)
    assert said(lam=5.0) == (lam_side._LAM_SAYS["lower"], False)
    assert said(lam=1.2) == (lam_side._LAM_SAYS["stop"], False)
    assert said(lam=0.3) == (lam_side._LAM_SAYS["few"], True)
    assert said(lam=1.0, n="200")[1]


def test_tilt_explorer_shows_the_exact_law_and_two_samplers(tilt):
    for lam in (0.4, 2.0, 10.0):
        result = tilt.evaluate(lam=lam)
        lines, found = {line["label"]: line for line in result["line"]}, readout(result)
        law = oracles.Mixture1D().tilt(1 / lam)
        x = torch.tensor(lines["exact tilt"]["x"], dtype=torch.float64)
        shown = torch.tensor(lines["exact tilt"]["y"], dtype=torch.float64)
        assert torch.allclose(shown, law.log_prob(x).exp(), atol=1e-4)
        width = lines["particles"]["x"][1] - lines["particles"]["x"][0]
        for name in ("guided", "particles"):
            assert sum(lines[name]["y"]) * width == pytest.approx(1, abs=0.02)
        mean = sum(w * m for w, m in zip(law.weights, law.means, strict=True))
        assert found["mean, exact"] == pytest.approx(float(mean), abs=1e-9)
        assert found["mean, particles"] == pytest.approx(float(mean), abs=0.2)
        assert found["distance, particles"] == pytest.approx(found["distance, exact"], rel=0.1)
        assert len(result["cloud"][-1]["x"]) == len(result["swarm"][-1]["x"]) == 60


def test_tilt_explorer_tells_where_guidance_is_biased(tilt):
    close, biased = tilt.evaluate(lam=10.0), tilt.evaluate(lam=0.4)
    assert (close["message"], close["warn"]) == (tilt_side._TILT_SAYS["close"], False)
    assert (biased["message"], biased["warn"]) == (tilt_side._TILT_SAYS["biased"], True)
    assert readout(biased)["mean, guided"] > readout(biased)["mean, exact"] + 0.2
    assert readout(biased)["distance, guided"] < 0.9 * readout(biased)["distance, exact"]


def test_samples_explorer_shows_what_it_was_given(samples):
    for at, lam in enumerate(("0.1", "1", "10", "∞ (pre-trained)")):
        result = samples.evaluate(at=at, prompt="a five")
        given, found = frames(1)[at], {row[0]: row[1] for row in result["readout"]}
        assert found["λ"] == lam and found["E CLIP"] == given.up and found["E boldness"] == given.low
        assert found["best of these"] == "0.1"  # 60, 60, 58, 54
        for image, drawn in zip(given.images, result["samples"], strict=True):
            pixels = torch.tensor(drawn["pixels"], dtype=torch.float64)
            assert torch.allclose(pixels, image.double(), atol=1 / 63 + 1e-9)
        lines = {line["label"]: line for line in result["curve"]}
        assert lines["E CLIP"]["x"] == [0.1, 1.0, 10.0] and lines["pre-trained"]["y"] == [54.0]
    assert samples.evaluate(at=0, prompt="a bold two")["readout"][-1][1] == "∞ (pre-trained)"
    with pytest.raises(ValueError, match="must increase and be the same for every prompt"):
        explorers.samples_explorer(
            {"a": frames(0), "b": frames(0, (0.1, 1.0))}, up="CLIP", low="boldness", note="made up"
        )


def test_samples_explorer_opens_where_the_first_prompt_is_best(samples):
    slider = samples.controls[0]
    assert (slider.label, slider.names) == ("λ", ["0.1", "1", "10", "∞ (pre-trained)"])
    prompts = {"a five": frames(1), "a bold two": frames(0)}
    other = explorers.samples_explorer(prompts, up="CLIP", low="boldness", note="made up")
    assert (samples.defaults()["at"], other.defaults()["at"]) == (3, 0)
    with pytest.raises(ValueError, match="slider a: 2 names for 3 values"):
        Slider("a", "a", 0, 2, 0, step=1, names=("one", "two"))


def test_a_slider_of_names_in_a_live_kernel(samples):
    controls, button, text, _ = widgets_of(samples.live())
    assert controls["λ"].options[0] == ("0.1", 0.0) and controls["λ"].label == "∞ (pre-trained)"
    controls["λ"].value = 1.0
    assert controls["λ"].label == "1" and "<b>1</b>" in text.value
    button.click()
    assert controls["λ"].label == "∞ (pre-trained)"


def test_lines_that_share_a_name_share_an_entry_of_the_legend(lam, samples):
    for explorer, name in ((lam, "batch ± 1.96 standard errors"), (samples, "± 1.96 standard errors")):
        result = explorer.evaluate()
        assert [line["label"] for line in result["curve"]].count(name) == 2
        legends = [axes.get_legend() for axes in explorer.figure(result).axes]
        assert [text.get_text() for legend in legends if legend for text in legend.texts].count(name) == 1


@pytest.mark.parametrize("value, end", [(1.0, 0.8), (1e3, 0.9), (1e6, 1.0)])
def test_gamma_explorer_is_the_oracle(gamma, value, end):
    oracle, q = oracles.LinearGaussianSchedule(), torch.tensor([0.0, end, 1.0, 0.008], dtype=torch.float64)
    star, tilted = oracle.solve_star(q), oracle.solve_gamma(q, value)
    assert torch.allclose(gamma_side.linear_gaussian_gamma(oracle, q, value), tilted, rtol=0, atol=1e-10)
    grad, info = estimators.penalty_grad(oracle, q, star, tilted, value)
    hyper = torch.autograd.functional.jacobian(oracle.value, q)
    for k, which in enumerate(("start", "end", "tau")):
        found = readout(gamma.evaluate(gamma=value, end=end, which=which))
        assert found["f at θ_{γ}"] == pytest.approx(info["f"], rel=1e-4)
        assert found[f"penalty gradient in {which}"] == pytest.approx(grad[k].item(), rel=1e-4, abs=1e-9)
        assert found[f"hypergradient in {which}"] == pytest.approx(hyper[k].item(), rel=1e-5)


def test_gamma_explorer_says_who_absorbs_f(gamma):
    found = {value: gamma.evaluate(gamma=value) for value in (1.0, 100.0, 1e4)}
    assert "wrong way" in found[1.0]["message"] and "absorbs 100 % of f" in found[1.0]["message"]
    assert "off by more than a tenth" in found[100.0]["message"] and found[100.0]["warn"]
    assert not found[1e4]["warn"]
    wrong_start = torch.tensor([0.0, 0.2, 1.0, 0.008], dtype=torch.float64)
    with pytest.raises(ValueError, match=r"G = 0\.8602 must not exceed s = 0\.5; take oracle\.solve_gamma"):
        gamma_side.linear_gaussian_gamma(oracles.LinearGaussianSchedule(), wrong_start, 10.0)


# ---- in a live kernel ---------------------------------------------------------------------------------------------
def widgets_of(box) -> tuple[dict, object, object, object]:
    """The controls by description, the button, the readout and the picture."""
    import ipywidgets

    found, button, texts, picture = {}, None, [], None
    stack = [box]
    while stack:
        widget = stack.pop(0)
        if isinstance(widget, ipywidgets.Button):
            button = widget
        elif isinstance(widget, ipywidgets.Image):
            picture = widget
        elif isinstance(widget, ipywidgets.HTML):
            texts.append(widget)
        elif hasattr(widget, "children"):
            stack += widget.children
        else:
            found[widget.description.split(" (")[0]] = widget
    return found, button, next(t for t in texts if "<span" in t.value), picture


def test_widgets_drive_the_python():
    box = small().live()
    controls, button, text, picture = widgets_of(box)
    assert ">0.50<" in text.value and bytes(picture.value).startswith(b"\x89PNG")
    before = picture.value
    controls["a_0"].value = 0.8
    assert ">0.80<" in text.value and picture.value != before
    controls["kind"].value = "turned"
    assert (controls["a_0"].min, controls["a_0"].max, controls["a_0"].value) == (2, 4, 3)
    assert ">−3.00<" in text.value
    button.click()
    assert controls["kind"].value == "plain" and (controls["a_0"].min, controls["a_0"].max) == (0, 1)
    assert ">0.50<" in text.value and picture.value == before


def test_widgets_of_both_explorers(schedule, penalty):
    controls, _, text, _ = widgets_of(schedule.live())
    controls["end"].value = 0.7
    assert "is above 0.001" in text.value
    controls["schedule"].value = "sigmoid"
    assert controls["end"].value == schedules.DEFAULT_Q["sigmoid"][1] and ">0.00281<" in text.value
    controls, _, text, _ = widgets_of(penalty.live())
    controls["λ"].value = 10 ** (-6 / 20)
    shown = format_number(readout(penalty.evaluate(gamma=1.0, lam=0.5))["L_{γ}(λ)"])
    assert shown == "0.9443" and f">{shown}<" in text.value


def test_changes_that_arrive_together_are_drawn_once():
    import asyncio

    calls = []
    explorer = small()
    compute = explorer.compute
    explorer.compute = lambda **values: calls.append(values) or compute(**values)
    controls, *_ = widgets_of(explorer.live())
    assert len(calls) == 1

    async def drag():
        for value in (0.6, 0.7, 0.8, 0.9):
            controls["a_0"].value = value
        await asyncio.sleep(0.3)

    asyncio.run(drag())
    assert [call["a"] for call in calls] == [0.5, 0.9]


def test_show_follows_the_place(monkeypatch):
    import ipywidgets
    from IPython.display import HTML

    monkeypatch.delenv("BILEVEL_STATIC", raising=False)
    assert isinstance(small().show(), ipywidgets.VBox)
    monkeypatch.setenv("BILEVEL_STATIC", "1")
    assert isinstance(small().show(), HTML) and small().show().data == small().html()
    monkeypatch.delenv("BILEVEL_STATIC")
    monkeypatch.setitem(sys.modules, "ipywidgets", None)
    assert isinstance(small().show(), HTML)


# ---- in the browser -----------------------------------------------------------------------------------------------


@pytest.mark.browser
@pytest.mark.parametrize("which", ["schedule", "penalty", "lam", "tilt", "samples", "gamma"])
def test_javascript_agrees_with_python(which, page, request):
    explorer = request.getfixturevalue(which)
    page.set_content(document(explorer))
    settings = [*corners(explorer), explorer.defaults()]
    if which == "penalty":
        pairs = ((0.2, 0.79), (0.2, 0.16), (1.0, 0.5), (13.0, 0.16), (450.0, 1.2), (2500.0, 7.1))
        settings += [{"gamma": g, "lam": v} for g, v in pairs]
    elif which == "lam":
        settings += [
            {"lam": v, "gamma": g, "n": n} for v, g, n in ((0.28, 10.0, "200"), (1.2, 400.0, "2000"), (7.1, 1.0, "200"))
        ]
    elif which == "tilt":
        settings += [{"lam": v} for v in (0.45, 0.9, 1.6, 6.3)]
    elif which == "gamma":
        settings += [{"gamma": g, "end": e, "which": "tau"} for g in (3.2, 1e3, 3.2e6) for e in (0.86, 0.94, 1.0)]
    elif which == "samples":
        settings += [{"at": at, "prompt": prompt} for at in range(4) for prompt in ("a bold two", "a five")]
    else:
        settings += [
            {"kind": k, "form": f, "start": 0.13, "end": 0.83, "tau": 1.35, "epsilon": 0.1}
            for k in schedules.KINDS
            for f in schedules.FORMS
        ]
    element = page.locator(f"#blx-{which}")
    for values in settings:
        ours = element.evaluate("(node, values) => node.explorer.compute(values)", values)
        assert_same(ours, explorer.evaluate(**values), f"{which} at {values}")


@pytest.mark.browser
def test_javascript_formats_numbers_as_python(page):
    page.set_content(document(small()))
    values = [
        1e-16,
        -1e7,
        0.5,
        -0.0012,
        6.07e-8,
        -1234567.0,
        1000.0,
        0.0999999,
        0.0,
        99999.7,
        12.0,
        1e-4,
        3.3e-5,
        999999.6,
    ]
    for spec in (".2f", ".3f", ".2g", ".3g", ".4g"):
        ours = page.locator("#blx-small").evaluate(
            "(n, [v, s]) => v.map((x) => n.explorer.format(x, s))", [values, spec]
        )
        assert ours == [format_number(value, spec) for value in values]


@pytest.mark.browser
def test_two_explorers_on_a_page_by_keyboard(page, schedule, penalty):
    page.set_content(document(schedule, penalty))
    settle(page)
    assert page.locator(".blx").count() == 2 and page.locator(".blx-fallback").count() == 0
    ids = page.locator("[id]").evaluate_all("(all) => all.map((node) => node.id)")
    assert len(ids) == len(set(ids))
    for explorer in (schedule, penalty):
        assert shown(page, explorer.name) == [format_number(*row[1:]) for row in explorer.evaluate()["readout"]]

    other = curve(page, "penalty")
    end, before = page.get_by_role("slider", name="end"), curve(page, "schedule")
    assert end.get_attribute("aria-valuetext") == "1.00"
    page.evaluate("document.addEventListener('keydown', (e) => { document.title = e.key; })")  # as a notebook would
    end.focus()
    assert end.evaluate("(node) => getComputedStyle(node).outlineStyle") == "solid"
    for _ in range(30):
        page.keyboard.press("ArrowLeft")
    settle(page)
    assert page.title() == "explorers", "the notebook around must not see the slider's keys"
    assert end.get_attribute("aria-valuetext") == "0.70" and curve(page, "schedule") != before
    assert "is above 0.001" in page.locator("#blx-schedule [role=status]").inner_text()
    assert shown(page, "schedule")[0] == "0.203"
    page.keyboard.press("End")
    settle(page)
    assert curve(page, "schedule") == before and curve(page, "penalty") == other

    page.get_by_role("slider", name="λ").focus()
    page.keyboard.press("ArrowRight")
    settle(page)
    assert curve(page, "penalty") != other
    want = penalty.evaluate(lam=1.1)["readout"]
    assert shown(page, "penalty") == [format_number(*row[1:]) for row in want]
    page.locator("#blx-penalty button").click()
    settle(page)
    assert curve(page, "penalty") == other


@pytest.mark.browser
def test_a_slider_of_names_says_lambda(page, samples):
    page.set_content(document(samples))
    settle(page)
    slider = page.get_by_role("slider", name="λ")
    assert slider.get_attribute("aria-valuetext") == "∞ (pre-trained)"
    for name in ("10", "1", "0.1"):
        slider.press("ArrowLeft")
        settle(page)
        assert slider.get_attribute("aria-valuetext") == name
        assert page.locator("#blx-samples output").inner_text() == name
        assert shown(page, "samples")[0] == name


@pytest.mark.browser
def test_one_entry_of_the_legend_for_both_ends_of_a_band(page, lam, samples):
    page.set_content(document(lam, samples))
    settle(page)
    for name in ("lam", "samples"):
        legend = page.locator(f"#blx-{name} .blx-legend > span").all_inner_texts()
        assert sum("1.96 standard errors" in entry for entry in legend) == 1, legend


OVERLAPS = """(root) => [...root.querySelectorAll("svg")].flatMap((canvas) => {
  const turned = canvas.querySelector("text[transform]");
  if (!turned) return [];
  const name = turned.getBoundingClientRect(), edge = canvas.getBoundingClientRect().left;
  return [...canvas.querySelectorAll('text[text-anchor="end"]')].flatMap((tick) => {
    const box = tick.getBoundingClientRect();
    return box.left < name.right + 2 || box.left < edge ? [`${turned.textContent}: ${tick.textContent}`] : [];
  });
})"""


@pytest.mark.browser
@pytest.mark.parametrize("which", ["schedule", "penalty", "lam", "tilt", "samples", "gamma"])
def test_the_axis_name_is_clear_of_its_numbers(which, new_page, request):
    explorer = request.getfixturevalue(which)
    for width in (1000, 360):
        page = new_page(viewport={"width": width, "height": 900})
        page.set_content(document(explorer))
        settle(page)
        assert page.locator(f"#blx-{which}").evaluate(OVERLAPS) == []
        for option in ("start", "end", "tau") if which == "gamma" else ():
            page.locator("#blx-gamma select").select_option(option)
            settle(page)
            assert page.locator("#blx-gamma").evaluate(OVERLAPS) == []


@pytest.mark.browser
def test_choices_set_the_ranges_and_pictures_follow(page, schedule):
    page.set_content(document(schedule))
    settle(page)

    def pixels(i: int) -> list[int]:
        js = "(c) => Array.from(c.getContext('2d').getImageData(0, 0, 8, 8).data).filter((_, i) => i % 4 === 0)"
        return page.locator("#blx-schedule canvas").nth(i).evaluate(js)

    clean, middle = pixels(0), pixels(4)
    assert max(abs(a - (b + 1) * 127.5) for a, b in zip(clean, DIGIT.flatten().tolist(), strict=True)) < 1
    page.get_by_label("schedule", exact=True).select_option("sigmoid")
    settle(page)
    values = page.locator("#blx-schedule").evaluate("(node) => node.explorer.values()")
    assert tuple(values[name] for name in schedules.NAMES) == schedules.DEFAULT_Q["sigmoid"]
    assert pixels(0) == clean and pixels(4) != middle
    page.get_by_label("form").select_option("normalised")
    settle(page)
    assert "about 0" in page.locator("#blx-schedule [role=status]").inner_text()
    page.locator("#blx-schedule button").click()
    settle(page)
    assert page.locator("#blx-schedule").evaluate("(node) => node.explorer.values()") == schedule.defaults()
    assert pixels(4) == middle


@pytest.mark.browser
def test_mouse_drag_redraws_while_it_moves(page, penalty):
    page.set_content(document(penalty))
    settle(page)
    box = page.get_by_role("slider", name="γ").bounding_box()
    y, seen = box["y"] + box["height"] / 2, set()
    page.mouse.move(box["x"] + box["width"] * 0.2, y)
    page.mouse.down()
    for part in (0.3, 0.5, 0.7, 0.9):
        page.mouse.move(box["x"] + box["width"] * part, y)
        settle(page)
        seen.add(curve(page, "penalty"))
    page.mouse.up()
    assert len(seen) == 4


@pytest.mark.browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_on_a_phone_by_touch_in_both_schemes(new_page, schedule, penalty, scheme):
    page = new_page(viewport={"width": 360, "height": 740}, has_touch=True, is_mobile=True, color_scheme=scheme)
    page.set_content(document(schedule, penalty))
    settle(page)
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    before, slider = curve(page, "penalty"), page.get_by_role("slider", name="γ")
    slider.scroll_into_view_if_needed()
    box = slider.bounding_box()
    page.touchscreen.tap(box["x"] + 0.8 * box["width"], box["y"] + box["height"] / 2)
    settle(page)
    values = page.locator("#blx-penalty").evaluate("(node) => node.explorer.values()")
    assert curve(page, "penalty") != before and values["gamma"] > 100

    # legible: the text stands out from the background by the WCAG's 4.5 to 1, lines by 3 to 1
    js = """(node) => { const s = getComputedStyle(node), p = (n) => s.getPropertyValue(n).trim();
      return [s.backgroundColor, s.color, p("--blx-soft"), ...ROLES.map((r) => p("--blx-" + r))]; }"""
    roles = [role for role in ROLES if role != "zero"]
    colours = page.locator("#blx-penalty").evaluate(js.replace("ROLES", json.dumps(roles)))

    def luminance(colour: str) -> float:
        if colour.startswith("#"):
            parts = [int(colour[i : i + 2], 16) for i in (1, 3, 5)]
        else:
            parts = [int(v) for v in re.findall(r"\d+", colour)[:3]]
        linear = [v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4 for v in (p / 255 for p in parts)]
        return sum(w * v for w, v in zip((0.2126, 0.7152, 0.0722), linear, strict=True))

    ground, *inks = map(luminance, colours)
    assert (ground < 0.1) == (scheme == "dark")
    contrast = [(max(ink, ground) + 0.05) / (min(ink, ground) + 0.05) for ink in inks]
    assert min(contrast[:2]) >= 4.5 and min(contrast) >= 3


@pytest.mark.browser
@pytest.mark.parametrize(
    "scheme, attributes, dark",
    [
        ("light", 'html data-theme="dark"', True),
        ("dark", 'html data-theme="light"', False),
        ("dark", 'body data-jp-theme-light="true"', False),
        ("light", 'body data-jp-theme-light="false"', True),
    ],
)
def test_the_page_chooses_the_theme(new_page, scheme, attributes, dark):
    page = new_page(color_scheme=scheme)
    tag, attribute = attributes.split(" ")
    html = f"<html {attribute if tag == 'html' else ''}><body {attribute if tag == 'body' else ''}>{small().html()}"
    page.set_content("<!doctype html>" + html)
    ground = page.locator(".blx").evaluate("(node) => getComputedStyle(node).backgroundColor")
    assert ground == ("rgb(23, 27, 33)" if dark else "rgb(255, 255, 255)")


@pytest.mark.browser
def test_in_a_sandboxed_frame_and_attached_late(page):
    page.set_content('<!doctype html><iframe sandbox="allow-scripts" style="width:600px;height:700px"></iframe>')
    page.locator("iframe").evaluate("(frame, html) => { frame.srcdoc = html; }", document(small()))
    frame = page.frame_locator("iframe")
    frame.locator("#blx-small-a").press("ArrowRight")
    frame.locator(".blx-readout", has_text="0.60").wait_for()

    # as JupyterLab does it: the script runs while the output is not in the page yet
    page.set_content("<!doctype html><body>")
    page.evaluate(
        """(html) => { const host = document.createElement("div"); host.innerHTML = html;
          const script = document.createElement("script");
          script.textContent = host.querySelector("script").textContent;
          document.head.append(script); setTimeout(() => document.body.append(host), 120); }""",
        small().html(),
    )
    page.locator("#blx-small-a").press("ArrowRight")
    page.locator(".blx-readout", has_text="0.60").wait_for()


@pytest.mark.browser
def test_without_javascript_there_is_a_text_and_no_dead_control(new_page, penalty):
    page = new_page(java_script_enabled=False)
    page.set_content(document(penalty))
    assert "needs JavaScript" in page.locator(".blx-fallback").inner_text()
    assert "0.6798" in page.locator(".blx-fallback").inner_text()
    assert page.locator("input, select, button").count() == 0
