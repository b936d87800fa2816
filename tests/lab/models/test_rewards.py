"""Rewards: values, gradients, determinism, standardisation, and images seen as the models' own code sees them."""

import copy
import itertools
import json
import warnings

import numpy as np
import pytest
import torch
from PIL import Image

from bilevel_core.lab.models import chains, pipelines, rewards


def bar(width, ink=1.0):
    images = torch.full((1, 1, 28, 28), -1.0, dtype=torch.float64)
    images[..., 4:24, 10 : 10 + width] = 2 * ink - 1
    return images


def noise(n, seed=0):
    return torch.rand(n, 1, 28, 28, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 2 - 1


def test_values_on_simple_images():
    assert rewards.ink(bar(3)).item() == pytest.approx(60 / 784)
    assert rewards.ink(bar(3, 0.5)).item() == pytest.approx(30 / 784)
    widths = torch.cat([rewards.boldness(bar(w)) for w in (1, 2, 4)])
    assert (widths.diff() > 0.5).all() and widths[2].item() == pytest.approx(4, rel=0.25)


@pytest.mark.parametrize(
    "make", [lambda: rewards.ink, lambda: rewards.boldness, lambda: rewards.RandomResNet().double()]
)
def test_gradients_are_those_of_finite_differences(make):
    reward, x = make(), noise(2).requires_grad_()
    direction = torch.randn(x.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    (grad,) = torch.autograd.grad(reward(x).sum(), x)
    with torch.no_grad():
        h = 1e-6
        slope = (reward(x + h * direction) - reward(x - h * direction)).sum() / (2 * h)
    assert (grad * direction).sum().item() == pytest.approx(slope.item(), rel=1e-4)


def test_the_random_network_is_seeded_and_leaves_the_global_generator_alone():
    state, x = torch.get_rng_state(), noise(3).float()
    a, b, c = (rewards.RandomResNet(seed)(x) for seed in (0, 0, 1))
    assert torch.equal(state, torch.get_rng_state())
    assert torch.equal(a, b) and not torch.allclose(a, c) and a.shape == (3,) and a.std() > 0
    network = rewards.RandomResNet(0)
    assert not network.training and not any(p.requires_grad for p in network.parameters())
    assert torch.allclose(network(x)[:1], network(x[:1]), rtol=1e-3, atol=1e-5)  # eval mode: no batch statistics


def test_standardised_has_mean_0_and_sd_1():
    samples = noise(120)
    reward = rewards.standardised(rewards.ink, samples, batch=50)
    values = reward(samples)
    assert values.mean().item() == pytest.approx(0, abs=1e-9) and values.std().item() == pytest.approx(1)
    assert reward.mean == pytest.approx(rewards.ink(samples).mean().item()) and reward.sd > 0
    x = noise(1).requires_grad_()
    (grad,) = torch.autograd.grad(reward(x).sum(), x)
    assert torch.allclose(grad, torch.full_like(grad, 1 / (2 * 784 * reward.sd)))


def test_errors():
    with pytest.raises(ValueError, match="n = 99 samples are too few"):
        rewards.standardised(rewards.ink, noise(99))
    with pytest.raises(ValueError, match="for every sample"):
        rewards.standardised(lambda x: torch.full((len(x),), 0.1), noise(100))
    with pytest.raises(ValueError, match="not finite for 100 of 100"):
        rewards.standardised(lambda x: rewards.ink(x) * float("nan"), noise(100))
    with pytest.raises(ValueError, match="not \\(B, 1, H, W\\)"):
        rewards.ink(torch.zeros(2, 28, 28))
    for size in (16, 0):
        with pytest.raises(ValueError, match=f"size = {size} is smaller than the images"):
            rewards.RandomResNet(size=size)


@pytest.mark.parametrize(
    ("reward", "error", "message"),
    [
        (lambda x: x.mean((2, 3)), ValueError, r"shape \(50, 1\) for 50 images; it must be one value each.*\(50,\)"),
        (lambda x: x.mean(), ValueError, r"shape \(\) for 50 images"),
        (lambda x: x.mean((1, 2, 3))[1:], ValueError, r"shape \(49,\) for 50 images"),
        (lambda x: x.mean((1, 2, 3)) > 0, ValueError, r"of 50 images is torch.bool: .*\.float\(\)"),
        (lambda x: (x > 0).sum((1, 2, 3)), ValueError, "int64"),
        (lambda x: x.mean((1, 2, 3)).numpy(), TypeError, r"is a ndarray of shape \(50,\), no tensor of torch"),
        (lambda x: x.mean((1, 2, 3)).tolist(), TypeError, "is a list, no tensor"),
        (lambda x: x.mean().item(), TypeError, "is a float, no tensor"),
        (lambda x: None, TypeError, "is a NoneType"),
    ],
)
def test_what_is_not_one_float_for_each_image_is_refused_with_its_shape(reward, error, message):
    for use in (
        lambda: rewards.standardised(reward, noise(100), batch=50),
        lambda: chains.rewarded(noise(50), {"own": reward}),
        lambda: rewards.check(lambda x: reward(x.detach()), noise(50)),
    ):
        with pytest.raises(error, match=message):
            use()


def test_a_scale_is_of_one_row_of_values():
    with pytest.raises(ValueError, match=r"shape \(4, 1\); they must be \(n,\)"):
        rewards.scale(torch.rand(4, 1))
    with pytest.raises(ValueError, match=r"shape \(1,\)"):
        rewards.scale(torch.ones(1))
    assert rewards.scale([1.0, 3.0]) == (2.0, pytest.approx(2**0.5))


# ---------------------------------------------------------------- photographs

WORDS = "fox dog cat house river moon tree car boat bread lamp stone cloud shoe".split()  # a random CLIP likes some


def photograph(height=45, width=61, seed=0):
    """Bytes (3, H, W) with edges and smooth parts, so that resizing has something to get wrong."""
    rows, columns = torch.meshgrid(torch.linspace(0, 1, height), torch.linspace(0, 1, width), indexing="ij")
    smooth = torch.stack([rows, columns, (rows * columns).sqrt()])
    edges = torch.rand(3, height // 5 + 1, width // 5 + 1, generator=torch.Generator().manual_seed(seed))
    edges = edges.repeat_interleave(5, 1).repeat_interleave(5, 2)[:, :height, :width]
    return ((smooth + edges) / 2 * 255).round().to(torch.uint8)


def unit(image):
    """Images (1, 3, H, W) in [-1, 1] of bytes."""
    return image[None].float() / 127.5 - 1


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory):
    return pipelines.random_clip(tmp_path_factory.mktemp("clip"), side=16)


@pytest.fixture(scope="module")
def tower(clip_folder):
    return rewards.open_clip_model(f"local-dir:{clip_folder}")


@pytest.mark.parametrize("shape", [(45, 61), (61, 45), (16, 16), (12, 30)])
def test_preprocessing_is_open_clips_own(tower, clip_folder, shape):
    import open_clip

    transform = open_clip.create_model_and_transforms(f"local-dir:{clip_folder}")[2]
    image = photograph(*shape)
    theirs = transform(Image.fromarray(image.permute(1, 2, 0).numpy()))[None]
    ours = tower.prepare(unit(image))
    assert ours.shape == theirs.shape == (1, 3, 16, 16)
    steps = ((ours - theirs).abs() * torch.tensor(rewards.CLIP_STD)[:, None, None] * 255).flatten()
    assert steps.max() < 1.1 and steps.mean() < 0.35  # PIL rounds to 8 bits after each of its two passes
    squash = rewards.Preprocess(16, rewards.CLIP_MEAN, rewards.CLIP_STD, "bilinear", "squash")(unit(image))
    pil = Image.fromarray(image.permute(1, 2, 0).numpy()).resize((16, 16), Image.Resampling.BILINEAR)
    back = (squash[0] * torch.tensor(rewards.CLIP_STD)[:, None, None]) + torch.tensor(rewards.CLIP_MEAN)[:, None, None]
    assert (back * 255 - torch.from_numpy(np.array(pil)).permute(2, 0, 1)).abs().max() < 1.1


def as_transformers(model):
    """The same weights in transformers' class, with its own tokenizer and image processor."""
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor

    vision, text = model.visual, model
    config = CLIPConfig(
        text_config={
            "vocab_size": 49408, "hidden_size": 16, "intermediate_size": 64, "num_hidden_layers": 2,
            "num_attention_heads": 2, "hidden_act": "quick_gelu", "eos_token_id": 49407, "bos_token_id": 49406,
        },
        vision_config={
            "image_size": 16, "patch_size": 4, "hidden_size": 16, "intermediate_size": 64, "num_hidden_layers": 2,
            "num_attention_heads": 2, "hidden_act": "quick_gelu",
        },
        projection_dim=16,
    )  # fmt: skip
    theirs = CLIPModel(config).eval()
    state = {
        "text_model.embeddings.token_embedding.weight": text.token_embedding.weight,
        "text_model.embeddings.position_embedding.weight": text.positional_embedding,
        "text_model.final_layer_norm": text.ln_final,
        "vision_model.embeddings.class_embedding": vision.class_embedding,
        "vision_model.embeddings.patch_embedding.weight": vision.conv1.weight,
        "vision_model.embeddings.position_embedding.weight": vision.positional_embedding,
        "vision_model.pre_layrnorm": vision.ln_pre,
        "vision_model.post_layernorm": vision.ln_post,
        "text_projection.weight": text.text_projection.T,
        "visual_projection.weight": vision.proj.T,
        "logit_scale": text.logit_scale,
    }
    for name, blocks in (("text_model", text.transformer.resblocks), ("vision_model", vision.transformer.resblocks)):
        for i, block in enumerate(blocks):
            place = f"{name}.encoder.layers.{i}."
            state |= {f"{place}layer_norm1": block.ln_1, f"{place}layer_norm2": block.ln_2}
            state |= {f"{place}mlp.fc1": block.mlp.c_fc, f"{place}mlp.fc2": block.mlp.c_proj}
            state[f"{place}self_attn.out_proj"] = block.attn.out_proj
            parts = zip("qkv", block.attn.in_proj_weight.chunk(3), block.attn.in_proj_bias.chunk(3), strict=True)
            for letter, weight, bias in parts:
                state |= {f"{place}self_attn.{letter}_proj.{k}": v for k, v in (("weight", weight), ("bias", bias))}
    flat = {}
    for name, value in state.items():
        is_module = isinstance(value, torch.nn.Module)
        flat |= {f"{name}.{k}": v for k, v in value.named_parameters()} if is_module else {name: value}
    missing, unexpected = theirs.load_state_dict(flat, strict=False)
    assert not unexpected and all("position_ids" in name for name in missing), (missing, unexpected)
    processor = CLIPImageProcessor(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    return theirs, CLIPProcessor(processor, pipelines.clip_tokenizer())


def test_the_clip_score_is_torchmetrics_own(tower):
    """Other classes for everything: transformers' CLIP, tokenizer and image processor, torchmetrics' formula."""
    from torchmetrics.multimodal.clip_score import CLIPScore

    theirs, processor = as_transformers(tower.model)

    class Features(torch.nn.Module):  # newer transformers return an object where torchmetrics wants its tensor
        config = theirs.config

        @staticmethod
        def get_image_features(x):
            found = theirs.get_image_features(x)
            return getattr(found, "pooler_output", found)

        @staticmethod
        def get_text_features(ids, mask):
            found = theirs.get_text_features(ids, attention_mask=mask)
            return getattr(found, "pooler_output", found)

    metric = CLIPScore(model_name_or_path=lambda: (Features(), processor))
    compared = 0
    for seed, prompt in enumerate(["A beautiful landscape", "a red fox, isn't it?", "two dogs", "naïve 4k"]):
        image = photograph(seed=seed)
        metric.reset()
        expected = metric(image, prompt).item()
        ours = tower.score(prompt)(unit(image)).item()
        assert ours == pytest.approx(expected, abs=0.1)
        compared += expected > 1
    assert compared >= 2  # CLIPScore is clamped at zero, and zeros would agree too easily


def test_large_rewards_have_the_gradient_of_finite_differences(tower, tmp_path):
    x = 0.95 * torch.cat([unit(photograph(20, 24, seed)) for seed in (4, 4)]).double()
    double = rewards.OpenClip(copy.deepcopy(tower.model).double(), tower.tokenise, tower.prepare)
    prompt = next(p for p in WORDS if double.score(p)(x).min() > 0.5)
    direction = torch.randn(x.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    network = rewards.RandomResNet(size=32, backbone=resnet_file(tmp_path)).double()
    for reward in (double.score(prompt), network):
        rewards.check(reward, x)
        leaf = x.clone().requires_grad_()
        (grad,) = torch.autograd.grad(reward(leaf).sum(), leaf)
        h = 1e-5
        slope = (reward(x + h * direction) - reward(x - h * direction)).sum() / (2 * h)
        assert (grad * direction).sum().item() == pytest.approx(slope.item(), rel=1e-4)


def resnet_file(tmp_path, seed=9):
    from safetensors.torch import save_file
    from torchvision.models import resnet18

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = resnet18(weights=None)
    for module in network.modules():  # statistics of a trained network, not of a new one
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.fill_(0.001)
    save_file(
        {name: value.contiguous() for name, value in network.state_dict().items()}, tmp_path / "resnet.safetensors"
    )
    return tmp_path / "resnet.safetensors"


def test_the_released_resnet_has_a_given_backbone_and_a_seeded_head(tmp_path):
    file = resnet_file(tmp_path)
    a, b, c = (rewards.RandomResNet(seed, backbone=file) for seed in (0, 0, 1))
    images = unit(photograph(40, 40))
    assert torch.equal(a(images), b(images)) and not torch.allclose(a(images), c(images))
    assert torch.equal(a.network.conv1.weight, c.network.conv1.weight) and a.size == 224
    assert a.network.bn1.running_mean.mean().item() == pytest.approx(0.001)
    x = torch.nn.functional.interpolate((images + 1) / 2, (224, 224), mode="bilinear", antialias=True)
    mean, std = (torch.tensor(values)[:, None, None] for values in (rewards.CLIP_MEAN, rewards.CLIP_STD))
    torch.testing.assert_close(a(images), a.network((x - mean) / std)[:, 0])
    grey = images.mean(1, keepdim=True)
    torch.testing.assert_close(a(grey), a(grey.expand(-1, 3, -1, -1)))


def save_as_torch(tensors, path):
    torch.serialization.save(tensors, path)  # the format of the published files, to be read as tensors only
    return path


@pytest.mark.slow
def test_human_preference_loads_a_checkpoint_into_a_named_model(tower, clip_folder, tmp_path):
    import open_clip

    config = json.loads((clip_folder / "open_clip_config.json").read_text())["model_cfg"]
    (tmp_path / "ViT-tiny-test.json").write_text(json.dumps(config))
    open_clip.add_model_config(tmp_path / "ViT-tiny-test.json")
    state = {name: value * 1.1 for name, value in tower.model.state_dict().items()}
    file = save_as_torch({"epoch": 3, "state_dict": state}, tmp_path / "HPS_v2.1_compressed.pt")
    images = torch.cat([unit(photograph(seed=s)) for s in range(4)])
    prompt = next(p for p in WORDS if tower.score(p)(images).max() > 1)
    found = rewards.hps_model(file, name="ViT-tiny-test").score(prompt)(images)
    expected = copy.deepcopy(tower.model)
    expected.load_state_dict(state)
    expected = rewards.OpenClip(expected, tower.tokenise, tower.prepare).score(prompt)(images)
    torch.testing.assert_close(found, expected)
    assert (found - tower.score(prompt)(images)).abs().max() > 1e-3
    cut = tmp_path / "cut.pt"
    cut.write_bytes(file.read_bytes()[:5000])
    with pytest.raises(
        OSError, match="cut.pt of ViT-tiny-test cannot be loaded .* check that the file is there, whole"
    ):
        rewards.hps_model(cut, name="ViT-tiny-test")
    with pytest.raises(OSError, match="of ViT-B-32 cannot be loaded"):
        rewards.hps_model(file, name="ViT-B-32")


@pytest.mark.parametrize("kind", ["five layers", "linear"])
def test_the_aesthetic_head_reads_the_published_formats(tower, tmp_path, kind):
    generator = torch.Generator().manual_seed(4)
    widths = {"five layers": [16, 32, 8, 6, 4, 1], "linear": [16, 1]}[kind]
    layers = [torch.randn(b, a, generator=generator) / a**0.5 for a, b in itertools.pairwise(widths)]
    biases = [torch.randn(len(layer), generator=generator) for layer in layers]
    names = [f"layers.{i}." for i in (0, 2, 4, 6, 7)] if kind == "five layers" else [""]
    state = {}
    for name, weight, bias in zip(names, layers, biases, strict=True):
        state |= {f"{name}weight": weight, f"{name}bias": bias}
    reward = rewards.aesthetic(save_as_torch(state, tmp_path / "head.pth"), tower)
    images = torch.cat([unit(photograph(seed=s)) for s in range(2)])
    x = tower.embed(images)
    torch.testing.assert_close(x.norm(dim=1), torch.ones(2))
    for weight, bias in zip(layers, biases, strict=True):
        x = x @ weight.T + bias
    torch.testing.assert_close(reward(images), x[:, 0])
    rewards.check(reward, images)

    def refused(change, message):
        with pytest.raises(ValueError, match=message):
            rewards.aesthetic(save_as_torch(change(dict(state)), tmp_path / "wrong.pth"), tower)

    refused(lambda s: s | {"other": torch.zeros(1)}, "no aesthetic head.*unknown")
    refused(lambda s: {k: v for k, v in s.items() if k != f"{names[-1]}bias"}, "lacks '.*bias'")
    refused(lambda s: s | {f"{names[0]}weight": torch.zeros(len(layers[0]), 24)}, "24 numbers, and this CLIP gives 16")


def test_images_in_the_wrong_range_are_refused(tower):
    reward, image = tower.score("a fox"), photograph()
    with pytest.raises(ValueError, match="uint8.*127.5 - 1"):
        reward(image[None])
    with pytest.raises(ValueError, match=r"lie in \[.*25.\], not in \[-1, 1\]"):
        reward(image[None].float())
    with pytest.raises(ValueError, match=r"not \(B, 1 or 3, H, W\)"):
        reward(unit(image)[0])
    with pytest.warns(UserWarning, match="in \\[0, 1\\], pass 2"):
        reward(image[None].float() / 255)


def test_missing_weights_say_what_to_do(tower, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(OSError, match="there is no file"):
        rewards.aesthetic(tmp_path / "none.pth", tower)
    (tmp_path / "text.pth").write_text("<html>not found</html>")
    with pytest.raises(ValueError, match="is no file of weights .* download it again"):
        rewards.aesthetic(tmp_path / "text.pth", tower)
    with pytest.raises(OSError, match="check that the file is there"):
        rewards.open_clip_model("local-dir:" + str(tmp_path / "empty"))
    with pytest.raises(ValueError, match="the backbone .* does not fit"):
        from safetensors.torch import save_file

        save_file({"conv1.weight": torch.zeros(2)}, tmp_path / "other.safetensors")
        rewards.RandomResNet(backbone=tmp_path / "other.safetensors")

    def offline(*args, **kwargs):
        raise ConnectionError("no route")

    monkeypatch.setattr("open_clip.factory.download_pretrained", offline)
    with pytest.raises(OSError, match="no route.*download its file elsewhere and give its path"):
        rewards.open_clip_model()
    monkeypatch.setattr("huggingface_hub.hf_hub_download", offline)
    with pytest.raises(OSError, match="xswu/HPSv2 .ConnectionError.*give its path as `file`"):
        rewards.hps_model()
    monkeypatch.setattr("torch.hub.load_state_dict_from_url", offline)
    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", offline)
    with pytest.raises(OSError, match="resnet18-.*give its path as `backbone`"):
        rewards.RandomResNet(backbone="imagenet")


def test_check_says_why_a_reward_cannot_steer():
    x = noise(3).float().expand(-1, 3, -1, -1).clone()
    rewards.check(lambda images: images.mean((1, 2, 3)), x)
    for reward, message in (
        (lambda images: images.mean(), "one value each"),
        (lambda images: images.mean((1, 2, 3)) / 0, "not finite for 3 of 3"),
        (lambda images: images.mean((1, 2, 3)).detach(), "no gradient in the pixels"),
        (lambda images: (images.mean((1, 2, 3)) > 0).float() + 0 * images.sum((1, 2, 3)), "no gradient"),
        (lambda images: (images - images.mean(0)).square().mean((1, 2, 3)), "other images of its batch"),
        (lambda images: images.mean((1, 2, 3)) - images.mean(), "other images of its batch"),
        (lambda images: images.mean((1, 2, 3)) - images.mean().detach(), "other images of its batch"),
        (lambda images: images.mean((1, 2, 3)) + 0.1 * torch.rand(len(images)), "is another at a second call"),
        (lambda images: (100 * images.mean((1, 2, 3))).round(), "no gradient"),
        (lambda images: images.mean((1, 2, 3)).clamp(min=2), "no gradient in the pixels of these 3 images; it is 2 "),
        (lambda images: (images[:, 0, 0, 0] * 0).sqrt(), "gradient of the reward is not finite for 3 of 3"),
        (lambda images: (images[:, 0, 0, 0] - images[2, 0, 0, 0].detach()).square().sqrt(), "other images|1 of 3"),
    ):
        with pytest.raises(ValueError, match=message):
            rewards.check(reward, x)
    with pytest.raises(ValueError, match="1 images are too few"):
        rewards.check(lambda images: images.mean((1, 2, 3)), x[:1])
    for images, message in ((x * 3, "not in .-1, 1."), (x[0], "shape"), ((x > 0), "bool")):
        with pytest.raises(ValueError, match=message):
            rewards.check(lambda images: images.mean((1, 2, 3)), images)
    with pytest.warns(UserWarning, match="pass 2"):
        rewards.check(lambda images: images.mean((1, 2, 3)), (x + 1) / 2)


def test_check_passes_what_can_steer():
    """Also where some images are equal, or where a clamp holds some of them."""
    x = noise(4)
    x[1] = x[0]
    own = (rewards.ink, rewards.boldness, rewards.RandomResNet(), lambda x: rewards.ink(x).clamp(min=0.5))
    for reward in own:
        rewards.check(reward, x)
    batch = rewards.RandomResNet().train()  # batch statistics
    with pytest.raises(ValueError, match="depends on the other images|second call"):
        rewards.check(batch, x)


def test_a_prompt_longer_than_the_text_tower_reads_is_told(tower):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        exact = tower.score("x " * 75)  # 77 tokens with start and end
    with pytest.warns(UserWarning, match="has 78 tokens.* reads 77: the last 1 before the end are cut off"):
        longer = tower.score("x " * 76)
    with pytest.warns(UserWarning, match="has 202 tokens.*the last 125 "):
        tower.score("x " * 200)
    image = torch.cat([unit(photograph(seed=s)) for s in range(3)])
    assert torch.equal(exact(image), longer(image))  # so without the warning nobody would know
