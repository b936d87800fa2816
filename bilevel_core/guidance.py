"""Wrappers of a denoiser: a wrapped denoiser is again a denoiser, so samplers need no options."""

import warnings
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as recompute

from .samplers import check_grid, x0_source
from .schedules import ANGLE, Scale, check_abar, integer, per_sample, read


def x0_from_eps(x: Tensor, eps_hat: Tensor, abar_t: Tensor | float) -> Tensor:
    """x0_hat = (x_t - sqrt(1 - abar_t) eps_hat) / sqrt(abar_t); shapes (B, ...), abar_t () or (B,).

    Raises ValueError where abar_t is not in (0, 1], which is read on a CPU alone: a GPU would have to wait for it.
    """
    a = per_sample(abar_t, x)
    if a.device.type == "cpu" and not read(((a > 0) & (a <= 1)).all(), True):
        raise ValueError(f"abar_t = {a.reshape(-1).tolist()} must lie in (0, 1]: at 0, eps says nothing of x_0")
    return (x - (1 - a).sqrt().to(x.dtype) * eps_hat) / a.sqrt().to(x.dtype)


def eps_from_x0(denoise_x0: Callable[..., Tensor], abar: Tensor) -> Callable:
    """A denoiser (predicting eps) from a network that predicts x_0: eps = (x_t - sqrt(abar) x0_hat)/sqrt(1 - abar).

    denoise_x0  callable (x, t, ...) -> x0_hat, shapes (B, ...); more arguments, such as a prompt, are passed on
    abar        (T+1,), which may end at 0: the denoiser offers x0_hat too, as its `denoise_x0`
    """
    abar = check_abar(abar)

    def denoiser(x: Tensor, t: int | Tensor, *given: object) -> Tensor:
        signal, noise = _roots(abar, t, x)
        return (x - signal * denoise_x0(x, t, *given)) / noise

    denoiser.denoise_x0 = denoise_x0
    return denoiser


def eps_from_v(denoise_v: Callable[..., Tensor], abar: Tensor) -> Callable:
    """A denoiser (predicting eps) from a network that predicts v = sqrt(abar) eps - sqrt(1 - abar) x_0.

    eps = sqrt(abar) v + sqrt(1 - abar) x_t and x0_hat = sqrt(abar) x_t - sqrt(1 - abar) v (Salimans & Ho, arXiv
    2202.00512). Arguments and `denoise_x0` as for `eps_from_x0`; v stands for v_prediction in diffusers.
    """
    abar = check_abar(abar)

    def denoiser(x: Tensor, t: int | Tensor, *given: object) -> Tensor:
        signal, noise = _roots(abar, t, x)
        return signal * denoise_v(x, t, *given) + noise * x

    def denoise_x0(x: Tensor, t: int | Tensor, *given: object) -> Tensor:
        signal, noise = _roots(abar, t, x)
        return signal * x - noise * denoise_v(x, t, *given)

    denoiser.denoise_x0 = denoise_x0
    return denoiser


