"""Rewards of images (B, C, H, W) in [-1, 1], C = 1 or 3: callables to (B,), differentiable in the images.

For digits `ink`, `boldness` and `RandomResNet`; for photographs the scores of `open_clip_model` and `hps_model`,
`aesthetic`, and the released ResNet, `RandomResNet(backbone="imagenet")`. Those look at images as the models' own
preprocessing would, see `Preprocess`.
"""

from __future__ import annotations

import itertools
import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

from . import captions, clip

Reward = Callable[[Tensor], Tensor]
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


# ---------------------------------------------------------------- digits


def ink(images: Tensor) -> Tensor:
    """Mean ink, (B,), from 0 for an empty image to 1 for a full one."""
    return (_checked(images) + 1).mean((1, 2, 3)) / 2


def boldness(images: Tensor) -> Tensor:
    """Stroke width in pixels, (B,): `captions.thickness`."""
    return captions.thickness(_checked(images))


class RandomResNet(nn.Module):
    """A ResNet-18 with a random scalar head, the lower-level reward of the released code's fine-tuning.

    By default every weight is random and images are resized to `size` x `size` pixels by bilinear interpolation. Such a
    reward is smooth and reproducible but says nothing about beauty: it stands in for an aesthetic model, and `ink` and
    `boldness` are the ones to interpret. With a backbone only the head is random, and images are prepared as in the
    released code: side 224, CLIP's mean and deviation. Eval mode, frozen; a grey channel enters three times. The scale
    is arbitrary, so use it `standardised`.

    seed      of the random weights; torch's global generator is left as it was
    size      side of the resized images, at least 28; default 64, with a backbone 224
    backbone  "imagenet" for torchvision's weights (45 MB, downloaded once), or a file of theirs; None: random
    """

    def __init__(self, seed: int = 0, size: int | None = None, backbone: str | Path | None = None) -> None:
        super().__init__()
        self.size = size or (64 if backbone is None else 224)
        if self.size < 28:
            raise ValueError(f"size = {size} is smaller than the images: take at least 28")
        from torchvision.models import resnet18

        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            self.network = resnet18(weights=None, num_classes=1)
        self.prepare = None
        if backbone is not None:
            self.prepare = Preprocess(self.size, CLIP_MEAN, CLIP_STD, "bilinear")
            found = _imagenet() if backbone == "imagenet" else _state(Path(backbone))
            found |= {name: value for name, value in self.network.state_dict().items() if name.startswith("fc.")}
            _fill(self.network, found, f"the backbone {backbone}")
        self.network.requires_grad_(False)
        self.eval()

    def forward(self, images: Tensor) -> Tensor:
        """(B,) of images (B, C, H, W)."""
        if self.prepare is not None:
            return self.network(self.prepare(images))[:, 0]
        x = functional.interpolate(_checked(images, 1, 3), (self.size, self.size), mode="bilinear", align_corners=False)
        return self.network(x.expand(-1, 3, -1, -1))[:, 0]


@dataclass(frozen=True)
class Standardised:
    """(reward - mean) / sd: a reward of mean 0 and standard deviation 1 under p_0; see `standardised`."""

    reward: Reward
    mean: float
    sd: float

    def __call__(self, images: Tensor) -> Tensor:
        return (self.reward(images) - self.mean) / self.sd


@torch.no_grad()
def standardised(reward: Reward, samples: Tensor, *, batch: int = 500) -> Standardised:
    """`reward` in units of its standard deviation under p_0, so that one lambda means the same for every reward.

    samples  (n, 1, 28, 28) of p_0, n >= 100
    Raises ValueError for too few samples, and for a reward that is constant or not finite on them.
    """
    if len(samples) < 100:
        raise ValueError(f"n = {len(samples)} samples are too few for a standard deviation: take at least 100")
    return Standardised(reward, *scale(torch.cat([reward(part) for part in samples.split(batch)])))


def scale(values: Tensor) -> tuple[float, float]:
    """Mean and standard deviation of a reward's values (n,); raises ValueError where it is constant or not finite."""
    values = values.double()
    if not values.isfinite().all():
        raise ValueError(f"the reward is not finite for {(~values.isfinite()).sum()} of {len(values)} samples")
    mean, sd = values.mean().item(), values.std().item()
    if sd <= 1e-6 * max(abs(mean), 1e-6):
        raise ValueError(f"the reward is {mean:g} for every sample, so it has no scale; check it")
    return mean, sd


def check(reward: Reward, images: Tensor) -> None:
    """Raises ValueError, saying what is wrong, unless a reward of images (B, C, H, W), B >= 2, can steer.

    It must give one finite value for each image, from that image alone, with a gradient in its pixels.
    """
    with torch.enable_grad():
        x = images.detach().requires_grad_()
        values = reward(x)
        if values.shape != (len(x),):
            raise ValueError(
                f"the reward has shape {tuple(values.shape)} for {len(x)} images; it must be one value each"
            )
        if not values.isfinite().all():
            raise ValueError(f"the reward is not finite for {(~values.isfinite()).sum()} of {len(x)} images")
        grad = torch.autograd.grad(values[0], x, allow_unused=True)[0] if values.requires_grad else None
    if grad is None or not grad[0].isfinite().all() or not grad[0].any():
        raise ValueError("the reward has no gradient in the pixels here, so it cannot guide: draw particles unguided")
    if grad[1:].any():
        raise ValueError(
            "the reward of an image depends on the other images of its batch: put its network in eval mode"
        )


