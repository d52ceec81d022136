"""Tuning modes: what trains, adapters, merging, refusals; in a tokenizer before any optimizer exists."""

from functools import partial

import pytest
import torch
from torch import nn

from golden_cases import assert_close
from tessera.backbones import CNNDecoder, CNNEncoder, LoRA, ViTDecoder, ViTEncoder, merge, tune
from tessera.backbones.tuning import LoRALinear, adapters
from tessera.errors import ConfigError
from tessera.quantizers import ProductQuantizer, SingleGridQuantizer, VQCodebook
from tessera.tokenizers import Tokenizer
from tessera.zoo import export, from_pretrained

TINY = {
    "model": "vit_small_patch14_dinov2",
    "resolution": 16,
    "patch_size": 4,
    "grid": 3,
    "pretrained": False,
    "drop_path": 0.0,
    "width": 12,
    "depth": 2,
    "num_heads": 3,
    "layer_scale": 0.5,
}
CNN = {"channels": 4, "channel_multipliers": (1, 2, 2), "num_res_blocks": 1, "z_channels": 6, "norm_groups": 2}


def tokenizer(encoder_tuning="full", decoder_tuning="full"):
    codebook = partial(VQCodebook, codebook_size=16)
    return Tokenizer(
        encoder=ViTEncoder(**TINY),
        quantizer=ProductQuantizer(partial(SingleGridQuantizer, codebook=codebook), branches=1, dim=4),
        decoder=ViTDecoder(**TINY),
        resolution=16,
        encoder_tuning=encoder_tuning,
        decoder_tuning=decoder_tuning,
    )


def trained(module):
    return {name for name, parameter in module.named_parameters() if parameter.requires_grad}


def disturb(module):
    """Make adapters do something."""
    with torch.no_grad():
        for _, layer in adapters(module):
            layer.lora_b.normal_()
    return module


def test_full_leaves_everything():
    assert trained(tokenizer()) == {name for name, _ in tokenizer().named_parameters()}


@pytest.mark.parametrize("tuned", ["encoder", "decoder"])
@pytest.mark.parametrize("mode", ["lora", "frozen"])
def test_what_trains(tuned, mode):
    model = tokenizer(**{f"{tuned}_tuning": mode})
    names = trained(model)
    assert {n for n in names if not n.startswith(tuned)} == {
        n for n, _ in model.named_parameters() if not n.startswith(tuned)
    }
    own = {"encoder": {"latent_tokens", "level_embed"}, "decoder": {"mask_token", "level_embed"}}[tuned]
    if tuned == "decoder":
        own |= {"to_pixel.projection.weight", "to_pixel.projection.bias"}
    if mode == "lora":
        own |= {"network.norm.weight", "network.norm.bias"}
        own |= {f"network.blocks.{b}.mlp.fc{f}.lora_{x}" for b in (0, 1) for f in (1, 2) for x in "ab"}
    assert {n.removeprefix(f"{tuned}.") for n in names if n.startswith(tuned)} == own


def test_a_step_moves_adapters_and_nothing_frozen():
    """The public code makes its optimizer before the adapters, which therefore never train."""
    model = tokenizer("lora", "frozen")
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    for _ in range(2):  # in the first step lora_b is zero, so that lora_a has no gradient
        images = torch.rand(4, 3, 16, 16) * 2 - 1
        output = model(images)
        ((output.reconstruction - images).square().mean() + sum(output.losses.values())).backward()
        optimizer.step()
    moved = {name for name, value in model.named_parameters() if not torch.equal(value, before[name])}
    assert moved == trained(model)


def test_adapters_start_as_the_identity_and_merge_exactly():
    plain = tokenizer().eval()
    model = tokenizer(LoRA(rank=3, alpha=6.0), "lora").eval()
    model.load_state_dict(plain.state_dict(), strict=False)  # the keys of the adapted layers stay the same
    images = torch.rand(2, 3, 16, 16) * 2 - 1
    assert_close(model.encode(images), plain.encode(images), atol=1e-6)
    disturb(model)
    assert not torch.allclose(model.encode(images), plain.encode(images), atol=1e-3)
    merged = merge(model)
    assert merged is not model and any(True for _ in adapters(model))
    assert not any(True for _ in adapters(merged))
    assert set(merged.state_dict()) == set(plain.state_dict())
    assert_close(merged.encode(images), model.encode(images), atol=1e-5)
    assert_close(merged.decode(torch.ones(2, 4, 3, 3)), model.decode(torch.ones(2, 4, 3, 3)), atol=1e-5)
    layer, weight = model.encoder.network.blocks[0].mlp.fc1, merged.encoder.network.blocks[0].mlp.fc1.weight
    assert_close(weight, layer.weight + 2.0 * layer.lora_b @ layer.lora_a, atol=1e-6)
    assert merge(plain) is plain