def _roots(abar: Tensor, t: int | Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """sqrt(abar_t) and sqrt(1 - abar_t), taken in float64, rounded to the dtype of x and shaped to multiply it."""
    a = per_sample(abar.to(x.device)[t], x)
    return a.clamp(min=1e-300).sqrt().to(x.dtype), (1 - a).sqrt().to(x.dtype)  # sqrt(0) has no derivative


def clip_x0(denoiser: Callable[[Tensor, int | Tensor], Tensor], abar: Tensor, limit: float = 1.0) -> Callable:
    """A denoiser whose x0_hat stays in [-limit, limit]: eps_hat is recomputed from the clipped estimate.

    abar (T+1,). Exact for data in that range if the denoiser is; keeps an error of eps_hat from being amplified by
    1/sqrt(abar_t). (In diffusers: clip_sample with use_clipped_model_output.) No gradient where the clip acts.
    """

    abar = check_abar(abar)
    dark = read((abar > 0).sum(), len(abar))  # from this t on abar_t = 0

    def denoise_x0(x: Tensor, t: int | Tensor) -> Tensor:
        if isinstance(t, int) and t >= dark:
            return x0_source(denoiser)(x, t).clamp(-limit, limit)
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
    record      a list, to which each guided step appends (t, |grad h|^2 (B,)), for `lab.comparisons.path_kl`
    Differentiable in x, abar and the weights if the caller has gradients enabled. A step from abar_t = 0 is unguided:
    there x_t knows nothing of x_0, and no network tells the limit. Raises ValueError if lam <= 0, for a bad table or
    grid, or if the reward is not (B,), not finite, or gives no gradient or one that is not finite; TypeError if it is
    no tensor. Warns at the last guided step if the gradient was zero at all of them.
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
        if micro_batch is not None:
            micro_batch = integer("micro_batch", micro_batch, 1)
        self.denoiser, self.reward, self.lam, self.record, self.temper = denoiser, reward, lam, record, temper
        self.abar, self.micro_batch, self.checkpoint = check_abar(abar), micro_batch, checkpoint
        ts = check_grid(ts, self.abar)
        self.unguided = None if guide_last else ts[-1]
        self.dark = ts[0] if read(self.abar[ts[0]], 1.0) == 0 else None
        guided = [t for t in ts if t not in (self.unguided, self.dark)]
        self.first, self.last, self.steers = *(guided[:1] or [None]), *(guided[-1:] or [None]), False

    def __call__(self, x: Tensor, t: int) -> Tensor:
        return self.denoiser(x, t) if t in (self.unguided, self.dark) else self.look(x, t)[1]

    def denoise_x0(self, x: Tensor, t: int) -> Tensor:
        """x0_hat of the guided denoiser, (B, ...); where abar_t = 0 that of the plain one."""
        return x0_source(self.denoiser)(x, t) if t == self.dark else x0_from_eps(x, self(x, t), self.abar[t])

    def potential(self, x0: Tensor) -> Tensor:
        """h(x0) = reward(x0)/lam, (B,)."""
        r = one_each(self.reward(x0), len(x0))
        h = r / self.lam
        if not read(torch.isfinite(h).all(), True):
            name = "reward/lam" if torch.isfinite(r).all() else "the reward"
            raise ValueError(f"{name} is not finite for {(~torch.isfinite(h)).sum()} of {len(x0)} samples")
        return h

    def look(self, x: Tensor, t: int, guided: bool = True) -> tuple[Tensor, Tensor, Tensor]:
        """eps_hat (B, ...), eps_guided (B, ...) and h(x0_hat) (B,) from one pass; not guided: no gradient is taken.

        Where abar_t = 0, x0_hat stands in both places, as `sample_particles` expects.
        """
        guided = guided and t not in (self.unguided, self.dark)
        parts = [self._look(chunk, t, guided) for chunk in x.split(self.micro_batch or len(x))]
        hat, grad, h = (torch.cat(part) for part in zip(*parts, strict=True))
        if not guided:
            return hat, hat, h
        square = grad.detach().reshape(len(x), -1).double().square().sum(1)
        self._watch(square, t)
        if self.record is not None:
            self.record.append((t, square))
        return hat, hat - (1 - self.abar[t]).sqrt().to(x) * grad, h

    def _watch(self, square: Tensor, t: int) -> None:
        """Refuses gradients that are not finite, and warns after a run in which none was anything but zero."""
        largest = read(square.max(), 1.0)
        if not largest < float("inf"):
            bad = (~torch.isfinite(square)).sum()
            raise ValueError(
                f"the gradient of the reward is not finite for {bad} of {len(square)} samples at t = {t}, though the "
                "reward is: mend its derivative (a root or logarithm at 0?), or use sample_particles(..., guided=False)"
            )
        self.steers = largest > 0 or (self.steers and t != self.first)
        if t == self.last and not self.steers:
            warnings.warn(
                "the gradient of the reward was zero for every sample at every step, so nothing was guided: is it "
                "rounded, constant or saturated? sample_particles(..., guided=False) needs no gradient",
                stacklevel=4,
            )

    def _look(self, x: Tensor, t: int, guided: bool) -> tuple[Tensor, Tensor, Tensor]:
        keep = torch.is_grad_enabled()
        with torch.set_grad_enabled(keep or guided):
            if guided and not (keep and x.requires_grad):
                x = x.detach().requires_grad_()
            hat = self._run(x0_source(self.denoiser) if t == self.dark else self.denoiser, x, t)
            h = self._run(self.potential, hat if t == self.dark else x0_from_eps(x, hat, self.abar[t]))
            h = h * self.abar[t].to(h) ** self.temper if self.temper else h
            if not guided:
                return hat, hat, h
            grad = gradient_of(h, x, keep)
        return (hat, grad, h) if keep else (hat.detach(), grad, h.detach())

    def _run(self, function: Callable, *inputs: Tensor | int) -> Tensor:
        return recompute(function, *inputs, use_reentrant=False) if self.checkpoint else function(*inputs)


def one_each(r: Tensor, n: int) -> Tensor:
    """What a reward gave for n samples, refused unless it is floating, (n,)."""
    wanted = f"it must be one value each, a floating tensor of shape ({n},)"
    if not isinstance(r, Tensor):
        raise TypeError(f"the reward is a {type(r).__name__} for {n} samples; {wanted}")
    if r.shape != (n,) or not r.is_floating_point():
        raise ValueError(f"the reward has shape {tuple(r.shape)} for {n} samples, in {r.dtype}; {wanted}")
    return r


def gradient_of(r: Tensor, x: Tensor, keep: bool = False) -> Tensor:
    """The gradient of each value of r (B,) in its own row of x (B, ...); keep: with a graph."""
    grad = torch.autograd.grad(r.sum(), x, create_graph=keep, allow_unused=True)[0] if r.requires_grad else None
    if grad is None:
        raise ValueError("the reward gives no gradient in x_0; use sample_particles(..., guided=False)")
    return grad


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
        return self._counted(self.denoiser, x, t)

    def denoise_x0(self, x: Tensor, t: int | Tensor) -> Tensor:
        """x0_hat of a denoiser that offers it, counted alike."""
        return self._counted(x0_source(self.denoiser), x, t)

    def _counted(self, network: Callable, x: Tensor, t: int | Tensor) -> Tensor:
        eps_hat, images = network(x, t), len(x) * self.passes
        self.calls += 1
        tangent = torch.autograd.forward_ad.unpack_dual(eps_hat).tangent
        self.cost += images * (1 + (tangent is not None))
        if eps_hat.requires_grad:
            weights = getattr(self.denoiser, "parameters", tuple)()
            trained = any(w.requires_grad for w in weights)
            backward = 2 * trained + (x.requires_grad or not trained)  # if not x, then the level that it is told

            def count(_: Tensor) -> None:
                self.cost += images * backward

            eps_hat.register_hook(count)
        return eps_hat


class LevelDenoiser(nn.Module):
    """A network that is told the noise level, as a denoiser (x, t) of any schedule: it is told the level of abar_t.

    Derivatives in abar, in forward and reverse mode, go through what it is told as well.

    network  callable (x, level, ...), level (1,) or (B,) in x's dtype; more arguments, such as a prompt, are passed on.
             It gives eps_hat, or what `eps_from_v` and `eps_from_x0` turn into it. If it says what it is `told`, that
             must be the scale
    abar     (T+1,), the schedule that it is trained on, which may be assigned anew; for others there is `on`
    scale    what it is told: `schedules.ANGLE` or LOG_NSR; or, of a network that is told t, the times of its own
             schedule (`lab.levels.time_scale`): told when it knew the level, it serves any other schedule
    seen     lowest and highest level of its training; None: those of abar, whatever it is. Beyond them networks
             extrapolate badly, and a warning says so (where t is an int, as samplers pass it)
    Raises ValueError for a bad table, or a network that is told something else.
    """

    def __init__(
        self, network: Callable, abar: Tensor, scale: Scale = ANGLE, seen: tuple[float, float] | None = None
    ) -> None:
        super().__init__()
        told = getattr(network, "told", scale.name)
        if told != scale.name:
            remedy = "; if that is t, pass scale = lab.levels.time_scale(abar) of the schedule that it was trained on"
            raise ValueError(f"the network is told the {told}, but the scale is the {scale.name}{remedy}")
        self.network, self.abar, self.scale, self.known = network, check_abar(abar), scale, seen
        self.passes, self.training = getattr(network, "passes", 1), getattr(network, "training", False)
        self.register_buffer(
            f"told_{scale.name}", torch.zeros(())
        )  # a saved run that was told something else is refused

    @property
    def seen(self) -> tuple[float, float]:
        """The lowest and the highest level of its training."""
        return self.known or tuple(self.scale.level(self.abar.detach()[[1, -1]]).tolist())

    def on(self, abar: Tensor) -> "LevelDenoiser":
        """The same network, which has seen what it has seen, as a denoiser of another schedule abar (T+1,)."""
        return LevelDenoiser(self.network, abar, self.scale, self.seen)

    def forward(self, x: Tensor, t: int | Tensor, *given: object) -> Tensor:
        level = self.scale.level(self.abar.to(x.device)[t] if isinstance(t, Tensor) else self.abar[t])
        if self.known and not isinstance(t, Tensor):
            (low, high), value = self.known, read(level, self.known[0])
            if not low - 1e-6 * abs(low) <= value <= high + 1e-6 * abs(high):
                said = (
                    f"the {self.scale.name} is {value:.5g} at t = {t}, but the network has seen {low:.5g} to {high:.5g}"
                )
                remedy = ": train it on more levels, or keep the grid within these (ends = denoiser.seen)"
                warnings.warn(said + remedy, stacklevel=4)
        level = level.reshape(-1)  # torch's forward mode makes float64 of a scaled float32 ()
        return self.network(x, level.to(x.device, x.dtype if level.is_floating_point() else level.dtype), *given)
