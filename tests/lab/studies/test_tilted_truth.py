"""The truth of a prompt: its lower reward, runs that go on after a kill, and what they say where all is known."""

import math
import types
from dataclasses import replace

import pytest
import torch

from bilevel_core import algorithms, tempering
from bilevel_core.estimators import pool
from bilevel_core.lab import certificates, files
from bilevel_core.lab.models import captions, chains, networks, text_models
from bilevel_core.lab.studies import tilted_truth
from bilevel_core.lab.studies.tilted_truth import Pull, Truth

PROMPT = "a bold two"
LAMS = (math.inf, 1.0, 0.3)
SIZE = {"sweeps": 6, "warmup": 3, "chains": 2, "seed": 0, "lams": LAMS, "block": 2}


# ---------------------------------------------------------------- prompts and the lower reward


def test_p_0_does_not_hear_the_word_that_the_reward_asks_for():
    assert tilted_truth.heard("a bold two") == "a two" == tilted_truth.heard("a two leaning left")
    assert tilted_truth.heard("a thin nine leaning right") == "a nine leaning right"
    with pytest.raises(ValueError, match="'a two' names neither thickness nor slant"):
        tilted_truth.heard("a two")
    with pytest.raises(ValueError, match="unknown word 'bald': did you mean 'bold'"):
        tilted_truth.heard("a bald two")


def test_prompts_are_kept_apart_and_of_several_kinds():
    everything = (*tilted_truth.VALIDATION, *tilted_truth.TEST)
    assert len(set(everything)) == 16 and all(tilted_truth.heard(prompt) != prompt for prompt in everything)
    words = " ".join(tilted_truth.TEST)
    assert all(word in words for word in ("bold", "medium", "thin", "leaning left", "leaning right"))


def bars(widths=(2, 4, 8), lean=0.0):
    """Upright bars (n, 1, 28, 28), or bars that lean to the right, of these widths."""
    row, column = torch.meshgrid(torch.arange(28.0), torch.arange(28.0), indexing="ij")
    off = (column - 13.5 - lean * (13.5 - row)).abs()
    shapes = [((off < width / 2) & (row > 3) & (row < 24)).float() for width in widths]
    return torch.stack(shapes)[:, None] * 2 - 1


@pytest.mark.parametrize("prompt, sign", [("a bold two", 1), ("a medium two", 1), ("a thin two", -1)])
def test_the_pull_on_the_stroke_goes_where_the_word_says(prompt, sign):
    pull = Pull(prompt, 0.0, 1.0, math.inf)
    found = sign * pull(bars())
    torch.testing.assert_close(found, captions.thickness(bars()))
    assert (found.diff() > 0).all()
    assert (sign * Pull(f"{prompt} leaning left", 0.0, 1.0, math.inf)(bars())).equal(found)  # the slant is heard


@pytest.mark.parametrize("prompt, sign", [("a two leaning right", 1), ("a two leaning left", -1)])
def test_the_pull_on_the_slant_goes_where_the_words_say(prompt, sign):
    images = torch.cat([bars((4,), lean) for lean in (-0.4, 0.0, 0.4)])
    found = sign * Pull(prompt, 0.0, 1.0, math.inf)(images)
    assert (found.diff() > 0.1).all() and found[1].abs() < 0.05


def test_the_pull_is_standardised_and_saturates():
    images = bars((2, 3, 4, 6, 12))
    z = (captions.thickness(images) - 3) / 0.5
    torch.testing.assert_close(Pull("a bold two", 3.0, 0.5, math.inf)(images), z)
    pull = Pull("a bold two", 3.0, 0.5, 2.0)
    torch.testing.assert_close(pull(images), 2 * torch.tanh(z / 2))
    torch.testing.assert_close(pull.attribute(images), z)
    assert z.max() > 8 and pull(images).abs().max() <= 2
    wide = Pull("a bold two", 3.0, 2.0)  # within a standard deviation it leaves z nearly as it is
    torch.testing.assert_close(wide(images[:3]), (captions.thickness(images[:3]) - 3) / 2, atol=0.02, rtol=0)


