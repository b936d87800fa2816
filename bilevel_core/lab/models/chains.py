"""A sampler with its prompts as one object: the pre-trained law p_0, its bank of rewarded samples, its particles."""

from __future__ import annotations

import hashlib
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ...guidance import CostMeter, LookAhead
from ...samplers import draw_x_T, sample_ddim, sample_particles, timesteps
from ...seeds import derive_seed
from ..files import kept
from . import captions, networks, pixels, text_models
from .fast import fast
from .rewards import evaluate


@dataclass(frozen=True)
class Chain:
    """The sampler whose output law, for a prompt, is p_0: network, schedule, guidance scale, steps and eta.

    denoiser     a `networks.TextDenoiser`;  abar (T+1,): its schedule
    scale        of classifier-free guidance;  steps, eta: of `sample_ddim`, on the trailing grid
    micro_batch  rows in a gradient pass, None: all;  checkpoint: as in `guidance.LookAhead`; they decide the memory
    shape        of what is sampled, here the image itself; a chain in latent space decodes it
    """

    denoiser: Callable[..., Tensor]
    abar: Tensor
    scale: float = 1.5
    steps: int = 10
    eta: float = 1.0
    micro_batch: int | None = None
    checkpoint: bool = False
    shape: tuple[int, ...] = (1, 28, 28)

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

    def denoise(self, prompt: str | Sequence[str]) -> networks.Prompted:
        """The denoiser of p_0 for a prompt, or for one prompt a row."""
        ids = captions.encode([prompt] if isinstance(prompt, str) else list(prompt))
        return networks.Prompted(self.denoiser, ids, self.scale)

    def decode(self, x: Tensor) -> Tensor:
        """Images in [-1, 1] of what was sampled (B, *shape); differentiable inside the range."""
        return x.clamp(-1, 1)

    def guide(
        self, denoiser: Callable[[Tensor, int], Tensor], reward: Callable[[Tensor], Tensor], lam: float, **options
    ) -> LookAhead:
        """Algorithm 5 around a denoiser of one prompt, for a reward of decoded images; options: of `LookAhead`."""
        memory = {"micro_batch": self.micro_batch, "checkpoint": self.checkpoint}
        return LookAhead(denoiser, lambda x: reward(self.decode(x)), lam, self.abar, self.ts, **memory, **options)

    @torch.no_grad()
    def sample(
        self,
        prompts: str | Sequence[str],
        n: int,
        seed: int,
        *,
        first: int = 0,
        batch: int = 500,
        wrap: Callable[[Callable], Callable] = lambda denoiser: denoiser,
        device: torch.device | str = "cpu",
        progress: Callable | None = None,
    ) -> tuple[Tensor, int]:
        """Samples number first, ..., first + n - 1 (n, *shape), not decoded, of one prompt or of several in turn.

        wrap  denoiser -> the denoiser to sample with, such as `guide` of it
        Returns them with their cost in forwards. The noise of a batch depends on the seed, on the number of its first
        sample and on how many it has; not on the prompts, so that they share it. So whole batches may be drawn in
        several calls; but 20 samples are not the first 20 of 40 unless `batch` is 20 or divides it. Raises ValueError
        unless n and batch are at least 1 and `first` is not negative.
        """
        if n < 1 or batch < 1 or first < 0:
            raise ValueError(f"n = {n} and batch = {batch} must be at least 1, first = {first} at least 0")
        rows = range(first, first + n)
        starts, images, cost = range(0, n, batch), [], 0
        for start in progress(starts) if progress else starts:
            generator = torch.Generator(device).manual_seed(derive_seed("sample", seed, first + start))
            part = rows[start : start + batch]
            meter = CostMeter(
                self.denoise(prompts if isinstance(prompts, str) else [prompts[i % len(prompts)] for i in part])
            )
            x = draw_x_T((len(part), *self.shape), self.abar, generator=generator, device=device)
            images.append(sample_ddim(wrap(meter), x, self.abar, self.ts, eta=self.eta, generator=generator))
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
    wrap: Callable[[Callable], Callable] = lambda denoiser: denoiser,
    device: torch.device | str = "cpu",
    bar: str | None = None,
) -> dict[str, Tensor]:
    """n samples of a chain for a prompt with their rewards, drawn once and kept in `folder`, a batch a file.

    rewards  name -> callable of images (B, C, H, W) in [-1, 1], as the chain decodes them
    about    what decides the numbers besides chain, prompt, seed and batch: hashes of weights, settings of rewards
    wrap     denoiser -> denoiser, for guided samples; what decides it belongs into `about`
    Returns every reward (n,) float32, "images" (n, C, H, W) uint8, and of all batches the "cost" (), in image forwards,
    and the "seconds" (). Larger n goes on from a smaller one. Raises ValueError where a file was made otherwise, naming
    what differs.
    """
    from tqdm.auto import tqdm

    config = {"prompt": prompt, "seed": seed, "batch": batch, "rewards": sorted(rewards)} | dict(about)
    config |= {"scale": chain.scale, "steps": chain.steps, "eta": chain.eta}

    def compute(first: int) -> dict[str, Tensor]:
        began = time.perf_counter()
        x, cost = chain.sample(prompt, batch, seed, first=first, batch=batch, wrap=wrap, device=device)
        with torch.no_grad():
            found = rewarded(chain.decode(x), rewards)
        return found | {"cost": torch.tensor([cost]), "seconds": torch.tensor([time.perf_counter() - began])}

    parts = []
    for first in tqdm(range(0, n, batch), desc=bar, disable=bar is None):
        path = folder / f"{slug(prompt)}_{seed}_{first}.safetensors"
        parts.append(kept(path, config, lambda first=first: compute(first)))
    joined = {name: torch.cat([part[name] for part in parts])[:n] for name in (*rewards, "images")}
    return joined | {name: sum(part[name][0] for part in parts) for name in ("cost", "seconds")}


