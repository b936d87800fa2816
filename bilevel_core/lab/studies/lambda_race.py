"""Chapter 5's experiment: rewards of p_0's samples for each prompt, and every method's lambda at one budget.

The protocol. Of a prompt such as "a bold two" p_0 hears all but the thickness ("a two"), as a model does that misses
an adjective. Upper reward: the CLIP score of image and whole prompt. Lower reward: `LOW`, in standard deviations under
p_0. What was open was settled on 2,000 samples of each VALIDATION prompt: boldness is taken rather than ink, because it
follows the CLIP score of "a bold three" more closely (correlation 0.90 against 0.79). An earlier design, in which p_0
heard the whole prompt, was dropped: no lambda moved the CLIP score by more than a fraction of its standard deviation,
for it is as high as it gets. TEST prompts are drawn once.

A prompt has n samples of p_0, in as many folds as there are seeds, and at a few small lambda independent runs of
particles. The methods that reweight get a fold. A method that draws at a lambda gets rows of the other folds and of run
0, resampled, at the price of Algorithm 5. That favours it, for guidance draws from a biased law. What a lambda is worth
is measured by the other folds and the other runs (`mark`), so that no method is marked on particles it chose by: those
of one run share their ancestors, and at small lambda they are a single family.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor
from tqdm.auto import tqdm

from ... import estimators
from ...algorithms import TiltSamples
from ...seeds import derive_seed
from .. import data, files, metrics
from ..files import kept, piece
from ..models import captions, chains, clip, networks, rewards
from ..models.chains import Chain, bank
from . import baselines
from .setting import same_protocol

VALIDATION = ("a bold three", "a medium three", "a thin zero leaning left", "a bold six")
TEST = ("a bold eight", "a bold two leaning right", "a bold five", "a medium nine")
LOW = ("boldness", "resnet")
MIN_ESS = 500.0  # below it a reweighted mean is not called the truth
TEMPER = 1.0  # of the particles' potentials: `guidance.LookAhead`
KL_TARGET = 0.5  # of adaptive control; see `validate`
KL_TARGETS = (0.03, 0.1, 0.3, 0.5, 1.0, 1.5, 2.0, 3.0, 5.0, 8.0)  # that `validate` compares
WEIGHTS = (0.0, 0.1, 0.3, 1.0)  # of the upper reward, in its standard deviations, in the weighted sum
SLIDER_LAMS = (0.01, 0.03, 0.1, 0.2, 0.3, 0.5, 1.0, 2.0, 5.0, math.inf)  # at which pictures are kept


def prompts(which: str) -> tuple[str, ...]:
    """Prompts to report on: "one" or all of TEST, or "all" that name a thickness and are not in VALIDATION."""
    told = (text for text, place in captions.CAPTIONS.items() if place[1] != captions.ABSENT)
    return {"one": TEST[:1], "test": TEST, "all": tuple(text for text in told if text not in VALIDATION)}[which]


def heard(prompt: str) -> str:
    """What p_0 is told of a prompt: all but the thickness."""
    captions.encode([prompt])
    digit, _, slant = captions.CAPTIONS[prompt]
    return captions.caption(digit, captions.ABSENT, slant)


def draw(
    chain: Chain, prompt: str, n: int, seed: int, *, folder: Path, device: torch.device | str = "cpu", bar: bool = False
) -> dict[str, Tensor]:
    """`chains.bank` of what p_0 hears, with all rewards as they come: "clip", "ink", "boldness", "resnet"."""
    found = {"clip": clip.score(clip.load().to(device), prompt)} | lower_rewards(device)
    options = {"folder": folder / prompt.replace(" ", "_"), "about": _about(), "device": device, "batch": min(n, 500)}
    return bank(chain, heard(prompt), found, n, seed, **options, bar=prompt if bar else None)


def lower_rewards(device: torch.device | str = "cpu") -> dict[str, rewards.Reward]:
    """The rewards that may steer, by name: ink and those of LOW."""
    return {"ink": rewards.ink, "boldness": rewards.boldness, "resnet": rewards.RandomResNet().to(device)}


def particles(
    chain: Chain,
    prompt: str,
    low: str,
    lam: float,
    n: int,
    seed: int,
    *,
    mean: float,
    sd: float,
    folder: Path | None,
    device: torch.device | str = "cpu",
) -> dict[str, Tensor]:
    """n guided particles of p_0 tilted by (r_low - mean)/(lam sd), drawn once and kept in `folder` (None: not kept).

    low  a name of LOW;  mean, sd: of that reward under p_0, which standardise it
    Returns "clip" and r_low under the name `low` (n,), as they come; "log_w" (n,); "log_z" (); "images" (n, 1, 28, 28)
    uint8; and "cost" (), in image forwards. Raises ValueError where the file was made otherwise, naming what differs.
    """
    config = {"prompt": prompt, "low": low, "lam": lam, "n": n, "seed": seed, "mean": mean, "sd": sd, "temper": TEMPER}
    config |= {"scale": chain.scale, "steps": chain.steps, "eta": chain.eta} | _about()
    path = folder and folder / f"{prompt.replace(' ', '_')}_{low}_{lam:g}_{seed}.safetensors"

    def compute() -> dict[str, Tensor]:
        reward = lower_rewards(device)[low]
        found = {"clip": clip.score(clip.load().to(device), prompt), low: reward}
        steer = rewards.Standardised(reward, mean, sd)
        options = {"temper": TEMPER, "device": device}
        return chains.particles(chain, heard(prompt), steer, lam, n, seed, found, **options)

    tensors = kept(path, config, compute)
    return tensors | {"cost": tensors["cost"][0]}


def weighted_back(found: Mapping[str, Tensor], low: str, lam: float, mean: float, sd: float) -> TiltSamples:
    """What `particles` returned at lam as samples that stand for p_0, the lower reward standardised."""
    r_low, log_z = (found[low].double() - mean) / sd, float(found["log_z"])
    cost = int(found.get("cost", 0))
    return TiltSamples.from_tilt(found["clip"].double(), r_low, lam, found["log_w"], log_z, cost)


def _about() -> dict[str, object]:
    """What decides a reward besides the image: the weights of both models, and the random network's settings."""
    hashes = {name: networks.card(name)["sha256"] for name in ("text_denoiser", "clip")}
    return hashes | {"resnet": "seed 0, 64 pixels"}


