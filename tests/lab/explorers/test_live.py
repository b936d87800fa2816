"""The live figures: layers and sampler in the browser against Python's, buttons, and what can go wrong, in Chromium."""

from __future__ import annotations

import base64
import hashlib
import json
import math
import re
from pathlib import Path

import pytest
import torch
from explorer_page import assert_same, document, settle

from bilevel_core import samplers, schedules
from bilevel_core.lab import distances, explorers, results
from bilevel_core.lab.explorers import engine, worker
from bilevel_core.lab.explorers.grid import START, cosine_levels, mosaic
from bilevel_core.lab.models import captions, clip, level_model, networks, packs, text_models
from bilevel_core.lab.models.chains import Chain
from bilevel_core.lab.studies import live_figures, tilted_truth
from bilevel_core.tempering import noise_map

CURVE = [{"lam": lam, "clip": 40 + 10 * lam, "pull": 3 - lam} for lam in (0.1, 0.5, 2.0, math.inf)]
CLOSE = 1e-3  # what page and Python may differ by: pixels in [-1, 1], rewards


@pytest.fixture(scope="module")
def pull() -> explorers.LiveExplorer:
    """The figure of chapter 5 with two chains and one sweep of warm-up."""
    explorer = live_figures.pull({"a bold four": CURVE})
    explorer.data |= {"chains": 2, "warmup": 1}
    return explorer


@pytest.fixture(scope="module")
def grid() -> explorers.LiveExplorer:
    return live_figures.grid()


@pytest.fixture(scope="module")
def pull_site(tmp_path_factory, pull) -> Path:
    """A site of one page, to be opened from the disk."""
    return lay(tmp_path_factory.mktemp("pull"), pull)


@pytest.fixture(scope="module")
def grid_site(tmp_path_factory, grid) -> Path:
    return lay(tmp_path_factory.mktemp("grid"), grid)


def lay(site: Path, figure: explorers.LiveExplorer) -> Path:
    live = site / "_static" / "live"
    live.mkdir(parents=True)
    (site / "notebooks").mkdir()
    (live / "runtime.js").write_text(worker.runtime()[0])
    (live / f"{figure.pack.name}.js").write_text(worker.pack_script(figure.pack))
    (site / "notebooks" / f"{figure.name}.html").write_text(document(figure))
    return site


def opened(page, folder: Path, name: str, load: bool = True):
    """The figure on its page, from the disk; loaded by its button."""
    page.goto((folder / "notebooks" / f"{name}.html").as_uri())
    settle(page)
    root = page.locator(f"#blx-{name}")
    if load:
        root.locator(".blx-load").click()
        page.wait_for_function(f"document.querySelector('#blx-{name} .blx-load') === null", timeout=60_000)
        root.locator(".blx-readout", has_text="second").wait_for(timeout=60_000)
    return root


def said(root) -> str:
    return root.locator("[role=status]").inner_text()


# what a worker answers to questions, as plain lists
ASK = """async (root, questions) => {
  const found = [];
  for (const { ask, ...rest } of questions) {
    for (const name of ["z", "xi", "x"]) if (rest[name]) rest[name] = Float32Array.from(rest[name]);
    const answer = await root.explorer.ask({ ask, ...rest });
    const plain = (v) => (v.length ? [...v] : v);
    for (const name of ["images", "pixels"]) if (answer[name]) answer[name] = Array.from(answer[name], plain);
    found.push(answer);
  }
  return found;
}"""


def halved(module):
    """The network with the weights that a pack holds."""
    state = {k: v.half().to(v) if v.is_floating_point() else v for k, v in module.state_dict().items()}
    module.load_state_dict(state)
    return module


# ---- what a page is given -------------------------------------------------------------------------------------------
def test_a_pack_holds_the_shipped_weights_in_half_precision(pull, grid):
    from safetensors.torch import load

    tensors = load(pull.pack.content)
    assert {v.dtype for k, v in tensors.items() if not k.startswith("text.")} == {torch.float16}
    shipped = networks.load_text_denoiser().state_dict()
    for name, value in shipped.items():
        assert torch.equal(tensors[f"text_denoiser.{name}"], value.half()), name
    assert sum(k.startswith("text.") for k in tensors) == len(pull.data["prompts"])
    assert not any(k.startswith("clip.") and not k.startswith("clip.visual.") for k in tensors)
    assert max(len(figure.pack.content) for figure in (pull, grid)) < 6e6
    with pytest.raises(ValueError, match="w hold numbers beyond half precision"):
        packs.halved({"w": torch.tensor([1e6])}, "")


