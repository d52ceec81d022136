"""Published XQ-GAN tokenizers: parity, strictness, unsupported options."""

import re
from typing import Any

import pytest
import torch
from torch import Tensor

from golden_cases import assert_close, golden
from tessera.backbones import merge
from tessera.backbones.tuning import adapters
from tessera.errors import CheckpointError, ConfigError
from tessera.tokenizers import Tokenizer
from tessera.zoo import export, from_pretrained, from_public
from tessera.zoo.export import build
from tessera.zoo.keys import XQGAN, XQGAN_IGNORED, load_strictly, rename
from tessera.zoo.xqgan import architecture

SINGLE_GRID = ["xqgan_cnn_vq", "xqgan_vq", "xqgan_vq_learnedpos", "xqgan_vp2", "xqgan_mixed"]
MULTI_SCALE = ["xqgan_msvr_p2", "xqgan_msbr_p2", "xqgan_cnn_msvr"]
CASES = SINGLE_GRID + MULTI_SCALE


def public_config(file) -> dict[str, Any]:
    config = file.config
    tiny = {**(config.get("tiny_cnn") or {}), **(config.get("tiny_backbone") or {})}
    return {**config["model"], **tiny, "lora": config.get("lora", {})}


def branch_and_scale(name: str) -> tuple[int, int]:
    """`idx_b{p}_s{k}` or `fhat_b{p}_s{k}` -> (p, k)."""
    branch, scale = name.split("_")[1:]
    return int(branch.removeprefix("b")), int(scale.removeprefix("s"))


def rows_of_branches(maps: Tensor, branches: int, rows: bool) -> Tensor:
    """(B, P C, h, w) in the recorded layout: with rows (B, C, P h w, 1), branch by branch; else as it is."""
    if not rows:
        return maps
    parts = [part.flatten(2) for part in maps.chunk(branches, dim=1)]
    return torch.cat(parts, dim=2).unsqueeze(3)


def differences(tokenizer: Tokenizer, file) -> dict[str, Any]:
    """Every recorded output beside ours."""
    image, size = file.input["image"], file.config["model"]["codebook_embed_dim"]
    branches = tokenizer.quantizer.num_branches
    with torch.no_grad():
        features, z = tokenizer.encoder(image), tokenizer.encode(image)
        tokens = tokenizer.tokenize(image)
        z_q = tokenizer.quantizer.decode(tokens)
        if file.output["encoder_out"].ndim == 3:  # a ViT's tokens
            features = rows_of_branches(features, branches, rows=True).squeeze(3).transpose(1, 2)
        ours: dict[str, Tensor] = {
            "encoder_out": features,
            "encode": rows_of_branches(z, branches, rows=branches > 1),
            "recon_last": tokenizer.reconstruct(image),
            "decode_noclamp": tokenizer.decode(z_q),
            "fhat_to_img": tokenizer.detokenize(tokens),
        }
        if "codes" in file.input:
            ours["image_from_codes"] = tokenizer.detokenize(file.input["codes"])
        sides = file.config["model"]["v_patch_nums"]
        latents = [z_q]
        if len(sides) > 1:
            latents = [tokenizer.quantizer.partial_decode(tokens, scale + 1) for scale in range(len(sides))]
        for scale, latent in enumerate(latents):
            ours[f"recon_s{scale}"] = tokenizer.decode(latent).clamp(-1, 1)
            for branch in range(branches):
                ours[f"fhat_b{branch}_s{scale}"] = latent[:, branch * size : (branch + 1) * size]
                part = tokens[:, branch].split([side**2 for side in sides], dim=1)[scale]
                ours[f"idx_b{branch}_s{scale}"] = part.reshape(file.output[f"idx_b{branch}_s{scale}"].shape)
        if len(sides) > 1:
            ours["var_input"] = tokenizer.quantizer.next_scale_input(tokens)
            ours |= next_scales(tokenizer.quantizer, tokens, sides)
    # the public code records what it can run: e.g. no teacher forcing of BSQ
    return {name: value for name, value in ours.items() if name in file.output}