# ---------------------------------------------------------------- runs


@pytest.fixture(scope="module")
def chain():
    net = networks.TextDenoiser("tiny_text", seed=3).eval().requires_grad_(False)
    return chains.Chain(net, text_models.abar(text_models.RECIPES["denoiser"]), steps=2)


@pytest.fixture(scope="module")
def problem(chain, tmp_path_factory):
    return tilted_truth.problem(chain, PROMPT, draws=64, folder=tmp_path_factory.mktemp("scale"))


@pytest.fixture(scope="module")
def whole(problem, tmp_path_factory):
    """Both runs of a prompt, uninterrupted, by start, and their folder."""
    folder = tmp_path_factory.mktemp("truth")
    return {start: tilted_truth.run(problem, start, **SIZE, folder=folder)[0] for start in tilted_truth.STARTS}, folder


def test_a_problem_is_standardised_on_p_0_once(chain, problem, tmp_path):
    x, cost = chain.sample("a two", 64, tilted_truth.derive_seed("scale", 0))
    z = problem.pull.attribute(chain.decode(x))
    assert z.mean().abs() < 1e-5 and z.std() == pytest.approx(1, abs=1e-5)
    assert problem.about["heard"] == "a two" and problem.pull.at == tilted_truth.SATURATION
    assert problem.G.shape == (2, 1, 28, 28) and problem.G.cost == 2 * 2 == cost / 64
    torch.testing.assert_close(problem.pull(chain.decode(x)), 5 * torch.tanh(z / 5))
    (path,) = tmp_path.iterdir() if any(tmp_path.iterdir()) else (None,)
    assert path is None
    told = tilted_truth.problem(chain, PROMPT, draws=64, scale=(problem.pull.mean, problem.pull.sd))
    assert told.pull == problem.pull and told.about == problem.about
    tilted_truth.problem(chain, PROMPT, draws=32, folder=tmp_path)
    with pytest.raises(ValueError, match="was made with other draws"):
        tilted_truth.problem(chain, PROMPT, draws=33, folder=tmp_path)


def test_what_is_measured_of_an_image(problem):
    images = torch.cat([bars((2, 9)), torch.full((1, 1, 28, 28), -1.0)])
    clip_score, pull, digit, true = problem.measure(images).T
    torch.testing.assert_close(pull, problem.pull.attribute(images))
    classifier = networks.load_classifier("mnist28")
    with torch.no_grad():
        found = classifier(images).argmax(1)
    assert digit.tolist() == [float(d == 2) for d in found] and set(true.tolist()) <= {0.0, 1.0}
    assert (true <= digit).all() and clip_score.std() > 0


def same(one, other):
    assert (one.config, one.cost, one.refused) == (other.config, other.cost, other.refused)
    for kind in ("history", "state"):
        ours, theirs = getattr(one, kind), getattr(other, kind)
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize("start", tilted_truth.STARTS)
def test_a_killed_run_goes_on_as_if_it_had_not_been(problem, whole, tmp_path, start, monkeypatch):
    saves, save = [], files.save_state

    def killed_at_the_second(*args):
        if saves:
            raise KeyboardInterrupt
        saves.append(save(*args))

    monkeypatch.setattr(files, "save_state", killed_at_the_second)
    with pytest.raises(KeyboardInterrupt):
        tilted_truth.run(problem, start, **SIZE, folder=tmp_path)
    monkeypatch.undo()
    (path,) = tmp_path.iterdir()
    assert len(files.load_state(path)[0]["history.low"]) == 3 + 2  # the first block
    again, seconds = tilted_truth.run(problem, start, **SIZE, folder=tmp_path)
    same(again, whole[0][start])
    assert seconds > 0
    stamp = path.stat().st_mtime_ns
    done, kept = tilted_truth.run(problem, start, **SIZE, folder=tmp_path)
    same(done, again)
    assert path.stat().st_mtime_ns == stamp and kept == pytest.approx(seconds, abs=1)
    longer, _ = tilted_truth.run(problem, start, **(SIZE | {"sweeps": 7}), folder=tmp_path)
    assert torch.equal(longer.history["low"][:-1], done.history["low"]) and len(longer.history["low"]) == 3 + 7


