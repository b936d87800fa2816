"""Denoisers (diffusers' UNet2DModel behind a thin wrapper) and the classifiers whose features measure samples."""

from __future__ import annotations

import hashlib
import importlib.resources
import json
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from ... import schedules
from ...samplers import x0_source
from ...schedules import check_abar
from . import captions, pixels

# ---------------------------------------------------------------- denoisers

# Side of the image, channels per level, and how many pixels are folded into channels first.
SIZES: dict[str, dict[str, Any]] = {
    "tiny": {"side": 8, "channels": (16, 16), "fold": 1},
    "small": {"side": 8, "channels": (32, 32), "fold": 1},
    "mnist28": {"side": 28, "channels": (16, 32, 32), "fold": 1},
    "mnist28_folded": {"side": 28, "channels": (32, 64), "fold": 2},
}

# Scales of levels by their names, and by what the embedding stretches them: the whole range to about 150.
LEVELS = {schedules.ANGLE.name: 100.0, schedules.LOG_NSR.name: 15.0}

# Channels per level, how many pixels are folded into channels first, and the width of a word.
TEXT_SIZES: dict[str, dict[str, Any]] = {
    "tiny_text": {"channels": (16, 16), "fold": 4, "width": 16},
    "mnist28_text": {"channels": (32, 64), "fold": 2, "width": 64},
}


def _unet(side: int, channels: tuple[int, ...], fold: int) -> dict[str, Any]:
    """What both U-Nets of diffusers are told, for grey images of `side` pixels folded by `fold`."""
    return {
        "sample_size": side // fold,
        "in_channels": fold**2,
        "out_channels": fold**2,
        "block_out_channels": channels,
        "down_block_types": ("DownBlock2D",) * len(channels),
        "up_block_types": ("UpBlock2D",) * len(channels),
        "layers_per_block": 1,
        "norm_num_groups": 8,
    }


class Denoiser(nn.Module):
    """A denoiser `eps_hat = denoiser(x, t)` around diffusers' `UNet2DModel`, or a network for `LevelDenoiser`.

    size        one of SIZES
    prediction  what the network's output means: "eps" (noise) or "x0" (clean image, turned into eps with `abar`)
    abar        (T+1,), needed for prediction="x0"
    told        what its second argument is: "t", or the name of a scale of LEVELS, then a tensor () or (B,)
    stretch     of a level before the embedding, whose fastest wave turns by one radian a unit: a large one lets the
                network follow its level closely, a small one keeps it smooth between the levels that it has seen.
                None: that of LEVELS
    jitter      standard deviation, in units of the level, of the noise added to what it is told in training
    seed        of the initial weights; torch's global generator is left as it was
    x is (B, 1, side, side); t an int or (B,), values 1..T: the U-Net gets t - 1, as diffusers counts.
    No attention: forward-mode derivatives (`torch.func.jvp`) go through.
    """

    def __init__(
        self,
        size: str = "small",
        *,
        prediction: str = "eps",
        abar: Tensor | None = None,
        told: str = "t",
        stretch: float | None = None,
        jitter: float = 0.0,
        seed: int = 0,
    ) -> None:
        super().__init__()
        from diffusers import UNet2DModel

        if size not in SIZES:
            raise ValueError(f"size {size!r} is not one of {', '.join(SIZES)}")
        if prediction not in ("eps", "x0"):
            raise ValueError(f"prediction {prediction!r} is not 'eps' or 'x0'")
        if prediction == "x0" and abar is None:
            raise ValueError("prediction = 'x0' needs abar, the schedule that turns the estimate into noise")
        if told not in ("t", *LEVELS):
            raise ValueError(f"told {told!r} is not one of t, {', '.join(LEVELS)}")
        if told != "t" and prediction != "eps":
            raise ValueError(f"a network told the {told} predicts eps; for x_0 wrap it by guidance.eps_from_x0")
        if not jitter >= 0 or (stretch is not None and not 0 < stretch < float("inf")):
            raise ValueError(f"jitter = {jitter} must be at least 0, and stretch = {stretch} positive and finite")
        if told == "t" and (jitter or stretch is not None):
            raise ValueError("jitter and stretch are of levels: the network is told t")
        self.told, self.stretch, self.jitter = told, stretch or LEVELS.get(told), jitter
        shape = SIZES[size]
        self.size, self.prediction = size, prediction
        self.side, self.fold = shape["side"], shape["fold"]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.unet = UNet2DModel(**_unet(**shape), add_attention=False)
        # Not a parameter: the schedule may itself be learned, and set anew (`denoiser.abar = ...`) at every step.
        self.abar = abar if abar is None else check_abar(abar)

    def forward(self, x: Tensor, t: int | Tensor) -> Tensor:
        if x.shape[1:] != (1, self.side, self.side):
            raise ValueError(f"x has shape {tuple(x.shape)}, but {self.size} takes (B, 1, {self.side}, {self.side})")
        if self.told == "t":
            time = t - 1
        else:
            level = t.reshape(-1)  # torch's forward mode makes float64 of a scaled float32 ()
            time = self.stretch * (
                level + self.jitter * torch.randn_like(level) if self.jitter and self.training else level
            )
        folded = functional.pixel_unshuffle(x, self.fold)
        output = functional.pixel_shuffle(self.unet(folded, time).sample, self.fold)
        if self.prediction == "eps":
            return output
        abar_t = torch.as_tensor(self.abar, device=x.device)[t].reshape(-1, 1, 1, 1)
        return (x - abar_t.sqrt().to(x.dtype) * output) / (1 - abar_t).sqrt().to(x.dtype)


