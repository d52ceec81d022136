"""Published IBQ tokenizers: parity of both halves, which weights are taken, strictness."""

from typing import Any

import pytest
import torch
from torch import Tensor

from golden_cases import Golden, assert_close, assert_outputs, golden
from tessera.errors import CheckpointError, ConfigError
from tessera.tokenizers import Tokenizer
from tessera.zoo import from_public, ibq
from tessera.zoo.export import build

ENCODER, DECODER = "ibq_tokenizer_enc", "ibq_tokenizer_dec"


def weights() -> dict[str, Tensor]:
    """The tokenizer whose halves the two files hold."""
    return {**golden(ENCODER).weights, **golden(DECODER).weights}


def tokenizer(file: Golden, state: dict[str, Tensor] | None = None) -> Tokenizer:
    return from_public("ibq", file.config, weights() if state is None else state)


def encoder_outputs(model: Tokenizer, file: Golden) -> dict[str, Tensor]:
    """Every recorded output of the encoding half; by parts, as the pictures need not be square."""
    config = file.config
    with torch.no_grad():
        features = model.encoder(file.input["image"])
        z = model.quant_conv(features)
        rows = z.permute(0, 2, 3, 1).flatten(0, 2)
        out = model.quantizer.branches[0].codebooks[0](rows)
        best = (rows @ model.quantizer.branches[0].codebooks[0].embedding.t()).topk(2, dim=1).values
    losses = out.losses
    joint = losses["joint"] + losses["commitment"] + config.get("beta", 0.25) * losses["codebook"]
    entropies = {}
    if config.get("use_entropy_loss", True):
        sample, batch = losses["entropy_sample"], -losses["entropy_batch"]
        weights = (config.get(f"{name}_weight", 1.0) for name in ("sample_minimization", "batch_maximization"))
        entropy = next(weights) * sample - next(weights) * batch
        entropies = {"sample_entropy": sample, "avg_entropy": batch, "entropy_loss": entropy}
    bhw = (len(z), *z.shape[2:])
    return {
        "encoder_out": features,
        "quant_conv_out": z,
        "indices": out.indices,
        "indices_bhw": out.indices.view(bhw),
        "z_q": out.vectors.view(*bhw, -1).permute(0, 3, 1, 2),
        "quant_loss": joint,
        **entropies,
        "min_top1_top2_logit_margin": (best[:, 0] - best[:, 1]).min(),
    }


def decoder_outputs(model: Tokenizer, file: Golden) -> dict[str, Tensor]:
    z_q = file.input["z_q"]
    codes = model.quantizer.branches[0].codebooks[0].lookup(file.input["indices"])
    assert_close(codes.view(len(z_q), *z_q.shape[2:], -1).permute(0, 3, 1, 2).detach(), z_q, atol=1e-6)
    with torch.no_grad():
        return {"post_quant_conv_out": model.decoder_input(z_q), "reconstruction": model.decode(z_q)}


OUTPUTS = {ENCODER: encoder_outputs, DECODER: decoder_outputs}


@pytest.mark.golden
@pytest.mark.parametrize("case", [ENCODER, DECODER])
def test_published_tokenizer(case):
    file = golden(case)
    assert_outputs(OUTPUTS[case](tokenizer(file), file), file)


