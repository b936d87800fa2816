"""Reward fine-tuning on MNIST: the pre-trained law p_0 and how well it follows its prompts."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from ..guidance import CostMeter
from ..samplers import draw_x_T, sample_ddim, timesteps
from . import captions, metrics, networks, runs, text_models
from .experiments import piece
from .fast import fast


@dataclass(frozen=True)
class Chain:
    """The sampler whose output law, for a prompt, is p_0: network, schedule, guidance scale, steps and eta.

    denoiser  a `networks.TextDenoiser`;  abar (T+1,): its schedule
    scale     of classifier-free guidance;  steps, eta: of `sample_ddim`, on the trailing grid
    """

    denoiser: Callable[..., Tensor]
    abar: Tensor
    scale: float = 1.5
    steps: int = 10
    eta: float = 1.0

    @classmethod
    def shipped(cls, device: torch.device | str = "cpu", **options: float) -> Chain:
        """The chain of the shipped denoiser; on a CPU it is recorded, see `fast`. options: scale, steps, eta."""
        denoiser = networks.load_text_denoiser().to(device)
        if torch.device(device).type == "cpu":
            denoiser = fast(denoiser, torch.zeros(2, 1, 28, 28), captions.encode([""]))
        return cls(denoiser, text_models.abar(text_models.RECIPES["denoiser"]), **options)

    @property
    def ts(self) -> list[int]:
        """The sampling grid."""
        return timesteps(len(self.abar) - 1, self.steps)

    def denoise(self, prompt: str | Tensor) -> networks.Prompted:
        """The denoiser of p_0 for a prompt, or for token ids by row."""
        return networks.Prompted(self.denoiser, prompt, self.scale)

    @torch.no_grad()
    def sample(
        self,
        prompts: str | Sequence[str],
        n: int,
        seed: int,
        *,
        first: int = 0,
        batch: int = 500,
        device: torch.device | str = "cpu",
        progress: Callable | None = None,
    ) -> tuple[Tensor, int]:
        """Images number first, ..., first + n - 1 (n, 1, 28, 28), not clipped, of one prompt or of several in turn.

        Returns them with their cost in forwards. Noise depends on seed, `first` and `batch` alone, so that prompts
        share it; a whole number of batches may be drawn in several calls.
        """
        prompts = [prompts] if isinstance(prompts, str) else list(prompts)
        ids = captions.encode(prompts)[torch.arange(first, first + n) % len(prompts)]
        starts, images, cost = range(0, n, batch), [], 0
        for start in progress(starts) if progress else starts:
            generator = torch.Generator(device).manual_seed(seed * 1_000_003 + first + start)
            part = ids[start : start + batch]
            meter = CostMeter(self.denoise(part))
            x = draw_x_T((len(part), 1, 28, 28), self.abar, generator=generator, device=device)
            images.append(sample_ddim(meter, x, self.abar, self.ts, eta=self.eta, generator=generator))
            cost += meter.cost
        return torch.cat(images), cost


def bank(
    chain: Chain,
    prompt: str,
    rewards: Mapping[str, Callable[[Tensor], Tensor]],
    n: int,
    seed: int,
    *,
    folder: Path,
    about: Mapping[str, object],
    batch: int = 500,
    device: torch.device | str = "cpu",
    bar: str | None = None,
) -> dict[str, Tensor]:
    """n samples of p_0 for a prompt with their rewards, drawn once and kept in `folder`, a batch a file.

    rewards  name -> callable of images (B, 1, 28, 28) in [-1, 1], which is what the chain's output is clipped to
    about    what decides the numbers besides chain, prompt, seed and batch: hashes of weights, settings of rewards
    Returns every reward (n,) float32, "images" (n, 1, 28, 28) uint8, and "cost" (), in image forwards. Larger n goes on
    from a smaller one. Raises ValueError where a file was made otherwise, naming what differs.
    """
    from tqdm.auto import tqdm

    config = {"prompt": prompt, "seed": seed, "batch": batch, "rewards": sorted(rewards)} | dict(about)
    config |= {"scale": chain.scale, "steps": chain.steps, "eta": chain.eta}
    parts = []
    for first in tqdm(range(0, n, batch), desc=bar, disable=bar is None):
        path = folder / f"{prompt.replace(' ', '_')}_{seed}_{first}.safetensors"
        if path.exists():
            tensors, found = runs.load_state(path)
            changed = [key for key in config if found.get(key) != config[key]]
            if changed:
                raise ValueError(f"{path} was made with other {', '.join(changed)}; delete it or use another work_dir")
        else:
            images, cost = chain.sample(prompt, batch, seed, first=first, batch=batch, device=device)
            images = images.clamp(-1, 1)
            with torch.no_grad():
                tensors = {name: reward(images).float().cpu() for name, reward in rewards.items()}
            tensors["images"] = ((images + 1) * 127.5).round().to(torch.uint8).cpu()
            tensors["cost"] = torch.tensor([cost])
            runs.save_state(path, tensors, config)
        parts.append(tensors)
    joined = {name: torch.cat([part[name] for part in parts])[:n] for name in (*rewards, "images")}
    return joined | {"cost": sum(part["cost"][0] for part in parts)}


FULL_CAPTIONS = [text for text, place in captions.CAPTIONS.items() if captions.ABSENT not in place]
"""The 90 captions that mention digit, thickness and slant."""


@torch.no_grad()
def follow(images: Tensor, classifier: nn.Module, reference: Tensor | None = None) -> dict[str, float]:
    """How well images of FULL_CAPTIONS in turn, (n, 1, 28, 28), follow their captions.

    reference  features of real images, for a Fréchet distance where n allows it
    Returns the shares "digit" (by the classifier), "thickness" and "slant" (measured terciles; chance 1/3) that are as
    asked; the mean thickness in pixels for each word, "thin" ..., and the mean slant for "leaning left" ..., each with
    its standard error "... se"; and "frechet".
    """
    x = images.clamp(-1, 1)
    wanted = torch.tensor([captions.CAPTIONS[text] for text in FULL_CAPTIONS], device=x.device)
    wanted = wanted.repeat(-(-len(x) // len(wanted)), 1)[: len(x)]
    features = torch.cat([classifier.features(part) for part in x.split(1000)])
    predicted, found = classifier.head(features).argmax(1), captions.attributes(x, wanted[:, 0])
    right = found == wanted
    right[:, 0] = predicted == wanted[:, 0]
    report = dict(zip(("digit", "thickness", "slant"), right.double().mean(0).tolist(), strict=True))
    for column, words, measure in ((1, captions.THICKNESS, captions.thickness), (2, captions.SLANT, captions.slant)):
        values = measure(x).double()
        for k, word in enumerate(words):
            chosen = values[wanted[:, column] == k]
            report[word], report[f"{word} se"] = chosen.mean().item(), (chosen.std() / len(chosen) ** 0.5).item()
    if reference is not None:
        report["frechet"] = metrics.frechet(features.double().cpu(), reference)
    return report


def prompt_study(
    settings: Sequence[tuple[float, int]],
    *,
    split: str,
    seeds: int,
    n: int,
    folder: Path,
    device: torch.device | str = "cpu",
    progress: Callable | None = None,
) -> list[dict]:
    """`follow` for the shipped chain at each (scale, steps), against the reference features of a split.

    n      images for each seed and setting, the 90 complete captions in turn
    folder where pieces live; a killed study goes on there
    Returns a row for each setting and seed: scale, steps, seed, cost, wall_s and what `follow` reports.
    """
    classifier = networks.load_classifier("mnist28").to(device)
    hashes = {name: networks.card(name)["sha256"] for name in ("text_denoiser", "classifier_mnist28")}
    reference = networks.reference_features("mnist28", split)

    def compute(scale: float, steps: int, seed: int) -> dict:
        chain = Chain.shipped(device, scale=scale, steps=steps)
        images, cost = chain.sample(FULL_CAPTIONS, n, seed, device=device, progress=progress)
        enough = n >= 2 * classifier.num_features
        return {"cost": cost} | follow(images, classifier, reference if enough else None)

    rows = []
    for (scale, steps), seed in itertools.product(settings, range(seeds)):
        config = {"scale": scale, "steps": steps, "seed": seed, "n": n, "split": split, "weights": hashes}
        path = folder / f"prompts_{split}_{scale:g}_{steps}_{seed}.json"
        found = piece(path, config, lambda s=scale, k=steps, i=seed: compute(s, k, i))
        rows.append({"scale": scale, "steps": steps, "seed": seed} | {k: v for k, v in found.items() if k != "config"})
    return rows