class TextDenoiser(nn.Module):
    """A denoiser `eps_hat = denoiser(x, t, text)` for MNIST, around diffusers' `UNet2DConditionModel`.

    size  one of TEXT_SIZES
    seed  of the initial weights; torch's global generator is left as it was
    x (B, 1, 28, 28); t an int or (B,) int64, values 1..T; text (B, CONTEXT) or (CONTEXT,) ids of `captions.encode`. The
    words are embedded here: one by one for the cross-attention, and averaged for the time embedding.
    """

    def __init__(self, size: str = "mnist28_text", *, seed: int = 0) -> None:
        super().__init__()
        from diffusers import UNet2DConditionModel

        if size not in TEXT_SIZES:
            raise ValueError(f"size {size!r} is not one of {', '.join(TEXT_SIZES)}")
        shape = TEXT_SIZES[size]
        self.size, self.side, self.fold = size, 28, shape["fold"]
        width = shape["width"]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.words = nn.Embedding(len(captions.WORDS), width)
            self.places = nn.Parameter(0.1 * torch.randn(captions.CONTEXT, width))
            self.unet = UNet2DConditionModel(
                **_unet(self.side, shape["channels"], self.fold),
                cross_attention_dim=width,
                attention_head_dim=8,
                class_embed_type="simple_projection",
                projection_class_embeddings_input_dim=width,
            )

    def forward(self, x: Tensor, t: int | Tensor, text: Tensor) -> Tensor:
        if x.shape[1:] != (1, self.side, self.side):
            raise ValueError(f"x has shape {tuple(x.shape)}, but {self.size} takes (B, 1, {self.side}, {self.side})")
        words = self.words(text.expand(x.shape[0], -1))  # not len(x), which a recording would fix
        output = self.unet(
            functional.pixel_unshuffle(x, self.fold),
            t - 1,
            encoder_hidden_states=words + self.places,
            class_labels=words.mean(1),
        ).sample
        return functional.pixel_shuffle(output, self.fold)