@pytest.mark.usefixtures("shipped_files")
@pytest.mark.parametrize("case", [ENCODER])
def test_the_tokenizer_does_the_same(case):
    """`tokenize` on a square part of the pictures."""
    file = golden(case)
    model = tokenizer(file)
    side = file.config["ddconfig"]["resolution"]
    images = file.input["image"]
    images = images.repeat(1, 1, -(-side // images.shape[2]), -(-side // images.shape[3]))[:, :, :side, :side]
    with torch.no_grad():
        tokens = model.tokenize(images)
        rows = model.quant_conv(model.encoder(images)).permute(0, 2, 3, 1).flatten(0, 2)
        assert torch.equal(tokens.flatten(), model.quantizer.branches[0].codebooks[0].assign(rows))
        assert_close(model.detokenize(tokens), model.reconstruct(images))


@pytest.mark.usefixtures("shipped_files")
@pytest.mark.parametrize("case", [ENCODER, DECODER])
def test_parity_fails_when_a_weight_of_any_part_changes(case):
    file = golden(case)
    # keys' biases, and with one channel per group biases before a norm, have no effect
    for key in (key for key in file.weights if key.endswith("weight")):
        changed = weights()
        changed[key] = changed[key] * torch.linspace(-1.5, 0.5, len(changed[key])).view(
            -1, *[1] * (changed[key].ndim - 1)
        )
        with pytest.raises(AssertionError):
            assert_outputs(OUTPUTS[case](tokenizer(file, changed), file), file)


def checkpoint(live: dict[str, Tensor], averaged: dict[str, Tensor]) -> dict[str, Any]:
    """The layout of published files."""
    shadows = {f"model_ema.{key.replace('.', '')}": value for key, value in averaged.items()}
    extra = {"model_ema.decay": torch.tensor(0.999), "model_ema.num_updates": torch.tensor(-1)}
    training = {
        "loss.discriminator.main.0.weight": torch.zeros(1),
        "model_ema.lossdiscriminatormain0weight": torch.ones(1),
    }
    return {"state_dict": {**live, **training, **shadows, **extra}, "epoch": 3}


@pytest.mark.usefixtures("shipped_files")
@pytest.mark.parametrize("case", [ENCODER])
def test_averaged_weights_are_taken_unless_told_otherwise(case):
    file, right = golden(case), weights()
    wrong = {key: torch.zeros_like(value) for key, value in right.items()}
    expected = tokenizer(file).state_dict()

    def equal(model: Tokenizer) -> bool:
        return all(torch.equal(value, expected[key]) for key, value in model.state_dict().items())

    assert equal(from_public("ibq", file.config, checkpoint(live=wrong, averaged=right)))
    assert not equal(from_public("ibq", file.config, checkpoint(live=right, averaged=wrong)))
    assert equal(ibq.from_public(file.config, checkpoint(live=right, averaged=wrong), weights="live"))
    generator = {f"first_stage_model.{key}": value for key, value in right.items()}
    assert equal(
        from_public("ibq", file.config, {"state_dict": {**generator, "transformer.head.weight": torch.ones(1)}})
    )
    incomplete = checkpoint(live=wrong, averaged=right)
    del incomplete["state_dict"]["model_ema.quant_convbias"]
    with pytest.raises(CheckpointError, match=r"1 weights have no partner.*quant_convbias"):
        from_public("ibq", file.config, incomplete)
    with pytest.raises(ConfigError, match="weights='raw'"):
        ibq.from_public(file.config, right, weights="raw")


@pytest.mark.usefixtures("shipped_files")
@pytest.mark.parametrize("case", [ENCODER])
def test_loading_is_strict(case):
    file, state = golden(case), weights()
    state["stray"] = state.pop("encoder.mid.attn_1.q.bias")
    with pytest.raises(CheckpointError) as error:
        tokenizer(file, state)
    assert "missing encoder.mid.1.q.bias" in str(error.value) and "unexpected stray" in str(error.value)


@pytest.mark.usefixtures("shipped_files")
@pytest.mark.parametrize("case", [ENCODER])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ddconfig": {"double_z": True}}, r"ddconfig\.double_z=true"),
        ({"l2_normalize": True}, "l2_normalize=true"),
        ({"n_embed": None}, "lacks n_embed"),
    ],
)
def test_refuses_options_it_would_have_to_ignore(case, change, message):
    config = dict(golden(case).config)
    for key, value in change.items():
        if value is None:
            del config[key]
        else:
            config[key] = {**config[key], **value} if isinstance(value, dict) else value
    with pytest.raises(ConfigError, match=message):
        from_public("ibq", config, {})


def test_attention_follows_the_configured_resolution():
    networks = {
        "double_z": False, "z_channels": 4, "resolution": 32, "in_channels": 3, "out_ch": 3, "ch": 32,
        "ch_mult": [1, 1, 1], "num_res_blocks": 1, "attn_resolutions": [32, 8], "dropout": 0.0,
    }  # fmt: skip
    model = build(ibq.architecture({"n_embed": 8, "embed_dim": 4, "ddconfig": networks}), "the test")
    assert [len(level.attn) for level in model.encoder.conv_blocks] == [1, 0, 1]
    assert [len(level.attn) for level in model.decoder.conv_blocks] == [2, 0, 2]
