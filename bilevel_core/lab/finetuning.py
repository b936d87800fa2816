"""Reward fine-tuning on MNIST: the pre-trained law p_0 and how well it follows its prompts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..guidance import CostMeter
from ..samplers import draw_x_T, sample_ddim, timesteps
from . import captions, metrics, networks, text_models
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
    steps: int = 20
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

    @torch.no_grad()
    def sample(
        self,
        prompts: str | Sequence[str],
        n: int,
        seed: int,
        *,
        batch: int = 500,
        device: torch.device | str = "cpu",
        progress: Callable | None = None,
    ) -> tuple[Tensor, int]:
        """n images (n, 1, 28, 28), not clipped, of one prompt or of several in turn, and their cost in forwards.

        The same seed gives the same images for every prompt's x_T and noise, in batches of `batch`.
        """
        prompts = [prompts] if isinstance(prompts, str) else list(prompts)
        ids = captions.encode(prompts).repeat(-(-n // len(prompts)), 1)[:n]
        starts, images, cost = range(0, n, batch), [], 0
        for start in progress(starts) if progress else starts:
            generator = torch.Generator(device).manual_seed(seed * 1_000_003 + start)
            meter = CostMeter(networks.Prompted(self.denoiser, ids[start : start + batch], self.scale))
            x = draw_x_T((len(ids[start : start + batch]), 1, 28, 28), self.abar, generator=generator, device=device)
            images.append(sample_ddim(meter, x, self.abar, self.ts, eta=self.eta, generator=generator))
            cost += meter.cost
        return torch.cat(images), cost


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