def test_what_is_vendored_is_small_named_and_checked(root, monkeypatch):
    folder = root / "bilevel_core" / "lab" / "explorers" / "vendor"
    about = json.loads((folder / "versions.json").read_text())
    assert about["from"] == {"@tensorflow/tfjs-core": "4.22.0", "@tensorflow/tfjs-backend-wasm": "4.22.0"}
    assert "Apache License" in (folder / "LICENSE").read_text()
    assert sum(file.stat().st_size for file in folder.iterdir()) < 3e6
    assert set(about["sha256"]) == {f.name for f in folder.iterdir() if f.suffix in (".js", ".wasm")}
    for file, digest in about["sha256"].items():
        assert hashlib.sha256(worker.vendored(file)).hexdigest() == digest
    monkeypatch.setattr(Path, "read_bytes", lambda self: b"other")
    with pytest.raises(ValueError, match=r"tf-core\.es2017\.min\.js was altered .* install the package again"):
        worker.vendored("tf-core.es2017.min.js")


def test_the_button_names_the_size_and_the_page_stays_light(pull, grid):
    for figure in (pull, grid):
        page, size = figure.html(), len(worker.runtime()[0]) + len(worker.pack_script(figure.pack))
        assert figure.data["live"]["megabytes"] == f"{size / 1e6:.1f}"
        assert len(page.encode()) < 60_000 and figure.pack.checksum in page
        assert len(figure.standalone()) > size


def test_a_notebook_with_a_kernel_gets_everything_in_its_output(grid, monkeypatch):
    monkeypatch.setenv("BILEVEL_STATIC", "1")
    assert grid.show().data == grid.html()
    monkeypatch.delenv("BILEVEL_STATIC")
    assert grid.show().data == grid.standalone()


def test_wrong_curves_and_pictures_are_named(pull):
    told = live_figures.pulled("a thin six", {"mean": -2.7, "sd": 0.5, "at": 5.0})
    assert (told.heard, told.up) == ("a six", "thinness")
    assert told.chain["pull"] == {"measure": "thickness", "sign": -1, "mean": -2.7, "sd": 0.5, "at": 5.0}
    assert live_figures.pulled("a three leaning right", {}).chain["pull"] == {"measure": "slant", "sign": 1}
    with pytest.raises(ValueError, match="no scale is recorded for a bold one"):
        live_figures.pull({"a bold one": CURVE})
    with pytest.raises(ValueError, match="no row at a finite lam"):
        explorers.pull_explorer({"a": explorers.Pulled("a", {}, "", CURVE[3:])}, torch.zeros(1, 2, 2), pull.pack)
    with pytest.raises(ValueError, match=r"from 0 to 2; they must lie in \[-1, 1\]"):
        explorers.pull_explorer({"a": told}, torch.full((1, 2, 2), 2.0).triu(), pull.pack)


def test_levels_of_the_sliders_are_those_of_the_core():
    seen = (0.01, 1.55)
    levels = cosine_levels(0.1, 0.9, 1.5, 4, seen)
    q = torch.tensor([0.1, 0.9, 1.5, schedules.DEFAULT_Q["cosine"][3]], dtype=torch.float64)
    abar = schedules.abar(q, 1000)[samplers.timesteps(1000, 4)[::-1]]
    assert torch.allclose(levels, schedules.angle(abar))
    assert cosine_levels(0.0, 1.0, 3.0, 12, (0.01, 1.0)).max() == 1.0  # what it has not seen is left out
    tiles = mosaic(torch.arange(1, 4, dtype=torch.float64)[:, None, None].expand(3, 2, 2))
    assert tiles.tolist() == [[1, 1, 0, 2, 2]] * 2 + [[0] * 5] + [[3, 3, 0, 0, 0]] * 2


def test_scales_are_those_of_the_problems(tmp_path):
    path = live_figures.record_scales(["a thin six"], tmp_path / "draws", "smoke", tmp_path, draws=20)
    scale = results.read_result(path.stem, tmp_path)["data"]["scales"]["a thin six"]
    problem = tilted_truth.problem(Chain.shipped(), "a thin six", draws=20, folder=tmp_path / "draws")
    assert scale == {"mean": problem.pull.mean, "sd": problem.pull.sd, "at": problem.pull.at}
    recorded = results.read_result("05_pulls")["data"]["scales"]
    assert set(tilted_truth.TEST) <= set(recorded) and recorded["a thin six"]["mean"] == pytest.approx(-2.78, abs=0.01)


