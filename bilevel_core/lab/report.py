"""What of the paper and of its released code is reproduced: each claim's verdict, computed from `book/results`.

A claim is a line of the paper's title or abstract, or something that its released code takes for granted; the paper's
tables are not known here. `claims` reads the recorded results, computes what is exact by the core's oracles, and turns
both into one of VERDICTS by the rule that the claim's function states. No verdict is typed by hand.

Two rules are used again and again. Against a rival, paired differences by seed are judged by Student's 95 % interval
(`baselines.summarise`): the rival is "better", "worse" or a "tie". "Outperforms" is *reproduced* where the rival is
worse in every study, *partly* where it is worse in some and better in none, else *not reproduced*.
"""

from __future__ import annotations

import html
import itertools
import json
import math
import re
import shutil
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from . import runs

VERDICTS = ("reproduced", "partly", "not reproduced", "cannot be tested here")
REPRODUCED, PARTLY, NOT_REPRODUCED, UNTESTED = VERDICTS
PARTS = ("the method", "entropy strength", "noise schedule", "released code", "full size")
METHOD, ENTROPY, SCHEDULE, CODE, SIZE = PARTS
TIE = 0.1  # CLIP points within which two regrets of chapter 5 count as equal


@dataclass(frozen=True)
class Claim:
    """One line of the report.

    id       unique;  part: one of PARTS;  chapter: the notebook that shows it, without .ipynb
    claim    what was claimed;  ran: what was run for it;  link: where that is shown, from the root of the site
    results  the files of book/results it rests on
    ours     the numbers, with 95 % intervals;  tier: of these;  verdict: one of VERDICTS;  why: the rule applied
    """

    id: str
    part: str
    chapter: str
    claim: str
    ran: str
    link: str
    results: tuple[str, ...]
    ours: str
    tier: str
    verdict: str
    why: str


class Finding(NamedTuple):
    """What a claim's function returns; see `Claim`."""

    ours: str
    tier: str
    verdict: str
    why: str


class NoData(Exception):
    """A result that a claim rests on is missing."""


class Records:
    """The recorded results in a folder: records["name"] of name.json; raises NoData where it is missing."""

    def __init__(self, directory: str | Path | None = None) -> None:
        self.directory = Path(directory) if directory else runs.project_root() / "book" / "results"
        self.read: dict[str, dict[str, Any]] = {}

    def __getitem__(self, name: str) -> dict[str, Any]:
        if name not in self.read:
            try:
                self.read[name] = runs.read_result(name, self.directory)
            except FileNotFoundError as error:
                raise NoData(f"no data: book/results/{name}.json is missing") from error
        return self.read[name]

    def __contains__(self, name: str) -> bool:
        return (self.directory / f"{name}.json").is_file()

    def path(self, name: str) -> Path:
        """Of a file of tensors."""
        if not (self.directory / name).is_file():
            raise NoData(f"no data: book/results/{name} is missing")
        return self.directory / name


Find = Callable[[Records], Finding]
_REGISTERED: list[tuple[dict[str, Any], Find]] = []


def _claim(id: str, part: str, at: str, claim: str, ran: str, *results: str) -> Callable[[Find], Find]:
    """Registers a function as the judge of a claim; at: "notebook#heading"."""
    chapter, _, heading = at.partition("#")
    link = f"notebooks/{chapter}.html#{heading}"
    fixed = {"id": id, "part": part, "chapter": chapter, "claim": claim, "ran": ran, "link": link, "results": results}

    def register(find: Find) -> Find:
        _REGISTERED.append((fixed, find))
        return find

    return register


def claims(directory: str | Path | None = None, ids: Iterable[str] | None = None) -> list[Claim]:
    """Every claim with its verdict, or those of some ids, from the results in a folder (default book/results).

    A missing result makes the claims that rest on it "cannot be tested here", never an error. Takes a second or three.
    """
    records, found, wanted = Records(directory), [], None if ids is None else set(ids)
    for fixed, find in _REGISTERED:
        if wanted is not None and fixed["id"] not in wanted:
            continue
        try:
            finding = find(records)
        except NoData as missing:
            finding = Finding("no data", "–", UNTESTED, str(missing))
        found.append(Claim(**fixed, **finding._asdict()))
    return found


def counts(found: Iterable[Claim]) -> dict[str, dict[str, int]]:
    """How many claims of each part got each verdict."""
    by_part = {part: Counter() for part in PARTS}
    for claim in found:
        by_part[claim.part][claim.verdict] += 1
    return {part: {verdict: counted[verdict] for verdict in VERDICTS} for part, counted in by_part.items()}


def without_seed(seed: int, folder: str | Path, directory: str | Path | None = None) -> Path:
    """Copies the recorded results into a folder, leaving out all that one seed gave; returns the folder."""
    folder, records = Path(folder), Records(directory)
    folder.mkdir(parents=True, exist_ok=True)
    for path in sorted(records.directory.iterdir()):
        if path.suffix != ".json":
            shutil.copy(path, folder)
            continue
        record = records[path.stem]
        record = record | {"data": _without(record["data"], seed)}
        (folder / path.name).write_text(json.dumps(record), encoding="utf-8")
    return folder


def _without(value: Any, seed: int) -> Any:
    if isinstance(value, dict):
        return {key: _without(part, seed) for key, part in value.items()}
    if not isinstance(value, list):
        return value
    kept = [x for x in value if not isinstance(x, dict) or x.get("config", x).get("seed") != seed]
    return [_without(part, seed) for part in kept]


# ---------------------------------------------------------------- rules


def outperforms(verdicts: Mapping[str, str]) -> tuple[str, str]:
    """(verdict, why) of "outperforms a rival" from the rival's "better", "worse" or "tie" in each study."""
    if not verdicts:
        raise NoData("no data: no study has this rival")
    said = "; ".join(f"{study}: the rival is {'level' if v == 'tie' else v}" for study, v in verdicts.items())
    kinds = set(verdicts.values())
    if kinds == {"worse"}:
        return REPRODUCED, said
    return (PARTLY if "worse" in kinds and "better" not in kinds else NOT_REPRODUCED), said


def shown(interval: tuple[float, float, float]) -> str:
    """mean ± half width."""
    from .plots import interval as text

    return text(interval)


def paired(rows: Iterable[Mapping[str, Any]], key: str, method: str, reference: str) -> Any:
    """Student's interval over seeds of key's paired difference, method minus reference, mean over prompts."""
    from .metrics import t_interval

    values: dict[str, dict] = {method: {}, reference: {}}
    for row in rows:
        if row["method"] in values:
            values[row["method"]][row["seed"], row.get("prompt", "")] = row[key]
    ours, base = values[method], values[reference]
    if not ours or ours.keys() != base.keys():
        raise NoData(f"no data: {method} and {reference} have no common pairs")
    seeds: dict[int, list[float]] = {}
    for pair, value in ours.items():
        seeds.setdefault(pair[0], []).append(value - base[pair])
    return t_interval([sum(v) / len(v) for v in seeds.values()])


