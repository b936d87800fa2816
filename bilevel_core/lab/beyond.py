"""Chapter 9's experiments: what exact estimators give that a penalty method does not.

Pooling on images. Algorithm 2 of chapter 5 (`lam_study.race`) with the same samples, the same seeds of its rounds and
the same budget, but with `pool=True`; its last lambda, or the maximum of the curve of everything it has drawn. What was
open, the effective sample size to ask for and which of the two to report, is decided on bold VALIDATION prompts
(`validate_pooling`); TEST prompts are run once, against the rows that chapter 5 recorded without pooling.
"""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from .. import algorithms, estimators, guidance, oracles, samplers, schedules
from ..algorithms import TiltSamples
from . import clip, lam_study, metrics, rewards
from .experiments import piece
from .finetuning import Chain

START = 1.0  # of Algorithm 2 on images, as in chapter 5
BOUNDS = (0.01, 100.0)
DRAWS, ROUNDS = 250, 4  # fresh particles a round, and rounds: what half of chapter 5's budget buys
MIN_ESS_TRIED = (100.0, 250.0)  # on validation prompts, of Algorithm 2 with pooling
MIN_ESS, REPORTED = 100.0, "last"  # what these chose: mean regret 0.21 against 0.40 (read off) and 0.65 (at 250, last)
PROTOCOL = {
    "mixture": "400 samples of p_0 and rounds of exact draws, 1000 at most; paired over methods by the first samples",
    "pooling": "chapter 5's samples, folds, seeds and budget; marked as there, by the other folds and runs",
    "chosen on validation": f"effective sample size {MIN_ESS:g}, reported: {REPORTED}",
    "bias": "exact denoiser of the mixture, eta = 1, common noise over lambda",
    "pieces": "resumable; wall_s counts those of the last start",
}


# ---------------------------------------------------------------- pooling, on the mixture

MIXTURE_LAMS = torch.logspace(-1.3, 2, 133, dtype=torch.float64)


class Shifted:
    """The mixture oracle with r_low = x and r_up = -(x - centre)^2/2, its optimum, and exact draws of every tilt."""

    def __init__(self, centre: float):
        from scipy.optimize import brentq

        self.mixture, self.centre = oracles.Mixture1D(), centre
        self.problem = self.mixture.problem(self.r_up)
        self.lam = brentq(lambda lam: self.problem.hypergrad(lam).item(), 0.05, 50.0, xtol=1e-12)

    def r_up(self, x: Tensor) -> Tensor:
        return -((x - self.centre) ** 2) / 2

    def regret(self, lam: float) -> float:
        """What lam lacks to the optimum in E r_up."""
        return (self.problem.value(min(max(lam, 0.05), 100.0)) - self.problem.value(self.lam)).item()

    def first(self, n: int, seed: int) -> TiltSamples:
        """n samples of p_0."""
        x = self.mixture.sample(n, torch.Generator().manual_seed(seed))
        return TiltSamples(self.r_up(x), x, cost=n)

    def draw(self, lam: float, n: int, seed: int) -> TiltSamples:
        """n exact samples of the tilt at lam, weighted back to p_0."""
        x = self.mixture.tilt(1 / lam).sample(n, torch.Generator().manual_seed(seed))
        log_z = self.problem.logits(lam).logsumexp(0).item()
        return TiltSamples.from_tilt(self.r_up(x), x, lam, torch.full_like(x, -math.log(n)), log_z, cost=n)


def mixture_methods() -> dict[str, dict]:
    """Name -> options of `learn_lam`, with "batch" and "budget": the samples of a round, and of all rounds together."""
    small, large = {"batch": 100, "min_ess": 50.0}, {"batch": 200, "min_ess": 100.0}
    return {
        "penalty, γ = 10": small | {"gamma": 10.0},
        "penalty, γ = 1000": small | {"gamma": 1000.0},
        "covariance": small,
        "covariance, batches of 200": large,
        "covariance, pooled": small | {"pool": True},
        "covariance, pooled, ESS 100": small | {"pool": True, "min_ess": 100.0},
    }