def test_recorded_curves_are_drawn_where_there_are_any(monkeypatch):
    assert all(row["clip"] for rows in live_figures.recorded_curves().values() for row in rows)
    monkeypatch.setattr(results, "read_result", lambda name: {"data": {"curves": {"a bold four": CURVE}}})
    assert live_figures.recorded_curves() == {"a bold four": CURVE}


# ---- the same numbers -----------------------------------------------------------------------------------------------
@pytest.mark.browser
@pytest.mark.parametrize(
    "name, settings",
    [
        ("pull", [{}, {"lam": 0.1, "prompt": "a thin six"}]),
        ("grid", [{}, {"end": 0.7, "tau": 2.0, "N": 9}, {"end": 1.0}]),
    ],
)
def test_before_the_button_the_page_agrees_with_python(page, request, name, settings):
    figure = request.getfixturevalue(name)
    root = opened(page, request.getfixturevalue(f"{name}_site"), name, load=False)
    for values in settings:
        ours = root.evaluate("(node, values) => node.explorer.compute(values)", {**figure.defaults(), **values})
        assert_same(ours, figure.evaluate(**values), f"{name} at {values}")


@pytest.mark.browser
def test_digits_and_rewards_agree_with_python(page, pull_site, pull):
    root = opened(page, pull_site, "pull")
    denoiser, model = halved(networks.load_text_denoiser()), halved(clip.load())
    chain = Chain(denoiser, text_models.abar(text_models.RECIPES["denoiser"]))
    generator = torch.Generator().manual_seed(0)
    for prompt in ("a bold four", "a bold seven leaning left"):
        told = pull.data["prompts"][prompt]["chain"]
        scale = told["pull"]
        if "leaning" in prompt:  # the other measure as well
            told = told | {"pull": scale | {"measure": "slant", "sign": -1, "mean": 0.1, "sd": 0.2}}
        drawn = noise_map(chain.denoise(tilted_truth.heard(prompt)), chain.abar, chain.ts, chain.shape, eta=chain.eta)
        z, xi = torch.randn(2, 2, *drawn.shape, generator=generator)
        start = {"ask": "start", "chain": {"name": prompt, **told}, "chains": 2, "seed": 1, "z": z.flatten().tolist()}
        move = {"ask": "sweep", "lam": 0.4, "k": 5, "warmup": 1, "xi": xi.flatten().tolist(), "u": [1e-9, 1 - 1e-9]}
        first, second = root.evaluate(ASK, [start, move])
        assert second["s"] == pytest.approx(0.5)
        moved = math.sqrt(0.75) * z + 0.5 * xi
        with torch.no_grad():
            images, proposed = (chain.decode(drawn.run(v)) for v in (z, moved))
            score = clip.score(model, prompt)
            measure = captions.slant if "leaning" in prompt else captions.thickness
            pulled = tilted_truth.Pull(prompt, told["pull"]["mean"], told["pull"]["sd"])
            r, after = (
                (5 * torch.tanh((told["pull"]["sign"] * measure(x) - pulled.mean) / pulled.sd / 5))
                for x in (images, proposed)
            )
            if "leaning" not in prompt:
                assert torch.allclose(r, pulled(images), atol=1e-6)
        taken = [True, bool((after - r)[1] / 0.4 > -1e-9)]
        assert second["taken"] == taken
        kept = torch.where(torch.tensor(taken)[:, None, None, None], proposed, images)
        for found, x in ((first, images), (second, kept)):
            shown = torch.tensor(found["images"]).reshape(x.shape)
            assert (shown - x).abs().max() < CLOSE
            assert (torch.tensor(found["clip"]) - score(x)).abs().max() < CLOSE * 10  # of 0 to 100
            assert (torch.tensor(found["attribute"]) - measure(x)).abs().max() < CLOSE
        assert (torch.tensor(first["r"]) - r).abs().max() < CLOSE * 5