def next_scales(quantizer, tokens: Tensor, sides: list[int]) -> dict[str, Tensor]:
    """What a generator that goes from scale to scale sees when it is fed the tokens."""
    latent = torch.zeros(len(tokens), quantizer.dim, sides[-1], sides[-1])
    found, inputs = {}, []
    for scale, part in enumerate(tokens.split([side**2 for side in sides], dim=2)):
        latent, following = quantizer.advance(latent, quantizer.embed(part, scale), scale)
        found[f"ar_fhat_s{scale}"] = latent
        inputs += [following] if following is not None else []
    return {**found, "var_input_from_ar": torch.cat(inputs, dim=1)}


def matches(tokenizer: Tokenizer, file) -> dict[str, bool]:
    ours, result = differences(tokenizer, file), {}
    for name, expected in file.output.items():
        try:
            assert_close(ours[name], expected, atol=0 if name.startswith("idx_") else 2e-5, rtol=1e-5)
            result[name] = True
        except AssertionError:
            result[name] = False
    return result


@pytest.mark.golden
@pytest.mark.parametrize("case", CASES)
def test_published_tokenizer(case):
    file = golden(case)
    tokenizer = from_public(file.metadata["family"], file.config, file.weights)
    ours = differences(tokenizer, file)
    assert set(file.output) == set(ours), "every recorded output is compared"
    for name, expected in file.output.items():
        if name.startswith("idx_"):
            assert torch.equal(ours[name], expected), name
        else:
            assert_close(ours[name], expected, atol=2e-5 if ours[name].shape[1] == 3 else 1e-5)
    # training mode and the straight-through path give the same picture
    for module in tokenizer.modules():
        if type(module).__name__ == "DropPath":
            module.drop_prob = 0.0
    output = tokenizer.train()(file.input["image"])
    assert_close(output.reconstruction.detach(), file.output["decode_noclamp"], atol=2e-5)


def parts_of(file) -> list[str]:
    """A weight of every kind of sub-module, but for those that record statistics or shift all scores alike."""
    kinds = {}
    for key in file.weights:
        kind = re.sub(r"\.\d+\.", ".", key)
        skipped = (".k.bias", "ema_vocab_hit_SV", "lvl1LC", "original_module.weight", "original_module.bias", "scaler")
        if not key.endswith(skipped):
            kinds[kind] = key  # the last of its kind
    return sorted(kinds.values())


def spoiled(file, key: str) -> dict[str, Tensor]:
    """The weights with one changed; not evenly, which a layer norm would not see."""
    value = file.weights[key]
    return {**file.weights, key: value * -1.5 + torch.linspace(-0.5, 0.5, value.numel()).view(value.shape)}


@pytest.mark.usefixtures("shipped_files")
@pytest.mark.parametrize("case", CASES)
def test_parity_fails_when_a_weight_of_any_part_changes(case):
    """The comparison sees every sub-module: one changed tensor spoils it."""
    file = golden(case)
    for key in parts_of(file):
        weights = spoiled(file, key)
        assert not all(matches(from_public("xqgan", public_config(file), weights), file).values()), key


@pytest.mark.golden
@pytest.mark.parametrize("case", ["xqgan_lora"])
def test_published_adapters(case, tmp_path):
    file = golden(case)
    tokenizer = from_public(file.metadata["family"], file.config, file.weights)
    image, lora = file.input["image"], file.config["lora"]
    branches = tokenizer.quantizer.num_branches
    layers = dict(adapters(tokenizer))
    assert len(layers) == sum(key.endswith("lora_A.default.weight") for key in file.weights) > 0
    assert all((layer.rank, layer.alpha) == (lora["r"], lora["lora_alpha"]) for layer in layers.values())

    def features(model):
        return rows_of_branches(model.encoder(image), branches, True).squeeze(3).mT

    for model in (tokenizer, merge(tokenizer), from_pretrained(export(tokenizer, tmp_path))):
        with torch.no_grad():
            assert_close(features(model), file.output["encoder_out"])
            z = rows_of_branches(model.encode(image), branches, rows=branches > 1)
            assert_close(z, file.output["encode"])
            assert_close(model.reconstruct(image), file.output["recon"])
    trained = {name for name, p in tokenizer.encoder.network.named_parameters() if p.requires_grad}
    saved = {f"{name}.{kind}" for name in lora["modules_to_save"] for kind in ("weight", "bias")}
    assert {name for name in trained if "lora_" not in name} == saved
    without = {k: v * 0 if "lora_B" in k else v for k, v in file.weights.items()}
    tokenizer = from_public("xqgan", public_config(file), without)
    with torch.no_grad():
        assert_close(features(tokenizer), file.output["encoder_out_loraB_zero"])