class Prompted(nn.Module):
    """A text denoiser with its prompt, as a denoiser `eps_hat = denoiser(x, t)`, by classifier-free guidance.

    eps_hat = eps(x, t, "") + scale (eps(x, t, prompt) - eps(x, t, "")), both in one call on the doubled batch (Ho and
    Salimans, arXiv 2207.12598). scale 1 is the conditional model alone, 0 the unconditional one, each in a single pass.

    denoiser  a `TextDenoiser`, or `fast` of one; with `empty`, any denoiser(x, t, text)
    prompt    a caption for all rows, or token ids (CONTEXT,) or (B, CONTEXT); with `empty`, text (1, ...) or (B, ...)
    empty     (1, ...): what stands for no prompt, where the denoiser reads something else than these captions
    `passes` is what a call costs in forwards per image. Raises ValueError for an unknown word or a scale that is not
    finite or negative.
    """

    def __init__(
        self, denoiser: Callable[..., Tensor], prompt: str | Tensor, scale: float = 1.5, empty: Tensor | None = None
    ) -> None:
        super().__init__()
        if not 0 <= scale < float("inf"):
            raise ValueError(f"scale = {scale} must be finite and at least 0")
        self.denoiser, self.scale, self.passes = denoiser, scale, 1 if scale in (0, 1) else 2
        text = captions.encode([prompt]) if isinstance(prompt, str) else prompt
        self.text = text.reshape(-1, captions.CONTEXT) if empty is None else text
        self.empty = captions.encode([""]) if empty is None else empty
        self.train(getattr(denoiser, "training", False))

    def forward(self, x: Tensor, t: int | Tensor) -> Tensor:
        return self._guided(self.denoiser, x, t)

    def denoise_x0(self, x: Tensor, t: int | Tensor) -> Tensor:
        """x0_hat in the same combination, of a denoiser that offers it: see `samplers.x0_source`."""
        return self._guided(x0_source(self.denoiser), x, t)

    def _guided(self, network: Callable[..., Tensor], x: Tensor, t: int | Tensor) -> Tensor:
        text, empty = self.text.to(x.device), self.empty.to(x.device)
        if self.passes == 1:
            return network(x, t, text if self.scale else empty)
        text, empty = (each.expand(x.shape[0], *each.shape[1:]) for each in (text, empty))
        text = torch.cat([text, empty])
        both = t.reshape(-1).expand(x.shape[0]).repeat(2) if isinstance(t, Tensor) else t
        with_text, without = network(torch.cat([x, x]), both, text).chunk(2)
        return without + self.scale * (with_text - without)


# ---------------------------------------------------------------- classifiers


class _Classifier(nn.Module):
    """Convolutions, a linear map to `num_features` features, SiLU, a linear map to 10 logits.

    Smooth throughout, and the features are taken before the SiLU: a Gaussian fits them better than rectified ones,
    their covariance has full rank, and gradients with respect to the image exist everywhere. They are shifted and
    scaled by constants (see `standardise`) that the head undoes, so that distances have a readable unit.
    """

    side: int
    num_features: int

    def __init__(self, body: nn.Sequential, body_features: int) -> None:
        super().__init__()
        self.body = body
        self.to_features = nn.Linear(body_features, self.num_features)
        self.to_logits = nn.Linear(self.num_features, 10)
        self.register_buffer("centre", torch.zeros(self.num_features))
        self.register_buffer("scale", torch.ones(()))

    def features(self, images: Tensor) -> Tensor:
        """(n, num_features) of images (n, 1, side, side) in [-1, 1]."""
        if images.shape[1:] != (1, self.side, self.side):
            raise ValueError(
                f"images have shape {tuple(images.shape)}, but this classifier takes (n, 1, {self.side}, {self.side})"
            )
        images = pixels.checked(images, 1).to(self.scale)
        return (self.to_features(self.body(images).flatten(1)) - self.centre) / self.scale

    def head(self, features: Tensor) -> Tensor:
        """(n, 10) logits of features (n, num_features)."""
        return self.to_logits(functional.silu(features * self.scale + self.centre))

    def forward(self, images: Tensor) -> Tensor:
        """(n, 10) logits of images (n, 1, side, side) in [-1, 1]."""
        return self.head(self.features(images))