@pytest.mark.browser
def test_small_digits_and_their_distance_agree_with_python(page, grid_site):
    root = opened(page, grid_site, "grid")
    network, classifier = level_model.load(), halved(networks.load_classifier("mnist8"))
    halved(network.network)
    real = distances.moments(networks.reference_features("mnist8", "val"))
    for levels in (cosine_levels(**START, seen=network.seen), torch.tensor([0.2, 0.7, 1.3, 1.56])):
        found = root.evaluate(ASK, [{"ask": "draw", "levels": levels.tolist(), "stretch": network.network.stretch}])[0]
        images = live_figures.drawn(network, levels)
        assert (torch.tensor(found["pixels"]).reshape(images.shape) - images).abs().max() < CLOSE
        with torch.no_grad():
            distance = distances.frechet(distances.moments(classifier.features(images)), real).item()
        assert found["distance"] == pytest.approx(distance, rel=CLOSE)


# ---- pieces of the worker, by themselves ----------------------------------------------------------------------------
def piece(page, file: str, expression: str, *given):
    """The value of an expression of (given) after one of the worker's files, in a page of nothing."""
    page.goto("about:blank")
    body = f"([source, given]) => new Function('given', source + ';return ' + {json.dumps(expression)})(given)"
    return page.evaluate(body, [engine.read_asset(file), given])


@pytest.mark.browser
def test_half_precision_is_read_exactly(page):
    bits = torch.arange(2**16, dtype=torch.int32).to(torch.uint16)
    wanted = bits.view(torch.float16).float()
    finite = wanted.isfinite()
    found = piece(page, "layers.js", "Array.from({length: 65536}, (_, i) => half(i)).filter(Number.isFinite)")
    assert torch.equal(torch.tensor(found), wanted[finite])
    special = piece(
        page, "layers.js", "[half(0x7c00) === Infinity, half(0xfc00) === -Infinity, half(0x7e00)].map(String)"
    )
    assert special == ["true", "true", "NaN"]


@pytest.mark.browser
@pytest.mark.parametrize("length", [0, 3, 55, 56, 63, 64, 65, 1000])
def test_checksums_are_sha256(page, length):
    content = bytes(i * 7 % 256 for i in range(length))
    found = piece(page, "worker.js", "sha256(Uint8Array.from(given[0]))", list(content))
    assert found == hashlib.sha256(content).hexdigest()


@pytest.mark.browser
def test_moves_in_noise_leave_the_tilted_law_as_it_is(page):
    """r = z_1 under N(0, I): the tilt at lam is N(1/lam, 1) in z_1 and N(0, 1) in z_2; within four standard errors."""
    run = """(async () => {
      const rows = (z) => Array.from({ length: z.length / 2 }, (_, j) => [z[2 * j], z[2 * j + 1]]);
      const look = async (z) => ({ r: rows(z).map(([a]) => a), other: rows(z).map(([, b]) => b) });
      const tilt = new Tilt(look, 400, 2, new Random(3)), out = [];
      await tilt.start();
      for (let k = 0; k < 300; k += 1) {
        const { s, share } = await tilt.sweep(0.8, k, 40);
        if (k >= 60) out.push([tilt.now.r.slice(), tilt.now.other.slice(), s, share]);
      }
      return out;
    })()"""
    rows = piece(page, "sampler.js", run)
    assert len({row[2] for row in rows}) == 1 and sum(row[3] for row in rows) / len(rows) == pytest.approx(0.3, abs=0.1)
    for column, mean in ((0, 1 / 0.8), (1, 0.0)):
        values = torch.tensor([row[column] for row in rows], dtype=torch.float64)  # (sweeps, chains)
        for power, wanted in ((1, mean), (2, 1 + mean**2)):
            chains = values.pow(power).mean(0)
            assert abs(chains.mean() - wanted) < 4 * chains.std() / len(chains) ** 0.5, (column, power)


@pytest.mark.browser
def test_chains_that_climb_are_noticed(page):
    generator = torch.Generator().manual_seed(0)
    flat = torch.randn(40, 8, generator=generator, dtype=torch.float64)
    rising = flat + torch.linspace(0, 2, 40, dtype=torch.float64)[:, None]
    rise = rising[20:].mean(0) - rising[:20].mean(0)
    found = piece(page, "sampler.js", "given.map(climb)", *[rows.tolist() for rows in (flat, rising, rising[:9])])
    assert abs(found[0]) < 2.5 < found[1] == pytest.approx((rise.mean() / rise.std() * 8**0.5).item())
    assert found[2] == 0  # too few to tell


