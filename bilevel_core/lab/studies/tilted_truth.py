"""What every strength is worth: the exact tilts of the text-to-digit model for a prompt, with their certificates.

The protocol. Of a prompt such as "a bold four" p_0 hears all but one word ("a four"), as a model does that misses an
adjective. Upper reward: the CLIP score of image and whole prompt. Lower reward: `Pull`, how far the stroke is bolder,
or thinner, or the digit leans further, than p_0's, in its standard deviations there, saturating smoothly at SATURATION
of them. Bounded, so that every tilt exists: boldness itself has a nearly exponential tail, and below a strength where
1/lambda exceeds its rate the tilt runs away to blots, in a transition that neither samples of p_0 nor particles see.
SATURATION and LADDER were settled on VALIDATION, which holds all prompts that were looked at before, by short runs: the
CLIP score of "a bold five" is then 44 under p_0, 65 near lambda = 0.3 and 55 to 60 at 0.05, where about every fifth
image is no five any more (from both starts, but certified down to 1 alone). TEST prompts were drawn once.

A prompt has two runs of `tempering.sample_tempered` in the noise of the model's own chain, one that starts from p_0
and one that starts from beyond the tilt, and `certificates.certify` says what they prove together. After 40 sweeps a
prompt ends that is certified down to UNTIL, after 80 one whose curve has turned within what is certified, and after 120
every prompt. Lengths were so chosen while the runs were made, and before the race was. Moves follow the
gradient: without it both runs of "a bold four" still climbed after 140 sweeps, at lambda 0.35 and below, and the
certificates said so; ten sweeps with it, from where they were, brought them together.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from tqdm.auto import tqdm

from ...algorithms import TiltSamples
from ...estimators import pool
from ...seeds import derive_seed
from ...tempering import NoiseMap, Tempered, kept, noise_map, sample_tempered
from .. import files
from ..certificates import Certificate, certify, tilt_samples
from ..models import captions, clip, networks, rewards
from ..models.chains import Chain, slug

VALIDATION = (
    "a bold three", "a medium three", "a thin zero leaning left", "a bold six",
    "a bold eight", "a bold two leaning right", "a bold five", "a medium nine",
)  # fmt: skip
TEST = (
    "a bold zero", "a bold four", "a bold seven leaning left", "a thin six", "a thin nine leaning right",
    "a medium two", "a three leaning right", "a five leaning left",
)  # fmt: skip
LADDER = (math.inf, 1.2, 0.6, 0.35, 0.22, 0.14, 0.09, 0.06)
SATURATION = 5.0  # standard deviations of p_0
BEYOND = 0.02  # the strength at which the other run starts
UNTIL = 0.09  # the strength down to which a third of the sweeps are enough
STARTS = ("p_0", "beyond")
MOVES = {"gradient": True, "accept": 0.5}  # of `sample_tempered`
MEASURED = ("clip", "pull", "digit", "caption")  # what a run notes of every image; `pull` does not saturate
COUNTED = ("digit", "caption")  # of these, those that are 0 or 1
SCALE_DRAWS = 2000  # samples of p_0 that standardise the lower reward


def heard(prompt: str) -> str:
    """What p_0 is told of a prompt: all but its thickness, or where it names none all but its slant.

    Raises ValueError where a prompt names neither.
    """
    captions.encode([prompt])
    digit, stroke, slant = captions.CAPTIONS[prompt]
    if stroke == slant == captions.ABSENT:
        raise ValueError(f"{prompt!r} names neither thickness nor slant, so there is no word to keep from p_0")
    return captions.caption(digit, captions.ABSENT, captions.ABSENT if stroke == captions.ABSENT else slant)


@dataclass(frozen=True)
class Pull:
    """The lower reward of a prompt: c tanh(z/c), z the measured attribute that p_0 does not hear of, standardised.

    It grows towards the word that is asked for: with the stroke for bold and medium, against it for thin, with the lean
    to the right, or to the left where that is asked.

    mean, sd  of the attribute under p_0, signed so that it grows that way;  at: c; infinity: it does not saturate
    """

    prompt: str
    mean: float
    sd: float
    at: float = SATURATION

    def attribute(self, images: Tensor) -> Tensor:
        """z (B,), in standard deviations of p_0, growing in the direction asked for."""
        _, stroke, slant = captions.CAPTIONS[self.prompt]
        measure, place = (captions.slant, slant) if stroke == captions.ABSENT else (captions.thickness, stroke)
        return ((-1 if place == 0 else 1) * measure(images) - self.mean) / self.sd

    def __call__(self, images: Tensor) -> Tensor:
        z = self.attribute(images)
        return z if self.at == math.inf else self.at * torch.tanh(z / self.at)


@dataclass(frozen=True)
class Problem:
    """A prompt's chain as a map of its noise, with both rewards; made by `problem`."""

    prompt: str
    G: NoiseMap
    pull: Pull
    measure: Callable[[Tensor], Tensor]
    about: dict