def mixture_pooling(centre: float, repeats: int, *, n: int = 400, budget: int = 1000, start: float = 3.0) -> list[dict]:
    """A row for each way to learn lam on `Shifted(centre)`, from n samples of p_0 and rounds of exact draws.

    budget  samples in all, at most. Two rows use no gradient: "pooled curve" reads the maximum off what the last method
            drew, "curve of p_0" off `budget` samples of p_0
    Rows: "method", and over repeats "error" (root mean square of log lam/lam*), "regret" with its t interval, "gain"
    (regret of "covariance" minus this one's, paired), "cost", and for curves "cover", the share of intervals with lam*.
    """
    one, found = Shifted(centre), {}
    for repeat in range(repeats):
        first, seed = one.first(n, 10_000 + repeat), 1_000_000 + 100 * repeat
        for name, options in mixture_methods().items():
            options = dict(options)
            batch = options.pop("batch")

            def draw(lam: float, round: int, batch: int = batch, seed: int = seed) -> TiltSamples:
                return one.draw(lam, batch, seed + round)

            options |= {"draw": draw, "rounds": (budget - n) // batch, "bounds": (0.05, 100.0)}
            *_, last = algorithms.learn_lam(first, start, **options)
            found.setdefault(name, []).append((last.lam, last.cost, None))
        alone = one.first(budget, 10_000 + repeat)
        for name, samples, cost in (("pooled curve", last.outer.p_star, last.cost), ("curve of p_0", alone, budget)):
            curve = estimators.lam_curve(samples.r_up, samples.r_low, MIXTURE_LAMS, samples.log_w, min_ess=30)
            hit = curve.interval[0] <= one.lam <= curve.interval[1]
            found.setdefault(name, []).append((curve.best, cost, hit))
    regrets = {name: [one.regret(lam) for lam, *_ in tries] for name, tries in found.items()}
    rows = []
    for name, tries in found.items():
        errors = [math.log(min(max(lam, 0.05), 100.0) / one.lam) for lam, *_ in tries]
        gains = [a - b for a, b in zip(regrets["covariance"], regrets[name], strict=True)]
        row = {"centre": centre, "method": name, "error": math.sqrt(sum(e * e for e in errors) / repeats)}
        row |= {"bias": sum(errors) / repeats, "regret": list(metrics.t_interval(regrets[name]))}
        row |= {"gain": list(metrics.t_interval(gains)), "cost": sum(cost for _, cost, _ in tries) / repeats}
        hits = [hit for *_, hit in tries if hit is not None]
        rows.append(row | {"cover": sum(hits) / repeats if hits else None, "repeats": repeats})
    return rows


# ---------------------------------------------------------------- pooling, on images


def learn_on_images(
    chain: Chain,
    prompt: str,
    low: str,
    samples: TiltSamples,
    scale: tuple[float, float],
    seed: int,
    *,
    pool: bool,
    min_ess: float,
    folder: Path,
    device: torch.device | str = "cpu",
) -> dict:
    """Algorithm 2 as in `lam_study.race` from samples of p_0, with or without pooling; a piece, kept in `folder`.

    scale  mean and standard deviation under p_0 of the lower reward
    Returns "last", the lambda of the last step; "read", the maximum of the curve of the samples it ended with, where
    that is inside what they reach, else "last"; "interval" of the latter; "rounds", "cost", "said" and "path".
    """
    mean, sd = scale

    def draw(lam: float, round: int) -> TiltSamples:
        options = {"mean": mean, "sd": sd, "folder": folder / "particles", "device": device}
        found = lam_study.particles(chain, prompt, low, lam, DRAWS, 1000 * (seed + 1) + round, **options)
        return lam_study.weighted_back(found, low, lam, mean, sd)

    def compute() -> dict:
        options = {"draw": draw, "min_ess": min_ess, "rounds": ROUNDS, "bounds": BOUNDS, "pool": pool}
        steps = list(algorithms.learn_lam(samples, START, **options))
        last = steps[-1]
        read, interval = read_off(last.outer.p_star, last.lam)
        found = {"last": last.lam, "read": read, "interval": interval, "rounds": last.round, "cost": last.cost}
        return found | {"said": last.done or "steps used up", "path": [[step.lam, step.round] for step in steps]}

    config = {"prompt": prompt, "low": low, "seed": seed, "pool": pool, "min_ess": min_ess, "n": len(samples.r_low)}
    config |= {"draws": DRAWS, "rounds": ROUNDS, "start": START, "mean": mean, "sd": sd}
    name = f"pool_{prompt.replace(' ', '_')}_{low}_{seed}_{int(pool)}_{min_ess:g}.json"
    return piece(folder / name, config, compute)


def read_off(samples: TiltSamples, otherwise: float) -> tuple[float, tuple[float | None, float | None]]:
    """The maximum of the curve of some samples and its interval, ends None where they are 0 or infinite; `otherwise`
    where the maximum is not inside what the samples reach."""
    lams = torch.logspace(math.log10(BOUNDS[0]), math.log10(BOUNDS[1]), 161, dtype=torch.float64)
    try:
        curve = estimators.lam_curve(samples.r_up, samples.r_low, lams, samples.log_w)
    except ValueError:  # fewer than three values with enough effective samples
        return otherwise, (None, None)
    ends = tuple(end if 0 < end < math.inf else None for end in curve.interval)
    return (curve.best if curve.boundary is None else otherwise), ends


def validate_pooling(
    chain: Chain,
    prompts: Sequence[str],
    *,
    seeds: int,
    n: int,
    lams: Sequence[float],
    count: int,
    runs: int,
    folder: Path,
    device: torch.device | str = "cpu",
    low: str = "boldness",
) -> list[dict]:
    """Rows of Algorithm 2 without and with pooling on validation prompts, each with the regret of "last" and "read".

    n      samples of p_0 for each seed, all of which mark together with `runs` runs of `count` particles at `lams`
    """
    rows = []
    for prompt in prompts:
        drawn = lam_study.draw(chain, prompt, seeds * n, 200, folder=folder / "bank", device=device)
        mean, sd = rewards.scale(drawn[low])
        options = {"mean": mean, "sd": sd, "folder": folder / "particles", "device": device}
        sharp = {
            (lam, run): lam_study.particles(chain, prompt, low, lam, count, 900_000 + 1000 * run, **options)
            for lam, run in itertools.product(lams, range(runs))
        }
        marks = lam_study.Bank.of(drawn, low, sharp)
        best = max(marks.worth(lam)["up"] for lam in lam_study.candidates(marks))
        for seed in range(seeds):
            samples = marks.folds(seeds, seed)[0].samples()
            for pool, min_ess in ((False, 100.0), *((True, value) for value in MIN_ESS_TRIED)):
                options = {"pool": pool, "min_ess": min_ess, "folder": folder, "device": device}
                found = learn_on_images(chain, prompt, low, samples, (mean, sd), 50 + seed, **options)
                regret = {f"regret {key}": best - marks.worth(found[key])["up"] for key in ("last", "read")}
                row = {"prompt": prompt, "seed": seed, "pool": pool, "min_ess": min_ess} | regret
                rows.append(row | {key: found[key] for key in ("last", "read", "rounds", "cost", "said")})
    return rows


def report_pooling(
    chain: Chain,
    materials: Mapping[str, lam_study.Material],
    before: Sequence[dict],
    *,
    seeds: int,
    min_ess: float,
    folder: Path,
    device: torch.device | str = "cpu",
    low: str = "boldness",
) -> list[dict]:
    """Algorithm 2 with pooling on chapter 5's test prompts: its folds, half of each, its seeds of particles.

    before  chapter 5's recorded rows of "Algorithm 2" with this reward
    Rows: prompt, seed, and for each of "before" (chapter 5's), "last" and "read" lambda, "up ..." and "regret ...", all
    marked alike: by the other folds and the runs of particles that no method drew from; "rounds", "cost", "said".
    """
    rows, old = [], {(row["prompt"], row["seed"]): row for row in before}
    for prompt, material in materials.items():
        whole, marks = material.bank(low), material.bank(low, "other")
        scale = rewards.scale(material.drawn[low])
        for seed in range(seeds):
            half = whole.folds(seeds, seed)[0].folds(2, 0)[0].samples()
            options = {"pool": True, "min_ess": min_ess, "folder": folder, "device": device}
            found = learn_on_images(chain, prompt, low, half, scale, seed, **options)
            rest = marks.folds(seeds, seed)[1]
            best = max(rest.worth(lam)["up"] for lam in lam_study.candidates(rest))
            lams = {"before": old[prompt, seed]["lam"], "last": found["last"], "read": found["read"]}
            row = {"prompt": prompt, "seed": seed}
            for key, lam in lams.items():  # None: infinity
                up = rest.worth(math.inf if lam is None else lam)["up"]
                row |= {f"lam {key}": lam, f"up {key}": up, f"regret {key}": best - up}
            row |= {"cost before": old[prompt, seed]["cost"], "path": found["path"]}
            rows.append(row | {key: found[key] for key in ("rounds", "cost", "said", "interval")})
    return rows


# ---------------------------------------------------------------- several strengths


class Strengths:
    """Learning strengths beta (m,) of lower rewards, of either sign, as Algorithm 1 sees it, on samples of p_0.

    f(beta, p) = -E_p r_up + kappa KL(p || p_0),   g(beta, p) = -sum_j beta_j E_p r_j + KL(p || p_0)
    r_up (n,), r_low (m, n);  kappa >= 0: the price of a nat.  A law p is a vector of log-probabilities (n,). Where all
    beta_j are positive, lam_j = 1/beta_j are entropy strengths.
    """

    def __init__(self, r_up: Tensor, r_low: Tensor, kappa: float = 0.0):
        if r_low.dim() != 2 or r_low.shape[1:] != r_up.shape or not kappa >= 0:
            raise ValueError(
                f"r_up (n,), r_low (m, n), kappa >= 0 are {tuple(r_up.shape)}, {tuple(r_low.shape)}, {kappa}"
            )
        self.r_up, self.r_low, self.kappa = r_up.double(), r_low.double(), kappa

    def kl(self, p: Tensor) -> Tensor:
        return (p.exp() * (p + math.log(len(p)))).sum()

    def f(self, beta: Tensor, p: Tensor) -> Tensor:
        return -p.exp() @ self.r_up + self.kappa * self.kl(p)

    def g(self, beta: Tensor, p: Tensor) -> Tensor:
        return -beta @ (self.r_low @ p.exp()) + self.kl(p)

    def solve_star(self, beta: Tensor, warm: Tensor | None = None) -> Tensor:
        return (beta @ self.r_low).log_softmax(0)

    def solve_gamma(self, beta: Tensor, gamma: float, warm: Tensor | None = None) -> Tensor:
        """argmin f/gamma + g: again a tilt, by (sum beta_j r_j + r_up/gamma)/(1 + kappa/gamma)."""
        return ((beta @ self.r_low + self.r_up / gamma) / (1 + self.kappa / gamma)).log_softmax(0)

    def hypergrad(self, beta: Tensor) -> Tensor:
        """-Cov_{p_star}(r_up - kappa h, r_j), (m,), with h = sum_j beta_j r_j: the limit of the penalty gradient."""
        p = self.solve_star(beta).exp()
        centred = self.r_low - (self.r_low @ p)[:, None]
        return -centred @ (p * (self.r_up - self.kappa * beta @ self.r_low))

    def fisher(self, beta: Tensor) -> Tensor:
        """Cov_{p_star}(r_i, r_j), (m, m)."""
        p = self.solve_star(beta).exp()
        centred = self.r_low - (self.r_low @ p)[:, None]
        return (centred * p) @ centred.T

    def worth(self, beta: Tensor) -> dict[str, float]:
        """E r_up, KL, ESS of the tilt at beta, and "J" = -f."""
        p = self.solve_star(beta)
        up, kl = (p.exp() @ self.r_up).item(), self.kl(p).item()
        return {"up": up, "kl": kl, "ess": 1 / p.exp().square().sum().item(), "J": up - self.kappa * kl}


def learn_strengths(problem: Strengths, gamma: float = 1e4, steps: int = 60) -> tuple[Tensor, list[Tensor]]:
    """beta by Algorithm 1 from 0, its steps preconditioned by kappa times the Fisher information; and the path."""

    def step(k: int, grad: Tensor) -> Tensor:
        ridge = 1e-3 * torch.eye(len(grad), dtype=torch.float64)
        return 0.5 * torch.linalg.solve(problem.fisher(path[-1]) + ridge, grad) / problem.kappa

    path = [torch.zeros(len(problem.r_low), dtype=torch.float64)]
    for record in algorithms.penalty_descent(problem, path[0], gamma=gamma, step=step, steps=steps):
        path.append(record.x_next)
    return path[-1], path


def front(r_up: Tensor, r: Tensor, budgets: Sequence[float], angles: Sequence[float]) -> list[list[dict]]:
    """Laws p_0 exp(s (cos(angle) r_1 + sin(angle) r_2)) with KL from p_0 equal to a budget: a row of points a budget.

    r (2, n) of samples of p_0. Each point: "angle", "s", the means "r1", "r2", "up", the last with its standard error
    "se", "kl" and "ess". With angles from 0 to pi/2 these are the laws that no other beats in E r_1, E r_2 and KL.
    """
    rows: list[list[dict]] = [[] for _ in budgets]
    for angle in angles:
        h = math.cos(angle) * r[0].double() + math.sin(angle) * r[1].double()
        for row, budget in zip(rows, budgets, strict=True):
            s = math.sqrt(2 * budget) / h.std().item()  # KL = s^2 Var(h)/2 for a weak tilt
            for _ in range(30):  # Newton's method: dKL/ds = s Var(h) under the tilt
                p, kl, ess = _tilt(s * h)
                if abs(kl - budget) < 1e-10:
                    break
                spread = (p @ h.square() - (p @ h) ** 2).item()
                s = min(max(s - (kl - budget) / (s * spread), s / 3), 3 * s)
            means = {"r1": r[0].double(), "r2": r[1].double(), "up": r_up.double()}
            point = {"angle": angle, "s": s} | {name: (p @ values).item() for name, values in means.items()}
            se = (p * (r_up.double() - point["up"])).norm().item()
            row.append(point | {"se": se, "kl": kl, "ess": ess})
    return rows


def _tilt(h: Tensor) -> tuple[Tensor, float, float]:
    log_p = h.log_softmax(0)
    p = log_p.exp()
    return p, (p @ (log_p + math.log(len(p)))).item(), 1 / p.square().sum().item()


# ---------------------------------------------------------------- the bias of guidance


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
            kls = [guidance.path_kl(record, abar, ts) for record in records]
            rows["guided"].append(means[1])
            rows["path"].append(estimators.lam_grad_path(*kls, gamma)[0].item())
            look = guidance.LookAhead(plain, lambda x: x, lam, abar, ts)
            x_T, generator = start(seed + 1000)
            x, log_w, info = samplers.sample_particles(look, x_T, abar, ts, eta=1.0, generator=generator)
            sets.append(TiltSamples.from_tilt(one.r_up(x), x, lam, log_w, info["log_z"]))
            p = log_w.exp()
            rows["particles"].append((p @ one.r_up(x)).item())
            rows["cov"].append(estimators.lam_grad_cov(sets[-1].r_up, x, lam, sets[-1].log_w)[0].item())
        x = chain(plain, seed + 2000, n * len(lams))
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
    device: torch.device | str = "cpu",
    low: str = "boldness",
) -> list[dict]:
    """Algorithm 5's own samples for a prompt: a row for each lam and seed, with the mean CLIP score of n guided samples
    ("up") and of the lower reward ("low", in its standard deviations under p_0). Noise is common to all lam; pieces."""
    mean, sd = scale
    reward = lam_study.lower_rewards(device)[low]
    steer, rows = rewards.Standardised(reward, mean, sd), []
    for lam, seed in itertools.product(lams, range(seeds)):

        def compute(lam: float = lam, seed: int = seed) -> dict:
            judge = clip.score(clip.load().to(device), prompt)
            options = {"wrap": lambda denoiser: chain.guide(denoiser, steer, lam), "batch": n, "device": device}
            x, cost = chain.sample(lam_study.heard(prompt), n, 7000 + seed, **options)
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