def test_a_run_of_other_settings_is_refused(problem, whole, chain):
    _, folder = whole
    for changed in ({"chains": 3}, {"warmup": 4}, {"lams": (math.inf, 1.0)}, {"seed": 1}):
        name = "run_seed" if "seed" in changed else next(iter(changed))
        with pytest.raises(ValueError, match=rf"a_bold_two_p_0.safetensors was made with other {name}: delete it"):
            tilted_truth.run(problem, "p_0", **(SIZE | changed), folder=folder)
    other = replace(problem, about=problem.about | {"at": 3.0, "clip": "another"})
    with pytest.raises(ValueError, match="was made with other clip, at: delete it or use another folder"):
        tilted_truth.run(other, "beyond", **SIZE, folder=folder)


def test_a_start_from_beyond_is_paid_and_lies_beyond(problem, whole):
    runs, _ = whole
    own = 2 * problem.G.cost * SIZE["chains"] * len(LAMS) * (SIZE["sweeps"] + SIZE["warmup"] + 1)
    first = 2 * problem.G.cost * SIZE["chains"] * 2 * (1 + SIZE["warmup"] + 1)  # two levels, a sweep after the warm-up
    assert runs["p_0"].cost == own and runs["beyond"].cost == own + first
    for run in runs.values():
        assert run.history["low"].shape == (9, 3, 2) and run.history["measured"].shape == (9, 3, 2, 4)
        torch.testing.assert_close(run.history["low"], 5 * torch.tanh(run.history["measured"][..., 1] / 5))
    start, far = (runs[name].history["low"][:2, 1:].mean() for name in ("p_0", "beyond"))
    assert far > start + 0.5


def test_both_runs_are_the_truth(problem, whole):
    runs, folder = whole
    truth = tilted_truth.truth(problem, **SIZE, folder=folder)
    assert truth.prompt == PROMPT and len(truth.runs) == 2
    for one, other in zip(truth.runs, runs.values(), strict=True):
        same(one, other)
    kept = [files.load_state(path)[1]["seconds"] for path in folder.glob("*_p_0.safetensors")]
    assert len(kept) == 1 and tilted_truth.seconds(problem, folder) > kept[0] > 0
    assert tilted_truth.seconds(problem, folder / "nowhere") == 0


def test_runs_end_once_they_are_certified_or_their_curve_has_turned(problem, tmp_path, monkeypatch):
    lengths, plain = [], tilted_truth.run

    def run(problem, start, *, sweeps, **options):
        lengths.append(sweeps)
        return plain(problem, start, sweeps=6, **options)

    monkeypatch.setattr(tilted_truth, "run", run)
    size = {name: value for name, value in SIZE.items() if name != "sweeps"} | {"folder": tmp_path}
    curve = [{"lam": lam, "clip": clip} for lam, clip in ((0.2, 60), (0.6, 65), (math.inf, 50))]
    monkeypatch.setattr(Truth, "curve", lambda self: curve)
    for down_to, wanted in ((0.09, [40]), (0.1, [40, 80]), (0.6, [40, 80, 120]), (None, [40, 80, 120])):
        lengths.clear()
        certificate = types.SimpleNamespace(down_to=down_to)
        monkeypatch.setattr(Truth, "certificate", property(lambda _, found=certificate: found))
        tilted_truth.truth(problem, sweeps=120, **size)
        assert lengths == [length for length in wanted for _ in tilted_truth.STARTS]


