"""Published XQ-GAN tokenizers: parity, strictness, unsupported options."""

from typing import Any

import pytest
import torch
from torch import Tensor

from golden_cases import assert_close, golden
from tessera.errors import CheckpointError, ConfigError
from tessera.tokenizers import Tokenizer
from tessera.zoo import from_public
from tessera.zoo.keys import XQGAN_IGNORED, XQGAN_SINGLE_GRID, rename

CASE = "xqgan_cnn_vq"


def public_config(file) -> dict[str, Any]:
    return {**file.config["model"], **file.config["tiny_cnn"]}


def branch_and_scale(name: str) -> tuple[int, int]:
    """`idx_b{p}_s{k}` or `fhat_b{p}_s{k}` -> (p, k)."""
    branch, scale = name.split("_")[1:]
    return int(branch.removeprefix("b")), int(scale.removeprefix("s"))


def differences(tokenizer: Tokenizer, file) -> dict[str, Any]:
    """Every recorded output beside ours."""
    image, size = file.input["image"], file.config["model"]["codebook_embed_dim"]
    with torch.no_grad():
        z = tokenizer.encode(image)
        tokens = tokenizer.tokenize(image)
        z_q = tokenizer.quantizer.decode(tokens)
        ours: dict[str, Tensor] = {
            "encoder_out": tokenizer.encoder(image),
            "encode": z,
            "recon_last": tokenizer.reconstruct(image),
            "decode_noclamp": tokenizer.decode(z_q),
            "fhat_to_img": tokenizer.detokenize(tokens),
            "image_from_codes": tokenizer.detokenize(file.input["codes"]),
        }
        for name in file.output:
            if name.startswith("idx_"):
                branch, _ = branch_and_scale(name)
                ours[name] = tokens[:, branch].flatten()
            elif name.startswith("fhat_b"):
                branch, _ = branch_and_scale(name)
                ours[name] = z_q[:, branch * size : (branch + 1) * size]
    return ours


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
@pytest.mark.parametrize("case", [CASE])
def test_published_tokenizer(case):
    file = golden(case)
    tokenizer = from_public("xqgan", public_config(file), file.weights)
    ours = differences(tokenizer, file)
    assert set(file.output) == set(ours), "every recorded output is compared"
    for name, expected in file.output.items():
        if name.startswith("idx_"):
            assert torch.equal(ours[name], expected), name
        else:
            assert_close(ours[name], expected, atol=2e-5 if ours[name].shape[1] == 3 else 1e-5)
    # training mode and the straight-through path give the same picture
    output = tokenizer.train()(file.input["image"])
    assert_close(output.reconstruction.detach(), file.output["decode_noclamp"], atol=2e-5)


@pytest.mark.golden
@pytest.mark.parametrize("case", [CASE])
def test_parity_fails_when_a_weight_of_any_part_changes(case):
    """The comparison sees every sub-module: one changed entry spoils it."""
    file = golden(case)
    parts = ["quant_conv.weight", "post_quant_conv.weight", "quantize.embedding.weight"]
    for prefix in ("encoder", "decoder"):
        parts += [f"{prefix}.{name}.weight" for name in ("conv_in", "conv_out", "norm_out", "mid.0.conv1", "mid.1.v")]
        parts += [
            key
            for key in file.weights
            if key.startswith(f"{prefix}.conv_blocks.")
            and key.endswith((".conv1.weight", ".v.weight", "sample.conv.weight"))
        ]
    for key in parts:
        weights = {name: value.clone() for name, value in file.weights.items()}
        weights[key] *= -1.5
        assert not all(matches(from_public("xqgan", public_config(file), weights), file).values()), key


@pytest.mark.golden
@pytest.mark.parametrize("case", [CASE])
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


@pytest.mark.golden
@pytest.mark.parametrize("case", [CASE])
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
    assert list(rename(state, XQGAN_SINGLE_GRID, XQGAN_IGNORED)) == [
        "quantizer.branches.0.codebooks.0.embedding",
        "encoder.conv_blocks.0.res.1.conv1.weight",
        "quant_conv.bias",
        "stray",  # kept, so that strict loading reports it
    ]
    product = {f"quantizes.{p}.embedding.weight": torch.zeros(1) for p in range(11)}
    assert list(rename(product, XQGAN_SINGLE_GRID)) == [
        f"quantizer.branches.{p}.codebooks.0.embedding" for p in range(11)
    ]
    with pytest.raises(CheckpointError, match="two published keys"):
        rename({**state, "quantizes.0.embedding.weight": torch.zeros(1)}, XQGAN_SINGLE_GRID)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"enc_type": "dinov2"}, "enc_type='dinov2'"),
        ({"dec_type": "dinov2"}, "dec_type='dinov2'"),
        ({"v_patch_nums": [1, 2, 4]}, r"v_patch_nums=\[1, 2, 4\]"),
        ({"lfq": True}, "lfq=true"),
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