def _checked(images: Tensor, *channels: int) -> Tensor:
    channels = channels or (1,)
    if images.ndim != 4 or images.shape[1] not in channels:
        wanted = " or ".join(map(str, channels))
        raise ValueError(f"images have shape {tuple(images.shape)}, not (B, {wanted}, H, W)")
    return images


# ---------------------------------------------------------------- photographs


@dataclass(frozen=True)
class Preprocess:
    """What a vision model's own preprocessing does to an image file, for images in [-1, 1] and differentiable.

    size         side of the result, (B, 3, size, size)
    mean, std    by channel, of pixels in [0, 1]
    interpolation, mode  "bicubic" or "bilinear", with antialiasing as in PIL; "shortest" (resize the shorter side, cut
                 the middle) or "squash". PIL rounds to 8 bits, this does not: they differ by that rounding
    Raises ValueError for images outside [-1, 1] or not floating.
    """

    size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str = "bicubic"
    mode: str = "shortest"

    def __call__(self, images: Tensor) -> Tensor:
        return self.resized(pixels(images))

    def resized(self, x: Tensor) -> Tensor:
        """Of x (B, 3, H, W) in [0, 1]."""
        height, width = x.shape[2:]
        short = min(height, width)
        to = (self.size, self.size)
        if self.mode == "shortest":
            to = (int(self.size * height / short), int(self.size * width / short))
        if to != (height, width):
            x = functional.interpolate(x, to, mode=self.interpolation, antialias=True).clamp(0, 1)
        top, left = (round((side - self.size) / 2) for side in to)
        x = x[:, :, top : top + self.size, left : left + self.size]
        mean, std = (x.new_tensor(values)[:, None, None] for values in (self.mean, self.std))
        return (x - mean) / std


def pixels(images: Tensor) -> Tensor:
    """Images (B, 1 or 3, H, W) in [-1, 1] as (B, 3, H, W) in [0, 1]; refuses what lies outside, warns of [0, 1]."""
    _checked(images, 1, 3)
    if not images.is_floating_point():
        raise ValueError(
            f"images are {images.dtype}: make them float in [-1, 1], by images / 127.5 - 1 if they are bytes"
        )
    low, high = images.min().item(), images.max().item()
    if not (low >= -1.001 and high <= 1.001):
        raise ValueError(
            f"images lie in [{low:.3g}, {high:.3g}], not in [-1, 1]: clamp them, or rescale if they are bytes"
        )
    if low >= 0 and high > 0:
        warnings.warn("no pixel is below 0: if these images are in [0, 1], pass 2 * images - 1", stacklevel=3)
    return ((images + 1) / 2).expand(-1, 3, -1, -1)


@dataclass(frozen=True)
class OpenClip:
    """An open_clip model with its tokenizer and its preprocessing; see `open_clip_model`."""

    model: nn.Module
    tokenise: Callable[[list[str]], Tensor]
    prepare: Preprocess

    def embed(self, images: Tensor) -> Tensor:
        """Unit vectors (B, D) of images (B, C, H, W) in [-1, 1]."""
        return clip.encode_images(self.model, images, self.prepare)

    def score(self, prompt: str) -> Reward:
        """`clip.score` of a prompt: max(100 cos, 0)."""
        return clip.score(self.model, prompt, tokenise=self.tokenise, prepare=self.prepare)


def open_clip_model(
    name: str = "ViT-B-16-quickgelu", pretrained: str | Path = "openai", device: torch.device | str = "cpu"
) -> OpenClip:
    """A model of open_clip, frozen, in float32: the released upper reward is ViT-B/16 with OpenAI's weights.

    name        one of open_clip's, or "local-dir:FOLDER" with open_clip_config.json and its weights
    pretrained  a tag that open_clip downloads, or a file: .safetensors, or .pt with a "state_dict" or weights alone
    Raises OSError with the remedy where the weights are missing, cannot be fetched or belong to another model.
    """
    import open_clip

    local = name.startswith("local-dir:") or bool(Path(pretrained).suffix)
    source = None if name.startswith("local-dir:") else str(pretrained)
    try:
        model = open_clip.create_model(name, pretrained=source, precision="fp32", require_pretrained=True)
        tokenise = open_clip.get_tokenizer(name)
    except Exception as error:  # open_clip, the hub and torch each have their own
        remedy = (
            "check that the file is there, whole and of this model"
            if local
            else "where there is no network, download its file elsewhere and give its path instead"
        )
        reason = " ".join(str(error).split())[:300]
        raise OSError(f"the weights {pretrained} of {name} cannot be loaded ({reason}): {remedy}") from error
    config = model.visual.preprocess_cfg
    size = config["size"] if isinstance(config["size"], int) else config["size"][0]
    if config["resize_mode"] not in ("shortest", "squash"):
        raise ValueError(f"{name} resizes by {config['resize_mode']!r}, which is not written here")
    prepare = Preprocess(
        size, tuple(config["mean"]), tuple(config["std"]), config["interpolation"], config["resize_mode"]
    )
    return OpenClip(model.to(device).eval().requires_grad_(False), tokenise, prepare)


