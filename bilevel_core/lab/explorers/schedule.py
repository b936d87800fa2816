"""The explorer of chapter 1: a noise schedule, its signal levels, and a digit under noise."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ... import schedules
from .controls import Choice, Image, Line, Panel, Slider
from .engine import Explorer, read_asset

EXPLORER_T = 200  # steps of the schedules drawn by the explorer
_FRAMES = tuple(i / 8 for i in range(9))  # the times u at which a noised digit is shown
# Ranges of the sliders, inside schedules.BOUNDS: where the curves are worth looking at.
_SLIDERS = {
    "cosine": {
        "start": (0.0, 0.9, 0.01),
        "end": (0.1, 1.0, 0.01),
        "tau": (0.5, 4.0, 0.05),
        "epsilon": (0.0, 0.5, 0.004),
    },
    "sigmoid": {
        "start": (-1.0, 3.0, 0.05),
        "end": (-0.5, 6.0, 0.05),
        "tau": (0.2, 3.0, 0.05),
        "epsilon": (-2.0, 2.0, 0.05),
    },
    "linear": {
        "start": (0.0, 0.9, 0.01),
        "end": (0.1, 2.0, 0.01),
        "tau": (0.2, 4.0, 0.05),
        "epsilon": (0.0, 1.0, 0.01),
    },
}
_TERMINAL_WARNING = (
    f"ᾱ_{{T}} = ABAR is above {schedules.TERMINAL_ABAR:g}: x_{{T}} still holds √ᾱ_{{T}} = ROOT of the signal, so "
    "N(0, I) is the wrong start for sampling. Raise end, take the normalised form, rescale (rescale_terminal), or "
    "start from the right law (draw_x_T)."
)
_TERMINAL_FINE = "Admissible, and ᾱ_{T} is about 0: sampling may start from N(0, I)."


def schedule_explorer(digit: Tensor | Sequence[Sequence[float]], noise_seed: int = 0) -> Explorer:
    """What each of the four schedule parameters does: abar, log-SNR and one noised digit, for T = 200.

    digit       (H, W), values in [-1, 1]
    noise_seed  seed of the one noise field that every frame shares
    Values outside the admissible set are projected, and the figure says so. Raises ValueError for another shape.
    """
    x0 = torch.as_tensor(digit, dtype=torch.float64).detach().cpu()
    if x0.dim() != 2:
        raise ValueError(f"digit has shape {tuple(x0.shape)}; it must be one picture, (H, W)")
    if not (x0.abs() <= 1).all():
        raise ValueError(f"digit has values from {x0.min():g} to {x0.max():g}; they must lie in [-1, 1]")
    generator = torch.Generator().manual_seed(noise_seed)
    eps = torch.randn(x0.shape, generator=generator, dtype=torch.float64).mul(1e4).round().div(1e4)  # short in JSON
    x0 = x0.mul(1e4).round().div(1e4)
    T = EXPLORER_T
    frames = [round(u * T) for u in _FRAMES]

    def compute(kind: str, form: str, start: float, end: float, tau: float, epsilon: float) -> dict[str, Any]:
        q, message = torch.tensor([start, end, tau, epsilon], dtype=torch.float64), ""
        try:
            schedules.check(q, T, kind, form)
        except ValueError as reason:
            message = f"Not admissible: {reason}."
            try:
                q = schedules.project(q, T, kind, form)
            except ValueError:
                return {"readout": [], "message": message, "warn": True}
            message += f" Drawn instead is its projection, start = {q[0]:.4g}, end = {q[1]:.4g}."
        beta = schedules.betas(q, T, kind, form)
        abar = schedules.abar_from_betas(beta)
        default = torch.tensor(schedules.DEFAULT_Q[kind], dtype=torch.float64)
        usual = schedules.abar(default, T, kind, form)
        last = float(abar[-1])
        if not message and last > schedules.TERMINAL_ABAR:
            message = _TERMINAL_WARNING.replace("ABAR", f"{last:.3g}").replace("ROOT", f"{last**0.5:.3g}")
        warn = bool(message)
        u, snr = torch.arange(T + 1, dtype=torch.float64) / T, schedules.log_snr(abar)
        return {
            "abar": [
                Line("default q", u, usual, "base"),
                Line("this q", u, abar, "star"),
                Line("digits below", u[frames], abar[frames], "star", "points"),
            ],
            "snr": [
                Line("default q", u[1:], schedules.log_snr(usual)[1:], "base"),
                Line("this q", u[1:], snr[1:], "star"),
                Line("digits below", u[frames[1:]], snr[frames[1:]], "star", "points"),
            ],
            "digits": [Image(f"u = {u[t]:g}", schedules.noise(x0, eps, abar[t])) for t in frames],
            "readout": [
                ("ᾱ_{T}", last, ".3g"),
                ("√ᾱ_{T}", last**0.5, ".3g"),
                ("largest β_{t}", float(beta.max()), ".3g"),
            ],
            "message": message or _TERMINAL_FINE,
            "warn": warn,
        }

    ranges = {
        kind: {
            name: {"min": low, "max": high, "step": step, "value": value}
            for (name, (low, high, step)), value in zip(sliders.items(), schedules.DEFAULT_Q[kind], strict=True)
        }
        for kind, sliders in _SLIDERS.items()
    }
    kinds = {"cosine": "cosine", "sigmoid": "sigmoid", "linear": "linear (DDPM)"}
    forms = {"released": "as released", "normalised": "normalised: exact ends"}
    texts = {
        "start": ("start", "", ".2f"),
        "end": ("end", "", ".2f"),
        "tau": ("τ", "shape", ".2f"),
        "epsilon": ("ε", "offset", ".3f"),
    }
    return Explorer(
        "schedule",
        [
            Choice("kind", "schedule", kinds, "cosine", ranges),
            Choice("form", "form", forms, "released"),
            *(
                Slider(name, label, **ranges["cosine"][name], format=spec, hint=hint)
                for name, (label, hint, spec) in texts.items()
            ),
        ],
        [
            Panel("abar", "Signal kept", "time u = t/T", "ᾱ(u)", xlim=(0, 1), ylim=(0, 1)),
            Panel("snr", "Log signal-to-noise ratio", "time u = t/T", "log ᾱ/(1−ᾱ)", xlim=(0, 1), ylim=(-24, 12)),
            Panel(
                "digits",
                "The digit at nine times",
                "x_{t} = √ᾱ_{t} x_{0} + √(1−ᾱ_{t}) ε, with the same ε in every picture",
                kind="images",
                wide=True,
            ),
        ],
        compute,
        read_asset("schedule.js"),
        {
            "T": T,
            "frames": _FRAMES,
            "gap": schedules.GAP,
            "minAbar": schedules.MIN_ABAR,
            "maxBeta": schedules.MAX_BETA,
            "terminal": schedules.TERMINAL_ABAR,
            "bounds": schedules.BOUNDS,
            "defaults": schedules.DEFAULT_Q,
            "warning": _TERMINAL_WARNING,
            "fine": _TERMINAL_FINE,
            "digit": x0.tolist(),
            "noise": eps.tolist(),
        },
        title="What the four schedule parameters do",
        caption=(
            f"T = {T} steps. Dotted: the same kind of schedule at its default parameters. "
            "Choosing a kind sets its defaults."
        ),
        alt=(
            "Explorer of noise schedules: sliders for start, end, tau and epsilon change two curves and nine "
            "noised digits."
        ),
    )
