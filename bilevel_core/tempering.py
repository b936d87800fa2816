"""The law p_0 exp(r/lam) of a sampler's output, exactly: Markov chains in the sampler's noise, exchanged over a ladder.

A sampler is a map G of its noise z = (x_T, one tensor for each step that adds noise) ~ N(0, I), and p_0 is the law of
G(z), whatever the network is worth. So pi(z) ~ N(z; 0, I) exp(r(G(z))/lam) has G(z) ~ p_0 exp(r/lam): no look-ahead and
no potentials, so no bias but that of chains too short.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from .algorithms import refuse_changes
from .guidance import gradient_of, one_each
from .samplers import Denoiser, sample_ddim
from .schedules import check_terminal, integer

State = dict[str, Tensor]  # of all chains: "z" (L, C, *shape), "r" (L, C), "slope" of r in z, "measured" (L, C, m), ...


@dataclass(frozen=True)
class NoiseMap:
    """A sampler as a function of all its noise.

    run    z (B, *shape) -> x_0 (B, ...), each row by its own noise alone;  shape: of a row of noise, such as (k, ...)
    cost   of a row, in image forwards
    """

    run: Callable[[Tensor], Tensor]
    shape: tuple[int, ...]
    cost: int = 1


def noise_map(
    denoiser: Denoiser, abar: Tensor, ts: list[int], shape: tuple[int, ...], sampler: Callable = sample_ddim, **options
) -> NoiseMap:
    """`sample_ddim` or `sample_ancestral` as a map of z (B, k, *shape): x_T, then the noise of each step that adds any.

    shape  of one x_T;  abar, ts: as for the sampler;  options: its own, such as eta
    k is 1 for DDIM with eta = 0, else the number of steps: the last adds no noise. Warns if abar_T is too large for
    x_T ~ N(0, I).
    """
    check_terminal(abar)
    noisy = sampler is not sample_ddim or options.get("eta", 0.0) > 0

    def run(z: Tensor) -> Tensor:
        x_T, *noise = z.unbind(1)
        return sampler(denoiser, x_T, abar, ts, noise=noise, **options)

    return NoiseMap(run, (len(ts) if noisy else 1, *shape), len(ts) * getattr(denoiser, "passes", 1))


@dataclass(frozen=True)
class Tempered:
    """What `sample_tempered` drew: S sweeps of C chains at each of L levels.

    config    "lams" of the levels, "warmup", how many sweeps come before those to use, and the other settings
    cost      in image forwards, of everything: warm-up and refused proposals included
    refused   how many proposals had the reward -inf
    history   float64 on the CPU. "low" (S, L, C): the reward after the moves of each sweep. "measured" (S, L, C, m).
              "replica" (S, L, C): which draw of p_0 a state descends from, a number for each; negative: from a start.
              "accept" (S, L), "swap" (S, L - 1): shares of moves, and of exchanges with the level below, accepted
    state     where the next sweep starts: "z" (L, C, *shape) with what belongs to it, "log_s" (L,), "generator"
    """

    config: dict
    cost: int
    refused: int
    history: dict[str, Tensor]
    state: State


def sample_tempered(
    G: NoiseMap,
    reward: Callable[[Tensor], Tensor],
    lams: Sequence[float],
    *,
    sweeps: int,
    warmup: int,
    generator: torch.Generator,
    chains: int = 8,
    z: Tensor | None = None,
    measure: Callable[[Tensor], Tensor] | None = None,
    gradient: bool = False,
    accept: float = 0.3,
    dtype: torch.dtype = torch.float32,
    micro_batch: int | None = None,
    progress: Callable[[list], Iterable] | None = None,
    resume: Tempered | None = None,
) -> Tempered:
    """Replica exchange for p_0 exp(reward/lam) at every lam of a ladder at once, in the noise of the sampler G.

    A sweep draws level 0 afresh from p_0, moves every other state by preconditioned Crank-Nicolson (pCN; Cotter et al.
    2013), z' = sqrt(1 - s^2) z + s xi, accepted with min(1, exp((r' - r)/lam)), and exchanges neighbours in each chain,
    even pairs, then odd ones: a fresh draw that level 1 takes is a move to anywhere. Chains never meet: each is a
    ladder of its own, so that they are independent.

    reward    of images (B, ...) -> (B,). At -inf an image has probability 0: such a proposal is refused and counted,
              and what is called p_0 is p_0 without them
    lams      infinity, which is p_0, then falling;  chains: at each level
    sweeps    to keep, in all, those before `resume` included;  warmup: sweeps before these, in which alone each s is
              tuned to the share `accept` of accepted moves
    z         where to start: (levels, chains, *G.shape), or (chains, *G.shape) for every level; None: draws of p_0
    measure   of images -> (B,) or (B, m): what else to note of each state, such as r_up
    gradient  the moves drift up the reward (pCNL), whose gradient goes back through G: at twice the cost
    dtype     of z;  micro_batch: rows through G at once, None: all;  progress: such as tqdm
    resume    continue after this, as if never stopped: the generator is set to where it was
    Every level keeps its law exactly; whether chains are long enough, ask `lab.certificates`. Raises ValueError for
    lams that are no such ladder; for a reward that is NaN or +inf anywhere, -inf at a start, the same for all images,
    or without a finite gradient where one is asked for; and for a resumed run with other settings.
    """
    lams, warmup, sweeps = [float(lam) for lam in lams], integer("warmup", warmup, 0), integer("sweeps", sweeps, 1)
    if len(lams) < 2 or lams[0] != float("inf") or not all(a > b > 0 for a, b in pairwise(lams)):
        raise ValueError(f"lams = {lams} must be a ladder: infinity (p_0), then one or more that fall, above 0")
    config = {"lams": lams, "chains": integer("chains", chains, 1), "warmup": warmup, "accept": accept}
    config |= {"shape": [*G.shape], "gradient": gradient, "measured": measure is not None, "dtype": str(dtype)}
    on, size, cost, refused = {"generator": generator, "device": generator.device}, (len(lams), chains), 0, 0
    beta = 1 / torch.tensor(lams, dtype=torch.float64, device=generator.device)[:, None]

    def look(z: Tensor) -> State:
        nonlocal cost
        cost += G.cost * (1 + gradient) * size[0] * chains
        parts = z.flatten(0, 1).split(micro_batch or size[0] * chains)
        parts = [_look(rows, G, reward, measure, gradient) for rows in parts]
        joined = (torch.cat(part).unflatten(0, size) for part in zip(*parts, strict=True))
        return dict(zip(("z", "r", "slope", "measured"), (z, *joined), strict=True))

    def normal() -> Tensor:
        return torch.randn(*size, *G.shape, **on, dtype=dtype)

    def accepts(log_a: Tensor) -> Tensor:  # with probability min(1, exp(log_a)); never if NaN, as at beta = 0, r = -inf
        return torch.rand(log_a.shape, **on, dtype=torch.float64).log() < log_a

    if resume is None:
        now = look(normal() if z is None else z.to(beta.device, dtype).expand(*size, *G.shape))
        tries = 100 if z is None else 0
        while tries and not now["r"].isfinite().all():
            now, tries = look(_choose(now["r"].isfinite(), now["z"], normal())), tries - 1
        if not now["r"].isfinite().all():
            raise ValueError(f"the reward is -inf for {now['r'].isinf().sum()} of {now['r'].numel()} starts")
        now["replica"] = -1 - torch.arange(now["r"].numel(), device=beta.device).reshape(size)
        log_s, rows = -0.7 * (beta > 0).double(), []
    else:
        refuse_changes(resume.config, config)
        now, cost, refused = dict(resume.state), resume.cost, resume.refused
        generator.set_state(now.pop("generator"))
        log_s = now.pop("log_s")
        rows = [dict(zip(resume.history, row, strict=True)) for row in zip(*resume.history.values(), strict=True)]
    left = list(range(len(rows), warmup + sweeps))
    for k in progress(left) if progress else left:
        new, log_a = _propose(now, log_s.exp(), beta, look, normal(), gradient)
        new["replica"] = now["replica"].clone()
        new["replica"][0] = k * chains + torch.arange(chains)
        yes, refused = accepts(log_a), refused + int(new["r"].isinf().sum())
        now = {name: _choose(yes, new[name], old) for name, old in now.items()}
        row = {"low": now["r"], "measured": now["measured"], "replica": now["replica"], "accept": yes.double().mean(1)}
        now, row["swap"] = _exchange(now, beta, accepts)
        rows.append({name: value.double().cpu() for name, value in row.items()})
        if k < warmup:
            log_s = (log_s + (beta > 0) * (row["accept"][:, None] - accept) / (1 + k) ** 0.5).clamp(max=0)
    history = {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
    if history["low"].min() == history["low"].max():
        raise ValueError(f"the reward is {history['low'].max():g} for every image: each tilt is p_0 itself; check it")
    return Tempered(config, cost, refused, history, now | {"log_s": log_s, "generator": generator.get_state()})


def _look(z: Tensor, G: NoiseMap, reward: Callable, measure: Callable | None, gradient: bool) -> tuple[Tensor, ...]:
    """Of rows z (B, *shape): the reward, its gradient in z (if none, zeros of one number) and what is measured."""
    with torch.set_grad_enabled(gradient):
        x = G.run(z := z.detach().requires_grad_(gradient))
        r = one_each(reward(x), len(z))
        slope = gradient_of(r, z) if gradient else z.new_zeros(len(z), *[1] * (z.dim() - 1))
    bad = (r.isfinite() & ~slope.isfinite().flatten(1).all(1)) | r.isnan() | (r == float("inf"))
    if bad.any():
        raise ValueError(f"the reward, or its gradient, is NaN or +inf for {bad.sum()} of {len(z)} images: mend it")
    with torch.no_grad():
        measured = measure(x.detach()).reshape(len(z), -1) if measure else r[:, None][:, :0]
    return r.detach().double(), slope, measured.double()


def _propose(now: State, s: Tensor, beta: Tensor, look: Callable, xi: Tensor, gradient: bool) -> tuple[State, Tensor]:
    """Where pCN, or pCNL, would go with sizes s (L, 1), and log of the ratio that accepts it (L, C).

    pCNL drifts by (1 - sqrt(1 - s^2)) beta grad r: without a gradient it is pCN, with s = 1 at beta = 0 a fresh draw.
    """
    c = (1 - s**2).clamp(min=0).sqrt()
    c_z, s_z, drift, half = (v.to(xi).reshape(-1, *[1] * (xi.dim() - 1)) for v in (c, s, beta, (1 - c) / 2))
    new = look(c_z * now["z"] + s_z * xi + 2 * half * drift * now["slope"])
    log_a = beta * (new["r"] - now["r"])

    def toward(u: State, v: State) -> Tensor:
        """log of the density of proposing v from u over that without drift, (L, C)."""
        pull = drift * u["slope"]
        return ((v["z"] - c_z * u["z"] - half * pull) * pull).flatten(2).double().sum(2) / (1 + c)

    return new, log_a + toward(new, now) - toward(now, new) if gradient else log_a


def _exchange(now: State, beta: Tensor, accepts: Callable[[Tensor], Tensor]) -> tuple[State, Tensor]:
    """Exchanges neighbours within each chain, even pairs, then odd. Returns the state and the shares (L - 1,)."""
    r, swapped = now["r"].clone(), torch.zeros_like(beta[1:, 0])
    source = torch.arange(len(r), device=r.device)[:, None].repeat(1, r.shape[1])
    for first in (0, 1):
        i = torch.arange(first, len(r) - 1, 2, device=r.device)
        yes = accepts((beta[i + 1] - beta[i]) * (r[i] - r[i + 1]))
        for rows in (r, source):
            rows[i], rows[i + 1] = torch.where(yes, rows[i + 1], rows[i]), torch.where(yes, rows[i], rows[i + 1])
        swapped[i] = yes.double().mean(1)
    columns = torch.arange(r.shape[1], device=r.device)
    return {name: value[source, columns] for name, value in now.items()}, swapped


def _choose(yes: Tensor, new: Tensor, old: Tensor) -> Tensor:
    """new (L, C, ...) where yes (L, C), else old."""
    return torch.where(yes.reshape(*yes.shape, *[1] * (new.dim() - 2)), new, old)


def kept(name: str, *runs: Tempered) -> Tensor:
    """A part of the history after the warm-up, the chains of all runs side by side: (S, L, C, ...).

    Raises ValueError, naming what differs, unless the runs have one ladder. The longer run gives its last sweeps.
    """
    for run in runs[1:]:
        refuse_changes(*({n: r.config[n] for n in ("lams", "measured")} for r in (runs[0], run)), "settings")
    parts = [run.history[name][run.config["warmup"] :] for run in runs]
    return torch.cat([part[-min(map(len, parts)) :] for part in parts], 2)
