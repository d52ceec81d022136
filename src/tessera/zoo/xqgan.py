"""Tokenizers of XQ-GAN (lxa9867/ImageFolder) from their published hyper-parameters and weights.

Covered: CNN encoder and decoder with one single-grid VQ codebook.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any

from torch import Tensor

from tessera.backbones import CNNDecoder, CNNEncoder
from tessera.errors import CheckpointError, ConfigError
from tessera.quantizers import ProductQuantizer, SingleGridQuantizer, VQCodebook
from tessera.tokenizers import Tokenizer
from tessera.zoo.keys import XQGAN_IGNORED, XQGAN_SINGLE_GRID, load_strictly, rename

_VQ16 = (1, 1, 2, 2, 4)


def public_weights(checkpoint: Mapping[str, Any]) -> Mapping[str, Tensor]:
    """The state dict inside a published checkpoint: `ema`, else `model`, else `state_dict`, else itself."""
    for name in ("ema", "model", "state_dict"):
        if isinstance(checkpoint.get(name), Mapping):
            return checkpoint[name]
    return checkpoint


def _refuse_unsupported(config: Mapping[str, Any]) -> None:
    for name in ("enc_type", "dec_type"):
        if config.get(name, "cnn") != "cnn":
            raise ConfigError(f"{name}={config[name]!r} of the published config is not supported here; only 'cnn' is")
    if len(config["v_patch_nums"]) != 1:
        raise ConfigError(
            f"v_patch_nums={list(config['v_patch_nums'])} of the published config is multi-scale, "
            "which is not supported here; only a single grid is"
        )
    if config.get("lfq"):
        raise ConfigError("lfq=true of the published config is not supported here; only VQ codebooks are")
    if config.get("product_quant", 1) != 1:
        raise ConfigError(
            f"product_quant={config['product_quant']} of the published config has no CNN tokenizer: "
            "the public code fails on it, so no weights can exist"
        )


def from_public(config: Mapping[str, Any], state_dict: Mapping[str, Any]) -> Tokenizer:
    """Build a tokenizer and load published weights strictly.

    Args:
        config: published names; read are codebook_size, codebook_embed_dim, codebook_l2_norm, v_patch_nums,
            z_channels, encoder_ch_mult, decoder_ch_mult, dropout_p, enc_type, dec_type, product_quant, lfq,
            and the constants of the public classes ch (128), num_groups (32), num_res_blocks (2). The other
            published options concern training or the ViT and change nothing of a CNN tokenizer.
        state_dict: published state dict, or the checkpoint around it (averaged weights are preferred).

    Returns:
        The tokenizer in eval mode.

    Raises:
        ConfigError: an option that is missing or not supported.
        CheckpointError: weights that do not fit; lists missing, unexpected and mis-shaped keys.
    """
    missing = [name for name in ("codebook_size", "codebook_embed_dim", "v_patch_nums") if name not in config]
    if missing:
        raise ConfigError(f"the published config lacks {', '.join(missing)}")
    _refuse_unsupported(config)
    sizes = {
        "channels": config.get("ch", 128),
        "num_res_blocks": config.get("num_res_blocks", 2),
        "z_channels": config.get("z_channels", 256),
        "norm_groups": config.get("num_groups", 32),
        "dropout": config.get("dropout_p", 0.0),
    }
    codebook = partial(
        VQCodebook,
        codebook_size=config["codebook_size"],
        l2_normalize=config.get("codebook_l2_norm", True),
    )
    encoder = CNNEncoder(channel_multipliers=tuple(config.get("encoder_ch_mult", _VQ16)), **sizes)
    tokenizer = Tokenizer(
        encoder=encoder,
        quantizer=ProductQuantizer(
            branch=partial(SingleGridQuantizer, codebook=codebook),
            branches=1,
            dim=config["codebook_embed_dim"],
        ),
        decoder=CNNDecoder(channel_multipliers=tuple(config.get("decoder_ch_mult", _VQ16)), **sizes),
        resolution=config["v_patch_nums"][-1] * encoder.downsample,
    )
    weights = public_weights(state_dict)
    if not weights:
        raise CheckpointError("the published checkpoint holds no weights under ema, model or state_dict")
    load_strictly(tokenizer, rename(weights, XQGAN_SINGLE_GRID, XQGAN_IGNORED), "the published checkpoint")
    return tokenizer.eval()