def test_draws_of_p_0_are_kept_and_go_on(problem, tmp_path):
    few = tilted_truth.plain(problem, 10, seed=0, folder=tmp_path, batch=8)
    assert few.shape == (10, 5) and len(list(tmp_path.iterdir())) == 2
    more = tilted_truth.plain(problem, 20, seed=0, folder=tmp_path, batch=8)
    assert torch.equal(more[:10], few) and len(list(tmp_path.iterdir())) == 3
    assert torch.equal(tilted_truth.plain(problem, 10, seed=0, folder=None, batch=8), few)
    assert not torch.equal(tilted_truth.plain(problem, 10, seed=1, folder=None, batch=8), few)
    torch.testing.assert_close(more[:, 0], 5 * torch.tanh(more[:, 2] / 5))
    assert more[:, 2].mean().abs() < 1 and len(more[:, 1].unique()) == 20
    with pytest.raises(ValueError, match="was made with other plain_seed, batch|was made with other batch"):
        tilted_truth.plain(problem, 10, seed=0, folder=tmp_path, batch=5)


def test_what_is_stored_comes_back(whole, tmp_path):
    runs, _ = whole
    truth = Truth(PROMPT, tuple(runs.values()))
    images = {lam: torch.full((2, 1, 28, 28), i, dtype=torch.uint8) for i, lam in enumerate(LAMS)}
    plain = torch.randn(5, 5)
    given = tilted_truth.Record(
        {PROMPT: truth, "a thin two": truth}, {PROMPT: images}, {PROMPT: plain}, {PROMPT: (3.1, 0.7)}
    )
    path = tilted_truth.store(tmp_path / "truth.safetensors", given)
    back, shown, draws, scales = tilted_truth.restore(path)
    assert scales == {PROMPT: (3.1, 0.7)}
    assert [*shown[PROMPT]] == [*LAMS] and [int(value.unique()) for value in shown[PROMPT].values()] == [0, 1, 2]
    assert shown["a thin two"] == {} and [*draws] == [PROMPT] and torch.equal(draws[PROMPT], plain[:, :2])
    assert list(back) == [PROMPT, "a thin two"] and back["a thin two"].prompt == "a thin two"
    for one, other in zip(back[PROMPT].runs, truth.runs, strict=True):
        assert (one.cost, one.refused) == (other.cost, other.refused)
        for name in ("low", "measured", "replica"):  # rewards are float32: nothing is lost
            assert torch.equal(tempering.kept(name, one), tempering.kept(name, other))
        assert one.config["lams"] == list(LAMS)
    assert str(back[PROMPT].certificate) == str(truth.certificate)
    for lam in (math.inf, 0.7):
        assert back[PROMPT].worth(lam) == truth.worth(lam)
    monkey = pytest.MonkeyPatch()
    with monkey.context() as patch, pytest.raises(ValueError, match="measured .* record it anew"):
        patch.setattr(tilted_truth, "MEASURED", ("clip",))
        tilted_truth.restore(path)


def test_images_of_levels_are_where_chains_ended(problem, whole):
    truth = Truth(PROMPT, tuple(whole[0].values()))
    shown = tilted_truth.pictures(problem, truth, 3)
    assert [*shown] == [*LAMS] and all(images.shape == (3, 1, 28, 28) for images in shown.values())
    first, second = (run.state["z"] for run in truth.runs)
    for i, images in enumerate(shown.values()):
        x = problem.G.run(torch.stack([first[i, 0], second[i, 0], first[i, 1]])).detach()
        assert (((x + 1) * 127.5) - images).abs().max() <= 0.501
    with pytest.raises(ValueError, match="5 images of 'a bold two' want as many chains with their state; there are 4"):
        tilted_truth.pictures(problem, truth, 5)


# ---------------------------------------------------------------- what runs say, where all is known

KNOWN = (math.inf, 2.0, 1.0, 0.6)  # r_low is N(0, 1) under p_0, so N(1/lam, 1) under the tilt


def measure(x):
    """Like MEASURED: the score 1.25 r - r^2/2, r itself, r > 0, and something that is always true."""
    r = x[:, 0]
    return torch.stack([1.25 * r - r**2 / 2, r, (r > 0).double(), torch.ones_like(r)], 1)