# ---------------------------------------------------------------- what is recorded


def study(
    chain: Chain,
    materials: Mapping[str, lam_study.Material],
    before: Sequence[dict],
    *,
    repeats: int,
    bias: Mapping[str, object],
    validation: Mapping[str, object],
    seeds: int,
    guided: Mapping[str, object],
    guided_prompts: Sequence[str],
    folder: Path,
    device: torch.device | str = "cpu",
) -> dict[str, object]:
    """All that chapter 9 records about lambda, in pieces in `folder`: "mixture", "bias", "guided", "validation" and
    "pooling"; with the "cost" of what was drawn on images, in image forwards.

    bias, validation, guided  options of `guidance_bias`, `validate_pooling` and `guided_on_images`
    materials, before         what chapter 5 recorded: `lam_study.restore`, and its rows of Algorithm 2 with boldness
    """
    found: dict[str, object] = {"mixture": []}
    for centre in (1.2, 3.0):
        config = {"centre": centre, "repeats": repeats}
        rows = piece(
            folder / f"mixture_{centre:g}.json", config, lambda c=centre: {"rows": mixture_pooling(c, repeats)}
        )
        found["mixture"] += rows["rows"]
    config = {key: list(value) if isinstance(value, tuple) else value for key, value in bias.items()}
    found["bias"] = piece(folder / "bias.json", config, lambda: guidance_bias(**bias))
    shared = {"folder": folder / "images", "device": device}
    found["guided"] = []
    for prompt in guided_prompts:
        scale = rewards.scale(materials[prompt].drawn["boldness"])
        found["guided"] += guided_on_images(chain, prompt, scale=scale, **guided, **shared)
    found["validation"] = validate_pooling(chain, **validation, **shared)
    found["pooling"] = report_pooling(chain, materials, before, seeds=seeds, min_ess=MIN_ESS, **shared)
    found["cost"] = sum(row["cost"] for key in ("guided", "validation", "pooling") for row in found[key])
    return found