def test_fingerprint_sees_the_strength_of_adapters():
    torch.manual_seed(0)
    weak = disturb(tokenizer(LoRA(alpha=1.0)))
    strong = tokenizer(LoRA(alpha=2.0))
    strong.load_state_dict(weak.state_dict())
    assert weak.fingerprint() != strong.fingerprint()


def config(encoder_tuning):
    vit = {**TINY, "_target_": "tessera.backbones.ViTEncoder"}
    codebook = {"_target_": "tessera.quantizers.VQCodebook", "_partial_": True, "codebook_size": 16}
    branch = {"_target_": "tessera.quantizers.SingleGridQuantizer", "_partial_": True, "codebook": codebook}
    return {
        "_target_": "tessera.tokenizers.Tokenizer",
        # as a training has it; an export must not need the file
        "encoder": {**vit, "pretrained": True, "weights": "/nowhere/dinov2.pth"},
        "quantizer": {"_target_": "tessera.quantizers.ProductQuantizer", "branches": 1, "dim": 4, "branch": branch},
        "decoder": {**vit, "_target_": "tessera.backbones.ViTDecoder"},
        "resolution": 16,
        "encoder_tuning": encoder_tuning,
        "decoder_tuning": "frozen",
    }


@pytest.mark.parametrize("mode", ["lora", {"_target_": "tessera.backbones.LoRA", "rank": 2}])
def test_export_is_free_of_adapters_and_of_pretrained_files(mode, tmp_path):
    model = disturb(tokenizer(mode if mode == "lora" else LoRA(rank=2), "frozen")).eval()
    folder = export(model, tmp_path, config(mode))
    loaded = from_pretrained(folder)
    assert type(loaded.encoder.network.blocks[0].mlp.fc1) is nn.Linear
    assert loaded.architecture["encoder_tuning"] == loaded.architecture["decoder_tuning"] == "full"
    assert loaded.architecture["encoder"]["pretrained"] is False and loaded.architecture["encoder"]["weights"] is None
    assert trained(loaded) == {name for name, _ in loaded.named_parameters()}
    images = torch.rand(2, 3, 16, 16) * 2 - 1
    assert_close(loaded.encode(images), model.encode(images), atol=1e-5)


def test_frozen_cnn():
    encoder = CNNEncoder(**CNN)
    tune(encoder, "frozen", "tokenizer.encoder_tuning")
    assert not trained(encoder)


@pytest.mark.parametrize("backbone", [CNNEncoder, CNNDecoder])
def test_adapters_are_refused_on_a_cnn(backbone):
    message = r"tokenizer\.decoder_tuning=lora needs a transformer.*tokenizer\.decoder_tuning=full"
    with pytest.raises(ConfigError, match=message):
        tune(backbone(**CNN), "lora", "tokenizer.decoder_tuning")


@pytest.mark.parametrize(
    ("mode", "message"),
    [
        ("adapter", r"tokenizer\.encoder_tuning='adapter' is unknown; choose one of full, lora, frozen"),
        (LoRA(train=["head_of_state"]), r"tokenizer\.encoder_tuning\.train names head_of_state"),
    ],
)
def test_refuses_unknown_values(mode, message):
    with pytest.raises(ConfigError, match=message):
        tokenizer(mode)


@pytest.mark.parametrize("values", [{"rank": 0}, {"alpha": 0.0}])
def test_refuses_empty_adapters(values):
    with pytest.raises(ConfigError, match="LoRA needs rank >= 1 and alpha > 0"):
        LoRA(**values)


def test_other_layers_can_train_beside_the_adapters():
    encoder = ViTEncoder(**TINY)
    tune(encoder, LoRA(train=["norm", "patch_embed.proj"]), "key")
    assert {"network.patch_embed.proj.weight", "network.norm.bias"} <= trained(encoder)


def test_adapter_under_autocast_and_without_bias():
    layer = LoRALinear(nn.Linear(6, 5, bias=False), rank=2, alpha=4.0)
    nn.init.normal_(layer.lora_b)
    x = torch.randn(3, 6)
    assert_close(layer(x), x @ layer.merged().weight.T, atol=1e-6)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16
    assert layer.merged().bias is None