def exact(lam):
    beta = 1 / lam
    return {"clip": 1.25 * beta - (1 + beta**2) / 2, "pull": beta, "low": beta, "caption": 1.0, "kl": beta**2 / 2}


def known(seed, sweeps=60, chains=6, lams=KNOWN):
    runs = []
    for i, z in enumerate((None, torch.full((chains, 1), 3.0, dtype=torch.float64))):
        generator = torch.Generator().manual_seed(tilted_truth.derive_seed("known", seed, i))
        options = {"sweeps": sweeps, "warmup": 20, "chains": chains, "z": z, "measure": measure}
        G = tempering.NoiseMap(lambda z: z, (1,), 10)
        first = tempering.sample_tempered(
            G, lambda x: x[:, 0], lams, generator=generator, dtype=torch.float64, **options
        )
        runs.append(first)
    return Truth("known", tuple(runs))


@pytest.fixture(scope="module")
def many():
    return [known(seed) for seed in range(24)]


@pytest.fixture(scope="module")
def long():
    return known(24, sweeps=250, chains=8)


def test_means_are_right_and_so_are_their_errors(many):
    for lam in (math.inf, 1.5, 0.6):
        worths = [truth.worth(lam) for truth in many]
        for name in ("clip", "pull", "low"):
            found = torch.tensor([worth[name] for worth in worths])
            assert abs(found.mean() - exact(lam)[name]) < 4 * found.std() / len(many) ** 0.5 + 0.01
            errors = torch.tensor([worth[f"{name}_se"] for worth in worths])
            assert 0.65 < errors.mean() / found.std() < 1.35  # the spread of 24 is known to 15 %
        assert all(worth["caption"] == pytest.approx(1) and worth["caption_se"] < 1e-9 for worth in worths)
    kl = torch.tensor([truth.worth(1.0)["kl"] for truth in many])
    assert kl.mean() == pytest.approx(0.5, abs=0.03)


def test_errors_are_those_of_leaving_a_chain_out(many):
    """Anew for each chain left out, log Z included, with the sizes that the whole has."""
    truth = many[0]
    low = tempering.kept("low", *truth.runs).transpose(0, 1)  # (L, S, C)
    L, S, C = low.shape
    up = truth.measured[:, 0].reshape(L, S, C)
    sizes = torch.tensor([part.size for part in truth.pooled.parts], dtype=torch.float64)
    beta = 1 / torch.tensor(KNOWN, dtype=torch.float64)
    for lam in (math.inf, 0.8):
        means = []
        for left_out in (None, *range(C)):
            kept = [c for c in range(C) if c != left_out]
            r = low[..., kept].flatten()
            count = sizes.repeat_interleave(S * len(kept)) / (S * len(kept))
            log_w, _ = pool(beta[:, None] * r, sizes, count)
            means.append((log_w + r / lam).softmax(0) @ up[..., kept].flatten())
        assert truth.worth(lam)["clip"] == pytest.approx(float(means[0]), abs=1e-6)
        left = torch.stack(means[1:])
        error = ((C - 1) / C * (left - left.mean()).square().sum()).sqrt().item()
        assert truth.worth(lam)["clip_se"] == pytest.approx(error, rel=0.05)


def test_at_infinity_stands_p_0(many):
    found = many[0].worth(math.inf)
    assert found["kl"] == 0 and found["certified"]
    n = tempering.kept("low", *many[0].runs)[:, 0].numel()
    assert n < found["ess"] < 4 * n  # draws of p_0, and what the other levels add


def test_a_weight_tilts_by_the_score_too(many):
    """exp((r + w (1.25 r - r^2/2))/lam) makes N(0, 1) N(m, s^2), 1/s^2 = 1 + w/lam, m = s^2 (1 + 1.25 w)/lam."""
    w, lam = 0.5, 1.0
    precision = 1 + w / lam
    mean = (1 + 1.25 * w) / lam / precision
    found = torch.tensor([[t.means(lam, w)[name] for name in ("pull", "clip")] for t in many])
    wanted = torch.tensor([mean, 1.25 * mean - (mean**2 + 1 / precision) / 2])
    assert ((found.mean(0) - wanted).abs() < 4 * found.std(0) / len(many) ** 0.5 + 0.01).all()


