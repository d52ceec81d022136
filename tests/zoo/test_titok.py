"""Published TiTok tokenizers: parity of all variants, strictness, refusals."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from golden_cases import Golden, assert_close, golden
from tessera.errors import CheckpointError, ConfigError
from tessera.tokenizers import Tokenizer
from tessera.zoo import from_public

TWO_STAGE, SINGLE_STAGE, VAE = "titok_two_stage", "titok_single_stage_vq", "titok_vae"


def published(file: Golden, weights: dict[str, Tensor] | None = None) -> Tokenizer:
    return from_public("titok", file.config, file.weights if weights is None else weights)


def to_unit(images: Tensor) -> Tensor:
    """[-1, 1] -> [0, 1], the published range."""
    return (images + 1) / 2


def recorded(module: torch.nn.Module, into: dict[str, Tensor], name: str, change=lambda x: x) -> None:
    module.register_forward_hook(lambda module, inputs, output: into.update({name: change(output)}))


def encoded(tokenizer: Tokenizer, file: Golden) -> dict[str, Any]:
    """What the VQ variants record."""
    seen: dict[str, Tensor] = {}
    encoder, decoder = tokenizer.encoder.transformer, tokenizer.decoder.transformer
    recorded(encoder.norm_in, seen, "encoder_after_ln_pre")
    recorded(encoder.blocks[0], seen, "encoder_block0_output_LND", lambda x: x.transpose(0, 1))
    recorded(decoder.norm_in, seen, "decoder_after_ln_pre")
    recorded(decoder.norm, seen, "decoder_after_ln_post")
    with torch.no_grad():
        output = tokenizer(file.input["image"] * 2 - 1)
        from_tokens = tokenizer.decode(tokenizer.quantizer.decode(output.tokens))
    return {
        **seen,
        "encoder_output": output.z,
        "indices": output.tokens,
        "z_quantized": output.z_q,
        "losses": output.losses,
        "image_from_forward": to_unit(output.reconstruction),
        "image_from_tokens": to_unit(from_tokens),
    }


def published_losses(losses: dict[str, Tensor], beta: float) -> Tensor:
    """(quantizer, commitment, codebook), the commitment with its weight."""
    commitment = beta * losses["commitment"]
    return torch.stack([commitment + losses["codebook"], commitment, losses["codebook"]])


def compare(ours: dict[str, Tensor], file: Golden) -> None:
    for name, expected in file.output.items():
        assert name in ours, f"{name} is not compared"
        if expected.dtype == torch.int64:
            assert torch.equal(ours[name], expected), name
        else:
            assert_close(ours[name], expected, atol=2e-5)


def outputs(tokenizer: Tokenizer, file: Golden, case: str) -> dict[str, Tensor]:
    """Every recorded output of a case, ours."""
    if case == VAE:
        return vae_outputs(tokenizer, file)
    ours = encoded(tokenizer, file)
    losses = ours.pop("losses")
    if case == SINGLE_STAGE:
        before: dict[str, Tensor] = {}
        tokenizer.decoder.conv_out.register_forward_pre_hook(lambda module, inputs: before.update(x=inputs[0]))
        with torch.no_grad():
            tokenizer.decode(ours["z_quantized"])
        beta = file.config["vq_model"]["commitment_cost"]
        return {**ours, "before_conv_out": before["x"], "encode_losses": published_losses(losses, beta)}
    with torch.no_grad():
        logits = tokenizer.decoder.proxy_logits(tokenizer.post_quant_conv(ours["z_quantized"]))
        soft = tokenizer.decoder.soft_codes(logits)
    cross_entropy = F.cross_entropy(logits.flatten(2), file.input["proxy_codes"])
    stage1 = published_losses(losses, file.config["stage1_commitment_cost"])
    return {
        **ours,
        "decoder_logits": logits,
        "soft_codes": soft,
        "encode_losses": torch.zeros(3),  # published: multiplied by 0; our stage 2 leaves them out
        "stage1/decoder_logits": logits,
        "stage1/quantizer_losses": stage1,
        "stage1/reconstruction_loss": cross_entropy,
        "stage1/total_loss": cross_entropy + file.config["stage1_quantizer_weight"] * stage1[0],
    }


def vae_outputs(tokenizer: Tokenizer, file: Golden) -> dict[str, Tensor]:
    quantizer = tokenizer.quantizer
    with torch.no_grad():
        moments = tokenizer.encode(file.input["image"] * 2 - 1)
        mean, log_variance = quantizer.moments(moments)
        std = (0.5 * log_variance).exp()
        z = mean + std * file.input["noise"]
        mode = tokenizer.reconstruct(file.input["image"] * 2 - 1)
        assert_close(quantizer.eval()(moments).z_q, mean, atol=0)
        return {
            "moments": moments,
            "mean": mean,
            "logvar": log_variance,
            "std": std,
            "kl": quantizer.kl(mean, log_variance),
            "z": z,
            "image_from_z": to_unit(tokenizer.decode(z)),
            "image_from_mode": to_unit(tokenizer.decode(mean)),
            "clamped": mode,
        }


@pytest.mark.golden
@pytest.mark.parametrize("case", [TWO_STAGE, SINGLE_STAGE, VAE])
def test_published_tokenizer(case):
    file = golden(case)
    compare(outputs(published(file), file, case), file)


@pytest.mark.usefixtures("shipped_files")
@pytest.mark.parametrize("case", [TWO_STAGE, SINGLE_STAGE, VAE])
def test_parity_fails_when_any_weight_changes(case):
    """The comparison sees every tensor, except the keys' bias, which softmax doesn't see either, and biases that the
    norms behind them take out again where groups are single channels."""
    file = golden(case)
    for key in file.weights:
        if key.endswith("upsample_conv.bias"):
            continue
        weights = {name: value.clone() for name, value in file.weights.items()}
        if key.endswith("in_proj_bias"):
            third = len(weights[key]) // 3
            weights[key][:third] += 0.5
            weights[key][2 * third :] += 0.5
        else:
            weights[key] = weights[key] * -1.5 + 0.1
        with pytest.raises(AssertionError):
            compare(outputs(published(file, weights), file, case), file)


@pytest.mark.usefixtures("shipped_files")
@pytest.mark.parametrize("case", [TWO_STAGE])
def test_the_layout_of_the_two_stage_models_is_needed(case):
    file = golden(case)
    tokenizer = published(file)
    assert tokenizer.encoder.latent_layout == "reshaped"
    before = tokenizer.fingerprint()
    tokenizer.encoder.latent_layout = "transposed"
    assert tokenizer.fingerprint() != before
    assert not torch.allclose(encoded(tokenizer, file)["encoder_output"], file.output["encoder_output"], atol=1e-3)


@pytest.mark.usefixtures("shipped_files")
@pytest.mark.parametrize("case", [SINGLE_STAGE])
def test_reads_the_nested_config_of_the_hub(case):
    file = golden(case)
    nested = {
        "model": {"vq_model": {**file.config["vq_model"], "sizes": file.config["sizes"]}},
        "dataset": {"preprocessing": {"crop_size": file.config["crop_size"]}},
    }
    tokenizer = from_public("titok", nested, file.weights)
    compare(outputs(tokenizer, file, case), file)


@pytest.mark.usefixtures("shipped_files")
@pytest.mark.parametrize("case", [SINGLE_STAGE])
def test_loading_is_strict(case):
    file = golden(case)
    weights = dict(file.weights)
    del weights["decoder.decoder_embed.bias"], weights["latent_tokens"]
    weights["stray"] = torch.zeros(1)
    with pytest.raises(CheckpointError) as error:
        published(file, weights)
    for part in ("missing post_quant_conv.bias", "missing encoder.latent_tokens", "unexpected stray"):
        assert part in str(error.value)


FLAT = {
    "crop_size": 16, "token_size": 4, "num_latent_tokens": 4, "codebook_size": 8, "vit_enc_model_size": "small",
    "vit_dec_model_size": "small", "vit_enc_patch_size": 8, "vit_dec_patch_size": 8,
}  # fmt: skip


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"finetune_decoder": True, "quantize_mode": "vae"}, "quantize_mode=vae"),
        ({"finetune_decoder": False}, "is_legacy=true with finetune_decoder=false"),
        ({"is_legacy": False}, "no proxy codes"),
        ({"finetune_decoder": False, "is_legacy": False, "quantize_mode": "lfq"}, "quantize_mode='lfq'"),
        ({"finetune_decoder": False, "is_legacy": False, "vit_enc_model_size": "huge"}, "vit_enc_model_size='huge'"),
        ({"token_size": None}, "lacks token_size"),
    ],
)
def test_refuses_what_does_not_exist(change, message):
    with torch.device("meta"), pytest.raises(ConfigError, match=message):
        from_public("titok", {**FLAT, **change}, {})
