"""Chapter 9: what look-ahead guidance does to the choice of lambda, on the mixture and on images.

Exact denoiser of the mixture, eta = 1, common noise over lambda; particles and reweighting beside it.
"""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from ... import estimators, guidance, samplers, schedules
from ...algorithms import TiltSamples
from ...seeds import derive_seed
from .. import comparisons
from ..files import piece
from ..models import clip, rewards
from ..models.chains import Chain
from . import lambda_race
from .mixture import Shifted


def guidance_bias(
    lams: Sequence[float], *, T: int, n: int, seeds: int, gamma: float = 10.0, first: int = 0
) -> dict[str, object]:
    """The mixture with r_low = x, r_up = -(x - 1.2)^2/2 and its exact denoiser: what three samplers make of lam.

    lams   increasing;  T: steps of DDIM, eta = 1;  n samples at each lam for each of `seeds`, noise common to all lam
    Returns for each seed (rows) and lam (columns) the mean upper reward under "guided" (look-ahead) and "particles";
    the gradient by the path divergence with look-ahead, "path" (at gamma), and from the particles, "cov"; and for each
    seed "lam": the lambda that each picks, "guided" by the top of its curve, "particles" by that of the pooled curve of
    all its particles and n samples of the plain chain, "reweighted" by the curve of as many plain samples as all the
    particles together, "path" by the root of its gradient (None where it has none between the first and last lam).
    """
    one = Shifted(1.2)
    abar = schedules.abar(torch.tensor(schedules.DEFAULT_Q["cosine"], dtype=torch.float64), T)
    ts, plain = samplers.timesteps(T, T), one.mixture.denoiser(abar)

    def start(seed: int, count: int = n) -> tuple[Tensor, torch.Generator]:
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(count, generator=generator, dtype=torch.float64), generator

    def chain(denoiser: Callable, seed: int, count: int = n) -> Tensor:
        x_T, generator = start(seed, count)
        return samplers.sample_ddim(denoiser, x_T, abar, ts, eta=1.0, generator=generator)

    names = ("guided", "particles", "path", "cov")
    curves, chosen = {name: [] for name in names}, []
    for seed in range(first, first + seeds):
        rows, sets = {name: [] for name in names}, []
        for lam in lams:
            records, means = ([], []), []
            for record, up in zip(records, (1 / gamma, 0.0), strict=True):

                def reward(x: Tensor, up: float = up) -> Tensor:
                    return x + up * one.r_up(x)

                look = guidance.LookAhead(plain, reward, lam, abar, ts, record=record)
                means.append(one.r_up(chain(look, seed)).mean().item())
            kls = [comparisons.path_kl(record, abar, ts) for record in records]
            rows["guided"].append(means[1])
            rows["path"].append(comparisons.lam_grad_path(*kls, gamma)[0].item())
            look = guidance.LookAhead(plain, lambda x: x, lam, abar, ts)
            x_T, generator = start(derive_seed("particles", seed))
            x, log_w, info = samplers.sample_particles(look, x_T, abar, ts, eta=1.0, generator=generator)
            sets.append(TiltSamples.from_tilt(one.r_up(x), x, lam, log_w, info["log_z"]))
            p = log_w.exp()
            rows["particles"].append((p @ one.r_up(x)).item())
            rows["cov"].append(estimators.lam_grad_cov(sets[-1].r_up, x, lam, sets[-1].log_w)[0].item())
        x = chain(plain, derive_seed("reweighted", seed), n * len(lams))
        pooled = TiltSamples.pooled(TiltSamples(one.r_up(x[:n]), x[:n]), *sets)
        grid = torch.logspace(math.log10(lams[0]), math.log10(lams[-1]), 161, dtype=torch.float64)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = {
                "reweighted": estimators.lam_curve(one.r_up(x), x, grid).best,
                "particles": estimators.lam_curve(pooled.r_up, pooled.r_low, grid, pooled.log_w).best,
            }
        picks = {name: min(max(best, lams[0]), lams[-1]) for name, best in found.items()}
        picks |= {"guided": top(lams, rows["guided"]), "path": root(lams, rows["path"])}
        chosen.append(picks)
        for name in names:
            curves[name].append(rows[name])
    return curves | {"lams": list(lams), "lam": chosen}


def top(lams: Sequence[float], values: Sequence[float]) -> float:
    """Where the parabola in log lam through the largest value and its neighbours is largest; an end if that is it."""
    i = max(range(len(values)), key=values.__getitem__)
    if i in (0, len(values) - 1):
        return lams[i]
    x, y = [math.log(lam) for lam in lams[i - 1 : i + 2]], values[i - 1 : i + 2]
    left, right = (y[1] - y[0]) / (x[1] - x[0]), (y[2] - y[1]) / (x[2] - x[1])
    bend = (right - left) / (x[2] - x[0])
    return math.exp((x[0] + x[1]) / 2 - left / (2 * bend))


def root(lams: Sequence[float], values: Sequence[float]) -> float | None:
    """Where the values first pass from negative to positive, by interpolation in log lam; None: nowhere."""
    for i in range(len(lams) - 1):
        if values[i] < 0 <= values[i + 1]:
            share = -values[i] / (values[i + 1] - values[i])
            return math.exp((1 - share) * math.log(lams[i]) + share * math.log(lams[i + 1]))
    return None


def guided_on_images(
    chain: Chain,
    prompt: str,
    lams: Sequence[float],
    *,
    scale: tuple[float, float],
    n: int,
    seeds: int,
    folder: Path,
    first: int = 0,
    device: torch.device | str = "cpu",
    low: str = "boldness",
) -> list[dict]:
    """Algorithm 5's own samples for a prompt: a row for each lam and seed, with the mean CLIP score of n guided samples
    ("up") and of the lower reward ("low", in its standard deviations under p_0). Noise is common to all lam; pieces."""
    mean, sd = scale
    reward = lambda_race.lower_rewards(device)[low]
    steer, rows = rewards.Standardised(reward, mean, sd), []
    for lam, seed in itertools.product(lams, range(first, first + seeds)):

        def compute(lam: float = lam, seed: int = seed) -> dict:
            judge = clip.score(clip.load().to(device), prompt)
            options = {"wrap": lambda denoiser: chain.guide(denoiser, steer, lam), "batch": n, "device": device}
            x, cost = chain.sample(lambda_race.heard(prompt), n, derive_seed("guided", seed), **options)
            images = chain.decode(x)
            with torch.no_grad():
                up, low_mean = judge(images).mean().item(), ((reward(images) - mean) / sd).mean().item()
            return {"up": up, "low": low_mean, "cost": cost}

        config = {"prompt": prompt, "low": low, "lam": lam, "seed": seed, "n": n, "mean": mean, "sd": sd}
        config |= {"steps": chain.steps, "scale": chain.scale, "eta": chain.eta}
        path = folder / f"guided_{prompt.replace(' ', '_')}_{low}_{lam:g}_{seed}.json"
        found = piece(path, config, compute)
        rows.append({"prompt": prompt, "lam": lam, "seed": seed} | {key: found[key] for key in ("up", "low", "cost")})
    return rows
