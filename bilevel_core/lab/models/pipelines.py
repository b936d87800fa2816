"""Stable Diffusion pipelines of diffusers as chains: the algorithms of this package run on their latents unchanged."""

from __future__ import annotations

import gzip
import json
import warnings
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ...guidance import eps_from_v, eps_from_x0
from ...samplers import x0_source
from ...schedules import integer
from .. import files
from . import networks, rewards
from .adapters import from_diffusers
from .chains import Chain

if TYPE_CHECKING:
    from diffusers import StableDiffusionPipeline
    from transformers import CLIPTokenizer

DEFAULT = "stable-diffusion-v1-5/stable-diffusion-v1-5"
"""A living mirror of the weights that the released code names by an id that is gone."""

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}

# What is built with random weights: the full Stable Diffusion 1.5, and a tiny one of the same parts.
SIZES: dict[str, dict[str, Any]] = {
    "sd15": {
        "merges": 48894,
        "text": {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12},
        "unet": {
            "sample_size": 64,
            "block_out_channels": (320, 640, 1280, 1280),
            "cross_attention_dim": 768,
            "attention_head_dim": 8,
        },
        "vae": {"block_out_channels": (128, 256, 512, 512), "layers_per_block": 2, "sample_size": 512},
    },
    "tiny": {
        "merges": 500,
        "text": {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2},
        "unet": {
            "sample_size": 8,
            "block_out_channels": (8, 16),
            "layers_per_block": 1,
            "norm_num_groups": 4,
            "cross_attention_dim": 8,
            "attention_head_dim": 4,
            "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
            "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        },
        "vae": {"block_out_channels": (4, 8), "layers_per_block": 1, "norm_num_groups": 4, "sample_size": 16},
    },
}


# ---------------------------------------------------------------- half precision


class _Up(torch.autograd.Function):
    """Into float32; its backward lifts each row's gradient to a largest value of about one before it is rounded."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, dtype: torch.dtype, scale: list[Tensor]) -> Tensor:
        ctx.half, ctx.scale = y.dtype, scale
        return y.to(dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        largest = grad.detach().abs().amax(tuple(range(1, grad.ndim)), keepdim=True)
        power = torch.where(largest > 0, -largest.clamp(min=1e-37).log2().ceil(), 0.0)
        ctx.scale[:] = [torch.exp2(power)]
        return (grad * ctx.scale[0]).to(ctx.half), None, None


class _Down(torch.autograd.Function):
    """Out of float32; its backward takes that factor, a power of two, off again."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, dtype: torch.dtype, scale: list[Tensor]) -> Tensor:
        ctx.full, ctx.scale = x.dtype, scale
        return x.to(dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return grad.to(ctx.full) / ctx.scale[0], None, None


def in_dtype(function: Callable[[Tensor], Tensor], x: Tensor, dtype: torch.dtype) -> Tensor:
    """function(x) computed in `dtype`, with input, output and gradient in the dtype of x.

    The rows of function must be independent. In half precision gradients of rewards would underflow (6e-8 is the
    smallest float16), so each row's is scaled on its way through, by a power of two: exact, and the same for any batch.
    """
    if dtype == x.dtype:
        return function(x)
    scale: list[Tensor] = []
    return _Up.apply(function(_Down.apply(x, dtype, scale)), x.dtype, scale)


# ---------------------------------------------------------------- the chain


class LatentDenoiser(nn.Module):
    """eps_hat = denoiser(x, t, text) of a pipeline's U-Net: float32 outside, the U-Net's own dtype inside.

    abar        (T+1,) of the pipeline's scheduler; diffusers' time step is t - 1
    prediction  what the U-Net's output means: "epsilon", "v_prediction" (Salimans & Ho, arXiv 2202.00512) or "sample"
    rows        of one U-Net call at most, None: all
    x (B, C, h, w); t an int or (B,) int64, values 1..T; text (B, L, D) or (1, L, D).
    """

    def __init__(self, unet: nn.Module, abar: Tensor, prediction: str = "epsilon", rows: int | None = None) -> None:
        super().__init__()
        if prediction not in ("epsilon", "v_prediction", "sample"):
            raise ValueError(f"prediction = {prediction!r} is not 'epsilon', 'v_prediction' or 'sample'")
        rows = rows if rows is None else integer("rows", rows, 1)
        self.unet, self.abar, self.prediction, self.rows = unet, abar, prediction, rows
        self.train(unet.training)

    def forward(self, x: Tensor, t: int | Tensor, text: Tensor) -> Tensor:
        return self._by_rows(self._denoiser(), x, t, text)

    def denoise_x0(self, x: Tensor, t: int | Tensor, text: Tensor) -> Tensor:
        """x0_hat (B, C, h, w); ValueError where the U-Net predicts eps, see `samplers.x0_source`."""
        return self._by_rows(x0_source(self._denoiser()), x, t, text)

    def _denoiser(self) -> Callable[..., Tensor]:
        """eps_hat of some rows, made from what the U-Net predicts."""
        wrap = {"v_prediction": eps_from_v, "sample": eps_from_x0}.get(self.prediction)
        return wrap(self._output, self.abar) if wrap else self._output

    def _by_rows(self, network: Callable[..., Tensor], x: Tensor, t: int | Tensor, text: Tensor) -> Tensor:
        rows, text = self.rows or len(x), text.expand(len(x), *text.shape[1:])
        times = t.reshape(-1).expand(len(x)).split(rows) if isinstance(t, Tensor) else [t] * -(-len(x) // rows)
        parts = zip(x.split(rows), times, text.split(rows), strict=True)
        return torch.cat([network(*part) for part in parts])

    def _output(self, x: Tensor, t: int | Tensor, text: Tensor) -> Tensor:
        def network(z: Tensor) -> Tensor:
            return self.unet(z, t - 1, encoder_hidden_states=text.to(z)).sample

        return in_dtype(network, x, self.unet.dtype)


@dataclass(frozen=True)
class LatentChain(Chain):
    """`chains.Chain` in the latent space of a pipeline; see `load`.

    vae     decodes latents;  encode: prompt -> text (1, L, D);  name: of the model, for records
    """

    vae: nn.Module | None = None
    encode: Callable[[str], Tensor] | None = None
    name: str = ""

    def denoise(self, prompt: str | Sequence[str]) -> networks.Prompted:
        """The denoiser of p_0 for a prompt, or for one prompt a row."""
        texts = [prompt] if isinstance(prompt, str) else prompt
        return networks.Prompted(
            self.denoiser, torch.cat([self.encode(text) for text in texts]), self.scale, self.encode("")
        )

    def decode(self, x: Tensor) -> Tensor:
        """Images (B, 3, H, W) float32 in [-1, 1] of latents (B, C, h, w); differentiable inside the range."""
        config = self.vae.config
        shift = getattr(config, "shift_factor", None) or 0.0

        def network(z: Tensor) -> Tensor:
            return self.vae.decode(z).sample

        parts = x.split(self.micro_batch or len(x))
        images = [in_dtype(network, part / config.scaling_factor + shift, self.vae.dtype) for part in parts]
        return torch.cat(images).clamp(-1, 1)


def load(
    model: str | Path | StableDiffusionPipeline = DEFAULT,
    *,
    device: torch.device | str = "cpu",
    dtype: str = "float32",
    side: int | None = None,
    micro_batch: int | None = 1,
    checkpoint: bool = True,
    block_checkpoint: bool = False,
    slicing: bool = True,
    offload: bool = False,
    **options: float,
) -> LatentChain:
    """A Stable Diffusion pipeline as a chain, its weights frozen.

    model    a hub id, a local folder as `save_pretrained` writes it, or a pipeline
    dtype    of its networks, one of DTYPES; guidance and rewards compute in float32 all the same
    side     of the images in pixels, default the model's own
    options  scale, steps, eta of the chain: default 7.5, 50, 1.0
    What costs time to save memory: micro_batch and checkpoint (see `guidance.LookAhead`); block_checkpoint recomputes
    each block of U-Net and VAE as well; slicing decodes image by image; offload keeps on the device only the network
    that works, and wants `checkpoint`, so that a network is there when its backward runs.
    Raises ImportError without transformers; OSError with the remedy where weights are missing, gated or offline;
    ValueError for another kind of pipeline, a scheduler without betas, or an option that does not fit.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype = {dtype!r} is not one of {', '.join(DTYPES)}")
    if offload and not checkpoint:
        raise ValueError("offload = True needs checkpoint = True: a backward pass would find its network moved away")
    if offload and torch.device(device).type == "cpu":
        raise ValueError("offload = True needs an accelerator to offload from; device is the CPU")
    pipe = _open(model, dtype) if isinstance(model, str | Path) else model
    if type(pipe).__name__ != "StableDiffusionPipeline":
        raise ValueError(
            f"the model is a {type(pipe).__name__}; this chain knows StableDiffusionPipeline (1.x and 2.x)"
        )
    micro_batch = micro_batch if micro_batch is None else integer("micro_batch", micro_batch, 1)
    prediction = pipe.scheduler.config.get("prediction_type", "epsilon")
    abar = from_diffusers(pipe.scheduler, prediction)
    if prediction == "epsilon" and not abar[-1] > 0:
        raise ValueError(
            "the scheduler ends at abar = 0, where no eps can be turned into x_0: set its rescale_betas_zero_snr "
            "to False"
        )
    factor = 2 ** (len(pipe.vae.config.block_out_channels) - 1)
    side = pipe.unet.config.sample_size * factor if side is None else integer("side", side, 1)
    least = factor * 2 ** (len(pipe.unet.config.block_out_channels) - 1)
    if side < least or side % least:
        raise ValueError(f"side = {side} must be a multiple of {least} pixels for this model")
    for network in (pipe.unet, pipe.vae, pipe.text_encoder):
        network.requires_grad_(False).eval()
        if block_checkpoint and network is not pipe.text_encoder:
            network.enable_gradient_checkpointing()
    if slicing:
        pipe.vae.enable_slicing()
    if offload:
        pipe.enable_model_cpu_offload(device=device)
    elif pipe.device != torch.device(device):
        pipe.to(device)

    @lru_cache(maxsize=64)
    @torch.no_grad()
    def encode(prompt: str) -> Tensor:
        limit = pipe.tokenizer.model_max_length
        length = len(pipe.tokenizer(prompt).input_ids)
        if length > limit:
            warnings.warn(f"the prompt has {length} tokens; the model reads the first {limit}", stacklevel=2)
        return pipe.encode_prompt(prompt, device, 1, False)[0]

    options = {"scale": 7.5, "steps": 50, "eta": 1.0} | options
    rows = micro_batch and micro_batch * (2 if options["scale"] not in (0, 1) else 1)
    return LatentChain(
        LatentDenoiser(pipe.unet, abar, prediction, rows),
        abar,
        **options,
        micro_batch=micro_batch,
        checkpoint=checkpoint,
        shape=(pipe.unet.config.in_channels, side // factor, side // factor),
        vae=pipe.vae,
        encode=encode,
        name=str(model) if isinstance(model, str) else getattr(pipe, "name_or_path", "") or "",
    )


def _open(model: str | Path, dtype: str) -> StableDiffusionPipeline:
    _need_transformers()
    from diffusers import StableDiffusionPipeline

    try:
        here = Path(model).expanduser()
    except RuntimeError as error:
        raise OSError(f"{model}: there is no home of this user; give the folder's whole path") from error
    remedy = "name a folder written by save_pretrained, or a model id of the Hugging Face hub"
    if here.is_dir():
        if not (here / "model_index.json").is_file():
            raise OSError(f"{here} holds no model_index.json, so it is no pipeline: {remedy}")
    elif isinstance(model, Path) or str(model).count("/") != 1:
        raise OSError(f"there is no folder {here}: {remedy}")
    source = str(here) if here.is_dir() else str(model)
    try:
        kind = StableDiffusionPipeline.load_config(source)["_class_name"]
        if kind != "StableDiffusionPipeline":
            raise ValueError(f"{model} is a {kind}, not a StableDiffusionPipeline (1.x and 2.x)")
        options = {_dtype_key(): DTYPES[dtype], "safety_checker": None, "feature_extractor": None}
        options |= {"requires_safety_checker": False, "use_safetensors": True}
        if dtype != "float32" and not here.is_dir():  # half the download, where the hub has it
            try:
                return StableDiffusionPipeline.from_pretrained(source, variant="fp16", **options)
            except (OSError, ValueError):
                pass
        return StableDiffusionPipeline.from_pretrained(source, **options)
    except OSError as error:
        reason = " ".join(str(error).split())[:300]
        raise OSError(
            f"the model {model} cannot be loaded ({reason}). If you are offline, give a folder that holds it; if it is "
            "gated, accept its licence on its page and run `hf auth login`; if a download was cut off, run again"
        ) from error


def _dtype_key() -> str:
    """How this version of diffusers calls the dtype of `from_pretrained`."""
    import diffusers

    version = tuple(int(part) for part in diffusers.__version__.split(".")[:2])
    return "dtype" if version >= (0, 42) else "torch_dtype"


def quiet() -> None:
    """No progress bars of diffusers and transformers while they load, for pages and logs."""
    _need_transformers()
    import diffusers
    import transformers

    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()


def _need_transformers() -> None:
    try:
        import accelerate  # noqa: F401
        import transformers  # noqa: F401
    except ImportError as error:
        raise ImportError(f"{error.name} is not installed: pip install 'bilevel-core[full]'") from error


# ---------------------------------------------------------------- random weights


def random_pipeline(
    size: str,
    *,
    seed: int = 0,
    dtype: str = "float32",
    mode: AbstractContextManager | None = None,
    **scheduler: Any,
) -> StableDiffusionPipeline:
    """A Stable Diffusion pipeline of SIZES with random weights: all of its parts, none of its knowledge.

    mode       entered while weights are made; a FakeTensorMode gives them shapes and no memory
    scheduler  changes to its scheduler's configuration, such as prediction_type
    The tokenizer is CLIP's own, its vocabulary cut to so many merges. Torch's global generator is left as it was.
    """
    _need_transformers()
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    if size not in SIZES:
        raise ValueError(f"size {size!r} is not one of {', '.join(SIZES)}")
    shape, before = SIZES[size], torch.get_default_dtype()
    words = clip_tokenizer(shape["merges"])
    ends = {"bos_token_id": words.bos_token_id, "eos_token_id": words.eos_token_id, "pad_token_id": 1}
    vae_levels = len(shape["vae"]["block_out_channels"])
    with torch.random.fork_rng(devices=[]), mode or nullcontext():
        torch.manual_seed(seed)
        torch.set_default_dtype(DTYPES[dtype])
        try:
            text = CLIPTextModel(
                CLIPTextConfig(vocab_size=len(words), hidden_act="quick_gelu", **ends, **shape["text"])
            )
            unet = UNet2DConditionModel(**shape["unet"])
            vae = AutoencoderKL(
                down_block_types=("DownEncoderBlock2D",) * vae_levels,
                up_block_types=("UpDecoderBlock2D",) * vae_levels,
                latent_channels=4,
                **shape["vae"],
            )
        finally:
            torch.set_default_dtype(before)
    betas = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "num_train_timesteps": 1000}
    options = betas | {"clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1} | scheduler
    return StableDiffusionPipeline(
        vae=vae,
        text_encoder=text,
        tokenizer=words,
        unet=unet,
        scheduler=DDIMScheduler(**options),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def clip_tokenizer(merges: int = 48894) -> CLIPTokenizer:
    """CLIP's byte-pair tokenizer with its first so many merges, of the vocabulary that open_clip carries."""
    from open_clip.tokenizer import bytes_to_unicode, default_bpe
    from transformers import CLIPTokenizer

    lines = gzip.open(default_bpe()).read().decode().split("\n")[1 : merges + 1]
    pairs = [tuple(line.split()) for line in lines]
    letters = list(bytes_to_unicode().values())
    words = [*letters, *(letter + "</w>" for letter in letters), *map("".join, pairs)]
    words += ["<|startoftext|>", "<|endoftext|>"]
    vocabulary = {word: i for i, word in enumerate(words)}
    return CLIPTokenizer(vocab=vocabulary, merges=pairs, model_max_length=77)


def random_clip(folder: str | Path, *, seed: int = 0, side: int = 16) -> Path:
    """Writes a tiny CLIP of random weights as open_clip's own folder, for `rewards.open_clip_model("local-dir:...")`.

    It has open_clip's whole vocabulary and reads images of `side` pixels; returns the folder.
    """
    from open_clip.model import CLIP
    from safetensors.torch import save

    config = {
        "embed_dim": 16,
        "quick_gelu": True,
        "vision_cfg": {"image_size": side, "layers": 2, "width": 16, "head_width": 8, "patch_size": side // 4},
        "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 2},
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = CLIP(**config)
    about = {"model_cfg": config, "preprocess_cfg": {"mean": rewards.CLIP_MEAN, "std": rewards.CLIP_STD}}
    folder = Path(folder)
    files.write_atomic(folder / "open_clip_config.json", json.dumps(about).encode())
    tensors = {name: value.contiguous() for name, value in model.state_dict().items()}
    files.write_atomic(folder / "open_clip_model.safetensors", save(tensors))
    return folder