def sign(interval: tuple[float, float, float], tie: float = 0.0) -> str:
    """Where an interval lies: "below" -tie, "above" tie, or it "holds" a value that counts as zero."""
    _, lo, hi = interval
    return "below" if hi < -tie else "above" if lo > tie else "holds"


# ---------------------------------------------------------------- the method, on problems whose answers are known


def _tilt() -> Any:
    from ..oracles import Mixture1D

    return Mixture1D().problem()


def lam_root(slope: Callable[[torch.Tensor], torch.Tensor], low: float = 0.05, high: float = 50.0) -> float:
    """Where a gradient in lambda changes its sign, by Brent's method in log lambda. ValueError if it does not."""
    from scipy.optimize import brentq

    def at(x: float) -> float:
        return float(slope(torch.tensor(x, dtype=torch.float64).exp()))

    ends = math.log(low), math.log(high)
    if (at(ends[0]) > 0) == (at(ends[1]) > 0):
        raise ValueError(f"the gradient has one sign between {low:g} and {high:g}")
    return math.exp(brentq(at, *ends, xtol=1e-14))


@_claim(
    "penalty-gradient",
    METHOD,
    "02_generative_bilevel#the-value-function-penalty",
    "Algorithm 1: a bilevel problem over distributions is solved with first derivatives only, by a penalty and two "
    "lower-level solutions.",
    "1-D mixture, both lower levels by quadrature: where penalty descent at γ = 1,000 from λ = 20 ends, against λ*.",
)
def _penalty_gradient(_: Records) -> Finding:
    from ..algorithms import penalty_descent

    problem = _tilt()
    best, start = lam_root(problem.hypergrad), torch.tensor(20.0).double().log()
    step = lambda k, grad: (0.25 * grad).clamp(-0.3, 0.3)  # noqa: E731
    *_, last = penalty_descent(problem, start, gamma=1000.0, step=step, steps=60)
    off = abs(last.x_next.exp().item() / best - 1)
    verdict = REPRODUCED if off < 1e-3 else PARTLY if off < 0.1 else NOT_REPRODUCED
    return Finding(
        f"ends {off:.2%} from λ* = {best:.4f}", "exact", verdict, "reproduced within 0.1 %, partly within 10 %"
    )


@_claim(
    "gamma-bias",
    METHOD,
    "02_generative_bilevel#how-large-must-gamma-be",
    "The bias of the penalty gradient is O(1/γ).",
    "1-D mixture: distance of the root of dL_γ/dλ from λ*, γ = 100 to 10,000.",
)
def _gamma_bias(_: Records) -> Finding:
    problem = _tilt()
    best, gammas = lam_root(problem.hypergrad), (100.0, 1000.0, 10_000.0)
    errors = [abs(lam_root(lambda lam, g=g: problem.penalty_grad(lam, g)) - best) for g in gammas]
    order = [math.log10(a / b) for a, b in itertools.pairwise(errors)]
    verdict = REPRODUCED if max(abs(o - 1) for o in order) < 0.1 else NOT_REPRODUCED
    said = f"errors {', '.join(f'{e:.1e}' for e in errors)}: order {order[-1]:.3f}"
    return Finding(said, "exact", verdict, "reproduced where ten times γ leaves a tenth of the error, to 10 %")


@_claim(
    "gamma-one",
    CODE,
    "06_learning_noise_schedules#gamma-who-gets-to-improve-the-samples",
    "γ = 1, the setting of the released code for schedules, is large enough.",
    "MNIST 8×8: Algorithm 6's gradient at γ = 1 against whole retrainings at two points, and schedules learned at "
    "γ = 1 against γ = 1,000 (validation split, three repetitions).",
    "06_learning_noise_schedules.json",
    "07_noise_schedule_mnist.json",
)
def _gamma_one(records: Records) -> Finding:
    from . import schedule_study

    pieces = records["06_learning_noise_schedules"]["data"]["pieces"]
    share, cosines = absorbed(pieces, 1.0), []
    for point in schedule_study.POINTS:
        judged = schedule_study.verdicts(pieces, point)
        if "Algorithm 6, gamma = 1" not in judged:
            raise NoData("no data: no gradient at gamma = 1")
        cosines.append(judged["Algorithm 6, gamma = 1"]["cosine"])
    record = records["07_noise_schedule_mnist"]
    gap = paired(validated(record), "frechet", "gamma = 1", "Algorithm 6")
    wrong = [share > 0.5, min(cosines) < 0, sign(gap) == "above"]
    verdict = REPRODUCED if not any(wrong) else NOT_REPRODUCED if sum(wrong) > 1 else PARTLY
    said = f"θ_γ absorbs {share:.0%} of f; cosine with the truth {', '.join(f'{c:.2f}' for c in cosines)}; "
    said += f"learned schedule worse by {shown(gap)} in Fréchet distance"
    why = "fails where θ_γ absorbs more than half of f, a cosine is negative, or the schedule is worse: not reproduced "
    return Finding(said, record["tier"], verdict, why + f"if two of these, and {sum(wrong)} hold")


def absorbed(pieces: Iterable[Mapping[str, Any]], gamma: float) -> float:
    """Mean share of f that theta_gamma absorbs in chapter 6's runs of Algorithm 6 with all of the path."""
    plain = {"inner": 30, "grad_steps": None, "directions": 0}
    found = [
        piece["rows"][-1]["absorbed"]
        for piece in pieces
        if piece["kind"] == "penalty"
        and piece["config"]["gamma"] == gamma
        and all(piece["config"]["options"][key] == value for key, value in plain.items())
    ]
    if not found:
        raise NoData(f"no data: no run of Algorithm 6 at gamma = {gamma:g}")
    return sum(found) / len(found)