@dataclass(frozen=True)
class Bank:
    """Rewards of n samples of p_0 for a prompt.

    r_up (n,) in CLIP points; r_low (n,) in its standard deviations; each: cost of one sample in image forwards
    sharp  particles at some small lam, where samples of p_0 do not reach: (lam, run) -> samples weighted back to p_0
    """

    r_up: Tensor
    r_low: Tensor
    each: int
    sharp: Mapping[tuple[float, int], TiltSamples]

    @classmethod
    def of(cls, drawn: Mapping[str, Tensor], low: str, sharp: Sharp | None = None):
        """From what `draw` and `particles` returned, the lower reward standardised under p_0."""
        mean, sd = rewards.scale(drawn[low])
        tilted = {key: weighted_back(sharp[key], low, key[0], mean, sd) for key in sorted(sharp or {})}
        each = int(drawn["cost"]) // len(drawn["clip"])
        return cls(drawn["clip"].double(), (drawn[low].double() - mean) / sd, each, tilted)

    def folds(self, seeds: int, seed: int) -> tuple[Bank, Bank]:
        """The fold of a seed, and the rest."""
        own = torch.arange(len(self.r_up)) % seeds == seed
        return tuple(replace(self, r_up=self.r_up[rows], r_low=self.r_low[rows]) for rows in (own, ~own))

    def samples(self) -> TiltSamples:
        """As Algorithm 2 takes them, with their cost."""
        return TiltSamples(self.r_up, self.r_low, cost=len(self.r_up) * self.each)

    @cached_property
    def pooled(self) -> TiltSamples:
        """Samples of p_0 and all particles as one set, weighted back to p_0, in the order of `law`.

        Unlike the effective sample size of one set, this cannot mistake a far corner, where particles at a small lambda
        sit with nearly even weights at every other lambda, for the law itself; and between lambdas it does not need
        the particles' own estimates of Z. Where neighbouring laws do not overlap, Z and so the divergence are rough.
        """
        return TiltSamples.pooled(self.samples(), *(s for _, s in sorted(self.sharp.items())))

    def law(self, lam: float, weight: float = 0.0) -> dict:
        """The law p_0 exp((r_low + weight r_up)/lam), r_up in standard deviations: "r_up", "r_low" and "p" (n,), "ess",
        "kl" and "how".

        By samples of p_0 ("reweighted"; "p_0" at lam = infinity) where their effective sample size is MIN_ESS or there
        are no particles, else by `pooled` ("particles"): rows are then samples of p_0, followed by those of `sharp`.
        """
        if lam == math.inf:
            p = torch.full_like(self.r_low, 1 / len(self.r_low), dtype=torch.float64)
            return {"r_up": self.r_up, "r_low": self.r_low, "p": p, "ess": float(len(p)), "kl": 0.0, "how": "p_0"}
        mean, sd = self.r_up.mean(), self.r_up.std()

        def tilt(samples: TiltSamples) -> tuple[Tensor, dict]:
            return replace(samples, r_low=samples.r_low + weight * (samples.r_up - mean) / sd).tilt(lam)

        samples, how = self.samples(), "reweighted"
        p, info = tilt(samples)
        if info["ess"] < MIN_ESS and self.sharp:
            samples, how = self.pooled, "particles"
            p, info = tilt(samples)
        found = {"r_up": samples.r_up, "r_low": samples.r_low, "p": p, "how": how}
        return found | {"ess": info["ess"], "kl": info["kl"]}

    def worth(self, lam: float, weight: float = 0.0) -> dict[str, float | str]:
        """E r_up at lam with its standard error, E r_low, KL, ESS and how it was found."""
        law = self.law(lam, weight)
        p, up = law["p"], law["r_up"].double()
        mean = float(p @ up)
        se = float((p * (up - mean)).norm())
        numbers = {"up": mean, "up_se": se, "low": float(p @ law["r_low"].double())}
        return numbers | {key: law[key] for key in ("kl", "ess", "how")}

    def draws(self, lam: float, n: int, seed: int, weight: float = 0.0) -> baselines.Evaluation:
        """n independent draws of the law at lam, at the price of guided ones (p_0 itself: of plain ones)."""
        law = self.law(lam, weight)
        generator = torch.Generator().manual_seed(derive_seed("draws", seed))
        up = law["r_up"].double()[torch.multinomial(law["p"], n, replacement=True, generator=generator)]
        cost = n * self.each * (1 if lam == math.inf else 2)
        return baselines.Evaluation(up.mean().item(), up.std().item() / n**0.5, cost, law["kl"])

    def reach(self) -> float:
        """The smallest lambda, on a grid, at which reweighting has an effective sample size of MIN_ESS."""
        lams = torch.logspace(-2, 2, 161, dtype=torch.float64).tolist()
        return next(lam for lam in lams if self.samples().tilt(lam)[1]["ess"] >= MIN_ESS)