def problem(
    chain: Chain,
    prompt: str,
    *,
    draws: int = SCALE_DRAWS,
    seed: int = 0,
    at: float = SATURATION,
    folder: Path | None = None,
    scale: tuple[float, float] | None = None,
    device: torch.device | str = "cpu",
) -> Problem:
    """A prompt with its lower reward standardised on `draws` samples of p_0, drawn once and kept in `folder`.

    scale  mean and standard deviation of the attribute under p_0, where they are known: then nothing is drawn
    """
    hashes = {name: networks.card(name)["sha256"] for name in ("text_denoiser", "clip", "classifier_mnist28")}
    about = {"prompt": prompt, "heard": heard(prompt), "scale": chain.scale, "steps": chain.steps, "eta": chain.eta}
    about |= {"draws": draws, "seed": seed} | hashes
    plain = Pull(prompt, 0.0, 1.0, math.inf)

    def compute() -> dict[str, Tensor]:
        x, cost = chain.sample(about["heard"], draws, derive_seed("scale", seed), device=device)
        return {"attribute": plain.attribute(chain.decode(x)).cpu(), "cost": torch.tensor([cost])}

    if scale is None:
        found = files.kept(folder and folder / f"{slug(prompt)}_scale.safetensors", about, compute)
        scale = rewards.scale(found["attribute"])
    mean, sd = scale
    pull = Pull(prompt, mean, sd, at)
    score, classifier = clip.score(clip.load().to(device), prompt), networks.load_classifier("mnist28").to(device)
    wanted = torch.tensor(captions.CAPTIONS[prompt], device=device)

    def measure(images: Tensor) -> Tensor:
        digit = classifier(images).argmax(1)
        true = captions.fits(wanted, captions.attributes(images, digit))
        return torch.stack([score(images), pull.attribute(images), digit == wanted[0], true], 1)

    drawn = noise_map(chain.denoise(about["heard"]), chain.abar, chain.ts, chain.shape, eta=chain.eta)
    G = NoiseMap(lambda z: chain.decode(drawn.run(z)), drawn.shape, drawn.cost)
    return Problem(prompt, G, pull, measure, about | {"mean": mean, "sd": sd, "at": at})


def run(
    problem: Problem,
    start: str,
    *,
    sweeps: int,
    warmup: int,
    chains: int,
    seed: int,
    folder: Path,
    lams: Sequence[float] = LADDER,
    block: int = 10,
    device: torch.device | str = "cpu",
    bar: bool = False,
) -> tuple[Tempered, float]:
    """A run of a prompt from a start of STARTS, and its seconds; kept every `block` sweeps, where a killed one goes on.

    "beyond": every level starts where chains at BEYOND, begun at p_0, are after `warmup` sweeps, which are paid too.
    """
    path = folder / f"{slug(problem.prompt)}_{slug(start)}.safetensors"
    config = (
        problem.about | MOVES | {"start": start, "run_seed": seed, "warmup": warmup, "chains": chains, "lams": [*lams]}
    )
    began, before, done = time.perf_counter(), 0.0, None
    if path.exists():
        tensors, found = files.load_state(path)
        changed = [key for key in config if found["config"].get(key) != json.loads(json.dumps(config[key]))]
        if changed:
            raise ValueError(f"{path} was made with other {', '.join(changed)}: delete it or use another folder")
        done, before = _tempered(tensors, found), found["seconds"]
        state = {name: value if name == "generator" else value.to(device) for name, value in done.state.items()}
        done = replace(done, state=state)
    generator = torch.Generator(device).manual_seed(derive_seed("tempered", problem.prompt, start, seed))
    options = {"measure": problem.measure, "generator": generator, "chains": chains, "warmup": warmup} | MOVES
    options |= {"micro_batch": 48 if torch.device(device).type == "cpu" else 128}  # for the memory of a gradient
    z, spent = None, 0
    if done is None and start == "beyond":
        far = sample_tempered(problem.G, problem.pull, (math.inf, BEYOND), sweeps=1, **options)
        z, spent = far.state["z"][1], far.cost
    have = 0 if done is None else len(done.history["low"]) - warmup
    blocks = range(have + block, sweeps + block, block)
    for target in tqdm(blocks, f"{problem.prompt}, from {start}", disable=not bar):
        done = sample_tempered(problem.G, problem.pull, lams, sweeps=min(target, sweeps), z=z, resume=done, **options)
        done, spent = replace(done, cost=done.cost + spent), 0
        seconds = before + time.perf_counter() - began
        tensors = {f"history.{name}": value for name, value in done.history.items()}
        tensors |= {f"state.{name}": value for name, value in done.state.items()}
        about = {"config": config, "run": done.config, "cost": done.cost, "refused": done.refused, "seconds": seconds}
        files.save_state(path, tensors, about)
    return done, before + time.perf_counter() - began


