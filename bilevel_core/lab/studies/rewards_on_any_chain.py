"""Chapter 8's experiment, for any chain, prompts and rewards: five stages, kept per prompt and per batch.

1. `samples` of p_0 with their rewards; 2. `learn`: Algorithm 2 on them by reweighting, with the curve over lambda;
3. `at`: guided samples or particles at a lambda, by Algorithm 5; 4. `rivals`: other ways to choose lambda, each at the
cost of stage 1, by samples they really draw; 5. `marks`: what every choice is worth, by fresh samples. Each stage asks
for those before it, and what is on the disk is not computed again, so that a cut-off study is started anew and goes on.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from ... import estimators
from ...algorithms import TiltSamples, learn_lam
from ...seeds import derive_seed
from .. import comparisons, files, metrics
from ..files import kept, piece
from ..models import chains, rewards
from . import baselines, memory

ESTIMATORS = {"penalty": estimators.lam_grad_penalty, "released": comparisons.lam_grad_released_est1}
METHODS = ("none", "Algorithm 2", "reweighted curve", "grid", "random", "Bayesian", "weighted sum")
DRAWING = METHODS[3:]
"""The rivals that draw at every lambda they look at."""
BOUNDS = (0.01, 100.0)
DIGITS = ("a bold eight", "a bold two leaning right", "a bold five", "a medium nine")
"""The prompts of the study on digits: the text-to-digit model hears all but their thickness."""

NAMES = ("clip", "hps", "aesthetic", "resnet", "random")


def load_rewards(
    upper: str,
    lower: str,
    *,
    clip: tuple[str, str] = ("ViT-B-16-quickgelu", "openai"),
    hps_file: str = "",
    aesthetic_file: str = "",
    device: torch.device | str = "cpu",
) -> tuple[Callable[[str], tuple[rewards.Reward, rewards.Reward]], Callable[[Tensor], Tensor]]:
    """`Study.rewards` by two of NAMES, and `Study.features`: the image embedding of the CLIP.

    "clip"    the CLIP score, by an open_clip model and its weights, as `rewards.open_clip_model` takes them
    "hps", "aesthetic"  need their files, see `rewards`: the first is fetched if hps_file is empty, the second reads
              the embedding of ViT-L/14, unless its name says vit_b_16
    "resnet"  the released one, on ImageNet's backbone;  "random": the same without a backbone, which needs no download
    Networks are loaded once, for all prompts. Raises ValueError for another name; OSError for what is missing.
    """
    for name in (upper, lower):
        if name not in NAMES:
            raise ValueError(f"reward {name!r} is not one of {', '.join(NAMES)}")
    tower = rewards.open_clip_model(*clip, device)
    blind: dict[str, rewards.Reward] = {}
    if "aesthetic" in (upper, lower):
        small = "vit_b_16" in Path(aesthetic_file).name
        head = tower if small else rewards.open_clip_model("ViT-L-14-quickgelu", "openai", device)
        blind["aesthetic"] = rewards.aesthetic(aesthetic_file, head)
    if "resnet" in (upper, lower):
        blind["resnet"] = rewards.RandomResNet(backbone="imagenet").to(device)
    if "random" in (upper, lower):
        blind["random"] = rewards.RandomResNet().to(device)
    human = rewards.hps_model(hps_file or None, device=device) if "hps" in (upper, lower) else None

    def of(name: str, prompt: str) -> rewards.Reward:
        if name in blind:
            return blind[name]
        return (tower if name == "clip" else human).score(prompt)

    return lambda prompt: (of(upper, prompt), of(lower, prompt)), tower.embed


def downloads(model: str, dtype: str, upper: str, lower: str, clip: tuple[str, str]) -> list[dict[str, Any]]:
    """What would be fetched before a study can start: "what" and "gib", counted from the shapes of the networks.

    Nothing for folders and what the hub's cache holds; a model id is taken to have the size of Stable Diffusion 1.5,
    and NaN is a size that is not known before. Raises ValueError for a CLIP that open_clip does not know.
    """
    from huggingface_hub import try_to_load_from_cache

    def clip_gib(name: str) -> float:
        import open_clip

        if name.startswith("hf-hub:"):
            return math.nan
        config = open_clip.get_model_config(name)
        if config is None:
            raise ValueError(f"open_clip knows no model {name!r}: see open_clip.list_models()")
        if "custom_text" in config:  # another class than CLIP
            return math.nan
        with torch.device("meta"):
            network = open_clip.model.CLIP(**config)
        return sum(weight.numel() for weight in network.parameters()) * 4 / memory.GIB

    rows = []
    if not Path(model).expanduser().is_dir() and not isinstance(try_to_load_from_cache(model, "model_index.json"), str):
        size = memory.counted("sd15", side=64, dtype=dtype, reward=None)["weights"]
        rows.append({"what": model, "gib": size})
    if not clip[0].startswith("local-dir:") and not Path(clip[1]).suffix:
        rows.append({"what": f"open_clip {clip[0]}, {clip[1]}", "gib": clip_gib(clip[0])})
    for name, what, size in (
        ("hps", "xswu/HPSv2", lambda: clip_gib("ViT-H-14") / 2),
        ("aesthetic", "open_clip ViT-L-14-quickgelu, openai", lambda: clip_gib("ViT-L-14")),
        ("resnet", "torchvision ResNet-18", lambda: 44.7e6 / memory.GIB),
    ):
        if name in (upper, lower):
            rows.append({"what": what, "gib": size()})
    return rows


@dataclass(frozen=True)
class Study:
    """What decides the results of all stages; see the module.

    chain     the model and its sampler, a `chains.Chain`
    rewards   prompt -> (upper, lower) reward of images in [-1, 1]; the lower one is standardised under p_0
    folder    where everything is kept;  about: what else decides the numbers, such as names of weights, JSON-able
    heard     prompt -> what the chain is told of it
    features  images (B, C, H, W) -> (B, d) for distances; reference: prompt -> features of real images, None: distances
              are to the samples of p_0
    n, batch  samples of stage 1, a whole number of batches; a file holds a batch
    shown     samples at each lambda in stages 3 and 5;  how: "guided", or "particles" in systems of `batch`
    gamma, estimator, start  of Algorithm 2: one of ESTIMATORS
    trials    of random and Bayesian search;  methods: of METHODS
    """

    chain: chains.Chain
    rewards: Callable[[str], tuple[rewards.Reward, rewards.Reward]]
    folder: Path
    about: Mapping[str, Any]
    features: Callable[[Tensor], Tensor]
    heard: Callable[[str], str] = str
    reference: Callable[[str], Tensor] | None = None
    n: int = 256
    batch: int = 8
    shown: int = 64
    how: str = "guided"
    gamma: float = math.inf
    estimator: str = "penalty"
    start: float = 1.0
    trials: int = 10
    methods: Sequence[str] = METHODS
    seed: int = 0
    device: torch.device | str = "cpu"
    bar: bool = False
    cache: dict = field(default_factory=dict, repr=False, compare=False)

    def __post_init__(self) -> None:
        for name, allowed in (("how", ("guided", "particles")), ("estimator", tuple(ESTIMATORS))):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} = {getattr(self, name)!r} is not one of {', '.join(allowed)}")
        unknown = [name for name in self.methods if name not in METHODS]
        if unknown or "Algorithm 2" not in self.methods:
            raise ValueError(f"methods {list(self.methods)} must be among {', '.join(METHODS)} and hold 'Algorithm 2'")
        for name in ("n", "shown"):
            value = getattr(self, name)
            if self.batch < 2 or value < self.batch or value % self.batch:
                raise ValueError(f"{name} = {value} must be a whole number of batches of {self.batch}, at least 2 each")
        if self.estimator == "released" and self.gamma == math.inf:
            raise ValueError("the released estimator needs a finite gamma: its code took 1 to 1000")

    # ------------------------------------------------------------ the stages

    def samples(self, prompt: str) -> dict[str, Tensor]:
        """Stage 1: "up" and "low" (n,), "images", "cost", "seconds" of p_0."""
        return self._bank(prompt, self.n, self.seed, math.inf, 0.0)

    def learn(self, prompt: str) -> dict[str, Any]:
        """Stage 2: Algorithm 2 by reweighting. JSON-able, lambdas in standard deviations of the lower reward.

        "lam" and "said": where it ended and why; "path": each step's lam, grad with se, up and ess; "curve": lam, mean,
        se, ess; "best" and "interval" read off the curve; "up" and "low": mean and standard deviation under p_0.
        """
        drawn = self.samples(prompt)
        low_mean, low_sd = rewards.scale(drawn["low"])
        up_mean, up_sd = rewards.scale(drawn["up"])

        def compute() -> dict[str, Any]:
            r_up, r_low = drawn["up"].double(), (drawn["low"].double() - low_mean) / low_sd
            min_ess = self.min_ess
            curve = estimators.lam_curve(r_up, r_low, torch.logspace(-2, 2, 81, dtype=torch.float64), min_ess=min_ess)
            lam = min(max(self.start, curve.lam[0].item()), BOUNDS[1])
            options = {"gamma": self.gamma, "estimator": ESTIMATORS[self.estimator], "min_ess": min_ess}
            steps = list(learn_lam(TiltSamples(r_up, r_low), lam, bounds=BOUNDS, **options))
            named = {name: getattr(curve, name).tolist() for name in ("lam", "mean", "se", "ess")}
            return {
                "lam": steps[-1].lam,
                "said": steps[-1].done or "steps used up",
                "path": [{key: getattr(step, key) for key in ("lam", "grad", "se", "up", "ess")} for step in steps],
                "curve": named,
                "best": min(max(curve.best, named["lam"][0]), BOUNDS[1]),
                "interval": [min(max(end, 1e-9), 1e9) for end in curve.interval],
                "low": [low_mean, low_sd],
                "up": [up_mean, up_sd],
            }

        config = self._config(prompt) | {"n": self.n, "seed": self.seed, "start": self.start}
        config |= {"gamma": str(self.gamma), "estimator": self.estimator}
        return piece(self._place(prompt) / "lambda.json", config, compute)

    def at(self, prompt: str, lam: float, n: int, seed: int, weight: float = 0.0) -> dict[str, Tensor]:
        """Stage 3: n samples by Algorithm 5 at lambda, for the reward r_low + weight r_up in standard deviations.

        As `samples`; with how = "particles" also "log_w" (n,), which together stand for the tilted law.
        """
        lam = float(f"{lam:.5g}")
        if self.how == "guided" or lam == math.inf:
            return self._bank(prompt, n, seed, lam, weight)
        found = self.learn(prompt)
        up, low = self._rewards(prompt)
        folder, parts = self._place(prompt) / f"lam_{lam:g}_{weight:g}", []
        config = self._config(prompt) | {"lam": lam, "weight": weight, "seed": seed, "low": found["low"]}
        for first in tqdm(range(0, n, self.batch), f"{prompt}, {lam:g}", disable=not self.bar):
            name = {"up": up, "low": low}
            args = (
                self.heard(prompt),
                self._steer(prompt, weight),
                lam,
                self.batch,
                derive_seed("particles", seed, first),
                name,
            )
            with memory.remedies():
                parts.append(
                    kept(
                        folder / f"particles_{seed}_{first}.safetensors",
                        config,
                        lambda args=args: chains.particles(self.chain, *args, device=self.device),
                    )
                )
        joined = {key: torch.cat([part[key] for part in parts])[:n] for key in ("up", "low", "images")}
        joined["log_w"] = torch.cat([part["log_w"] + part["log_z"] for part in parts])[:n].log_softmax(0)
        return joined | {key: sum(part[key][0] for part in parts) for key in ("cost", "seconds")}

    def rivals(self, prompt: str) -> dict[str, dict[str, Any]]:
        """Stage 4: method -> "lam", "weight", "cost" (search included), "value" and "trials", each kept when it ends.

        The budget of a search is the cost of stage 1. Its trials share their noise.
        """
        found, drawn = self.learn(prompt), self.samples(prompt)
        budget, up = int(drawn["cost"]), drawn["up"].double()
        rows = {
            "none": {"lam": None, "weight": 0.0, "cost": 0, "value": up.mean().item(), "trials": []},
            "Algorithm 2": {"lam": found["lam"], "weight": 0.0, "cost": budget, "value": found["path"][-1]["up"]},
            "reweighted curve": {
                "lam": found["best"],
                "weight": 0.0,
                "cost": budget,
                "value": max(found["curve"]["mean"]),
            },
        }

        def evaluate(lam: float, n: int, seed: int, weight: float = 0.0) -> baselines.Evaluation:
            got = self.at(prompt, lam, n, seed, weight)
            mean, se = self.mean(got, "up")
            return baselines.Evaluation(mean, se, int(got["cost"]))

        def size(count: int) -> int:
            n = baselines.plan(budget, self.each[1], count)[1]
            return n // self.batch * self.batch if n >= self.batch else n

        weights = (0.0, 0.3, 1.0, 3.0)
        searches = {
            "grid": lambda: baselines.grid(evaluate, size(len(baselines.GRID)), self._seed("grid")),
            "random": lambda: baselines.random_search(
                evaluate, size(self.trials), self._seed("random"), self.trials, BOUNDS
            ),
            "Bayesian": lambda: baselines.bayesian(
                evaluate, size(self.trials), self._seed("Bayesian"), self.trials, BOUNDS
            ),
            "weighted sum": lambda: baselines.weighted_sum(
                evaluate, size(len(weights)), self._seed("weighted sum"), 1.0, weights
            ),
        }
        config = self._config(prompt) | {"n": self.n, "trials": self.trials, "seed": self.seed, "how": self.how}
        for name in (name for name in self.methods if name in searches):

            def compute(name: str = name) -> dict[str, Any]:
                best = searches[name]()
                trials = [[t.lam, t.mean, t.se, t.cost, t.weight] for t in best.trials]
                return {
                    "lam": best.lam,
                    "weight": best.weight,
                    "cost": best.cost,
                    "value": best.value,
                    "trials": trials,
                }

            file = self._place(prompt) / f"rival_{name.replace(' ', '_')}.json"
            rows[name] = piece(file, config | {"method": name}, compute)
        return {name: rows[name] for name in self.methods}

    def marks(self, prompt: str) -> list[dict[str, Any]]:
        """Stage 5: a row for each method, of `shown` fresh samples at its choice, the same noise for all.

        "up" and "low" with their standard errors; "kid" and "frechet" (None where n is below twice the features) to
        the reference; "cost" of choosing; "seconds" for the samples shown.
        """
        base = self.samples(prompt)
        reference = self.reference(prompt) if self.reference else self._features(base["images"])
        rows = []
        for method, choice in self.rivals(prompt).items():
            lam = math.inf if choice["lam"] is None else choice["lam"]
            got = self.at(prompt, lam, self.shown, self._seed("shown"), choice["weight"])
            row = {"prompt": prompt, "method": method, "lam": choice["lam"], "weight": choice["weight"]}
            row |= {"cost": choice["cost"], "seconds": float(got["seconds"]), "n": self.shown}
            for name in ("up", "low"):
                row[name], row[f"{name}_se"] = self.mean(got, name)
            rows.append(row | self._distances(got, reference))
        return rows

    def pictures(self, prompt: str, lams: Sequence[float], k: int) -> Tensor:
        """k images at each lambda, (len(lams) k, C, H, W) in [-1, 1], a column the same noise."""
        count = -(-k // self.batch) * self.batch
        found = [self.at(prompt, lam, count, self._seed("shown"))["images"][:k] for lam in lams]
        return torch.cat(found).float() / 127.5 - 1

    # ------------------------------------------------------------ before and between

    @property
    def min_ess(self) -> float:
        """The effective sample size that Algorithm 2 asks for: a tenth of n where that is below the usual 100."""
        return min(estimators.MIN_ESS, self.n / 10)

    @property
    def each(self) -> tuple[int, int]:
        """What a plain and a guided sample cost in image forwards: guided steps cost twice, and the last is plain."""
        passes = 1 if self.chain.scale in (0, 1) else 2
        return passes * self.chain.steps, passes * (2 * self.chain.steps - 1)

    def plan(self, prompts: Sequence[str], plain: float = math.nan, guided: float = math.nan) -> list[dict[str, Any]]:
        """The dry run: for each stage the samples, the network calls (in image forwards) and the seconds at most.

        plain, guided  seconds of one such step of one sample, measured or recorded
        """
        count, searches = len(prompts), sum(method in DRAWING for method in self.methods)
        budget = self.n * self.each[0]
        rival = budget // self.each[1] * searches
        rows = []
        for stage, p_0, steered in (
            ("1 samples", self.n, 0),
            ("2 Algorithm 2", 0, 0),
            ("3 guided", 0, self.shown),
            ("4 rivals", 0, rival),
            ("5 marks", self.shown, self.shown * (len(self.methods) - 2)),
        ):
            steps = self.chain.steps
            seconds = count * (p_0 * steps * plain + steered * ((steps - 1) * guided + plain))
            calls = count * (p_0 * self.each[0] + steered * self.each[1])
            rows.append({"stage": stage, "samples": count * (p_0 + steered), "calls": calls, "seconds": seconds})
        whole = {key: sum(row[key] for row in rows) for key in ("samples", "calls", "seconds")}
        return [*rows, {"stage": "all"} | whole]

    def status(self, prompts: Sequence[str]) -> list[dict[str, Any]]:
        """What is on the disk of each prompt: batches of stage 1, searches ended, files, and "broken" ones."""
        rows = []
        for prompt in prompts:
            place, broken = self._place(prompt), []
            there = sorted(place.rglob("*.safetensors")) + sorted(place.rglob("*.json"))
            for file in there:
                try:
                    files.load_state(file) if file.suffix == ".safetensors" else json.loads(file.read_bytes())
                except ValueError:
                    broken.append(f"{file}: cut short or altered; delete it, and only it is computed again")
            stage = len([file for file in there if file.parent.name == "p_0" and f"_{self.seed}_" in file.name])
            ended = [file.stem.removeprefix("rival_") for file in there if file.name.startswith("rival_")]
            rows.append(
                {"prompt": prompt, "samples": f"{stage} of {self.n // self.batch} batches", "searches": ended}
                | {"learned": (place / "lambda.json").is_file(), "files": len(there), "broken": broken}
            )
        return rows

    def mean(self, drawn: Mapping[str, Tensor], name: str) -> tuple[float, float]:
        """Mean of a reward over what `at` drew, and its standard error, for particles between their systems."""
        value = drawn[name].double()
        p = drawn["log_w"].exp() if "log_w" in drawn else torch.full_like(value, 1 / len(value))
        mean = p @ value
        influence = p * (value - mean)
        if "log_w" in drawn:
            influence = torch.stack([part.sum() for part in influence.split(self.batch)])
        n = len(influence)
        return mean.item(), (influence.norm() * math.sqrt(n / max(1, n - 1))).item()

    # ------------------------------------------------------------ how

    def _place(self, prompt: str) -> Path:
        return self.folder / chains.slug(prompt)

    def _seed(self, which: str) -> int:
        return derive_seed(which, self.seed)

    def _config(self, prompt: str) -> dict[str, Any]:
        chain = {"steps": self.chain.steps, "scale": self.chain.scale, "eta": self.chain.eta}
        return {"scored": prompt, "batch": self.batch, "shape": list(self.chain.shape)} | chain | dict(self.about)

    def _rewards(self, prompt: str) -> tuple[rewards.Reward, rewards.Reward]:
        if prompt not in self.cache:
            self.cache[prompt] = self.rewards(prompt)
        return self.cache[prompt]

    def _steer(self, prompt: str, weight: float) -> rewards.Reward:
        found = self.learn(prompt)
        up, low = self._rewards(prompt)
        low = rewards.Standardised(low, *found["low"])
        if not weight:
            return low
        up = rewards.Standardised(up, *found["up"])
        return lambda images: low(images) + weight * up(images)

    def _bank(self, prompt: str, n: int, seed: int, lam: float, weight: float) -> dict[str, Tensor]:
        up, low = self._rewards(prompt)
        about, wrap, place = dict(self.about) | {"scored": prompt}, None, "p_0"
        if lam != math.inf:
            steer, place = self._steer(prompt, weight), f"lam_{lam:g}_{weight:g}"
            about |= {"lam": lam, "weight": weight, "low": self.learn(prompt)["low"]}
            wrap = {"wrap": lambda denoiser: self.chain.guide(denoiser, steer, lam)}
        options = {"folder": self._place(prompt) / place, "about": about, "batch": min(self.batch, n)}
        options |= {"device": self.device, "bar": f"{prompt}, {place}" if self.bar else None} | (wrap or {})
        with memory.remedies():
            return chains.bank(self.chain, self.heard(prompt), {"up": up, "low": low}, n, seed, **options)

    @torch.no_grad()
    def _features(self, images: Tensor) -> Tensor:
        parts = [self.features(part.to(self.device).float() / 127.5 - 1) for part in images.split(64)]
        return torch.cat(parts).double().cpu()

    def _distances(self, drawn: Mapping[str, Tensor], reference: Tensor) -> dict[str, float | None]:
        features = self._features(drawn["images"])
        if "log_w" in drawn:  # distances know no weights: as many rows, drawn by them
            generator = torch.Generator().manual_seed(self.seed)
            rows = torch.multinomial(drawn["log_w"].exp(), len(features), replacement=True, generator=generator)
            features = features[rows]
        kid = metrics.kid(features, reference, seed=self.seed)[0]
        enough = min(len(features), len(reference)) >= 2 * features.shape[1]
        return {"kid": kid, "frechet": metrics.frechet(features, reference) if enough else None}