def hps_model(
    file: str | Path | None = None, *, name: str = "ViT-H-14", device: torch.device | str = "cpu"
) -> OpenClip:
    """Human Preference Score v2 (Wu et al., arXiv 2306.09341), a CLIP tuned to human choices: its `score` of a prompt.

    file  `HPS_v2.1_compressed.pt` or `HPS_v2_compressed.pt` of the hub's xswu/HPSv2 (2 GB; a dict with "state_dict"),
          fetched if None. The score is 100 times that of its own package
    """
    if file is None:
        from huggingface_hub import hf_hub_download

        try:
            file = hf_hub_download("xswu/HPSv2", "HPS_v2.1_compressed.pt")
        except Exception as error:
            raise OSError(
                f"HPS_v2.1_compressed.pt cannot be fetched from the hub's xswu/HPSv2 ({type(error).__name__}): "
                "download it elsewhere and give its path as `file`"
            ) from error
    return open_clip_model(name, file, device)


def aesthetic(file: str | Path, tower: OpenClip) -> Reward:
    """LAION's aesthetic score of images, about 1 to 10: a head on a CLIP's image embedding.

    file   `sac+logos+ava1-l14-linearMSE.pth` of christophschuhmann/improved-aesthetic-predictor (five linear layers
           layers.0, .2, .4, .6, .7, and nothing between them at inference), or a linear head such as
           `sa_0_4_vit_b_16_linear.pth` of LAION-AI/aesthetic-predictor (weight, bias)
    tower  the CLIP that the head was made for, of OpenAI's weights: ViT-L/14 for the first, as its name says for others
    Raises OSError if there is no such file, ValueError if it holds something else or does not fit the tower.
    """
    found = _state(Path(file))
    numbers = sorted({int(key.split(".")[1]) for key in found if re.fullmatch(r"layers\.\d+\.weight", key)})
    names = [f"layers.{number}." for number in numbers] or [""]
    head = nn.Sequential()
    try:
        for name in names:
            layer = nn.Linear(found[f"{name}weight"].shape[1], len(found[f"{name}weight"]))
            _fill(layer, {key: found.pop(name + key) for key in ("weight", "bias")}, f"the head {file}")
            head.append(layer)
    except (KeyError, IndexError, AttributeError) as error:
        raise ValueError(f"{file} holds no aesthetic head: a layer lacks {error}") from error
    widths = [layer.in_features for layer in head] + [head[-1].out_features]
    if found or widths[-1] != 1 or any(a.out_features != b.in_features for a, b in itertools.pairwise(head)):
        raise ValueError(f"{file} holds no aesthetic head: layers of widths {widths}, unknown {sorted(found)[:3]}")
    device = next(tower.model.parameters()).device
    with torch.no_grad():
        width = tower.embed(torch.zeros(1, 3, 32, 32, device=device)).shape[1]
    if widths[0] != width:
        raise ValueError(
            f"{file} reads embeddings of {widths[0]} numbers, and this CLIP gives {width}: take its own CLIP"
        )
    head = head.to(device).eval().requires_grad_(False)
    return lambda images: head(tower.embed(images))[:, 0]


def _imagenet() -> dict[str, Tensor]:
    from torchvision.models import ResNet18_Weights

    weights = ResNet18_Weights.IMAGENET1K_V1
    try:
        return weights.get_state_dict(progress=False, check_hash=True)
    except Exception as error:
        raise OSError(
            f"torchvision's ResNet-18 weights cannot be fetched ({type(error).__name__}): download {weights.url} "
            "elsewhere and give its path as `backbone`"
        ) from error


def _state(path: Path) -> dict[str, Tensor]:
    """The tensors of a file of weights, .safetensors or one of torch's; nothing else in it is loaded."""
    if not path.is_file():
        raise OSError(f"there is no file {path}: download it, or correct its path")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        found = torch.load(path, map_location="cpu", weights_only=True)
        return {name: value.float() for name, value in dict(found).items()}
    except Exception as error:
        raise ValueError(
            f"{path} is no file of weights ({' '.join(str(error).split())[:200]}): download it again"
        ) from error


def _fill(network: nn.Module, found: dict[str, Tensor], what: str) -> None:
    try:
        network.load_state_dict(found)
    except RuntimeError as error:
        raise ValueError(
            f"{what} does not fit ({' '.join(str(error).split())[:200]}): is it another model's?"
        ) from error
