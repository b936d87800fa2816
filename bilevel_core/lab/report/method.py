"""Claims of the method, on problems whose answers are known."""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch

from .rules import (
    CODE,
    METHOD,
    NOT_REPRODUCED,
    PARTLY,
    REPRODUCED,
    Finding,
    NoData,
    Records,
    claim,
    paired,
    shown,
    sign,
)


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


@claim(
    "penalty-gradient",
    METHOD,
    "02_generative_bilevel#the-value-function-penalty",
    "Algorithm 1: a bilevel problem over distributions is solved with first derivatives only, by a penalty and two "
    "lower-level solutions.",
    "1-D mixture, both lower levels by quadrature: where penalty descent at γ = 1,000 from λ = 20 ends, against λ*.",
)
def _penalty_gradient(_: Records) -> Finding:
    from ...algorithms import penalty_descent

    problem = _tilt()
    best, start = lam_root(problem.hypergrad), torch.tensor(20.0).double().log()
    step = lambda k, grad: (0.25 * grad).clamp(-0.3, 0.3)  # noqa: E731
    *_, last = penalty_descent(problem, start, gamma=1000.0, step=step, steps=60)
    off = abs(last.x_next.exp().item() / best - 1)
    verdict = REPRODUCED if off < 1e-3 else PARTLY if off < 0.1 else NOT_REPRODUCED
    return Finding(
        f"ends {off:.2%} from λ* = {best:.4f}", "exact", verdict, "reproduced within 0.1 %, partly within 10 %"
    )


@claim(
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


@claim(
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
    from ..studies import schedule_gradients

    pieces = records["06_learning_noise_schedules"]["data"]["pieces"]
    share, cosines = absorbed(pieces, 1.0), []
    for point in schedule_gradients.POINTS:
        judged = schedule_gradients.verdicts(pieces, point)
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


@claim(
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
    from ...algorithms import TiltSamples, learn_lam

    problem, ends = _tilt(), []
    samples = TiltSamples(problem.r_up, problem.r_low, problem.log_p0)
    for start in (0.01, 5.0, 100.0):
        *_, last = learn_lam(samples, start, **({"gamma": 1000.0, "min_ess": 1.0, "stop": 0.0, "steps": 100} | options))
        ends.append(last.lam)
    return ends


@claim(
    "released-gradient",
    CODE,
    "03_learning_lambda#swapped-arguments-what-est1-optimises",
    "The released code's estimator of the gradient in λ (est1) finds the best λ.",
    "1-D mixture, exact expectations: the root of est1 at γ = 1, 10, 1,000 against λ*.",
)
def _released_gradient(_: Records) -> Finding:
    from ..comparisons import lam_grad_released_est1

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


@claim(
    "algorithm-3",
    METHOD,
    "01_diffusion#training-predict-the-noise",
    "Algorithm 3: score network training.",
    "MNIST 8×8, 1,500 training steps: the share of the noise's variance that a trained network explains.",
    "01_sampling_mnist8.json",
)
def _algorithm_3(records: Records) -> Finding:
    from ..metrics import t_interval

    record = records["01_sampling_mnist8"]
    losses = {(row["seed"], row["end"]): row["final_loss"] for row in record["data"]["rows"]}
    by_seed: dict[int, list[float]] = {}
    for (seed, _), loss in losses.items():
        by_seed.setdefault(seed, []).append(1 - loss)
    explained = t_interval([sum(v) / len(v) for v in by_seed.values()])
    verdict = REPRODUCED if explained.lo > 0.5 else PARTLY if explained.lo > 0 else NOT_REPRODUCED
    why = "a network that has learned nothing explains none; reproduced above half, partly above zero"
    return Finding(f"{shown(explained)} of the variance, {len(by_seed)} seeds", record["tier"], verdict, why)


@claim(
    "algorithm-4",
    METHOD,
    "01_diffusion#how-wrong-is-a-sampler-with-a-perfect-network",
    "Algorithm 4: backward sampling draws from the data's law.",
    "Gaussian data, exact denoiser: the discrete chain's standard deviation at 10, 100 and 1,000 steps; MNIST 8×8: "
    "50 DDIM steps against 5 (end = 0.98).",
    "01_sampling_mnist8.json",
)
def _algorithm_4(records: Records) -> Finding:
    from ...samplers import timesteps
    from ...schedules import DEFAULT_Q, abar
    from ..oracles import Gaussian

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


@claim(
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
    from ...guidance import LookAhead
    from ...samplers import sample_ddim, timesteps
    from ...schedules import DEFAULT_Q, abar
    from ..oracles import Gaussian

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


@claim(
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
    """At each of chapter 6's points: whether an estimator's mean has the sign of the truth's in each coordinate whose
    true slope is told from zero by its 95 % interval, its cosine and its relative bias."""
    from ..studies import schedule_gradients

    found = {}
    for point in schedule_gradients.POINTS:
        judged = schedule_gradients.verdicts(record["data"]["pieces"], point)
        if name not in judged:
            raise NoData(f"no data: {name} was not run at {point!r}")
        pairs = zip(judged[name]["mean"], judged["truth"]["mean"], strict=True)
        signs = [ours.mean * true.mean > 0 for ours, true in pairs if true.lo * true.hi > 0]
        found[point] = signs, judged[name]["cosine"], judged[name]["off"]
    return found


@claim(
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