@pytest.mark.usefixtures("shipped_files")
@pytest.mark.parametrize("case", ["xqgan_lora"])
def test_parity_of_adapters_fails_when_a_weight_changes(case):
    file = golden(case)
    for key in parts_of(file):
        weights = spoiled(file, key)
        tokenizer = from_public("xqgan", public_config(file), weights)
        with torch.no_grad():
            branches = tokenizer.quantizer.num_branches
            z = rows_of_branches(tokenizer.encode(file.input["image"]), branches, rows=branches > 1)
            recon = tokenizer.reconstruct(file.input["image"])
        same = torch.allclose(z, file.output["encode"], atol=1e-5)
        assert not (same and torch.allclose(recon, file.output["recon"], atol=1e-5)), key


@pytest.mark.usefixtures("shipped_files")
@pytest.mark.parametrize("case", ["xqgan_cnn_vq", "xqgan_vq"])
def test_takes_averaged_weights_and_ignores_teachers(case):
    file = golden(case)
    teachers = {
        "semantic_model.blocks.0.weight": torch.zeros(2),
        "encoder.lvl1LC": torch.zeros(1, dtype=torch.int64),
    }
    checkpoint = {
        "model": {key: torch.zeros_like(value) for key, value in file.weights.items()},
        "ema": {**file.weights, **teachers},
        "steps": 10,
    }
    tokenizer = from_public("xqgan", public_config(file), checkpoint)
    assert all(matches(tokenizer, file).values())


@pytest.mark.usefixtures("shipped_files")
@pytest.mark.parametrize("case", ["xqgan_cnn_vq", "xqgan_vq"])
def test_loading_is_strict(case):
    file = golden(case)
    weights = dict(file.weights)
    del weights["quant_conv.bias"]
    weights["decoder.extra"] = torch.zeros(1)
    weights["quantize.embedding.weight"] = weights["quantize.embedding.weight"][:-1]
    with pytest.raises(CheckpointError) as error:
        from_public("xqgan", public_config(file), weights)
    message = str(error.value)
    assert "missing quant_conv.bias" in message
    assert "unexpected decoder.extra" in message
    assert "quantizer.branches.0.codebooks.0.embedding is (" in message


@pytest.mark.usefixtures("shipped_files")
@pytest.mark.parametrize("case", ["xqgan_msbr_p2"])
def test_code_magnitudes_must_be_those_of_the_options(case):
    file = golden(case)
    with pytest.raises(CheckpointError, match=r"quantizes\.0\.scaler=.*scale"):
        from_public("xqgan", {**public_config(file), "scale": 0.7}, file.weights)


