"""The rivals of Algorithm 2: ways to choose the entropy strength lambda, each with its whole cost counted.

A rival sees a black box `Evaluate`: (lam, n, seed) -> `Evaluation`, the mean upper reward of n samples drawn at lam.
Every search is deterministic given its seed. The trials of one search share the seed (common random numbers), save
those of `adaptive_kl`, which averages over them. To compare methods, give all the same budget (`plan`), and measure
the lambda each returns afresh: `value` is that of the best noisy trial and so flatters the search.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch

from ...algorithms import TiltSamples, learn_lam
from ...estimators import lam_curve
from ...seeds import derive_seed
from ..metrics import Interval, t_interval

if TYPE_CHECKING:
    import optuna

BOUNDS = (0.01, 100.0)
GRID = (0.01, 0.1, 1.0, 10.0, 100.0)


class Evaluation(NamedTuple):
    """Mean upper reward, its standard error, the cost in image forwards, and KL from p_0 where known."""

    mean: float
    se: float
    cost: int
    kl: float | None = None


Evaluate = Callable[[float, int, int], Evaluation]


class Trial(NamedTuple):
    """What a search looked at; weight: of r_up in the weighted sum, else 0."""

    lam: float
    mean: float
    se: float
    cost: int
    kl: float | None = None
    weight: float = 0.0


@dataclass(frozen=True)
class Search:
    """What a method chose, `lam` (and `weight`), the estimate `value` with `se`, and its total cost, search included.

    said  how the search ended, where it has something to say
    """

    name: str
    lam: float
    value: float
    se: float
    trials: tuple[Trial, ...]
    cost: int
    weight: float = 0.0
    said: str = ""


def plan(budget: int, cost: int, trials: int, n_min: int = 2) -> tuple[int, int]:
    """(trials, n): the samples each of `trials` can have when one costs `cost` image forwards; trials n cost <= budget.

    Raises ValueError if that is fewer than n_min >= 2, or a number is not positive.
    """
    if cost <= 0 or trials < 1 or n_min < 2:
        raise ValueError(f"cost = {cost} and trials = {trials} must be positive, n_min = {n_min} at least 2")
    n = int(budget // (cost * trials))
    if n < n_min:
        raise ValueError(
            f"a budget of {budget} gives {n} samples to each of {trials} trials at {cost} a sample, and {n_min} are "
            f"needed: raise it to {cost * trials * n_min}, or make fewer trials"
        )
    return trials, n


def none(evaluate: Evaluate, n: int, seed: int) -> Search:
    """No tilt: lam = infinity, the pre-trained model."""
    return _best("none", [_trial(evaluate, math.inf, n, seed)])


def grid(evaluate: Evaluate, n: int, seed: int, lams: Sequence[float] = GRID) -> Search:
    """The best of fixed values; the default ones are those of the released code."""
    return _best("grid", [_trial(evaluate, lam, n, seed) for lam in lams])


def random_search(
    evaluate: Evaluate, n: int, seed: int, trials: int = 20, bounds: tuple[float, float] = BOUNDS
) -> Search:
    """The best of `trials` log-uniform draws. With one seed, more trials extend fewer."""
    low, high = _bounds(bounds, trials)
    _check_seed(seed)
    u = torch.rand(trials, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return _best("random", [_trial(evaluate, low * (high / low) ** v, n, seed) for v in u.tolist()])


def bayesian(
    evaluate: Evaluate,
    n: int,
    seed: int,
    trials: int = 20,
    bounds: tuple[float, float] = BOUNDS,
    name: str = "Bayesian",
    storage: str | Path | None = None,
) -> Search:
    """Bayesian optimisation of log lam: optuna's Gaussian process with noise, after four random trials.

    storage  a journal file in which optuna keeps the trials: a search that was cut off goes on, and processes that
             share it share one search. It is then no longer deterministic given its seed. `trials` are those in all:
             of a journal with more, the first count
    The process sees asinh(mean): the same maximum, and rewards that differ by orders of magnitude within the bounds (a
    mixture's mean at lam = 0.01, in units of the standard deviation under p_0) do not flatten its model near it.
    Raises ValueError where the journal is damaged, or of a search with other bounds, n or seed, naming what differs.
    """
    import optuna

    low, high = _bounds(bounds, trials)
    _check_seed(seed)
    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        study = _study(name, storage, {"bounds": [low, high], "n": n, "seed": seed})
        done = optuna.trial.TrialState.COMPLETE
        of_this_start = derive_seed("Bayesian", seed, len(study.trials))
        study.sampler = optuna.samplers.GPSampler(seed=of_this_start, n_startup_trials=4)
        while len(study.get_trials(states=(done,))) < trials:
            ask = study.ask()
            trial = _trial(evaluate, ask.suggest_float("lam", low, high, log=True), n, seed)
            ask.set_user_attr("trial", trial)
            study.tell(ask, math.asinh(trial.mean))
        found = [Trial(*each.user_attrs["trial"]) for each in study.get_trials(states=(done,))[:trials]]
    finally:
        optuna.logging.set_verbosity(before)
    return _best(name, found)


def _study(name: str, storage: str | Path | None, config: dict[str, object]) -> optuna.Study:
    """optuna's study of this name: a new one, or the one that the journal `storage` holds, if `config` is its own."""
    import optuna

    if storage is None:
        return optuna.create_study(direction="maximize")
    path = Path(storage)
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        journal = optuna.storages.journal
        shared = optuna.storages.JournalStorage(journal.JournalFileBackend(str(path)))
        study = optuna.create_study(direction="maximize", storage=shared, study_name=name, load_if_exists=True)
        trials, made = study.trials, study.user_attrs.get("config")
    except (ValueError, LookupError, TypeError, AttributeError, IsADirectoryError) as error:
        raise ValueError(
            f"{path} cannot be read as a journal of optuna ({error}): delete it, the search then starts anew"
        ) from error
    if made is None and not trials:
        study.set_user_attr("config", config)
    elif made != config:
        made = made or {}
        changed = ", ".join(
            f"{k} = {made.get(k, 'unknown')}, now {config[k]}" for k in config if made.get(k) != config[k]
        )
        raise ValueError(f"{path} is of a search with other settings ({changed}): delete it or use another file")
    return study


def weighted_sum(
    evaluate: Callable[[float, int, int, float], Evaluation],
    n: int,
    seed: int,
    lam: float = 1.0,
    weights: Sequence[float] = (0.0, 0.3, 1.0, 3.0, 10.0),
) -> Search:
    """The best weight w of the law p_0 exp((r_low + w r_up)/lam) at fixed lam: evaluate(lam, n, seed, w).

    Another family of laws: as w grows it maximises r_up itself and forgets r_low, so its value may exceed what any
    lambda reaches (a negative regret), at a KL from p_0 without bound. Compare E[r_low] and KL as well.
    """
    if not all(0 <= w < math.inf for w in weights):
        raise ValueError(f"weights = {weights} must be finite and not negative")
    return _best("weighted sum", [_trial(evaluate, lam, n, seed, w) for w in weights])


def adaptive_kl(
    evaluate: Evaluate,
    n: int,
    seed: int,
    target: float,
    lam: float = 1.0,
    trials: int = 20,
    bounds: tuple[float, float] = BOUNDS,
    gain: float = 0.5,
    clip: float = 1.0,
) -> Search:
    """lam <- lam (1 + gain clip(KL/target - 1)): the controller of Ziegler et al. (2019), arXiv:1909.08593.

    It steers KL(p_star || p_0) to `target` and never looks at r_up. `Evaluation.kl` must be given: particles and exact
    tilts have E_{p_star}[r_low]/lam - log Z. Their gain is 0.1 with clip 0.2, for thousands of steps; here few trials
    must do, and since KL ~ 1/lam^2 for a small tilt, 0.5 is the step of Newton's method. Returns the geometric mean of
    lam over the second half of the trials, each with a seed of its own, and the mean of their values.
    """
    low, high = _bounds(bounds, trials)
    if not 0 < target < math.inf or not low <= lam <= high or not 0 < gain * clip < 1:
        raise ValueError(f"target = {target} must be positive, lam = {lam} within {bounds}, gain clip in (0, 1)")
    found = []
    for i in range(trials):
        found.append(_trial(evaluate, lam, n, derive_seed("adaptive KL", seed, i)))
        if found[-1].kl is None or not math.isfinite(found[-1].kl):
            raise ValueError(f"adaptive KL control needs a finite KL, and the evaluation at lam = {lam:g} has none")
        error = found[-1].kl / target - 1
        lam = min(max(lam * (1 + gain * min(max(error, -clip), clip)), low), high)
    half = found[trials // 2 :]
    chosen = math.exp(sum(math.log(t.lam) for t in half) / len(half))
    value, se = sum(t.mean for t in half) / len(half), math.hypot(*(t.se for t in half)) / len(half)
    return Search("adaptive KL", chosen, value, se, tuple(found), sum(t.cost for t in found))


def reweighted_curve(samples: TiltSamples, bounds: tuple[float, float] = BOUNDS) -> Search:
    """The maximum of the reweighted curve of one batch (`estimators.lam_curve`), within bounds: no search at all."""
    low, high = _bounds(bounds)
    curve = _curve(samples, bounds)
    lam = min(max(curve.best, low, curve.lam[0].item()), high)
    best = _reweighted(samples, lam)
    trials = (Trial(lam, best.mean, best.se, samples.cost),)
    return Search("reweighted curve", lam, best.mean, best.se, trials, samples.cost, said=curve.said)


def reweighted_bayesian(
    samples: TiltSamples, seed: int, trials: int = 20, bounds: tuple[float, float] = BOUNDS
) -> Search:
    """`bayesian` on the reweighted curve of one batch, where the effective sample size suffices; trials are free."""
    reach = (max(bounds[0], _curve(samples, bounds).lam[0].item()), bounds[1])
    n = len(samples.r_up)
    found = bayesian(lambda lam, *_: _reweighted(samples, lam), n, seed, trials, reach, "reweighted Bayesian")
    return Search(found.name, found.lam, found.value, found.se, found.trials, samples.cost)


def algorithm_2(
    samples: TiltSamples, lam: float = 1.0, bounds: tuple[float, float] = BOUNDS, **options: object
) -> Search:
    """`learn_lam` from lam, as a Search: a trial for each step, the cost of all samples drawn. options: its own."""
    steps = list(learn_lam(samples, lam, bounds=bounds, **options))
    costs = [0, *(step.cost for step in steps)]
    trials = tuple(
        Trial(s.lam, s.up, s.up_se, cost - before, s.kl)
        for s, before, cost in zip(steps, costs, costs[1:], strict=False)
    )
    last = steps[-1]
    return Search("Algorithm 2", last.lam, last.up, last.up_se, trials, last.cost, said=last.done or "steps used up")


def path(found: Search) -> list[list[float]]:
    """[cost so far, lam, weight] after each trial, of what the search would return by then.

    Algorithm 2 and adaptive control steer, and so return their last lambda, not the best one seen.
    """
    spent, best, rows = found.cost - sum(trial.cost for trial in found.trials), found.trials[0], []
    for trial in found.trials:
        spent += trial.cost
        best = trial if found.name in ("Algorithm 2", "adaptive KL") or trial.mean > best.mean else best
        rows.append([spent, best.lam, best.weight])
    return rows


class Summary(NamedTuple):
    """One method against the reference. Intervals are Student's t over seeds, each the mean over its prompts.

    regret      mean regret;  difference: regret minus the reference's, paired by seed and prompt
    won, tied, lost  pairs in which the method's regret is smaller, equal within `tie`, larger
    verdict     "better" or "worse" where the interval of the difference lies below -tie or above tie, else "tie";
                "reference"
    """

    method: str
    regret: Interval
    difference: Interval
    won: int
    tied: int
    lost: int
    verdict: str


def summarise(rows: Iterable[dict], reference: str = "Algorithm 2", tie: float = 1e-9) -> list[Summary]:
    """Summaries, in order of first appearance, of rows with method, seed, prompt and regret (smaller is better).

    Prompts of one seed share its randomness, so seeds are the independent units. Raises ValueError if the reference
    is missing, a row comes twice, or a method lacks a pair that the reference has (or has more); and below two seeds.
    """
    table: dict[str, dict] = {}
    for row in rows:
        pairs, pair = table.setdefault(row["method"], {}), (row["seed"], row["prompt"])
        if pair in pairs:
            raise ValueError(f"{row['method']} has two rows for seed, prompt = {pair}")
        pairs[pair] = float(row["regret"])
    if reference not in table:
        raise ValueError(f"no rows of the reference {reference!r}, only of {sorted(table)}")
    base, summaries = table[reference], []

    def interval(values: dict) -> Interval:
        by_seed: dict = {}
        for (seed, _), value in values.items():
            by_seed.setdefault(seed, []).append(value)
        return t_interval([sum(v) / len(v) for v in by_seed.values()])

    for method, pairs in table.items():
        if pairs.keys() != base.keys():
            raise ValueError(f"{method} and {reference} differ in their pairs: {sorted(pairs.keys() ^ base.keys())}")
        gaps = {pair: regret - base[pair] for pair, regret in pairs.items()}
        won, lost = sum(g < -tie for g in gaps.values()), sum(g > tie for g in gaps.values())
        gap = interval(gaps)
        verdict = "better" if gap.hi < -tie else "worse" if gap.lo > tie else "tie"
        verdict = "reference" if method == reference else verdict
        summaries.append(Summary(method, interval(pairs), gap, won, len(gaps) - won - lost, lost, verdict))
    return summaries


def _trial(evaluate: Callable[..., Evaluation], lam: float, n: int, seed: int, *weight: float) -> Trial:
    if not lam > 0:
        raise ValueError(f"lam = {lam} must be positive")
    if n < 2:
        raise ValueError(f"n = {n} is too small: a standard error needs at least 2 samples")
    mean, se, cost, kl = evaluate(lam, n, seed, *weight)
    if not (math.isfinite(mean) and math.isfinite(se)):
        raise ValueError(
            f"the evaluation at lam = {lam:g} is not finite: mean = {mean}, se = {se}; look at its samples"
        )
    return Trial(lam, mean, se, cost, kl, *weight)


def _best(name: str, trials: list[Trial]) -> Search:
    if not trials:
        raise ValueError(f"{name}: nothing to try")
    best = max(trials, key=lambda trial: trial.mean)
    return Search(name, best.lam, best.mean, best.se, tuple(trials), sum(t.cost for t in trials), best.weight)


def _bounds(bounds: tuple[float, float], trials: int = 1) -> tuple[float, float]:
    if not 0 < bounds[0] < bounds[1] < math.inf:
        raise ValueError(f"bounds = {bounds} of lam must be positive, increasing and finite")
    if trials < 1:
        raise ValueError(f"trials = {trials} must be at least 1")
    return bounds


def _check_seed(seed: int) -> None:
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**32:
        raise ValueError(f"seed = {seed!r} must be a whole number from 0 to 2**32 - 1")


def _curve(samples: TiltSamples, bounds: tuple[float, float]) -> object:
    low, high = (math.log10(bound) for bound in _bounds(bounds))
    lams = torch.logspace(low, high, 161, dtype=torch.float64)
    return lam_curve(samples.r_up, samples.r_low, lams, samples.log_w)


def _reweighted(samples: TiltSamples, lam: float) -> Evaluation:
    p, info = samples.tilt(lam)
    r_up = samples.r_up.to(p)
    mean = p @ r_up
    return Evaluation(mean.item(), (p * (r_up - mean)).norm().item(), 0, info["kl"])