def seconds(problem: Problem, folder: Path) -> float:
    """What both runs of a prompt have taken so far, all starts together."""
    paths = (folder / f"{slug(problem.prompt)}_{slug(start)}.safetensors" for start in STARTS)
    return sum(files.load_state(path)[1]["seconds"] for path in paths if path.exists())


def plain(
    problem: Problem,
    n: int,
    *,
    seed: int,
    folder: Path | None,
    batch: int = 500,
    device: torch.device | str = "cpu",
    bar: bool = False,
) -> Tensor:
    """r_low and MEASURED of n independent draws of p_0, (n, 1 + len(MEASURED)); kept in `folder`, a batch a file.

    Larger n goes on from a smaller one. Raises ValueError where a file was made otherwise, naming what differs.
    """
    config = problem.about | {"plain_seed": seed, "batch": batch}

    @torch.no_grad()
    def compute(first: int) -> dict[str, Tensor]:
        generator = torch.Generator(device).manual_seed(derive_seed("plain", problem.prompt, seed, first))
        images = problem.G.run(torch.randn(batch, *problem.G.shape, generator=generator, device=device))
        return {"rows": torch.cat([problem.pull(images)[:, None], problem.measure(images)], 1).cpu()}

    parts = []
    for first in tqdm(range(0, n, batch), f"{problem.prompt}: draws of p_0", disable=not bar):
        path = folder and folder / f"{slug(problem.prompt)}_plain_{seed}_{first}.safetensors"
        parts.append(files.kept(path, config, lambda first=first: compute(first))["rows"])
    return torch.cat(parts)[:n]


def _tempered(tensors: Mapping[str, Tensor], about: Mapping) -> Tempered:
    """The run in a file of `run` or `store`."""
    parts = {
        kind: {name.partition(".")[2]: value for name, value in tensors.items() if name.startswith(f"{kind}.")}
        for kind in ("history", "state")
    }
    history = {name: value.double() for name, value in parts["history"].items()}
    return Tempered(about["run"], about["cost"], about["refused"], history, parts["state"])