@pytest.mark.golden
@pytest.mark.parametrize("case", ["var_pq2_tokenize"])
def test_published_tokenizer_without_decoder(case):
    file = golden(case)
    sizes = {"embed_dim": "vit_dim", "depth": "vit_depth", "num_heads": "vit_heads"}
    config = {**file.config, **{ours: file.config[theirs] for ours, theirs in sizes.items()}}
    config |= {"enc_type": "dinov2", "dec_type": "dinov2"}
    state = {key.removeprefix("vae_local."): value for key, value in file.weights.items()}
    tokenizer = build(architecture(config), "test").eval()
    own = tokenizer.state_dict()
    absent = {key: own[key] for key in own if key.startswith(("decoder.", "post_quant_conv."))}
    load_strictly(tokenizer, {**rename(state, XQGAN, XQGAN_IGNORED), **absent}, "golden")
    with torch.no_grad():
        z, tokens = tokenizer.encode(file.input["image"]), tokenizer.tokenize(file.input["image"])
        z_q = tokenizer.quantizer.decode(tokens)
        assert_close(tokenizer.quantizer.next_scale_input(tokens), file.output["var_input"], atol=2e-5)
    branches, size = config["product_quant"], config["codebook_embed_dim"]
    assert_close(rows_of_branches(z, branches, rows=branches > 1), file.output["encode"], atol=2e-5)
    for p in range(branches):
        assert_close(z_q[:, p * size : (p + 1) * size], file.output[f"f_hat_p{p}"], atol=2e-5)
        for scale, part in enumerate(tokens[:, p].split([side**2 for side in config["v_patch_nums"]], dim=1)):
            assert torch.equal(part, file.output[f"idx_p{p}_{scale}"])


def test_key_table():
    state = {
        "quantize.embedding.weight": torch.zeros(1),
        "quantize.ema_vocab_hit_SV": torch.zeros(1),
        "encoder.conv_blocks.0.res.1.conv1.weight": torch.zeros(1),
        "quant_conv.bias": torch.zeros(1),
        "semantic_model.norm.weight": torch.zeros(1),
        "sem_linear.weight": torch.zeros(1),
        "stray": torch.zeros(1),
    }
    assert list(rename(state, XQGAN, XQGAN_IGNORED)) == [
        "quantizer.branches.0.codebooks.0.embedding",
        "encoder.conv_blocks.0.res.1.conv1.weight",
        "quant_conv.bias",
        "stray",  # kept, so that strict loading reports it
    ]
    peft = "encoder.model.base_model.model."
    lora = ["blocks.0.mlp.fc1.base_layer.bias", "blocks.0.mlp.fc1.lora_A.default.weight", "blocks.0.norm1.weight"]
    lora += ["blocks.0.mlp.fc2.lora_B.default.weight", "norm.modules_to_save.default.bias", "norm.original_module.bias"]
    assert list(rename({peft + key: torch.zeros(1) for key in lora}, XQGAN, XQGAN_IGNORED)) == [
        "encoder.network.blocks.0.mlp.fc1.bias",
        "encoder.network.blocks.0.mlp.fc1.lora_a",
        "encoder.network.blocks.0.norm1.weight",
        "encoder.network.blocks.0.mlp.fc2.lora_b",
        "encoder.network.norm.bias",
    ]
    product = {f"quantizes.{p}.embedding.weight": torch.zeros(1) for p in range(11)}
    assert list(rename(product, XQGAN)) == [f"quantizer.branches.{p}.codebooks.0.embedding" for p in range(11)]
    with pytest.raises(CheckpointError, match="two published keys"):
        rename({**state, "quantizes.0.embedding.weight": torch.zeros(1)}, XQGAN)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"enc_type": "swin"}, "enc_type='swin'"),
        ({"dec_type": "swin"}, "dec_type='swin'"),
        ({"num_latent_tokens": 15}, "num_latent_tokens=15"),
        ({"lfq": True}, "lfq=true"),
        ({"lfq": True, "v_patch_nums": [1, 2, 4]}, "codebook_size=8.*16 codes"),
        ({"product_quant": 2}, "product_quant=2"),
    ],
)
def test_refuses_options_it_would_have_to_ignore(change, message):
    config = {"codebook_size": 8, "codebook_embed_dim": 4, "v_patch_nums": [4], **change}
    with pytest.raises(ConfigError, match=message):
        from_public("xqgan", config, {})


def test_refuses_an_incomplete_config_and_an_unknown_family():
    with pytest.raises(ConfigError, match="codebook_size, codebook_embed_dim"):
        from_public("xqgan", {"v_patch_nums": [4]}, {})
    with pytest.raises(ConfigError, match=r"'vqgan'.*xqgan"):
        from_public("vqgan", {}, {})