# ---- what a reader does ---------------------------------------------------------------------------------------------
@pytest.mark.browser
def test_nothing_is_loaded_until_the_button_is_pressed(page, pull_site):
    asked = []
    page.on("request", lambda request: asked.append(request.url))
    root = opened(page, pull_site, "pull", load=False)
    page.wait_for_timeout(300)
    assert [url for url in asked if "live/" in url] == []
    assert re.fullmatch(r"Load the model \(\d\.\d MB\)", root.locator(".blx-load").inner_text())
    assert root.locator(".blx-play").count() == 0 and "Nothing runs yet" in said(root)
    assert root.locator("canvas").count() == 8  # recorded draws of p_0


@pytest.mark.browser
def test_play_gathers_means_follows_the_slider_and_resets(page, pull_site):
    root = opened(page, pull_site, "pull")
    state = "document.querySelector('#blx-pull').explorer.result()"
    points = f"{state}.clip.filter((line) => line.label === 'yours')"
    root.locator(".blx-once").click()
    root.locator(".blx-readout", has_text="sweeps1").wait_for()
    assert "Paused" in said(root)
    root.locator(".blx-play").press("Enter")  # by keyboard
    page.wait_for_function(f"{points}.length === 1", timeout=60_000)
    assert root.locator("canvas").count() == 4 and root.locator(".blx-play").inner_text() == "Pause"
    root.get_by_role("slider", name="λ").press("ArrowLeft")  # while a sweep runs
    page.wait_for_function(f"{points}.length === 2", timeout=60_000)
    lams = page.evaluate(f"{points}.map((line) => line.x[0])")
    assert lams == [1.0, 0.89]
    bars = page.evaluate(f"{state}.clip.filter((line) => line.label.includes('standard errors')).map((line) => line.y)")
    assert all(low < high for low, high in bars)
    root.locator("select").select_option("a thin six")  # another prompt begins anew
    page.wait_for_function(f"{state}.untuned.length === 2 && {points}.length === 1", timeout=60_000)
    root.get_by_role("button", name="Reset").click()
    page.wait_for_function(f"{points}.length === 0", timeout=60_000)
    assert root.locator(".blx-play").inner_text() == "Play"
    assert root.evaluate("(node) => node.explorer.values()") == {"prompt": "a bold four", "lam": 1.0}


@pytest.mark.browser
def test_a_hidden_tab_pauses(page, pull_site):
    root = opened(page, pull_site, "pull")
    hide = """(on) => { Object.defineProperty(document, "hidden", { get: () => on, configurable: true });
      document.dispatchEvent(new Event("visibilitychange")); }"""
    sweeps = "Number(document.querySelectorAll('#blx-pull .blx-readout span:last-child')[1].innerText)"
    root.locator(".blx-play").click()
    page.wait_for_function(f"{sweeps} >= 1", timeout=60_000)
    page.evaluate(hide, True)
    root.locator("[role=status]", has_text="hidden").wait_for()
    page.wait_for_function("document.querySelector('#blx-pull') !== null")
    page.wait_for_timeout(2500)  # the sweep that ran ends
    before = page.evaluate(sweeps)
    page.wait_for_timeout(2000)
    assert page.evaluate(sweeps) == before
    page.evaluate(hide, False)
    page.wait_for_function(f"{sweeps} > {before}", timeout=60_000)


@pytest.mark.browser
def test_a_slow_machine_has_fewer_chains_and_says_so(new_page, tmp_path, pull):
    pull.data |= {"chains": 4, "patience": 0}
    try:
        lay(tmp_path, pull)
    finally:
        pull.data |= {"chains": 2, "patience": 6000}
    root = opened(new_page(), tmp_path, "pull")
    assert "A sweep of 4 chains would take too long here: there are 2" in said(root)
    assert root.locator("canvas").count() == 4


