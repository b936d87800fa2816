"""Rewards of images (B, C, H, W) in [-1, 1], C = 1 or 3: callables to (B,), differentiable in the images.

`check` is the first thing to call with one of your own. The values come in float32, or in float64 where images and
network are; images of another dtype, shape or range are refused as `pixels.checked` does.

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

from . import captions, clip, pixels

Reward = Callable[[Tensor], Tensor]
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


# ---------------------------------------------------------------- digits


def ink(images: Tensor) -> Tensor:
    """Mean ink, (B,), from 0 for an empty image to 1 for a full one."""
    return (pixels.checked(images, 1) + 1).mean((1, 2, 3)) / 2


def boldness(images: Tensor) -> Tensor:
    """Stroke width in pixels, (B,): `captions.thickness`."""
    return captions.thickness(images)


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
        self.size = (64 if backbone is None else 224) if size is None else size
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
            x = self.prepare(images)
        else:
            x, to = pixels.checked(images, 1, 3), (self.size, self.size)
            x = functional.interpolate(x, to, mode="bilinear", align_corners=False).expand(-1, 3, -1, -1)
        return self.network(x.to(self.network.conv1.weight))[:, 0]


@dataclass(frozen=True)
class Standardised:
    """(reward - mean) / sd: a reward of mean 0 and standard deviation 1 under p_0; see `standardised`."""

    reward: Reward
    mean: float
    sd: float

    def __call__(self, images: Tensor) -> Tensor:
        return (self.reward(images) - self.mean) / self.sd


def evaluate(reward: Reward, images: Tensor) -> Tensor:
    """The values (B,) of a reward of B images; raises unless it gives one floating number for each.

    TypeError for something else than a tensor, ValueError for another shape or dtype; both say what to return.
    """
    values, n = reward(images), len(images)
    wanted = f"it must be one value each, floating, of shape ({n},); `rewards.check` says more"
    if not isinstance(values, Tensor):
        shape = f" of shape {tuple(values.shape)}" if hasattr(values, "shape") else ""
        raise TypeError(f"the reward of {n} images is a {type(values).__name__}{shape}, no tensor of torch: {wanted}")
    if values.shape != (n,):
        raise ValueError(f"the reward has shape {tuple(values.shape)} for {n} images; {wanted}")
    if not values.is_floating_point():
        raise ValueError(f"the reward of {n} images is {values.dtype}: {wanted}; .float() where it only scores")
    return values


@torch.no_grad()
def standardised(reward: Reward, samples: Tensor, *, batch: int = 500) -> Standardised:
    """`reward` in units of its standard deviation under p_0, so that one lambda means the same for every reward.

    samples  (n, 1, 28, 28) of p_0, n >= 100
    Raises as `evaluate`, and ValueError for too few samples or a reward that is constant or not finite on them.
    """
    if len(samples) < 100:
        raise ValueError(f"n = {len(samples)} samples are too few for a standard deviation: take at least 100")
    return Standardised(reward, *scale(torch.cat([evaluate(reward, part) for part in samples.split(batch)])))


def scale(values: Tensor) -> tuple[float, float]:
    """Mean and standard deviation of a reward's values (n,), n >= 2.

    Raises ValueError for another shape, and where they are constant or not finite.
    """
    values = torch.as_tensor(values).double()
    if values.ndim != 1 or len(values) < 2:
        raise ValueError(f"the rewards have shape {tuple(values.shape)}; they must be (n,), one for each of n samples")
    if not values.isfinite().all():
        raise ValueError(f"the reward is not finite for {(~values.isfinite()).sum()} of {len(values)} samples")
    mean, sd = values.mean().item(), values.std().item()
    if sd <= 1e-6 * max(abs(mean), 1e-6):
        raise ValueError(f"the reward is {mean:g} for every sample, so it has no scale; ask `rewards.check`")
    return mean, sd


def check(reward: Reward, images: Tensor) -> None:
    """Raises, saying what is wrong, unless a reward can steer: the first thing to call with one of your own.

    It must give one finite float for each of the images (B, C, H, W) in [-1, 1], B >= 2, the same each time, from that
    image alone, with a finite gradient in its pixels. Looked for in turn: images of another convention
    (`pixels.checked`); another type or shape (`evaluate`); values that are not finite, that change from call to call
    (dropout), that depend on the rest of the batch (batch statistics, a mean over the batch); gradients that are NaN
    (a root or a norm at 0), or zero for every image (rounding, a threshold, a clamp that is never left).
    """
    images = pixels.checked(images.detach() if isinstance(images, Tensor) else images, bounded=True)
    if (n := len(images)) < 2:
        raise ValueError(f"{n} images are too few to see whether one depends on another: take at least 2")
    with torch.enable_grad():
        x = images.clone().requires_grad_()
        values = evaluate(reward, x)
        grad = torch.autograd.grad(values.sum(), x, allow_unused=True)[0] if values.requires_grad else None
    with torch.no_grad():
        again, alone = evaluate(reward, images), evaluate(reward, images[:1].expand_as(images))
    values = values.detach()
    if not values.isfinite().all():
        raise ValueError(f"the reward is not finite for {(~values.isfinite()).sum()} of {n} images")
    for other, reason in (
        (again[:1], "is another at a second call: put its network in eval mode, or draw its noise once"),
        (alone[:1], "of an image depends on the other images of its batch: put its network in eval mode"),
    ):
        if not torch.allclose(other, values[:1], rtol=1e-5, atol=1e-3 * values.std().item()):
            raise ValueError(f"the reward {reason} ({values[0]:.4g}, then {other.item():.4g})")
    rows = torch.zeros(n, 1) if grad is None else grad.flatten(1)
    if bad := (~rows.isfinite()).any(1).sum().item():
        raise ValueError(
            f"the gradient of the reward is not finite for {bad} of {n} images: a root, a norm or a logarithm at 0?"
        )
    if not rows.any():
        flat = f"; it is {values[0]:.4g} for each of them" if values.std() == 0 else ""
        raise ValueError(
            f"the reward has no gradient in the pixels of these {n} images{flat}: it cannot guide, it can only weight "
            "samples, or particles drawn with guided=False"
        )


# ---------------------------------------------------------------- photographs


@dataclass(frozen=True)
class Preprocess:
    """What a vision model's own preprocessing does to an image file, for images in [-1, 1] and differentiable.

    size         side of the result, (B, 3, size, size)
    mean, std    by channel, of pixels in [0, 1]
    interpolation, mode  "bicubic" or "bilinear", with antialiasing as in PIL; "shortest" (resize the shorter side, cut
                 the middle) or "squash". PIL rounds to 8 bits, this does not: they differ by that rounding
    Raises ValueError for images outside [-1, 1], as `pixels.checked` does.
    """

    size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str = "bicubic"
    mode: str = "shortest"

    def __call__(self, images: Tensor) -> Tensor:
        return self.resized(pixels.unit(images))

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


@dataclass(frozen=True)
class OpenClip:
    """An open_clip model with its tokenizer and its preprocessing; see `open_clip_model`."""

    model: nn.Module
    tokenise: Callable[..., Tensor]
    prepare: Preprocess

    def embed(self, images: Tensor) -> Tensor:
        """Unit vectors (B, D) of images (B, C, H, W) in [-1, 1]."""
        return clip.encode_images(self.model, images, self.prepare)

    def score(self, prompt: str) -> Reward:
        """`clip.score` of a prompt: max(100 cos, 0). Warns of a prompt that is longer than what the model reads."""
        limit = self.tokenise([prompt]).shape[1]
        whole = self.tokenise([prompt], context_length=limit + len(prompt.encode()) + 2)[0]  # ends in padding
        length = int((whole != whole[-1]).nonzero().max()) + 1
        if length > limit:
            warnings.warn(
                f"the prompt has {length} tokens, its start and end counted, and this CLIP reads {limit}: the last "
                f"{length - limit} before the end are cut off, so shorten it",
                stacklevel=2,
            )
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
