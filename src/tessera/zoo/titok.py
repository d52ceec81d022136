"""Tokenizers of TiTok (bytedance/1d-tokenizer) from their published hyper-parameters and weights.

Covered: two-stage models with their pixel decoder, single-stage VQ, single-stage VAE. The published defaults of missing
keys are kept here, as they decide the architecture: finetune_decoder true, quantize_mode vq, is_legacy true.
"""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from tessera.backbones import TiTokProxyDecoder
from tessera.backbones.titok_layers import SIZES
from tessera.errors import ConfigError
from tessera.tokenizers import Tokenizer
from tessera.zoo import maskgit
from tessera.zoo.export import build
from tessera.zoo.keys import Rules, load_strictly, rename
from tessera.zoo.nodes import Node, single_grid

_TRANSFORMER: Rules = (
    (r"(encoder|decoder)\.positional_embedding", r"\1.position_embedding"),
    (r"(encoder|decoder)\.latent_token_positional_embedding", r"\1.latent_position_embedding"),
    (r"(encoder|decoder)\.ln_pre\.(.*)", r"\1.transformer.norm_in.\2"),
    (r"(encoder|decoder)\.ln_post\.(.*)", r"\1.transformer.norm.\2"),
    (r"(encoder|decoder)\.transformer\.(\d+)\.ln_([12])\.(.*)", r"\1.transformer.blocks.\2.norm\3.\4"),
    (r"(encoder|decoder)\.transformer\.(\d+)\.attn\.in_proj_(.*)", r"\1.transformer.blocks.\2.attn.qkv.\3"),
    (r"(encoder|decoder)\.transformer\.(\d+)\.attn\.out_proj\.(.*)", r"\1.transformer.blocks.\2.attn.proj.\3"),
    (r"(encoder|decoder)\.transformer\.(\d+)\.mlp\.c_fc\.(.*)", r"\1.transformer.blocks.\2.mlp.0.\3"),
    (r"(encoder|decoder)\.transformer\.(\d+)\.mlp\.c_proj\.(.*)", r"\1.transformer.blocks.\2.mlp.2.\3"),
)
_ENDS: Rules = (
    (r"latent_tokens", r"encoder.latent_tokens"),
    (r"encoder\.conv_out\.(.*)", r"quant_conv.\1"),
    (r"decoder\.decoder_embed\.(.*)", r"post_quant_conv.\1"),
    (r"quantize\.embedding\.weight", r"quantizer.branches.0.codebooks.0.embedding"),
)
_PIXEL_HEAD: Rules = ((r"decoder\.ffn\.0\.(.*)", r"decoder.head.\1"),)
_PROXY_HEAD: Rules = (
    (r"decoder\.ffn\.([02])\.(.*)", r"decoder.head.\1.\2"),
    (r"pixel_quantize\.embedding\.weight", r"decoder.pixel_embedding"),
)
# (our key, dimensions of the published tensor, to ours)
_RESHAPED = (
    ("post_quant_conv.weight", 2, lambda weight: weight[:, :, None, None]),  # a linear layer there
    ("decoder.mask_token", 3, lambda token: token[0]),
)


def _flat(config: Mapping[str, Any]) -> dict[str, Any]:
    """Published options in one level, from the hub's nested config.json or from flat ones."""
    nested = config.get("model", config)
    found = {**config, **nested.get("vq_model", nested)}
    if "crop_size" not in found:
        found["crop_size"] = config.get("dataset", {}).get("preprocessing", {}).get("crop_size")
    required = (
        "crop_size", "token_size", "num_latent_tokens", "vit_enc_model_size", "vit_enc_patch_size",
        "vit_dec_model_size", "vit_dec_patch_size",
    )  # fmt: skip
    missing = [name for name in required if found.get(name) is None]
    if missing:
        raise ConfigError(f"the published config lacks {', '.join(missing)}")
    return found


def _transformer(config: Mapping[str, Any], part: str) -> dict[str, Any]:
    """Arguments that encoder and decoder share; `sizes.vit` may redefine the named sizes."""
    name = config[f"vit_{part}_model_size"]
    named = {**SIZES, **config.get("sizes", {}).get("vit", {})}
    if name not in named:
        raise ConfigError(f"vit_{part}_model_size={name!r} of the published config is none of {', '.join(named)}")
    width, layers, heads = named[name]
    return {
        "resolution": config["crop_size"],
        "num_latent_tokens": config["num_latent_tokens"],
        "width": width,
        "layers": layers,
        "heads": heads,
        "patch_size": config[f"vit_{part}_patch_size"],
    }


