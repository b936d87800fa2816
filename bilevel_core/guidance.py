"""Wrappers of a denoiser: a wrapped denoiser is again a denoiser, so samplers need no options."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint as recompute

from .samplers import ddim_coefficients
from .schedules import per_sample


def x0_from_eps(x: Tensor, eps_hat: Tensor, abar_t: Tensor) -> Tensor:
    """x0_hat = (x_t - sqrt(1 - abar_t) eps_hat) / sqrt(abar_t); shapes (B, ...), abar_t () or (B,), positive."""
    a = per_sample(abar_t, x)
    return (x - (1 - a).sqrt().to(x.dtype) * eps_hat) / a.sqrt().to(x.dtype)


def eps_from_x0(denoise_x0: Callable[[Tensor, int | Tensor], Tensor], abar: Tensor) -> Callable:
    """A denoiser (predicting eps) from a network that predicts x_0: eps = (x_t - sqrt(abar) x0_hat)/sqrt(1 - abar).

    denoise_x0  callable (x, t) -> x0_hat, shapes (B, ...)
    abar        (T+1,)
    """

    def denoiser(x: Tensor, t: int | Tensor) -> Tensor:
        a = per_sample(abar[t], x)
        return (x - a.sqrt().to(x.dtype) * denoise_x0(x, t)) / (1 - a).sqrt().to(x.dtype)

    return denoiser


def clip_x0(denoiser: Callable[[Tensor, int | Tensor], Tensor], abar: Tensor, limit: float = 1.0) -> Callable:
    """A denoiser whose x0_hat stays in [-limit, limit]: eps_hat is recomputed from the clipped estimate.

    abar (T+1,). Exact for data in that range if the denoiser is; keeps an error of eps_hat from being amplified by
    1/sqrt(abar_t). (In diffusers: clip_sample with use_clipped_model_output.) No gradient where the clip acts.
    """

    def denoise_x0(x: Tensor, t: int | Tensor) -> Tensor:
        return x0_from_eps(x, denoiser(x, t), abar[t]).clamp(-limit, limit)

    return eps_from_x0(denoise_x0, abar)


class LookAhead:
    """Algorithm 5: the denoiser of the law p_0 exp(r/lam), to first order, as a wrapper of the denoiser of p_0.

    eps_guided = eps_hat - sqrt(1 - abar_t) grad_{x_t} h(x0_hat(x_t)),  h = reward/lam, through the denoiser. Exact for
    Gaussian p_0 and linear reward, biased otherwise: `sample_particles` removes the bias. Use it in any sampler.

    denoiser    eps_hat = denoiser(x, t), x (B, ...), t an int
    reward      callable x_0 (B, ...) -> (B,), one value per sample, differentiable
    lam         entropy strength > 0
    abar        (T+1,) signal levels;  ts: the sampler's grid, whose last step (no noise) is left unguided
    guide_last  guides the last step too, for deterministic samplers
    temper      >= 0: at time t, h is abar_t^temper reward/lam. 0 is Algorithm 5; about 1 serves particles, whose first
                weights otherwise choose by what the reward makes of a blurred x0_hat. The last weight is h as it is
    micro_batch rows per gradient pass, None: all. Gradients are per sample, so it changes nothing but the memory
    checkpoint  recomputes denoiser and reward in the backward pass, so that their activations are never held together
    record      a list, to which each guided step appends (t, |grad h|^2 (B,)), for `path_kl` and `guidance_norm`
    Differentiable in x, abar and the weights if the caller has gradients enabled. Raises ValueError if lam <= 0, or if
    the reward is not (B,), not finite or gives no gradient.
    """

    def __init__(
        self,
        denoiser: Callable[[Tensor, int], Tensor],
        reward: Callable[[Tensor], Tensor],
        lam: Tensor | float,
        abar: Tensor,
        ts: list[int],
        *,
        guide_last: bool = False,
        temper: float = 0.0,
        micro_batch: int | None = None,
        checkpoint: bool = False,
        record: list[tuple[int, Tensor]] | None = None,
    ):
        if not 0 < float(lam) < float("inf"):
            raise ValueError(f"lam = {float(lam)} must be positive and finite")
        if not 0 <= temper < float("inf"):
            raise ValueError(f"temper = {temper} must be at least 0 and finite")
        self.denoiser, self.reward, self.lam, self.abar, self.record = denoiser, reward, lam, abar, record
        self.unguided, self.micro_batch, self.checkpoint = None if guide_last else ts[-1], micro_batch, checkpoint
        self.temper = temper

    def __call__(self, x: Tensor, t: int) -> Tensor:
        return self.denoiser(x, t) if t == self.unguided else self.look(x, t)[1]

    def potential(self, x0: Tensor) -> Tensor:
        """h(x0) = reward(x0)/lam, (B,)."""
        r = self.reward(x0)
        if r.shape != (len(x0),):
            raise ValueError(f"the reward has shape {tuple(r.shape)} for {len(x0)} samples; it must be one value each")
        if not torch.isfinite(r).all():
            raise ValueError(f"the reward is not finite for {(~torch.isfinite(r)).sum()} of {len(x0)} samples")
        return r / self.lam

    def look(self, x: Tensor, t: int, guided: bool = True) -> tuple[Tensor, Tensor, Tensor]:
        """eps_hat (B, ...), eps_guided (B, ...) and h(x0_hat) (B,) from one pass; not guided: no gradient is taken."""
        guided = guided and t != self.unguided
        parts = [self._look(chunk, t, guided) for chunk in x.split(self.micro_batch or len(x))]
        eps_hat, grad, h = (torch.cat(part) for part in zip(*parts, strict=True))
        if not guided:
            return eps_hat, eps_hat, h
        if self.record is not None:
            self.record.append((t, grad.detach().reshape(len(x), -1).double().square().sum(1)))
        return eps_hat, eps_hat - (1 - self.abar[t]).sqrt().to(x) * grad, h

    def _look(self, x: Tensor, t: int, guided: bool) -> tuple[Tensor, Tensor, Tensor]:
        keep = torch.is_grad_enabled()
        with torch.set_grad_enabled(keep or guided):
            if guided and not (keep and x.requires_grad):
                x = x.detach().requires_grad_()
            eps_hat = self._run(self.denoiser, x, t)
            h = self._run(self.potential, x0_from_eps(x, eps_hat, self.abar[t]))
            h = h * self.abar[t].to(h) ** self.temper if self.temper else h
            if not guided:
                return eps_hat, eps_hat, h
            if not h.requires_grad:
                raise ValueError("the reward gives no gradient in x_0; use sample_particles(..., guided=False)")
            (grad,) = torch.autograd.grad(h.sum(), x, create_graph=keep)  # a sum, so that each row is its own
        return (eps_hat, grad, h) if keep else (eps_hat.detach(), grad, h.detach())

    def _run(self, function: Callable, *inputs: Tensor | int) -> Tensor:
        return recompute(function, *inputs, use_reentrant=False) if self.checkpoint else function(*inputs)


def released_target_matching(
    denoiser: Callable[[Tensor, int], Tensor],
    reward: Callable[[Tensor], Tensor],
    x0: Tensor,
    target: float,
    strength: float,
    abar: Tensor,
    ts: list[int],
) -> LookAhead:
    """One round of the released code's guidance: towards a reward of `target`, with the reward linearised at x0.

    Adds to the score -strength grad_{x_t} (target - <G, x0_hat> - b)^2/2, where G = grad reward(x0) and
    b = reward(x0) - <G, x0>. It aims at a value of the reward, not at p_0 exp(r/lam) (gradient-guided diffusion,
    arXiv 2404.14743).

    x0        (1, ...) or (B, ...)  the last round's images; the next round takes those that this one makes
    strength  beta/lam > 0;  the other arguments as for `LookAhead`, whose last step is unguided
    """
    with torch.enable_grad():
        x0 = x0.detach().requires_grad_()
        r = reward(x0)
        (slope,) = torch.autograd.grad(r.sum(), x0)
    slope, offset = slope.reshape(len(x0), -1), r.detach() - (slope * x0.detach()).reshape(len(x0), -1).sum(1)

    def closeness(x: Tensor) -> Tensor:
        return -((target - (slope * x.reshape(len(x), -1)).sum(1) - offset) ** 2) / 2

    return LookAhead(denoiser, closeness, 1 / strength, abar, ts)


def path_kl(record: list[tuple[int, Tensor]], abar: Tensor, ts: list[int], eta: float = 1.0) -> Tensor:
    """sum_t |mu_guided(x_t) - mu_0(x_t)|^2/(2 sigma_t^2) along each guided path (Girsanov); (n,), float64.

    record  what `LookAhead` recorded in one run of `sample_ddim` with the same abar, ts and eta in (0, 1]
    The mean bounds the KL between the output laws of the guided and the plain *sampler*; it is equal to it for the
    exact h-transform in the limit of many steps. Raises ValueError if a step without noise was guided: the KL is
    then infinite.
    """
    after, kl = dict(zip(ts, [*ts[1:], 0], strict=True)), torch.zeros(())
    for t, square in record:
        _, c_eps, sigma = ddim_coefficients(abar, t, after[t], eta)
        if not sigma > 0:
            raise ValueError(f"the step at t = {t} adds no noise but was guided, so the path KL is infinite")
        kl = kl + (c_eps**2 * (1 - abar[t]) / (2 * sigma**2)).to(square.device) * square
    return kl


def guidance_norm(record: list[tuple[int, Tensor]]) -> Tensor:
    """|grad h| averaged over the steps of each path, (n,): what `estimators.lam_grad_released_est2` takes for a KL."""
    return torch.stack([square.sqrt() for _, square in record]).mean(0)


class CostMeter:
    """A denoiser that counts what it costs, in units of one image through one forward pass.

    forward 1, backward into the weights 2, backward into the input 1, one forward-mode (jvp) tangent 1; each per image.
    What a backward costs is counted when it runs. Read or reset `cost`; `calls` counts network calls. A denoiser may
    say by an attribute `passes` how many forwards it takes for each image (two with classifier-free guidance).
    """

    def __init__(self, denoiser: Callable[[Tensor, int | Tensor], Tensor]):
        self.denoiser, self.cost, self.calls = denoiser, 0, 0
        self.passes = getattr(denoiser, "passes", 1)

    def __call__(self, x: Tensor, t: int | Tensor) -> Tensor:
        eps_hat, images = self.denoiser(x, t), len(x) * self.passes
        self.calls += 1
        self.cost += images * (1 + _has_tangent(x, t))
        if eps_hat.requires_grad:
            weights = getattr(self.denoiser, "parameters", tuple)()
            backward = 2 * any(w.requires_grad for w in weights) + x.requires_grad

            def count(_: Tensor) -> None:
                self.cost += images * backward

            eps_hat.register_hook(count)
        return eps_hat


def _has_tangent(*inputs: Tensor | int) -> bool:
    tensors = [value for value in inputs if isinstance(value, Tensor)]
    return any(torch.autograd.forward_ad.unpack_dual(value).tangent is not None for value in tensors)