@dataclass(frozen=True)
class Truth:
    """What the runs of a prompt, one from each of STARTS, say of every strength."""

    prompt: str
    runs: tuple[Tempered, ...]

    @cached_property
    def certificate(self) -> Certificate:
        """How far down the ladder it can be trusted, by r_low, its CLIP score and its attribute."""
        short = [replace(r, history=r.history | {"measured": r.history["measured"][..., :2]}) for r in self.runs]
        return certify(*short)

    @cached_property
    def pooled(self) -> TiltSamples:
        """All levels of both runs as one set that stands for p_0; its r_up is the CLIP score."""
        return TiltSamples.pooled(*tilt_samples(*self.runs))

    @cached_property
    def measured(self) -> Tensor:
        """What was noted of the rows of `pooled`, (n, len(MEASURED))."""
        return kept("measured", *self.runs).transpose(0, 1).flatten(0, 2)

    @cached_property
    def _log_z(self) -> tuple[Tensor, Tensor]:
        """Each level's share in each row of `pooled`, (L, n), and by how much each chain moves log Z, (C, L)."""
        parts, (S, _, C) = self.pooled.parts, kept("low", *self.runs).shape
        sizes = torch.tensor([part.size for part in parts], dtype=torch.float64)
        h = self.pooled.r_low / torch.tensor([part.at for part in parts], dtype=torch.float64)[:, None]
        count = (sizes / (S * C)).repeat_interleave(S * C)
        share = (h + (sizes.log() - pool(h, sizes, count)[1])[:, None]).softmax(0)
        curve = torch.diag(share @ count) - (share * count) @ share.T
        off = self._by_chain((share * count).T) - sizes / C
        return share, off @ torch.linalg.pinv(curve, hermitian=True)

    def _by_chain(self, rows: Tensor) -> Tensor:
        """Sums (C, m) over the rows (n, m) of each chain."""
        S, L, C = kept("low", *self.runs).shape
        return rows.reshape(L, S, C, -1).sum((0, 1))

    def look(self, lam: float, weight: float = 0.0) -> tuple[Tensor, Tensor, dict]:
        """Means (m,) of MEASURED and r_low under p_0 exp((r_low + weight clip)/lam), how much each chain adds to their
        error (C, m), and "kl" and "ess".

        A chain's part in log Z is a part of it (the infinitesimal jackknife): without it errors are a third too small.
        """
        if lam < math.inf:
            p, info = replace(self.pooled, r_low=self.pooled.r_low + weight * self.pooled.r_up).tilt(lam)
        else:
            p = self.pooled.log_w.softmax(0)
            info = {"kl": 0.0, "ess": 1 / p.square().sum().item()}
        values, (share, moved) = torch.cat([self.measured, self.pooled.r_low[:, None]], 1), self._log_z
        mean = p @ values
        off = p[:, None] * (values - mean)
        return mean, self._by_chain(off) + moved @ (share @ off), {name: float(info[name]) for name in ("kl", "ess")}

    def means(self, lam: float, weight: float = 0.0) -> dict[str, float]:
        """Of MEASURED and "low" under the tilt at lam, with standard errors "..._se"; "kl" and "ess".

        weight  of the CLIP score, added to r_low. Errors are those of the chains, each of which is a ladder of its own.
        """
        mean, off, info = self.look(lam, weight)
        names = (*MEASURED, "low")
        found = dict(zip(names, mean.tolist(), strict=True)) | info
        return found | {f"{name}_se": value for name, value in zip(names, _error(off).tolist(), strict=True)}

    def worth(self, lam: float) -> dict[str, float]:
        """`means` at lam, with "lam" and whether it is "certified"."""
        return self.means(lam) | {"lam": lam, "certified": self.certifies(lam)}

    def certifies(self, lam: float) -> bool:
        down_to = self.certificate.down_to
        return down_to is not None and lam >= down_to * (1 - 1e-9)

    @property
    def turned(self) -> bool:
        """Whether the top of the curve lies above the lowest certified strength: both its sides are then certified."""
        down_to = self.certificate.down_to
        return down_to is not None and max(self.curve(), key=lambda row: row["clip"])["lam"] > down_to

    def gap(self, better: float, lam: float, weight: float = 0.0) -> tuple[float, float]:
        """By how much the mean CLIP score at one strength exceeds that at another, with the error of the difference."""
        (high, off_high, _), (low, off_low, _) = self.look(better), self.look(lam, weight)
        return (high - low)[0].item(), _error(off_high - off_low)[0].item()

    def split(self, folds: int, fold: int) -> tuple[Truth, Truth]:
        """The chains of a fold, of all runs every so-and-so-many-th, and the rest.

        Raises ValueError where a fold would have fewer than two chains.
        """
        counts = [one.config["chains"] for one in self.runs]
        if not 2 <= folds <= sum(counts) // 2 or not 0 <= fold < folds:
            raise ValueError(f"fold {fold} of {folds}: {sum(counts)} chains make 2 to {sum(counts) // 2} folds, from 0")
        own, sides = (torch.arange(sum(counts)) % folds == fold).split(counts), []
        for side in (own, [~chains for chains in own]):
            runs = [_some_chains(one, chains) for one, chains in zip(self.runs, side, strict=True) if chains.any()]
            sides.append(Truth(self.prompt, tuple(runs)))
        return sides[0], sides[1]

    def curve(self, count: int = 81) -> list[dict[str, float]]:
        """`worth` of `strengths`."""
        return [self.worth(lam) for lam in self.strengths(count)]

    def strengths(self, count: int = 81) -> list[float]:
        """From the end of the ladder to 100, evenly in log lam, and infinity, which is p_0."""
        low = math.log10(self.runs[0].config["lams"][-1])
        return [*torch.logspace(low, 2, count, dtype=torch.float64).tolist(), math.inf]

    def best(self) -> dict[str, float]:
        """`worth` at the certified strength with the highest CLIP score. Raises ValueError where none is certified."""
        known = [row for row in self.curve() if row["certified"]]
        if not known:
            raise ValueError(f"{self.prompt!r} is {self.certificate}: more sweeps, or a ladder with closer levels")
        return max(known, key=lambda row: row["clip"])


