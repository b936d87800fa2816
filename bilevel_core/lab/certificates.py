"""Are the chains of `tempering` long enough? What must hold where every level of a ladder has its law, and does it?

Imports torch and the core alone.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from ..algorithms import TiltSamples
from ..estimators import pool
from ..tempering import Tempered, kept


def tilt_samples(*runs: Tempered, column: int = 0) -> tuple[TiltSamples, ...]:
    """What runs kept, a set for each level: `TiltSamples.pooled(*tilt_samples(run))` is the curve over every lam.

    column  of "measured" that is r_up; r_low itself where nothing was measured
    A chain is a group, and the size of a set its `effective_draws`, of r_low or r_up, whichever are fewer. The cost of
    everything is shared out evenly.
    """
    low, lams, cost = kept("low", *runs), runs[0].config["lams"], sum(run.cost for run in runs)
    up = kept("measured", *runs)[..., column] if runs[0].config["measured"] else low
    group, sets = torch.arange(low.shape[2]).expand(len(low), -1).flatten(), []
    for i, lam in enumerate(lams):
        size = min(effective_draws(x[:, i].T) for x in (low, up))
        each = cost * (i + 1) // len(lams) - cost * i // len(lams)
        rows = [x[:, i].flatten() for x in (up, low)]
        sets.append(TiltSamples(*rows, -rows[1] / lam, each, at=lam, group=group, size=size))
    return tuple(sets)


def effective_draws(x: Tensor) -> float:
    """How many independent draws x (chains, n) is worth for a mean, by autocorrelation pooled over chains; at most all.

    Geyer's (1992) initial monotone sequence of the autocorrelation of all chains together, as Vehtari et al. (arXiv
    1903.08008, eqs. 10-13): chains that differ in their means count for little.
    """
    n, x = x.shape[1], x.double()
    padded = torch.fft.rfft(x - x.mean(1, keepdim=True), 2 * n)
    covariance = torch.fft.irfft(padded.abs() ** 2, 2 * n)[:, :n].mean(0) / n
    spread = covariance[0] + (x.mean(1).var() if len(x) > 1 else 0)
    if not spread > 0:
        return 1.0  # nothing has moved
    correlation = 1 - (covariance[0] * n / (n - 1) - covariance) / spread
    correlation[0] = 1
    pairs = correlation[: n - n % 2].reshape(-1, 2).sum(1)
    pairs = pairs[: int((pairs < 0).int().argmax()) if (pairs < 0).any() else len(pairs)].cummin(0).values
    return x.numel() / max(float(2 * pairs.sum() - 1), 1.0)


def split_rhat(x: Tensor) -> float:
    """The rank-normalised split R-hat of x (chains, n): 1 where the halves of all chains have one law.

    The larger of those of location and of spread (Vehtari et al., arXiv 1903.08008, section 4.2); infinite where no
    half varies but their values differ.
    """
    half = x.shape[1] // 2
    x = torch.cat([x[:, :half], x[:, -half:]]).double()
    return max(_rhat(x), _rhat((x - x.median()).abs()))


def _rhat(x: Tensor) -> float:
    values, place, count = x.unique(return_inverse=True, return_counts=True)
    rank = count.cumsum(0) - (count - 1).double() / 2  # ties share the mean of their ranks
    x, n = torch.special.ndtri((rank[place] - 0.375) / (x.numel() + 0.25)), x.shape[1]
    within, between = x.var(1).mean(), x.mean(1).var()
    return ((n - 1) / n + between / within).sqrt().item() if within > 0 else 1.0 if len(values) == 1 else float("inf")


@dataclass(frozen=True)
class Certificate:
    """How far down a ladder the laws are proved to be sampled; as text, a sentence.

    down_to  the smallest lam such that it and all above it pass; None: not even p_0 does
    rows     for each level: "lam"; "low" and "low_se", E r_low and its error; "var", Var r_low; "rhat" and "draws", the
             worst over r_low and what was measured; "families", how many draws of p_0 its states descend from; "log_z",
             and "identity" and "area" in standard errors; "failed", the names of those outside their limits
    """

    down_to: float | None
    rows: tuple[dict, ...]

    def __str__(self) -> str:
        said = "certified nowhere" if self.down_to is None else f"certified down to lambda = {self.down_to:g}"
        bad = next((row for row in self.rows if row["failed"]), None)
        if bad is None:
            return f"{said}, the end of the ladder"
        return f"{said}; at {bad['lam']:g}, " + " and ".join(f"{name} is {bad[name]:.3g}" for name in bad["failed"])


def certify(*runs: Tempered, rhat: float = 1.05, draws: float = 100.0, sigmas: float = 4.0) -> Certificate:
    """What runs of one ladder from opposite starts, from p_0 and from beyond the tilt, prove about each of its levels.

    rhat   the halves of both runs, each with all its chains, have a split R-hat below it: for many short chains, of
           which none has the whole law, what counts is that both starts and both halves do (Margossian et al., arXiv
           2110.13017)
    draws  at least so many independent draws: by autocorrelation, or by how far the means of the chains are apart,
           whichever are fewer
    sigmas       within so many standard errors (jackknife over chains, of less than 16 over their halves; a ladder
                 makes some twenty comparisons),
                 "identity": the means of a level and of the one above it differ by the integral over 1/lam, between
                 them, of Var r_low, as the pool of the two (`estimators.pool`) has it, and
                 "area": the integral of E r_low from p_0 on, by the trapezoidal rule with end terms, is the pools' log
                 Z; the rule's own error is taken to be a tenth of its end terms
    Raises ValueError for a single run: chains that all start on one side of a barrier agree with each other.
    """
    if len(runs) < 2:
        raise ValueError("one run proves nothing: pass one that starts from p_0 and one from beyond the tilt")
    low, lams = kept("low", *runs), runs[0].config["lams"]
    whole, half = torch.cat([low[..., None], kept("measured", *runs)], 3), len(low) // 2
    cut = low if low.shape[2] >= 16 else torch.cat([low[:half], low[-half:]], 2)  # halves of one chain are correlated
    beta, r = 1 / torch.tensor(lams).double(), cut.transpose(0, 1)  # (L, S, blocks)
    blocks = range(min(r.shape[2], 32))

    def compare(i: int, left_out: int, log_z: Tensor | None) -> tuple[Tensor, Tensor]:
        """Levels i and i + 1: by how much their means differ, less what their pool says; the area under E r_low between
        them, less the pool's log Z; and the last term of that area."""
        count = (torch.arange(r.shape[2]) % len(blocks) != left_out).double().expand_as(r[:2])
        pair, step, n = r[i : i + 2], beta[i + 1] - beta[i], count[0].sum()
        h = torch.stack([0 * step, step])[:, None] * pair.flatten()
        log_w, log_z = pool(h, n.expand(2), count.flatten(), log_z)
        mean = (pair * count).sum((1, 2)) / n
        var = ((pair - mean[:, None, None]).square() * count).sum((1, 2)) / n
        off, bend = mean - (h + log_w).softmax(1) @ pair.flatten(), step**2 / 12 * (var[1] - var[0])
        return torch.stack([off[1] - off[0], step * mean.mean() - bend - log_z[1], bend]), log_z

    found, spread, log_z = [], [], [0.0]
    for i in range(len(lams) - 1):
        all_in, ratio = compare(i, -1, None)
        found.append(all_in)
        spread.append(torch.stack([compare(i, k, ratio)[0] for k in blocks]))
        log_z.append(log_z[-1] + ratio[1].item())
    found, spread = torch.stack(found, 1), torch.stack(spread, 2)  # (3, L - 1), (blocks, 3, L - 1)
    found[1:], spread[:, 1:] = found[1:].cumsum(1), spread[:, 1:].cumsum(2)
    error = (spread.var(0) * (len(blocks) - 1) ** 2 / len(blocks)).sqrt()
    error[1] = torch.hypot(error[1], found[2] / 10)
    off = found / error.clamp(min=1e-300)
    rows, replicas, down_to = [], kept("replica", *runs), None
    sides = whole.split([run.history["low"].shape[2] for run in runs], 2)
    least = min(side.shape[2] for side in sides)
    for i, lam in enumerate(lams):
        x = whole[:, i].movedim(2, 0).transpose(1, 2)  # (1 + m, C, S)
        size = [min(effective_draws(y), len(y) * (y.var() / y.mean(1).var()).item()) for y in x]
        row = {"lam": lam, "low": x[0].mean().item(), "var": x[0].var().item()}
        met = torch.stack([side[:, i, :least].flatten(0, 1) for side in sides]).movedim(2, 0)  # in order of sweeps
        row |= {"low_se": (row["var"] / size[0]) ** 0.5, "rhat": max(map(split_rhat, met)), "draws": min(size)}
        row |= {"families": len(replicas[:, i].unique()), "log_z": log_z[i]}
        row |= {name: off[j, i - 1].item() if i else 0.0 for j, name in enumerate(("identity", "area"))}
        failed = {"rhat": row["rhat"] >= rhat, "draws": row["draws"] < draws}
        failed |= {name: abs(row[name]) > sigmas for name in ("identity", "area")}
        rows.append(row | {"failed": [name for name, bad in failed.items() if bad]})
        down_to = lam if not any(r["failed"] for r in rows) else down_to
    return Certificate(down_to, tuple(rows))