def _quantizer(config: Mapping[str, Any]) -> Node:
    mode = config.get("quantize_mode", "vq")
    if mode == "vae":
        return {"_target_": "tessera.quantizers.GaussianBottleneck", "dim": config["token_size"]}
    if mode != "vq":
        raise ConfigError(f"quantize_mode={mode!r} of the published config is unknown; it is vq or vae")
    if "codebook_size" not in config:
        raise ConfigError("the published config lacks codebook_size")
    normalize = config.get("use_l2_norm", False)
    return single_grid(
        "VQCodebook", config["token_size"], codebook_size=config["codebook_size"], l2_normalize=normalize
    )


def architecture(config: Mapping[str, Any]) -> Node:
    """The `_target_` tree that builds the tokenizer of published hyper-parameters; see `from_public`.

    Raises:
        ConfigError: an option that is missing or not supported.
    """
    config = _flat(config)
    two_stage, legacy = config.get("finetune_decoder", True), config.get("is_legacy", True)
    if two_stage and config.get("quantize_mode", "vq") == "vae":
        raise ConfigError("finetune_decoder=true with quantize_mode=vae of the published config does not exist")
    if legacy and not two_stage:
        raise ConfigError(
            "is_legacy=true with finetune_decoder=false of the published config is a stage-1 model without pixel "
            "decoder; set finetune_decoder=true and add the MaskGIT-VQGAN weights as pixel_quantize.* and "
            "pixel_decoder.*"
        )
    if two_stage and not legacy:
        raise ConfigError(
            "finetune_decoder=true with is_legacy=false of the published config has no proxy codes to decode: no such "
            "weights exist"
        )
    decoder = {"_target_": "tessera.backbones.TiTokDecoder", **_transformer(config, "dec")}
    if two_stage:
        sizes = config.get("sizes", {})
        pixel = maskgit.sizes(sizes.get("pixel_decoder", maskgit.PUBLISHED))
        decoder |= {
            "_target_": "tessera.backbones.TiTokProxyDecoder",
            "proxy_codebook_size": sizes.get("proxy_codebook_size", maskgit.PUBLISHED["num_embeddings"]),
            "pixel_decoder": {"_target_": "tessera.backbones.MaskGITDecoder", **pixel},
        }
    return {
        "_target_": "tessera.tokenizers.Tokenizer",
        "encoder": {
            "_target_": "tessera.backbones.TiTokEncoder",
            **_transformer(config, "enc"),
            "latent_layout": "reshaped" if legacy else "transposed",
        },
        "quantizer": _quantizer(config),
        "decoder": decoder,
        "resolution": config["crop_size"],
    }


def renamed(tokenizer: Tokenizer, state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Published weights under the names and shapes of `tokenizer`."""
    rules = [*_ENDS, *_TRANSFORMER]
    if isinstance(tokenizer.decoder, TiTokProxyDecoder):
        levels = len(tokenizer.decoder.pixel_decoder.levels)
        rules += [*_PROXY_HEAD, *maskgit.decoder_rules("pixel_decoder", "decoder.pixel_decoder", levels)]
    else:
        rules += _PIXEL_HEAD
    state = rename(state_dict, rules)
    for key, ndim, reshape in _RESHAPED:
        if key in state and state[key].ndim == ndim:
            state[key] = reshape(state[key])
    return state


def from_public(config: Mapping[str, Any], state_dict: Mapping[str, Tensor]) -> Tokenizer:
    """Build a tokenizer and load published weights strictly.

    Args:
        config: published names, flat or nested as in the hub's config.json: crop_size, token_size, num_latent_tokens,
            codebook_size, use_l2_norm, quantize_mode, vit_{enc,dec}_model_size, vit_{enc,dec}_patch_size,
            finetune_decoder, is_legacy. `sizes` may replace what the public classes fix: vit (name -> width, layers,
            heads), proxy_codebook_size, pixel_decoder. commitment_cost concerns training only.
        state_dict: published state dict.

    Returns:
        The tokenizer in eval mode; images in [-1, 1] as everywhere here.

    Raises:
        ConfigError: an option that is missing or not supported.
        CheckpointError: weights that do not fit; lists missing, unexpected and mis-shaped keys.
    """
    tokenizer = build(architecture(config), "the published config")
    load_strictly(tokenizer, renamed(tokenizer, state_dict), "the published checkpoint")
    return tokenizer.eval()