def test_gaps_have_their_own_error(many):
    gaps = [truth.gap(0.6, 1.0) for truth in many]
    found, errors = (torch.tensor(values) for values in zip(*gaps, strict=True))
    assert abs(found.mean() - (exact(0.6)["clip"] - exact(1.0)["clip"])) < 4 * found.std() / len(many) ** 0.5 + 0.01
    assert 0.65 < errors.mean() / found.std() < 1.35
    assert many[0].gap(0.7, 0.7) == (0.0, 0.0)
    alone = math.hypot(many[0].worth(0.6)["clip_se"], many[0].worth(0.65)["clip_se"])
    assert many[0].gap(0.6, 0.65)[1] < alone / 2  # one set of chains for both


def test_folds_share_no_chain(many):
    whole = many[0]
    lows = [tempering.kept("low", run) for run in whole.runs]
    seen = 0
    for fold in range(5):
        own, rest = whole.split(5, fold)
        ours, theirs = (sum(run.config["chains"] for run in side.runs) for side in (own, rest))
        assert ours + theirs == 12 and ours in (2, 3)
        seen += ours
        first = [set(tempering.kept("low", run)[0, 1].tolist()) for run in (*own.runs, *rest.runs)]
        assert len(set.union(*first)) == 12 == sum(map(len, first))
        assert set.union(*first) == set(lows[0][0, 1].tolist()) | set(lows[1][0, 1].tolist())
        assert sum(run.cost for run in own.runs) == pytest.approx(ours / 12 * sum(r.cost for r in whole.runs), abs=3)
        assert rest.worth(1.0)["clip"] != whole.worth(1.0)["clip"]
    assert seen == 12
    with pytest.raises(ValueError, match="12 chains make 2 to 6 folds"):
        whole.split(7, 0)


def test_long_chains_are_certified_and_truncated_ones_are_not(long):
    truth = long
    assert truth.certificate.down_to == 0.6 and truth.certifies(0.6) and truth.certifies(math.inf)
    assert not truth.certifies(0.59)
    assert certificates.certify(*truth.runs).down_to is None  # what is always true counts as no draw at all
    cut = Truth("cut", tuple(replace(r, history={n: x[:35] for n, x in r.history.items()}) for r in truth.runs))
    assert cut.certificate.down_to is None or cut.certificate.down_to > 0.6
    assert "draws" in next(row for row in cut.certificate.rows if row["failed"])["failed"]
    assert not cut.worth(0.6)["certified"] and truth.worth(0.6)["certified"]
    if cut.certificate.down_to is None:
        with pytest.raises(ValueError, match="'cut' is certified nowhere; at inf, .*: more sweeps, or a ladder"):
            cut.best()


def test_a_truth_without_its_tail_is_certified_only_above_it():
    """The coldest level of both runs never goes above 1.5, as particles of a few families do not."""
    truth = known(1, sweeps=250, chains=8)
    for run in truth.runs:
        run.history["low"][:, 3].clamp_(max=1.5)
    assert truth.certificate.down_to == 1.0 and "identity" in truth.certificate.rows[3]["failed"]
    assert truth.best()["lam"] >= 1.0


def test_the_best_strength_is_found(long):
    assert long.best()["lam"] == pytest.approx(0.8, rel=0.15) and long.best()["certified"]  # best: 1/1.25
    assert long.best()["clip"] == pytest.approx(exact(0.8)["clip"], abs=4 * long.best()["clip_se"])


def test_the_curve_covers_the_ladder_and_p_0(many):
    curve = many[0].curve(9)
    assert [row["lam"] for row in curve] == many[0].strengths(9)
    assert curve[0]["lam"] == pytest.approx(0.6) and curve[-2]["lam"] == pytest.approx(100) and len(curve) == 10
    assert curve[-1]["lam"] == math.inf and isinstance(many[0].pooled, algorithms.TiltSamples)