@torch.no_grad()
def rewarded(images: Tensor, rewards: Mapping[str, Callable[[Tensor], Tensor]]) -> dict[str, Tensor]:
    """Every reward (n,) float32 of images (n, C, H, W) in [-1, 1], and the "images" as uint8, all on the CPU.

    Raises as `rewards.evaluate` does, and ValueError for images outside [-1, 1].
    """
    images = pixels.checked(images, bounded=True)
    found = {name: evaluate(reward, images).float().cpu() for name, reward in rewards.items()}
    return found | {"images": ((images + 1) * 127.5).round().to(torch.uint8).cpu()}


@torch.no_grad()
def particles(
    chain: Chain,
    prompt: str,
    steer: Callable[[Tensor], Tensor],
    lam: float,
    n: int,
    seed: int,
    rewards: Mapping[str, Callable[[Tensor], Tensor]],
    *,
    temper: float = 0.0,
    device: torch.device | str = "cpu",
) -> dict[str, Tensor]:
    """n guided particles of p_0 tilted by steer/lam, as `bank` returns them, with "log_w" and "family" (n,), from which
    start each descends, "log_z" () and "cost".

    steer   reward of decoded images;  temper: of the guide's potentials, see `guidance.LookAhead`
    They depend on one another, and on n: fewer are not the first of more.
    """
    began = time.perf_counter()
    generator = torch.Generator(device).manual_seed(seed)
    meter = CostMeter(chain.denoise(prompt))
    guide = chain.guide(meter, steer, lam, temper=temper)
    x_T = draw_x_T((n, *chain.shape), chain.abar, generator=generator, device=device)
    x, log_w, info = sample_particles(guide, x_T, chain.abar, chain.ts, eta=chain.eta, generator=generator)
    found = rewarded(chain.decode(x), rewards) | {"log_w": log_w.cpu(), "family": info["family"].cpu()}
    found |= {"log_z": torch.tensor(info["log_z"]).double(), "cost": torch.tensor([meter.cost])}
    return found | {"seconds": torch.tensor([time.perf_counter() - began])}


def slug(text: str) -> str:
    """A file name for a prompt: itself with _ for spaces; where more must change, its beginning and a hash."""
    plain = text.replace(" ", "_")
    if re.fullmatch(r"[A-Za-z0-9_-]{1,60}", plain):
        return plain
    return re.sub(r"[^A-Za-z0-9-]+", "_", text)[:40] + "_" + hashlib.sha256(text.encode()).hexdigest()[:8]
