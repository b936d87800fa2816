"""A small CLIP for MNIST, of open_clip's own model class: the upper reward of chapter 5."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional

from ...algorithms import ScoreTraining, TrainStep
from . import captions, networks, pixels

CONFIG = {
    "embed_dim": 64,
    "vision_cfg": {"image_size": 28, "patch_size": 4, "width": 96, "layers": 4, "head_width": 32},
    "text_cfg": {
        "context_length": captions.CONTEXT,
        "vocab_size": len(captions.WORDS),
        "width": 64,
        "heads": 2,
        "layers": 2,
    },
}


def build(seed: int = 0) -> nn.Module:
    """An untrained `open_clip.model.CLIP`; torch's global generator is left as it was."""
    from open_clip.model import CLIP

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return CLIP(**CONFIG)


def load() -> nn.Module:
    """The shipped CLIP, frozen, in eval mode, on the CPU in float32. Raises as `networks.shipped` does."""
    from safetensors.torch import load

    model = build()
    model.load_state_dict(load(networks.shipped("clip", "clip.safetensors")))
    return model.eval().requires_grad_(False)


def grey(images: Tensor) -> Tensor:
    """What the small CLIP looks at: the grey channel of images (B, 1, 28, 28) in [-1, 1] three times."""
    return pixels.checked(images, 1, side=28).expand(-1, 3, -1, -1)


def encode_images(model: nn.Module, images: Tensor, prepare: Callable[[Tensor], Tensor] = grey) -> Tensor:
    """Unit vectors (B, D) of images in [-1, 1], which `prepare` makes ready for the model, in the model's dtype."""
    return model.encode_image(prepare(images).to(next(model.parameters()).dtype), normalize=True)


def score(
    model: nn.Module,
    prompt: str,
    *,
    tokenise: Callable[[list[str]], Tensor] = captions.encode,
    prepare: Callable[[Tensor], Tensor] = grey,
) -> Callable[[Tensor], Tensor]:
    """The CLIP score of a prompt as a reward: images (B, C, H, W) in [-1, 1] -> (B,), max(100 cos, 0).

    tokenise, prepare  prompts -> token ids, images -> what the model takes: those of the small CLIP, or another's
    Scaled as in torchmetrics' CLIPScore; differentiable in the images where it is positive. Raises ValueError for a
    prompt that the small CLIP's words cannot say, and for images as `pixels.checked` does.
    """
    device = next(model.parameters()).device
    with torch.no_grad():
        text = model.encode_text(tokenise([prompt]).to(device), normalize=True)[0]

    def reward(images: Tensor) -> Tensor:
        return (100 * encode_images(model, images, prepare) @ text).clamp(min=0)

    return reward


def contrastive_loss(model: nn.Module, images: Tensor, ids: Tensor, true: Tensor) -> Tensor:
    """CLIP's symmetric cross-entropy, where an image may fit several captions of the batch.

    images (B, 1, 28, 28); ids (B, CONTEXT); true (B, B) bool: caption j is true of image i. The target of a row, and of
    a column, is uniform over what is true.
    """
    text = model.encode_text(ids, normalize=True)
    logits = model.logit_scale.exp().clamp(max=100) * encode_images(model, images) @ text.T
    target = true.to(logits)
    by_image = functional.cross_entropy(logits, target / target.sum(1, keepdim=True))
    by_text = functional.cross_entropy(logits.T, target.T / target.T.sum(1, keepdim=True))
    return (by_image + by_text) / 2


def train(state: ScoreTraining, images: Tensor, found: Tensor, *, drop: float = 0.3, steps: int) -> Iterator[TrainStep]:
    """Trains a CLIP on images with random true captions, yielding a TrainStep for each step; resumable as Algorithm 3.

    state   what is updated in place: `state.denoiser` is the CLIP
    images  (n, 1, 28, 28) in [-1, 1];  found: (n, 3) their `captions.attributes`
    """
    sampler = captions.CaptionSampler(found, drop)
    while state.step < steps:
        rows = torch.randint(len(images), (state.batch_size,), generator=state.generator, device=images.device)
        wanted = sampler.wanted(rows, state.generator)
        true = captions.fits(wanted[None], found[rows][:, None])
        loss = contrastive_loss(state.denoiser, images[rows], sampler.ids(wanted), true)
        value = state.update(loss, 3 * len(rows))
        yield TrainStep(state.step, value, state.cost)


@torch.no_grad()
def retrieval(model: nn.Module, images: Tensor, found: Tensor) -> dict[str, float]:
    """How often the best-scoring caption is the true one, for images with attributes `found` (n, 3).

    "digit": of "a zero", ..., "a nine" (chance 0.1); "thickness" and "slant": of the three captions that differ in that
    attribute alone, the others true (chance 1/3); "caption": of all 90 (chance 1/90).
    """
    device = images.device
    picture = torch.cat([encode_images(model, batch) for batch in images.split(1000)])
    complete = [(place, text) for text, place in captions.CAPTIONS.items() if captions.ABSENT not in place]
    places = torch.tensor([place for place, _ in complete], device=device)
    full = model.encode_text(captions.encode([text for _, text in complete]).to(device), normalize=True)
    plain = model.encode_text(captions.encode([captions.caption(d) for d in range(10)]).to(device), normalize=True)
    scores = picture @ full.T
    right = {"digit": (picture @ plain.T).argmax(1) == found[:, 0]}
    for column, name in ((1, "thickness"), (2, "slant")):
        others = [k for k in range(3) if k != column]
        rivals = (places[None, :, others] == found[:, None, others]).all(-1)
        best = scores.masked_fill(~rivals, -torch.inf).argmax(1)
        right[name] = places[best, column] == found[:, column]
    right["caption"] = (places[scores.argmax(1)] == found).all(1)
    return {name: value.double().mean().item() for name, value in right.items()}