def validated(record: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Chapter 7's marks on the validation split, of the seeds that the ablation has."""
    found = record["data"]
    seeds = {row["seed"] for row in found["ablation"]}
    rows = [*found["ablation"], *(row for row in found["rows"] if row["budget"] == "final")]
    return [row for row in rows if row["split"] == "val" and row["seed"] in seeds]


@_claim(
    "algorithm-2",
    METHOD,
    "03_learning_lambda#where-it-ends",
    "Algorithm 2 learns the entropy strength λ from samples of the pre-trained model.",
    "1-D mixture, quadrature nodes for samples, from λ = 0.01, 5 and 100, γ = 1,000.",
)
def _algorithm_2(_: Records) -> Finding:
    best = lam_root(_tilt().hypergrad)
    ends = learned_exactly()
    off = max(abs(end / best - 1) for end in ends)
    verdict = REPRODUCED if off < 1e-3 else PARTLY if off < 0.1 else NOT_REPRODUCED
    said = f"ends at {', '.join(f'{end:.4f}' for end in ends)}; λ* = {best:.4f}"
    return Finding(said, "exact", verdict, "reproduced within 0.1 %, partly within 10 %")


def learned_exactly(**options: Any) -> list[float]:
    """Where Algorithm 2 ends on the 1-D mixture from lambda = 0.01, 5 and 100; options of `learn_lam`."""
    from ..algorithms import TiltSamples, learn_lam

    problem, ends = _tilt(), []
    samples = TiltSamples(problem.r_up, problem.r_low, problem.log_p0)
    for start in (0.01, 5.0, 100.0):
        *_, last = learn_lam(samples, start, **({"gamma": 1000.0, "min_ess": 1.0, "stop": 0.0, "steps": 100} | options))
        ends.append(last.lam)
    return ends


@_claim(
    "released-gradient",
    CODE,
    "03_learning_lambda#swapped-arguments-what-est1-optimises",
    "The released code's estimator of the gradient in λ (est1) finds the best λ.",
    "1-D mixture, exact expectations: the root of est1 at γ = 1, 10, 1,000 against λ*.",
)
def _released_gradient(_: Records) -> Finding:
    from ..estimators import lam_grad_released_est1

    problem, roots = _tilt(), []
    best = lam_root(problem.hypergrad)
    for gamma in (1.0, 10.0, 1000.0):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            slope = lambda lam, g=gamma: lam_grad_released_est1(  # noqa: E731
                problem.r_up, problem.r_low, lam, g, problem.log_p0
            )[0]
            roots.append(lam_root(slope))
    off = abs(roots[-1] / best - 1)
    verdict = REPRODUCED if off < 1e-3 else PARTLY if off < 0.1 else NOT_REPRODUCED
    said = f"roots {', '.join(f'{root:.3f}' for root in roots)}; λ* = {best:.3f}"
    return Finding(said, "exact", verdict, "by the largest γ: reproduced within 0.1 %, partly within 10 %")


@_claim(
    "algorithm-3",
    METHOD,
    "01_diffusion#training-predict-the-noise",
    "Algorithm 3: score network training.",
    "MNIST 8×8, 1,500 training steps: the share of the noise's variance that a trained network explains.",
    "01_sampling_mnist8.json",
)
def _algorithm_3(records: Records) -> Finding:
    from .metrics import t_interval

    record = records["01_sampling_mnist8"]
    losses = {(row["seed"], row["end"]): row["final_loss"] for row in record["data"]["rows"]}
    by_seed: dict[int, list[float]] = {}
    for (seed, _), loss in losses.items():
        by_seed.setdefault(seed, []).append(1 - loss)
    explained = t_interval([sum(v) / len(v) for v in by_seed.values()])
    verdict = REPRODUCED if explained.lo > 0.5 else PARTLY if explained.lo > 0 else NOT_REPRODUCED
    why = "a network that has learned nothing explains none; reproduced above half, partly above zero"
    return Finding(f"{shown(explained)} of the variance, {len(by_seed)} seeds", record["tier"], verdict, why)


@_claim(
    "algorithm-4",
    METHOD,
    "01_diffusion#how-wrong-is-a-sampler-with-a-perfect-network",
    "Algorithm 4: backward sampling draws from the data's law.",
    "Gaussian data, exact denoiser: the discrete chain's standard deviation at 10, 100 and 1,000 steps; MNIST 8×8: "
    "50 DDIM steps against 5 (end = 0.98).",
    "01_sampling_mnist8.json",
)
def _algorithm_4(records: Records) -> Finding:
    from ..oracles import Gaussian
    from ..samplers import timesteps
    from ..schedules import DEFAULT_Q, abar

    law = Gaussian(torch.zeros(1, dtype=torch.float64), torch.full((1, 1), 0.25, dtype=torch.float64))
    q = torch.tensor(DEFAULT_Q["cosine"], dtype=torch.float64)
    q[1] = 0.98
    levels = abar(q, 1000)
    errors = [abs(law.chain_law(levels, timesteps(1000, n)).cov.sqrt().item() / 0.5 - 1) for n in (10, 100, 1000)]
    record = records["01_sampling_mnist8"]
    rows = [row for row in record["data"]["rows"] if row["end"] == 0.98 and row["eta"] == 0]
    rows = [row | {"method": f"{row['steps']} steps"} for row in rows]
    gap = paired(rows, "frechet", "50 steps", "5 steps")
    good = [errors[-1] < 0.01 and sorted(errors, reverse=True) == errors, sign(gap) == "below"]
    verdict = REPRODUCED if all(good) else PARTLY if any(good) else NOT_REPRODUCED
    said = f"standard deviation off by {', '.join(f'{e:.2%}' for e in errors)}; Fréchet distance, 50 steps minus 5: "
    why = "reproduced where the exact chain's error falls below 1 % and more steps are better on MNIST, partly if one"
    return Finding(said + shown(gap), f"exact, {record['tier']}", verdict, why)


@_claim(
    "algorithm-5",
    METHOD,
    "04_guided_sampling#how-wrong-it-is-elsewhere",
    "Algorithm 5: guided diffusion draws from the lower level's optimum, the law tilted by the reward.",
    "N(0.3, 0.25), exact denoiser, 500 steps of DDIM: mean for a linear reward, standard deviation for a quadratic "
    "one, λ = 0.5; guided chains are affine in x_T, so this is exact.",
)
def _algorithm_5(_: Records) -> Finding:
    bias = guided_bias()
    linear, quadratic = abs(bias["linear"]), abs(bias["quadratic"])
    good = [linear < 0.01, quadratic < 0.01]
    verdict = REPRODUCED if all(good) else PARTLY if any(good) else NOT_REPRODUCED
    said = f"linear: mean off by {linear:.2%}; quadratic: standard deviation off by {bias['quadratic']:+.0%}"
    why = "reproduced where both are within 1 %, partly if one is; particles (chapter 4) remove the bias"
    return Finding(said, "exact", verdict, why)


def guided_bias(T: int = 500, lam: float = 0.5) -> dict[str, float]:
    """Relative error of look-ahead guidance on N(0.3, 0.25): of the mean for the reward x, of the standard deviation
    for -(x - 1)^2. The guided chain is affine in x_T, so the images of 0 and 1 tell its law."""
    from ..guidance import LookAhead
    from ..oracles import Gaussian
    from ..samplers import sample_ddim, timesteps
    from ..schedules import DEFAULT_Q, abar

    mean, var = 0.3, 0.25
    law = Gaussian(torch.tensor([mean]).double(), torch.tensor([[var]]).double())
    levels, ts = abar(torch.tensor(DEFAULT_Q["cosine"], dtype=torch.float64), T), timesteps(T, T)
    found = {}
    for name, reward in (("linear", lambda x: x[:, 0]), ("quadratic", lambda x: -((x[:, 0] - 1) ** 2))):
        guided = LookAhead(law.denoiser(levels), reward, lam, levels, ts, guide_last=True)
        with torch.no_grad():
            zero, one = sample_ddim(guided, torch.tensor([[0.0], [1.0]]).double(), levels, ts)[:, 0].tolist()
        if name == "linear":
            found[name] = zero / (mean + var / lam) - 1
        else:
            found[name] = abs(one - zero) / (1 / (1 / var + 2 / lam)) ** 0.5 - 1
    return found


@_claim(
    "algorithm-6",
    METHOD,
    "06_learning_noise_schedules#every-estimator-against-the-truth",
    "Algorithm 6: the gradient of sample quality in the noise schedule by two networks kept warm.",
    "MNIST 8×8, γ = 10,000, 30 training steps between outer steps: the gradient at two schedules against differences "
    "of whole trainings, five seeds.",
    "06_learning_noise_schedules.json",
)
def _algorithm_6(records: Records) -> Finding:
    record = records["06_learning_noise_schedules"]
    found = against_truth(record, "Algorithm 6, gamma = 10000")
    right = [all(signs) for signs, _, _ in found.values()]
    close = [off < 0.25 for _, _, off in found.values()]
    verdict = REPRODUCED if all(right) and all(close) else PARTLY if any(right) else NOT_REPRODUCED
    said = "; ".join(
        f"{point}: {sum(signs)} of {len(signs)} signs right, cosine {cosine:.2f}, bias {off:.2f} of the truth's length"
        for point, (signs, cosine, off) in found.items()
    )
    why = "reproduced where all signs are right and the bias is below a quarter at both points, partly where the signs "
    return Finding(said, record["tier"], verdict, why + "are right at one")


def against_truth(record: Mapping[str, Any], name: str) -> dict[str, tuple[list[bool], float, float]]:
    """At each of chapter 6's points: whether an estimator's mean has the sign of the truth's in each coordinate, its
    cosine and its relative bias."""
    from . import schedule_study

    found = {}
    for point in schedule_study.POINTS:
        judged = schedule_study.verdicts(record["data"]["pieces"], point)
        if name not in judged:
            raise NoData(f"no data: {name} was not run at {point!r}")
        pairs = zip(judged[name]["mean"], judged["truth"]["mean"], strict=True)
        signs = [ours.mean * true.mean > 0 for ours, true in pairs]
        found[point] = signs, judged[name]["cosine"], judged[name]["off"]
    return found


@_claim(
    "fixed-network",
    CODE,
    "06_learning_noise_schedules#every-estimator-against-the-truth",
    "The gradient that the released code follows in effect, of sample quality with the network held fixed, points the "
    "right way.",
    "MNIST 8×8: the exact pathwise gradient with θ fixed, and the released two-point estimate (36 samples), against "
    "differences of whole trainings at two schedules, five seeds.",
    "06_learning_noise_schedules.json",
)
def _fixed_network(records: Records) -> Finding:
    record = records["06_learning_noise_schedules"]
    exact, released = against_truth(record, "forward"), against_truth(record, "released")
    right = [all(signs) for signs, _, _ in exact.values()]
    verdict = REPRODUCED if all(right) else PARTLY if any(right) else NOT_REPRODUCED
    said = "; ".join(
        f"{point}: {sum(exact[point][0])} of {len(exact[point][0])} signs right, bias {exact[point][2]:.1f} times the "
        f"truth (released: {released[point][2]:.1f})"
        for point in exact
    )
    why = "by the exact gradient with θ fixed: reproduced where all its signs are right at both points"
    return Finding(said, record["tier"], verdict, why)


# ---------------------------------------------------------------- the first application: entropy strength


@_claim(
    "stand-ins",
    ENTROPY,
    "appendix_text_models#do-they-do-what-the-prompt-says",
    "(Needed for the rest.) A text-to-image model draws what a prompt says, and a CLIP score tells whether it does.",
    "The text-to-digit model and the small CLIP of this book: 1,080 images a seed read by a frozen classifier; CLIP "
    "on 10,000 test images among 90 captions.",
    "appendix_text_models.json",
)
def _stand_ins(records: Records) -> Finding:
    from .metrics import t_interval

    record = records["appendix_text_models"]
    digit = t_interval([row["digit"] for row in record["data"]["gate"]])
    caption = record["data"]["clip"]["caption"]
    good = [digit.lo > 0.95, caption > 0.8]
    verdict = REPRODUCED if all(good) else PARTLY if any(good) else NOT_REPRODUCED
    said = f"right digit in {digit.mean:.1%} (from {digit.lo:.1%}); CLIP picks the right caption of 90 in {caption:.1%}"
    return Finding(said, record["tier"], verdict, "reproduced above 95 % and 80 %, partly if one of them is")


FINETUNING = {
    "grid": ("grid search", "the released grid λ = 0.01 to 100"),
    "random": ("random search", "20 log-uniform λ"),
    "Bayesian": ("Bayesian search", "20 λ chosen by a Gaussian process"),
    "weighted sum": ("a weighted sum of the rewards", "four weights at λ = 1"),
}


def finetuning(records: Records, rival: str, guided: bool = True) -> tuple[dict[str, str], str, str]:
    """A rival of Algorithm 2 in chapter 5 and, if guided, 8: verdict by study, the numbers in words, and the tier."""
    from . import baselines

    record = records["05_reward_finetuning_mnist"]
    verdicts, said = {}, []
    for low, name in (("boldness", "boldness"), ("resnet", "random ResNet")):
        rows = [row for row in record["data"]["rows"] if row["reward"] == low]
        by_method = {one.method: one for one in baselines.summarise(rows, tie=TIE)}
        if rival not in by_method:
            raise NoData(f"no data: {rival} was not run")
        verdicts[name] = by_method[rival].verdict
        said.append(f"{name} {shown(_negative(by_method[rival].difference))}")
    if guided:
        gap = paired(records["08_digits"]["data"]["rows"], "up", rival, "Algorithm 2")
        verdicts["real guidance"] = {"below": "worse", "above": "better", "holds": "tie"}[sign(gap, TIE)]
        said.append(f"real guidance {shown(gap)}")
    return verdicts, f"CLIP points, rival minus Algorithm 2 (level within {TIE:g}): {'; '.join(said)}", record["tier"]


def _negative(interval: tuple[float, float, float]) -> tuple[float, float, float]:
    mean, lo, hi = interval
    return -mean, -hi, -lo


def _against_finetuning(rival: str, name: str, what: str) -> None:
    @_claim(
        f"lambda-vs-{rival.lower().replace(' ', '-')}",
        ENTROPY,
        "05_reward_finetuning_mnist#nine-ways-to-choose-lambda-one-price",
        f"Learning λ outperforms {name}.",
        f"MNIST, four prompts, five seeds, equal cost; rival: {what}. With two lower rewards and draws of exact laws "
        "for rivals (chapter 5), and once more with samples that guidance really draws (chapter 8).",
        "05_reward_finetuning_mnist.json",
        "08_digits.json",
    )
    def find(records: Records) -> Finding:
        verdicts, said, tier = finetuning(records, rival)
        return Finding(said, tier, *outperforms(verdicts))


for _rival, (_name, _what) in FINETUNING.items():
    _against_finetuning(_rival, _name, _what)


@_claim(
    "lambda-vs-none",
    ENTROPY,
    "05_reward_finetuning_mnist#nine-ways-to-choose-lambda-one-price",
    "Fine-tuning at the learned λ improves the upper reward over the pre-trained model.",
    "MNIST, four prompts, five seeds, against no tilt at all: two lower rewards (chapter 5), real guidance (chapter "
    "8).",
    "05_reward_finetuning_mnist.json",
    "08_digits.json",
)
def _lambda_vs_none(records: Records) -> Finding:
    verdicts, said, tier = finetuning(records, "none")
    return Finding(said, tier, *outperforms(verdicts))


@_claim(
    "sample-efficient",
    ENTROPY,
    "05_reward_finetuning_mnist#nine-ways-to-choose-lambda-one-price",
    "The gradient in λ is sample-efficient: new samples, drawn where it points, are worth more than as many at once.",
    "MNIST, four prompts, five seeds, equal cost, two lower rewards; rival: one batch twice as large, and the maximum "
    "of the curve over λ that it gives by reweighting.",
    "05_reward_finetuning_mnist.json",
)
def _sample_efficient(records: Records) -> Finding:
    verdicts, said, tier = finetuning(records, "reweighted curve", guided=False)
    return Finding(said, tier, *outperforms(verdicts))


@_claim(
    "over-optimisation",
    ENTROPY,
    "05_reward_finetuning_mnist#are-the-images-any-better",
    "A learned λ avoids over-optimising the reward.",
    "MNIST, boldness below, CLIP score above, four prompts, five seeds: the CLIP score, and the Fréchet distance to "
    "real images of which the prompt is true, which no method saw, against the pre-trained model.",
    "05_reward_finetuning_mnist.json",
)
def _over_optimisation(records: Records) -> Finding:
    record = records["05_reward_finetuning_mnist"]
    rows, looks = ([row for row in record["data"][key] if row["reward"] == "boldness"] for key in ("rows", "quality"))
    up = paired(rows, "up", "Algorithm 2", "none")
    away = paired(looks, "frechet", "Algorithm 2", "none")
    verdict = NOT_REPRODUCED if sign(up) != "above" else REPRODUCED if sign(away) == "below" else PARTLY
    said = f"CLIP score {shown(up)}, Fréchet distance to real images {shown(away)}, both minus the pre-trained model's"
    why = "reproduced where the CLIP score rises and images come closer to real ones, partly where only the score rises"
    return Finding(said, record["tier"], verdict, why)


@_claim(
    "lambda-start",
    ENTROPY,
    "03_learning_lambda#where-it-ends",
    "The learned λ does not depend on where the search for it starts (released: λ₀ = 5 or 0.01).",
    "Algorithm 2 at γ = 1,000 from λ₀ = 0.01, 1 and 5 on chapter 5's 20,000 recorded samples of each of four prompts, "
    "two lower rewards, without new draws: the spread of the CLIP score that it ends with.",
    "05_reward_finetuning_mnist.json",
    "05_rewards.safetensors",
)
def _lambda_start(records: Records) -> Finding:
    spread = start_spread(records.path("05_rewards.safetensors"))
    stable = [key for key, value in spread.items() if value <= TIE]
    verdict = REPRODUCED if len(stable) == len(spread) else PARTLY if stable else NOT_REPRODUCED
    said = f"the same CLIP score within {TIE:g} from all three starts in {len(stable)} of {len(spread)} problems"
    worst = max(spread, key=spread.get)
    said += f"; largest spread {spread[worst]:.2g} ({worst[0]}, {worst[1]})"
    why = "reproduced where all problems agree, partly where some do; with exact expectations all starts agree"
    return Finding(said, records["05_reward_finetuning_mnist"]["tier"], verdict, why)


def start_spread(path: Path, starts: Sequence[float] = (0.01, 1.0, 5.0)) -> dict[tuple[str, str], float]:
    """Range of E r_up at the ends of Algorithm 2 over starts, by (prompt, lower reward) of chapter 5's samples."""
    from ..algorithms import learn_lam
    from . import lam_study

    materials, _ = lam_study.restore(path)
    spread = {}
    for text, material in materials.items():
        for low in lam_study.LOW:
            samples, ends = lam_study.Bank.of(material.drawn, low).samples(), []
            for start in starts:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # that samples do not reach 0.01
                    *_, last = learn_lam(samples, start, gamma=1000.0)
                ends.append(last.up)
            spread[text, low] = max(ends) - min(ends)
    return spread


@_claim(
    "inference-only",
    ENTROPY,
    "08_stable_diffusion#five-stages",
    "The lower level needs inference only: nothing is trained, and samples can be used again.",
    "Cost of choosing λ in image forwards: chapter 8's digits, on samples of the pre-trained model alone; chapter 5's "
    "problems, with new draws where samples end, and the share of outer steps without a network call.",
    "08_digits.json",
    "05_reward_finetuning_mnist.json",
)
def _inference_only(records: Records) -> Finding:
    digits, record = records["08_digits"], records["05_reward_finetuning_mnist"]
    costs = {
        method: {row["cost"] for row in digits["data"]["rows"] if row["method"] == method}
        for method in ("Algorithm 2", "reweighted curve")
    }
    ours = [row for row in record["data"]["rows"] if row["method"] == "Algorithm 2"]
    budget = max(row["cost"] for row in record["data"]["rows"] if row["method"] != "Algorithm 2")
    spent = [point[0] for row in ours for point in row["path"][1:]]
    before = [point[0] for row in ours for point in row["path"][:-1]]
    free = sum(a == b for a, b in zip(spent, before, strict=True)) / len(spent)
    most, samples = max(row["cost"] for row in ours), max(costs["reweighted curve"], default=0)
    good = [costs["Algorithm 2"] == costs["reweighted curve"] != set(), most <= budget]
    verdict = REPRODUCED if all(good) else PARTLY if any(good) else NOT_REPRODUCED
    said = f"chapter 8: {max(costs['Algorithm 2'], default=0):,} forwards, and the samples alone cost {samples:,}; "
    said += f"chapter 5, {len(ours)} runs: {free:.0%} of later outer steps call no network, at most {most:,} of "
    said += f"{budget:,} forwards"
    why = "reproduced where the samples are the whole cost (chapter 8) and new draws stay within the budget (chapter 5)"
    return Finding(said, record["tier"], verdict, why)


# ---------------------------------------------------------------- the second application: noise schedule


def race(record: Mapping[str, Any], rival: str, steps: int, budget: str = "final", ours: str = "Algorithm 6") -> Any:
    """Paired difference of the test Fréchet distance, rival minus ours (equal final training), in chapter 7."""
    rows = [row for row in record["data"]["rows"] if row["split"] == "test" and row["steps"] == steps]
    kept = [r for r in rows if r["method"] == rival and r["budget"] == budget]
    base = [r | {"method": "ours"} for r in rows if r["method"] == ours and r["budget"] == "final"]
    return paired([*kept, *base], "frechet", rival, "ours")


def _race_verdict(gap: tuple[float, float, float]) -> str:
    return {"above": "worse", "below": "better", "holds": "tie"}[sign(gap)]


SCHEDULES = {
    "grid": ("grid search", "end × τ, 15 points"),
    "random": ("random search", "15 draws over the released ranges"),
    "Bayesian": ("Bayesian search", "15 schedules chosen by a Gaussian process over the released ranges"),
}


def _against_schedules(rival: str, name: str, what: str) -> None:
    @_claim(
        f"schedule-vs-{rival.lower()}",
        SCHEDULE,
        "07_noise_schedule_mnist#equal-final-training",
        f"Learning the noise schedule outperforms {name}.",
        f"MNIST 8×8, five repetitions, equal cost of searching and equal final training; rival: {what}.",
        "07_noise_schedule_mnist.json",
    )
    def find(records: Records) -> Finding:
        record = records["07_noise_schedule_mnist"]
        gaps = {steps: race(record, rival, steps) for steps in record["protocol"]["plan"]["grids"]}
        said = "; ".join(f"{shown(gap)} at {steps} steps" for steps, gap in gaps.items())
        verdicts = {f"{steps} DDIM steps": _race_verdict(gap) for steps, gap in gaps.items()}
        return Finding(f"Fréchet distance, rival minus ours: {said}", record["tier"], *outperforms(verdicts))


for _rival, (_name, _what) in SCHEDULES.items():
    _against_schedules(_rival, _name, _what)


@_claim(
    "schedule-vs-default",
    SCHEDULE,
    "07_noise_schedule_mnist#equal-total-cost",
    "A learned schedule is better than the usual ones, whatever is spent on them.",
    "MNIST 8×8, 10 DDIM steps, five repetitions: default cosine, sigmoid and linear, trained longer by all that "
    "learning cost.",
    "07_noise_schedule_mnist.json",
    "07_noise_schedule.safetensors",
)
def _schedule_vs_default(records: Records) -> Finding:
    record = records["07_noise_schedule_mnist"]
    levels = runs.load_state(records.path("07_noise_schedule.safetensors"))[0]["abar"]
    steps = record["protocol"]["plan"]["val_steps"]
    gaps = {name: race(record, name, steps, "total") for name in ("cosine", "sigmoid", "linear")}
    said = "; ".join(f"{name} {shown(gap)}" for name, gap in gaps.items())
    said = f"Fréchet distance, rival minus ours: {said}; the learned schedule ends at abar_T = {levels[-1]:.1e}"
    return Finding(said, record["tier"], *outperforms({name: _race_verdict(gap) for name, gap in gaps.items()}))


@_claim(
    "schedule-vs-hand",
    SCHEDULE,
    "07_noise_schedule_mnist#equal-total-cost",
    "Learning a schedule is worth its price (asked by this book; the paper may not claim it).",
    "MNIST 8×8, 10 DDIM steps, five repetitions: the cosine stopped by hand at end = 0.95, trained longer by all that "
    "learning cost, against Algorithm 6 from scratch and from its own weights.",
    "07_noise_schedule_mnist.json",
)
def _schedule_vs_hand(records: Records) -> Finding:
    record = records["07_noise_schedule_mnist"]
    steps = record["protocol"]["plan"]["val_steps"]
    gaps = {
        name: race(record, "cosine, end 0.95", steps, "total", ours)
        for name, ours in (("from scratch", "Algorithm 6"), ("own weights", "Algorithm 6, own weights"))
    }
    said = "Fréchet distance, by hand minus learned: " + "; ".join(f"{n} {shown(g)}" for n, g in gaps.items())
    return Finding(said, record["tier"], *outperforms({name: _race_verdict(gap) for name, gap in gaps.items()}))


@_claim(
    "released-loop",
    CODE,
    "07_noise_schedule_mnist#equal-final-training",
    "The loop of the released code, as it runs, finds better schedules than search.",
    "MNIST 8×8, 10 DDIM steps, five repetitions: zeroth order with 36 fresh samples, one direction, the released step "
    "sizes and no bilevel term, against three searches of the same cost.",
    "07_noise_schedule_mnist.json",
)
def _released_loop(records: Records) -> Finding:
    record = records["07_noise_schedule_mnist"]
    steps = record["protocol"]["plan"]["val_steps"]
    gaps = {rival: race(record, rival, steps, ours="zeroth order") for rival in SCHEDULES}
    said = "Fréchet distance, rival minus the loop: " + "; ".join(f"{n} {shown(g)}" for n, g in gaps.items())
    return Finding(said, record["tier"], *outperforms({name: _race_verdict(gap) for name, gap in gaps.items()}))


@_claim(
    "bilevel-term",
    SCHEDULE,
    "07_noise_schedule_mnist#what-each-part-is-for",
    "The bilevel term, the answer of the network to its schedule, is what makes the learned schedule good.",
    "MNIST 8×8, validation split, three repetitions: Algorithm 6 without it, at the same cost.",
    "07_noise_schedule_mnist.json",
)
def _bilevel_term(records: Records) -> Finding:
    record = records["07_noise_schedule_mnist"]
    gap = paired(validated(record), "frechet", "no bilevel term", "Algorithm 6")
    verdict = {"above": REPRODUCED, "holds": PARTLY, "below": NOT_REPRODUCED}[sign(gap)]
    why = "reproduced where leaving it out is worse, partly where the interval holds zero, not where it is better"
    return Finding(f"without it the Fréchet distance is larger by {shown(gap)}", record["tier"], verdict, why)


def released_bill(steps: int = 50, inner: int = 10, batch: int = 128, images: int = 36) -> list[dict[str, Any]]:
    """What one outer iteration of the released code calls its networks for, and what becomes of it.

    steps, inner, batch, images: DDIM steps of the objective, training steps, and sizes; T is 20 times `steps`.
    Each row has "what", "calls", "cost" in image forwards (a backward pass into weights counts 2, into the input 1)
    and "fate": "used", "only logged" or "without effect".
    """

    def sample(n: int) -> int:
        return n * images

    return [
        {"what": "training steps", "calls": inner, "cost": 3 * inner * batch, "fate": "used"},
        {
            "what": "samples whose distance is overwritten",
            "calls": 20 * steps,
            "cost": sample(20 * steps),
            "fate": "without effect",
        },
        {"what": "loss of the orphaned weights", "calls": 1, "cost": 3 * batch, "fate": "without effect"},
        {
            "what": "two samplings for the orphaned weights",
            "calls": 2 * steps,
            "cost": sample(2 * steps),
            "fate": "without effect",
        },
        {"what": "samples for the log", "calls": 2 * steps, "cost": sample(2 * steps), "fate": "only logged"},
        {
            "what": "two samplings for the schedule",
            "calls": 2 * steps,
            "cost": sample(2 * steps),
            "fate": "used",
        },
        {"what": "two losses for the schedule", "calls": 2, "cost": 4 * batch, "fate": "used"},
    ]


@_claim(
    "schedule-cost",
    SCHEDULE,
    "06_learning_noise_schedules#algorithm-6",
    "The gradient in the schedule is computationally tractable.",
    "Image forwards of one outer step: the released code's, counted from its settings, and Algorithm 6's as recorded "
    "in chapter 7 (validation not counted).",
    "07_noise_schedule_mnist.json",
)
def _schedule_cost(records: Records) -> Finding:
    record = records["07_noise_schedule_mnist"]
    paths = [one["path"] for one in record["data"]["searches"] if one["method"] == "Algorithm 6"]
    gaps = [b["cost"] - a["cost"] for path in paths for a, b in itertools.pairwise(path) if b["val"] is None]
    if not gaps:
        raise NoData("no data: no path of Algorithm 6")
    ours, bill = sorted(gaps)[len(gaps) // 2], released_bill()
    released, calls = (sum(row[key] for row in bill) for key in ("cost", "calls"))
    wasted = sum(row["calls"] for row in bill if row["fate"] == "without effect") / calls
    verdict = REPRODUCED if ours < released else PARTLY if ours < 2 * released else NOT_REPRODUCED
    said = f"{ours:,} against {released:,} ({calls:,} network calls, {wasted:.0%} of them without effect)"
    why = "reproduced where a step of Algorithm 6 costs less than a released one, partly below twice that"
    return Finding(said, f"exact, {record['tier']}", verdict, why)


@_claim(
    "schedule-start",
    SCHEDULE,
    "06_learning_noise_schedules#every-estimator-against-the-truth",
    "The learned schedule does not depend on where learning starts.",
    "MNIST 8×8: signs of Algorithm 6's gradient (γ = 10,000) at a schedule near the default and at a far one; every "
    "recorded descent started from the default.",
    "06_learning_noise_schedules.json",
)
def _schedule_start(records: Records) -> Finding:
    record = records["06_learning_noise_schedules"]
    found = against_truth(record, "Algorithm 6, gamma = 10000")
    verdict = PARTLY if all(all(signs) for signs, *_ in found.values()) else NOT_REPRODUCED
    said = "; ".join(f"{point}: {sum(signs)} of {len(signs)} signs right" for point, (signs, *_) in found.items())
    why = "partly where all signs are right at both points; more cannot be said of descents from one start"
    return Finding(said, record["tier"], verdict, why)


# ---------------------------------------------------------------- full size


@_claim(
    "stable-diffusion",
    SIZE,
    "08_stable_diffusion#the-full-run",
    "On Stable Diffusion, with CLIP or HPSv2 as the reward, learning λ outperforms existing fine-tuning and search.",
    "All five stages on a tiny pipeline with random weights and on digits; the full run wants a GPU and Stable "
    "Diffusion's weights.",
    "08_digits.json",
)
def _stable_diffusion(records: Records) -> Finding:
    name = "08_stable_diffusion"
    if name not in records:
        rows = records["08_digits"]["data"]["rows"]
        ran = f"the same code ran on digits: {len(rows)} rows"
        return Finding(ran, "–", UNTESTED, "the full run has left no result yet: no GPU and no weights here")
    record, verdicts, said = records[name], {}, []
    rows = record["data"]["rows"]
    for rival in dict.fromkeys(row["method"] for row in rows if row["method"] not in ("none", "Algorithm 2")):
        texts = [row["prompt"] for row in rows if row["method"] == rival]
        cells = {(row["method"], row["prompt"]): row for row in rows}
        gaps = []
        for text in texts:
            a, b = cells[rival, text], cells["Algorithm 2", text]
            gap, error = a["up"] - b["up"], 1.96 * math.hypot(a["up_se"], b["up_se"])
            gaps.append("worse" if gap < -error else "better" if gap > error else "tie")
        verdicts |= {f"{rival}, {text}": v for text, v in zip(texts, gaps, strict=True)}
        said.append(f"{rival}: {gaps.count('worse')} of {len(gaps)} prompts worse")
    return Finding("; ".join(said), record["tier"], *outperforms(verdicts))


@_claim(
    "memory",
    SIZE,
    "08_stable_diffusion#does-it-fit",
    "The method is practical at full size: a guided step of Stable Diffusion fits on one GPU.",
    "Stable Diffusion 1.5 at 512×512 with random weights, float16: bytes alive, counted on fake tensors; float32 "
    "measured on a CPU.",
    "08_memory.json",
)
def _memory(records: Records) -> Finding:
    record = records["08_memory"]
    rows = [row for row in record["data"]["rows"] if (row["side"], row["dtype"]) == (512, "float16")]
    if not rows:
        raise NoData("no data: no row at 512, float16")
    peak, small = min(row["counted"]["peak"] for row in rows), 15.0  # GiB of a T4 that torch can use
    on_gpu = record["data"]["device"] != "cpu" and any(row["measured"] for row in rows)
    verdict = NOT_REPRODUCED if peak > small else REPRODUCED if on_gpu else PARTLY
    why = f"reproduced where it fits {small:g} GiB by a measurement on a GPU, partly where only a count says so"
    return Finding(f"{peak:.1f} GiB with every block recomputed", record["tier"], verdict, why)


@_claim(
    "mnist-28",
    SIZE,
    "07_noise_schedule_mnist#at-2828",
    "The schedule experiment on MNIST at 28×28.",
    "At 8×8 only; the full profile of chapter 7 wants a GPU.",
    "07_noise_schedule_mnist.json",
)
def _mnist_28(records: Records) -> Finding:
    name = "07_noise_schedule_mnist_full"
    small = records["07_noise_schedule_mnist"]
    if name not in records:
        ran = f"at 8×8: {len(small['data']['rows'])} marks"
        return Finding(ran, "–", UNTESTED, "the full run has left no result yet: no GPU here")
    record = records[name]
    steps = record["protocol"]["plan"]["val_steps"]
    gaps = {rival: race(record, rival, steps) for rival in SCHEDULES}
    said = "Fréchet distance, rival minus ours: " + "; ".join(f"{n} {shown(g)}" for n, g in gaps.items())
    return Finding(said, record["tier"], *outperforms({n: _race_verdict(g) for n, g in gaps.items()}))


# ---------------------------------------------------------------- shown


class ProseTable:
    """A table of sentences, wrapped and flush left, some of them links; shown as HTML in a notebook and on a page.

    rows     mappings, one per row; of a text with a line break the first line is bold
    columns  key -> heading;  tier, note: as for `plots.Table`
    links    key of a column -> key of the row's link, from the root of the site as in `Claim.link`
    """

    def __init__(
        self,
        rows: Iterable[Mapping[str, str]],
        columns: Mapping[str, str],
        *,
        tier: str,
        note: str,
        links: Mapping[str, str] | None = None,
    ):
        if tier not in ("exact", *runs.TIERS):
            raise ValueError(f"tier = {tier!r} must be one of exact, {', '.join(runs.TIERS)}")
        self.rows, self.columns, self.tier, self.note, self.links = list(rows), columns, tier, note, links or {}

    def _repr_html_(self) -> str:
        style = "padding: 0.3em 0.5em; text-align: left; vertical-align: top"

        def cell(row: Mapping[str, str], key: str) -> str:
            first, line_break, rest = (html.escape(part) for part in row[key].partition("\n"))
            text = f"<strong>{first}</strong><br>{rest}" if line_break else first
            if key in self.links:
                text = f'<a href="{html.escape(href(row[self.links[key]]))}">{text}</a>'
            return f'<td style="{style}">{text}</td>'

        head = "".join(f'<th scope="col" style="{style}">{html.escape(text)}</th>' for text in self.columns.values())
        body = "".join(f"<tr>{''.join(cell(row, key) for key in self.columns)}</tr>" for row in self.rows)
        caption = f'<caption style="caption-side: bottom"><b>{self.tier}</b>: {html.escape(self.note)}</caption>'
        table = '<table class="dataframe" style="font-size: 0.85em; min-width: 46em">'
        return f"{table}{caption}<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"

    def __repr__(self) -> str:
        rows = [
            "\n  ".join(f"{head}: {': '.join(row[key].splitlines())}" for key, head in self.columns.items())
            for row in self.rows
        ]
        return "\n".join([*rows, f"{self.tier}: {self.note}"])


def place(chapter: str) -> str:
    """What a reader calls a notebook: "chapter 5", "appendix"."""
    number = re.match(r"\d+", chapter)
    return f"chapter {int(number[0])}" if number else chapter.partition("_")[0]


def href(link: str) -> str:
    """A `Claim.link` as a notebook must write it: a page of the site in a build, the notebook's file in a live one."""
    target = link.removeprefix("notebooks/")
    return target if runs.is_batch() else target.partition("#")[0].replace(".html", ".ipynb")


# ---------------------------------------------------------------- the paper's own values

_METHODS = {"entropy": ("bilevel", *FINETUNING), "schedule": ("bilevel", *SCHEDULES, "default")}
_MEASURES = {"entropy": ("upper reward", "FID"), "schedule": ("FID", "IS")}


def _value_ids() -> dict[str, str]:
    """Ids of the values to transcribe, with the claim beside which each is shown."""
    claim_of = {"entropy": "lambda-vs-", "schedule": "schedule-vs-"}
    ids = {}
    for application, methods in _METHODS.items():
        for method in methods:
            for measure in _MEASURES[application]:
                key = re.sub(r"[^a-z]+", "-", f"{application} {method} {measure}".lower())
                shown_at = "stable-diffusion" if application == "entropy" else "mnist-28"
                rival = claim_of[application] + method.lower().replace(" ", "-")
                ids[key] = shown_at if method == "bilevel" else rival
    return ids


VALUE_IDS = _value_ids()
FIELDS = ("id", "table", "row", "column", "value", "unit", "page")


@dataclass(frozen=True)
class PaperValue:
    """A number of the paper, or a place for one: value None until somebody transcribes it. See `paper_values`."""

    id: str
    table: str | None
    row: str | None
    column: str | None
    value: float | None
    unit: str | None
    page: int | None


def paper_values(path: str | Path | None = None) -> list[PaperValue]:
    """The transcribed values of a YAML file, default book/paper_values.yml.

    Raises ValueError that names the entry: an unknown or repeated id, an unknown or missing field, a value that is not
    a number, or a number without table, row, column and page.
    """
    import yaml

    path = Path(path) if path else runs.project_root() / "book" / "paper_values.yml"
    found = yaml.safe_load(path.read_text(encoding="utf-8"))
    entries = found.get("values") if isinstance(found, dict) else None
    if not isinstance(entries, list):
        raise ValueError(f"{path.name}: a mapping with one key, values, a list of entries, was expected")
    values: dict[str, PaperValue] = {}
    for i, entry in enumerate(entries, 1):
        where = f"{path.name}, entry {i}"
        if not isinstance(entry, dict) or set(entry) != set(FIELDS):
            raise ValueError(f"{where}: the fields {', '.join(FIELDS)} were expected, not {entry!r}")
        where += f" ({entry['id']})"
        if entry["id"] not in VALUE_IDS:
            raise ValueError(f"{where}: unknown id; known are {', '.join(VALUE_IDS)}")
        if entry["id"] in values:
            raise ValueError(f"{where}: this id comes twice")
        value = entry["value"]
        if value is not None:
            if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
                raise ValueError(f"{where}: value = {value!r} is not a number")
            missing = [key for key in ("table", "row", "column", "page") if entry[key] in (None, "")]
            if missing:
                raise ValueError(f"{where}: a value needs its {', '.join(missing)}")
        page = entry["page"]
        if page is not None and (isinstance(page, bool) or not isinstance(page, int) or page < 1):
            raise ValueError(f"{where}: page = {page!r} is not a page number")
        texts = {key: None if entry[key] is None else str(entry[key]) for key in ("table", "row", "column", "unit")}
        values[entry["id"]] = PaperValue(entry["id"], **texts, value=value, page=page)
    return list(values.values())


def paper_column(found: Iterable[Claim], values: Iterable[PaperValue]) -> dict[str, str]:
    """What the column "paper" says of each claim, by its id: values, "not transcribed", or "–" where none is asked."""
    by_claim: dict[str, list[PaperValue]] = {}
    for value in values:
        by_claim.setdefault(VALUE_IDS[value.id], []).append(value)
    said = {}
    for claim in found:
        places = by_claim.get(claim.id, [])
        numbers = [
            f"{v.row}, {v.column}: {v.value:g}{' ' + v.unit if v.unit else ''} (table {v.table}, p. {v.page})"
            for v in places
            if v.value is not None
        ]
        said[claim.id] = "; ".join(numbers) or ("not transcribed" if places else "–")
    return said