@pytest.mark.browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_grids_by_slider_by_hand_and_learned_on_a_phone(new_page, grid_site, grid, scheme):
    page = new_page(viewport={"width": 375, "height": 800}, has_touch=True, is_mobile=True, color_scheme=scheme)
    root = opened(page, grid_site, "grid")
    assert page.evaluate("document.documentElement.scrollWidth") <= 375
    state, handles = "document.querySelector('#blx-grid').explorer.result()", root.locator("[role=slider].blx-handle")

    def drawn(points: int) -> dict:
        page.wait_for_function(
            f"{state}.message.startsWith('Drawn') && {state}.frechet.some((l) => l.label === 'your 64')"
        )
        held = f"{state}.frechet.filter((l) => l.label.startsWith('your 64')).reduce((n, l) => n + l.x.length, 0)"
        page.wait_for_function(f"{held} === {points}", timeout=20_000)
        return page.evaluate(state)

    first = drawn(1)
    assert handles.count() == START["N"]
    root.locator("input[name=end]").press("ArrowRight")
    assert drawn(2)["drawn"] != first["drawn"]
    root.locator(".blx-learned").click()
    learned = drawn(3)
    assert "the learned grid of 5 steps" in learned["message"]
    at = float(handles.nth(2).get_attribute("aria-valuenow"))
    assert at == pytest.approx(grid.data["grids"]["5"][2] / (math.pi / 2), abs=1e-3)
    handles.nth(2).press("ArrowRight")
    by_hand = drawn(4)
    assert float(handles.nth(2).get_attribute("aria-valuenow")) > at and "by hand" in by_hand["message"]
    handles.nth(0).scroll_into_view_if_needed()
    box, far = handles.nth(0).bounding_box(), handles.nth(1).bounding_box()
    page.mouse.move(box["x"] + 9, box["y"] + 9)
    page.mouse.down()
    page.mouse.move(far["x"] + 200, far["y"] + 9, steps=4)  # stops before its neighbour
    page.mouse.up()
    drawn(5)
    places = [float(handle.get_attribute("aria-valuenow")) for handle in handles.all()]
    assert places == sorted(places) and len(set(places)) == len(places)
    root.get_by_role("button", name="Reset").click()
    assert drawn(1)["frechet"][-1]["y"] == first["frechet"][-1]["y"]  # common noise


# ---- what can go wrong ----------------------------------------------------------------------------------------------
@pytest.mark.browser
@pytest.mark.parametrize(
    "fault, reason",
    [("flipped", "checksum is wrong"), ("missing", "levels.js is missing"), ("other", "of another build")],
)
def test_damaged_weights_are_named_and_can_be_tried_again(browser, tmp_path, grid, fault, reason):
    lay(tmp_path, grid)
    file = tmp_path / "_static" / "live" / "levels.js"
    good = file.read_text()
    content = bytearray(grid.pack.content)
    content[-5] ^= 1
    bad = {"flipped": good.replace(base64.b64encode(grid.pack.content).decode(), base64.b64encode(content).decode())}
    bad["other"] = good.replace(grid.pack.version, "0123456789")
    if fault == "missing":
        file.unlink()
    else:
        assert bad[fault] != good
        file.write_text(bad[fault])
    page = browser.new_page()
    root = opened(page, tmp_path, "grid", load=False)
    root.locator(".blx-load").click()
    root.locator("[role=status]", has_text=reason).wait_for(timeout=60_000)
    assert root.locator("canvas").count() == 1  # the recorded picture stays
    file.write_text(good)
    if fault != "missing":  # the browser remembers that there was no such file
        root.get_by_role("button", name="Try again").click()
        root.locator(".blx-readout", has_text="seconds").wait_for(timeout=60_000)
    page.close()


@pytest.mark.browser
@pytest.mark.parametrize(
    "lacking", ["delete window.WebAssembly", "WebAssembly.validate = () => false", "delete window.Worker"]
)
def test_without_webassembly_the_recorded_figure_stays(page, grid_site, lacking):
    page.add_init_script(lacking)
    root = opened(page, grid_site, "grid", load=False)
    assert "no WebAssembly" in said(root) and root.locator(".blx-load").count() == 0
    assert root.locator("canvas").count() == 1
    root.get_by_role("slider", name="τ").press("ArrowRight")  # curves still follow
    settle(page)
    assert page.evaluate("document.querySelector('#blx-grid').explorer.values().tau") == 1.05


@pytest.mark.browser
def test_without_webassembly_the_recorded_curve_of_the_pull_stays(page, pull_site):
    page.add_init_script("delete window.WebAssembly")
    root = opened(page, pull_site, "pull", load=False)
    assert "no WebAssembly" in said(root) and root.locator(".blx-load").count() == 0
    values = "document.querySelector('#blx-pull').explorer.values()"
    before = page.evaluate(values)
    assert root.locator("svg path").count() > 0  # the recorded curve, whose mark follows the slider
    drawn = "nodes => nodes.map(node => node.innerHTML).join()"
    marks = root.locator("svg").evaluate_all(drawn)
    root.get_by_role("slider").first.press("ArrowLeft")
    settle(page)
    assert page.evaluate(values) != before and root.locator("svg").evaluate_all(drawn) != marks