def compare(
    whole: Bank,
    seeds: int,
    seed: int,
    *,
    trials: int,
    target: float,
    start: float = 1.0,
    draw: Callable[[float, int], TiltSamples] | None = None,
    min_ess: float = estimators.MIN_ESS,
    rounds: int | None = None,
    first: int = 0,
) -> list[dict]:
    """Every method once, on the fold of a seed, all at the cost of that fold: a row each.

    trials  of random and Bayesian search and of `adaptive_kl`, which steers to the KL `target`
    draw    (lam, round) -> particles at lam, for Algorithm 2, which then starts from half the fold and spends the other
            half's cost on them. None: it starts from all of the fold and goes no further down than that reaches
    first   what the rivals draw comes from seed `first` + `seed`
    min_ess, rounds  effective sample size that Algorithm 2 asks for, and how often it may draw
    Rows: method, lam, weight, cost, trials, said, what the lambda is worth on the other folds, "regret" to the best
    lambda there, and "path": [cost so far, lambda, weight] after each trial, of what the method would return by then.
    """
    fold, rest = whole.folds(seeds, seed)
    samples, bounds = fold.samples(), (candidates(rest)[0], 100.0)
    half = fold.folds(2, 0)[0].samples()
    budget = samples.cost
    guided, own = 2 * whole.each, range(first, first + seeds)[seed]

    def size(count: int) -> int:
        return baselines.plan(budget, guided, count)[1]

    methods = [
        lambda: baselines.algorithm_2(
            half if draw else samples, start, bounds, draw=draw, min_ess=min_ess, rounds=rounds
        ),
        lambda: baselines.reweighted_curve(samples, bounds),
        lambda: baselines.reweighted_bayesian(samples, own, trials, bounds),
        lambda: baselines.none(rest.draws, max(2, budget // whole.each // 10), own),
        lambda: baselines.grid(rest.draws, size(len(baselines.GRID)), own),
        lambda: baselines.random_search(rest.draws, size(trials), own, trials, bounds),
        lambda: baselines.bayesian(rest.draws, size(trials), own, trials, bounds),
        lambda: baselines.adaptive_kl(rest.draws, size(trials), own, target, start, trials, bounds),
        lambda: baselines.weighted_sum(rest.draws, size(len(WEIGHTS)), own, 1.0, WEIGHTS),
    ]
    best = max(rest.worth(lam)["up"] for lam in candidates(rest))
    rows = []
    for method in methods:
        found = method()
        path = [[spent, _number(lam), weight] for spent, lam, weight in baselines.path(found)]
        worth = rest.worth(found.lam, found.weight)
        rows.append(
            {"method": found.name, "lam": _number(found.lam), "weight": found.weight, "cost": found.cost}
            | {"trials": len(found.trials), "said": found.said, "regret": best - worth["up"], "path": path}
            | worth
        )
    return rows


def candidates(whole: Bank, count: int = 161) -> list[float]:
    """Lambdas over which the best is looked for: a grid from what samples or particles reach to 100, and infinity."""
    low = math.log10(min(whole.sharp)[0] if whole.sharp else whole.reach())
    return [*torch.logspace(low, 2, count, dtype=torch.float64).tolist(), math.inf]


def _number(lam: float) -> float | None:
    return lam if math.isfinite(lam) else None  # JSON has no infinity


Sharp = Mapping[tuple[float, int], Mapping[str, Tensor]]


@dataclass(frozen=True)
class Material:
    """What was drawn for a prompt: `drawn` by `draw`; `sharp`: reward -> (lam, run) -> what `particles` returned."""

    drawn: Mapping[str, Tensor]
    sharp: Mapping[str, Sharp]

    def runs(self, low: str, which: str | int = "all") -> Sharp:
        """Particles in order, of "all" runs, of the "other" ones than 0, which mark, or of one run by its number."""
        chosen = {"all": lambda run: True, "other": lambda run: run > 0}.get(which, lambda run: run == which)
        return {key: self.sharp[low][key] for key in sorted(self.sharp[low]) if chosen(key[1])}

    def bank(self, low: str, which: str | int = "all") -> Bank:
        """The samples as `Bank.of` has them."""
        return Bank.of(self.drawn, low, self.runs(low, which))

    def images(self, low: str, which: str | int = "all") -> Tensor:
        """In the order of rows in `Bank.law`: of p_0, then the particles, (n, 1, 28, 28) uint8."""
        return torch.cat([self.drawn["images"], *(found["images"] for found in self.runs(low, which).values())])


def gather(
    chain: Chain,
    prompts: Sequence[str],
    *,
    n: int,
    lams: Sequence[float],
    count: int,
    runs: int,
    seed: int,
    folder: Path,
    device: torch.device | str = "cpu",
    bar: bool = False,
) -> dict[str, Material]:
    """For each prompt n samples of p_0, and for each of LOW and `lams` independent runs 0..runs of count particles."""
    found = {}
    for prompt in prompts:
        drawn, sharp = draw(chain, prompt, n, seed, folder=folder / "bank", device=device, bar=bar), {}
        for low in LOW:
            mean, sd = rewards.scale(drawn[low])
            options = {"mean": mean, "sd": sd, "folder": folder / "particles", "device": device}
            keys = tqdm(list(itertools.product(lams, range(runs + 1))), f"{prompt}, {low}: particles", disable=not bar)
            sharp[low] = {
                (lam, run): particles(chain, prompt, low, lam, count, derive_seed("particles", seed, run), **options)
                for lam, run in keys
            }
        found[prompt] = Material(drawn, sharp)
    return found


def race(
    chain: Chain,
    prompt: str,
    low: str,
    material: Material,
    *,
    seeds: int,
    draws: int,
    trials: int,
    target: float,
    folder: Path,
    first: int = 0,
    device: torch.device | str = "cpu",
) -> list[dict]:
    """`compare` for each seed, Algorithm 2 with `draws` fresh particles wherever its samples do not reach, as often as
    half of its budget allows.

    A piece a seed, in `folder`: a killed race goes on there; another `first`, of which the seeds of all draws count,
    and other material want another folder. Returns its rows with "prompt", "reward" (low) and "seed",
    chosen by the first run of particles and marked by the others.
    """
    whole, rows = material.bank(low, 0), []
    mean, sd = rewards.scale(material.drawn[low])
    lams = sorted({lam for lam, _ in whole.sharp})
    config = {"prompt": prompt, "low": low, "n": len(whole.r_up), "lams": lams, "seeds": seeds}
    each = 2 * (2 * chain.steps - 1)  # of a particle: guided steps cost twice a plain one, and the last is plain
    rounds = len(whole.r_up) // seeds // 2 * whole.each // (draws * each)
    config |= {"draws": draws, "rounds": rounds, "trials": trials, "target": target} | _about()
    config |= {"first": first} if first else {}
    for seed in range(seeds):

        def fresh(lam: float, round: int, seed: int = seed) -> TiltSamples:
            options = {"mean": mean, "sd": sd, "folder": folder / "particles", "device": device}
            drawn = particles(chain, prompt, low, lam, draws, derive_seed("round", first, seed, round), **options)
            return weighted_back(drawn, low, lam, mean, sd)

        def compute(seed: int = seed, fresh: Callable = fresh) -> dict:
            min_ess = min(estimators.MIN_ESS, draws / 2)
            options = {"trials": trials, "target": target, "draw": fresh, "min_ess": min_ess, "rounds": rounds}
            options["first"] = first
            return {"rows": compare(whole, seeds, seed, **options)}

        path = folder / f"race_{prompt.replace(' ', '_')}_{low}_{seed}.json"
        found = piece(path, config | {"seed": seed}, compute)["rows"]
        rows += [{"prompt": prompt, "reward": low, "seed": seed} | row for row in found]
    return mark(rows, material.bank(low, "other"), seeds)


def mark(rows: Sequence[dict], whole: Bank, seeds: int) -> list[dict]:
    """Rows of one prompt and reward with worth and regret measured anew, by `whole` without the fold of their seed."""
    rests = [whole.folds(seeds, seed)[1] for seed in range(seeds)]
    best = [max(rest.worth(lam)["up"] for lam in candidates(rest)) for rest in rests]
    marked = []
    for row in rows:
        worth = rests[row["seed"]].worth(math.inf if row["lam"] is None else row["lam"], row["weight"])
        marked.append(row | {"regret": best[row["seed"]] - worth["up"]} | worth)
    return marked


@torch.no_grad()
def quality(materials: Mapping[str, Material], rows: Sequence[dict], low: str, *, seeds: int, n: int) -> list[dict]:
    """What the images look like that a method's lambda stands for: a row for each seed and method of `rows`.

    Shares are over the law itself: "digit" (by the frozen classifier) and "caption" (all that the prompt mentions,
    thickness and slant as measured) as asked, mean over prompts. Distances are between features of n draws of the law a
    prompt and those images of MNIST's test split of which the prompt is true: "kid", mean over prompts, and "frechet",
    of all prompts pooled, each with as many real images as the rarest has. Samples of the seed's own fold stay out.
    """
    classifier = networks.load_classifier("mnist28")
    real_features = networks.reference_features("mnist28", "test")
    real_found = captions.attributes(*data.load("mnist", "test"))
    wanted = {prompt: torch.tensor(captions.CAPTIONS[prompt]) for prompt in materials}
    real = {prompt: real_features[captions.fits(wanted[prompt], real_found)] for prompt in materials}
    fewest = min(map(len, real.values()))
    pooled = torch.cat([features[:fewest] for features in real.values()])

    def look(images: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
        x = images.float() / 127.5 - 1
        features = torch.cat([classifier.features(part) for part in x.split(1000)])
        digit = classifier.head(features).argmax(1)
        true = captions.fits(wanted, captions.attributes(x, digit))
        return features.double(), torch.stack([digit == wanted[0], true], 1).double()

    seen = {prompt: look(material.images(low, "other"), wanted[prompt]) for prompt, material in materials.items()}
    chosen = {(row["method"], row["seed"], row["prompt"]): row for row in rows if row["reward"] == low}
    banks = {prompt: material.bank(low, "other") for prompt, material in materials.items()}
    report = []
    for seed, method in itertools.product(range(seeds), dict.fromkeys(row["method"] for row in rows)):
        shares, distances, drawn = [], [], []
        for i, prompt in enumerate(materials):
            row = chosen[method, seed, prompt]
            lam = math.inf if row["lam"] is None else row["lam"]
            law = banks[prompt].folds(seeds, seed)[1].law(lam, row["weight"])
            rows_of_p = torch.arange(len(materials[prompt].drawn["clip"]))
            others = torch.ones(len(seen[prompt][0]), dtype=torch.bool)
            others[rows_of_p] = rows_of_p % seeds != seed
            features, right = (values[others][: len(law["p"])] for values in seen[prompt])
            generator = torch.Generator().manual_seed(derive_seed("quality", seed, i))
            drawn.append(features[torch.multinomial(law["p"], n, replacement=True, generator=generator)])
            shares.append(law["p"] @ right)
            distances.append(metrics.kid(drawn[-1], real[prompt], seed=seed)[0])
        digit, caption = torch.stack(shares).mean(0).tolist()
        found = {"digit": digit, "caption": caption, "kid": sum(distances) / len(distances)}
        found["frechet"] = metrics.frechet(torch.cat(drawn), pooled)
        report.append({"reward": low, "seed": seed, "method": method} | found)
    return report


def picture(material: Material, low: str, lam: float, k: int, seed: int = 0) -> Tensor:
    """k images (k, 1, 28, 28) uint8 of the law at lam, by their weights, no sample twice; particles can be twins."""
    p = material.bank(low).law(lam)["p"].clamp(min=1e-30)  # where fewer than k have weight, the next best
    return material.images(low)[torch.multinomial(p, k, generator=torch.Generator().manual_seed(seed))]


def store(path: Path, materials: Mapping[str, Material], pictures: int) -> None:
    """Keeps rewards of samples and particles, and `pictures` images for each prompt and value of SLIDER_LAMS under the
    first reward of LOW, in one file for `restore`."""
    tensors = {}
    for prompt, material in materials.items():
        for name in ("clip", *lower_rewards()):
            tensors[f"{prompt}|{name}"] = material.drawn[name].float()
        tensors[f"{prompt}|cost"] = material.drawn["cost"].reshape(1)
        for low, sharp in material.sharp.items():
            for (lam, run), found in sharp.items():
                for name in ("clip", low, "log_w", "log_z"):
                    tensors[f"{prompt}|{low}|{lam:g}|{run}|{name}"] = found[name].reshape(-1)
        for lam in SLIDER_LAMS:
            tensors[f"{prompt}|picture|{lam:g}"] = picture(material, LOW[0], lam, pictures)
    meta = _about() | {"prompts": list(materials)}
    files.save_state(path, {name: tensor.contiguous() for name, tensor in tensors.items()}, meta)


def restore(path: Path) -> tuple[dict[str, Material], dict[tuple[str, float], Tensor]]:
    """Materials without images, and the pictures by (prompt, lam), as `store` kept them.

    Raises ValueError if they were made with other weights or rewards than these, naming what differs.
    """
    tensors, about = files.load_state(path)
    changed = [key for key in _about() if about.get(key) != _about()[key]] or ["prompts"] * ("prompts" not in about)
    if changed:
        raise ValueError(f"{path.name} was made with other {', '.join(changed)}: run the recorded profile again")
    materials = {prompt: Material({}, {low: {} for low in LOW}) for prompt in about["prompts"]}
    pictures = {}
    for name, tensor in tensors.items():
        prompt, *rest = name.split("|")
        material = materials[prompt]
        if rest[0] == "picture":
            pictures[prompt, float(rest[1])] = tensor
        elif len(rest) == 1:
            material.drawn[rest[0]] = tensor[0] if rest[0] == "cost" else tensor
        else:
            low, lam, run, key = rest
            material.sharp[low].setdefault((float(lam), int(run)), {})[key] = tensor[0] if key == "log_z" else tensor
    return materials, pictures


def validate(materials: Mapping[str, Material]) -> dict[str, object]:
    """What validation prompts say on the open choices.

    "correlations" of ink and of boldness with the CLIP score under p_0, by prompt; "gains": for each of KL_TARGETS the
    mean over prompts and LOW of the gain in CLIP score, in standard deviations under p_0, at the lambda whose law has
    that divergence; and the "target" with the largest.
    """
    correlations, gains = {}, torch.zeros(len(KL_TARGETS), dtype=torch.float64)
    for prompt, material in materials.items():
        up = material.drawn["clip"].double()
        pairs = {name: torch.stack([up, material.drawn[name].double()]) for name in ("ink", "boldness")}
        correlations[prompt] = {name: pair.corrcoef()[0, 1].item() for name, pair in pairs.items()}
        for low in LOW:
            whole = material.bank(low)
            worths = [whole.worth(lam) for lam in candidates(whole, 81)]
            for i, target in enumerate(KL_TARGETS):
                nearest = min(worths, key=lambda worth: abs(math.log(max(worth["kl"], 1e-9) / target)))
                gains[i] += ((nearest["up"] - up.mean()) / up.std()).item() / (len(materials) * len(LOW))
    target = KL_TARGETS[int(gains.argmax())]
    return {"correlations": correlations, "gains": dict(zip(KL_TARGETS, gains.tolist(), strict=True)), "target": target}


def protocol(chain: Chain) -> dict[str, object]:
    """What a recorded result must share with this code, JSON-able."""
    return {
        "test": list(TEST),
        "validation": list(VALIDATION),
        "low": list(LOW),
        "heard by p_0": "all but the thickness",
        "chain": {"scale": chain.scale, "steps": chain.steps, "eta": chain.eta},
        "truth": f"reweighting at ESS >= {MIN_ESS:g}, else particles of runs that no method drew from",
        "kl_target": KL_TARGET,
        "weights": list(WEIGHTS),
    } | _about()


def check_protocol(found: Mapping[str, object], chain: Chain) -> None:
    """Raises ValueError, naming what differs, if a result was made by another protocol than `protocol`."""
    same_protocol(found, protocol(chain), "run the recorded profile again")