def truth(problem: Problem, *, sweeps: int, **options: object) -> Truth:
    """Both runs of a prompt, made or gone on with, as its truth: a third of `sweeps` if that certifies it down to
    UNTIL, two thirds if it is `turned` by then, else all. Other options: of `run`, all but the start."""
    for third in (1, 2, 3):
        length = max(1, third * sweeps // 3)
        found = Truth(problem.prompt, tuple(run(problem, start, sweeps=length, **options)[0] for start in STARTS))
        if (third == 1 and found.certifies(UNTIL)) or (third == 2 and found.turned):
            break
    return found


def _error(off: Tensor) -> Tensor:
    """The standard error (m,) of means to whose error each chain adds off (C, m)."""
    return (len(off) / (len(off) - 1) * off.square().sum(0)).sqrt()


def _some_chains(one: Tempered, chains: Tensor) -> Tempered:
    """A run with those of its chains alone for which `chains` (C,) is true, and their share of the cost."""
    history = {name: x if x.dim() < 3 else x[:, :, chains] for name, x in one.history.items()}
    count = int(chains.sum())
    return Tempered(one.config | {"chains": count}, one.cost * count // len(chains), one.refused, history, {})


@torch.no_grad()
def pictures(problem: Problem, truth: Truth, n: int = 10) -> dict[float, Tensor]:
    """Images of the tilt at each level, (n, 1, 28, 28) uint8: where chains of both runs ended, in turn.

    Raises ValueError for runs that were restored without their state, and for more images than chains.
    """
    states = [one.state.get("z") for one in truth.runs]
    if any(z is None for z in states) or sum(z.shape[1] for z in states) < n:
        chains = sum(0 if z is None else z.shape[1] for z in states)
        raise ValueError(f"{n} images of {problem.prompt!r} want as many chains with their state; there are {chains}")
    found = {}
    for i, lam in enumerate(truth.runs[0].config["lams"]):
        turns = [z[i, k] for k in range(n) for z in states if k < z.shape[1]]
        images = problem.G.run(torch.stack(turns[:n]))
        found[lam] = ((images.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).cpu()
    return found


class Record(NamedTuple):
    """By prompt: its truth; images of each level, falling lam -> (n, 1, 28, 28) uint8; r_low and clip of draws of p_0,
    (n, 2); mean and standard deviation of the attribute under p_0."""

    truths: dict[str, Truth]
    images: dict[str, dict[float, Tensor]]
    plain: dict[str, Tensor]
    scales: dict[str, tuple[float, float]]


def store(path: Path, record: Record) -> Path:
    """Keeps a record in one file for `restore`, of runs the sweeps after the warm-up."""
    tensors, about = {}, {}
    for prompt, truth in record.truths.items():
        for i, one in enumerate(truth.runs):
            history = {name: value[one.config["warmup"] :] for name, value in one.history.items()}
            measured = history.pop("measured").unbind(-1)
            history |= {f"measured.{name}": value for name, value in zip(MEASURED, measured, strict=True)}
            for name, value in history.items():
                whole = torch.int32 if name == "replica" else torch.uint8 if name[9:] in COUNTED else torch.float32
                tensors[f"{prompt}|{i}|{name}"] = value.to(whole)
            about[f"{prompt}|{i}"] = {"run": one.config | {"warmup": 0}, "cost": one.cost, "refused": one.refused}
        tensors |= {f"{prompt}|images|{lam:g}": images for lam, images in record.images.get(prompt, {}).items()}
        if prompt in record.plain:
            tensors[f"{prompt}|plain"] = record.plain[prompt][:, :2].float()
    return files.save_state(path, tensors, {"runs": about, "measured": MEASURED, "scales": record.scales})


def restore(path: Path) -> Record:
    """What `store` kept. Raises as `files.load_state` does, and ValueError where other things were measured."""
    tensors, about = files.load_state(path)
    if tuple(about["measured"]) != MEASURED:
        raise ValueError(f"{path.name} measured {about['measured']}, not {MEASURED}: record it anew")
    runs: dict[str, list[Tempered]] = {}
    for key, one in about["runs"].items():
        own = {name[len(key) + 1 :]: value for name, value in tensors.items() if name.startswith(f"{key}|")}
        own["measured"] = torch.stack([own.pop(f"measured.{name}").double() for name in MEASURED], -1)
        history = {f"history.{name}": value for name, value in own.items()}
        runs.setdefault(key.partition("|")[0], []).append(_tempered(history, one))
    scales = {prompt: tuple(scale) for prompt, scale in about["scales"].items()}
    record = Record({prompt: Truth(prompt, tuple(each)) for prompt, each in runs.items()}, {}, {}, scales)
    for prompt in runs:
        images = {name.split("|")[2]: value for name, value in tensors.items() if name.startswith(f"{prompt}|images|")}
        record.images[prompt] = dict(sorted(((float(lam), x) for lam, x in images.items()), reverse=True))
        if f"{prompt}|plain" in tensors:
            record.plain[prompt] = tensors[f"{prompt}|plain"]
    return record