def _block(inputs: int, outputs: int, stride: int = 1, kernel: int = 3) -> nn.Sequential:
    convolution = nn.Conv2d(inputs, outputs, kernel, stride=stride, padding=kernel // 2, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(outputs), nn.SiLU())


class Classifier28(_Classifier):
    """For 28x28 images; 64 features."""

    side, num_features = 28, 64

    def __init__(self) -> None:
        blocks = _block(1, 16, stride=2, kernel=5), _block(16, 32, stride=2), _block(32, 64), _block(64, 64, stride=2)
        super().__init__(nn.Sequential(*blocks), 64 * 4 * 4)


class Classifier8(_Classifier):
    """For MNIST padded to 32x32 and averaged to 8x8; 32 features."""

    side, num_features = 8, 32

    def __init__(self) -> None:
        blocks = _block(1, 32), _block(32, 64, stride=2), _block(64, 64)
        super().__init__(nn.Sequential(*blocks), 64 * 4 * 4)


CLASSIFIERS: dict[str, type[_Classifier]] = {"mnist28": Classifier28, "mnist8": Classifier8}


def load_classifier(name: str) -> _Classifier:
    """The shipped classifier "mnist28" or "mnist8", frozen, in eval mode, on the CPU in float32.

    Raises ValueError where its weights are not those whose SHA-256 the card records.
    """
    from safetensors.torch import load

    classifier = CLASSIFIERS[_known(name)]()
    classifier.load_state_dict(load(shipped(f"classifier_{name}", f"classifier_{name}.safetensors")))
    return classifier.eval().requires_grad_(False)


def classifier_card(name: str) -> dict[str, Any]:
    """How a shipped classifier was made: configuration, log of the losses, accuracies, hashes, provenance."""
    return card(f"classifier_{_known(name)}")


def reference_features(name: str, split: str, dtype: torch.dtype = torch.float64) -> Tensor:
    """Features (n, num_features) that a shipped classifier gives to MNIST's "train", "val" or "test" split.

    Stored in half precision, returned as `dtype`; in the order of `data.load`. Raises ValueError for a damaged file.
    """
    return _reference(name, split)["features"].to(dtype)


def reference_labels(name: str, split: str) -> Tensor:
    """The labels (n,) int64 that go with `reference_features`."""
    return _reference(name, split)["labels"].long()


def _reference(name: str, split: str) -> dict[str, Tensor]:
    from safetensors.torch import load

    if split not in ("train", "val", "test"):
        raise ValueError(f"split {split!r} is not one of train, val, test")
    return load(shipped(f"classifier_{_known(name)}", f"features_{name}_{split}.safetensors"))


def _known(name: str) -> str:
    if name not in CLASSIFIERS:
        raise ValueError(f"classifier {name!r} is not one of {', '.join(CLASSIFIERS)}")
    return name


# ---------------------------------------------------------------- shipped files


def card(name: str) -> dict[str, Any]:
    """What is recorded about a shipped model: configuration, log, measurements, SHA-256 of its files, provenance."""
    path = _weights() / f"{name}.json"
    if not path.is_file():
        raise FileNotFoundError(
            f"no card {name}.json among the shipped weights: install the package again, or train it"
        )
    return json.loads(path.read_text(encoding="utf-8"))


def shipped(name: str, file: str) -> bytes:
    """The bytes of a shipped file. Raises ValueError where its SHA-256 is not the one in the card `name`."""
    expected, path = card(name)["sha256"][file], _weights() / file
    if not path.is_file():
        raise FileNotFoundError(f"shipped file {file} is missing: install the package again")
    data = path.read_bytes()
    if hashlib.sha256(data).hexdigest() != expected:
        raise ValueError(f"shipped file {file} was altered (its SHA-256 is not {expected}): install the package again")
    return data


def load_text_denoiser() -> TextDenoiser:
    """The shipped text-conditional denoiser of MNIST, frozen, in eval mode, on the CPU in float32.

    Its schedule and its measured quality are in `card("text_denoiser")`. Raises as `shipped` does.
    """
    from safetensors.torch import load

    denoiser = TextDenoiser(card("text_denoiser")["recipe"]["size"])
    denoiser.load_state_dict(load(shipped("text_denoiser", "text_denoiser.safetensors")))
    return denoiser.eval().requires_grad_(False)


def _weights():
    return importlib.resources.files(__package__) / "weights"
