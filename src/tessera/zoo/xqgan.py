"""Tokenizers of XQ-GAN, ImageFolder and RobusTok (lxa9867/ImageFolder) from their published options and weights.

ViT and CNN encoders and decoders in any pairing that the public code can build, VQ codebooks on a single grid or over
several scales, LFQ and BSQ over several scales, products of them, and backbones with LoRA adapters.
"""

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from tessera.errors import CheckpointError, ConfigError
from tessera.tokenizers import Tokenizer
from tessera.zoo.export import build
from tessera.zoo.files import part_of
from tessera.zoo.keys import XQGAN, XQGAN_BINARY_IGNORED, XQGAN_IGNORED, load_strictly, rename
from tessera.zoo.nodes import Node

_VQ16 = (1, 1, 2, 2, 4)


_PREFIX = "vq_model."  # of a tokenizer beside other modules


def public_weights(checkpoint: Mapping[str, Any]) -> Mapping[str, Tensor]:
    """The state dict inside a published checkpoint: `ema`, else `model`, else `state_dict`, else itself."""
    state = part_of(checkpoint, ("ema", "model", "state_dict"))
    if any(key.startswith(_PREFIX) for key in state):
        return {key.removeprefix(_PREFIX): value for key, value in state.items() if key.startswith(_PREFIX)}
    return state


def public_options(config: Mapping[str, Any], weights: Mapping[str, Tensor]) -> dict[str, Any]:
    """Published options in one level and as values, from all the ways in which they are written down.

    These are flat; of the model and of small networks apart (`model`, `tiny_backbone`, `tiny_cnn`); in words, e.g.
    "121 per branch", "<model> at img 256 / patch 16" and "same"; or only the sizes of a ViT and its `grid`.
    """
    options = dict(config)
    for part in ("model", "tiny_cnn", "tiny_backbone"):
        options |= options.pop(part, None) or {}
    if "grid" in options:
        options.setdefault("v_patch_nums", [options["grid"]])
        options |= {name: options.get(name, "dinov2") for name in ("enc_type", "dec_type")}
        options.setdefault("abs_pos_embed", "encoder.lvl_embed.weight" in weights)
    for name in ("encoder_model", "decoder_model"):
        if name in options:
            found = str(options[name])
            options[name] = options["encoder_model"] if found == "same" else found.partition(" ")[0]
    if isinstance(options.get("num_latent_tokens"), str):
        options["num_latent_tokens"] = int(options["num_latent_tokens"].partition(" ")[0])
    return options


def _grid(config: Mapping[str, Any]) -> int:
    """Side S of the latent grid: the last scale."""
    side, branches = config["v_patch_nums"][-1], config.get("product_quant", 1)
    # the public constructor multiplies the number in the config it is given by the branches
    tokens = config.get("num_latent_tokens", side**2)
    if tokens not in (side**2, branches * side**2):
        raise ConfigError(
            f"num_latent_tokens={tokens} of the published config contradicts its v_patch_nums, whose last scale of "
            f"{side} x {side} needs {side**2}"
        )
    return side


def _kinds(config: Mapping[str, Any]) -> tuple[str, str]:
    kinds = config.get("enc_type", "cnn"), config.get("dec_type", "cnn")
    for name, kind in zip(("enc_type", "dec_type"), kinds, strict=True):
        if kind not in ("cnn", "dinov2"):
            raise ConfigError(f"{name}={kind!r} of the published config is not supported here; cnn and dinov2 are")
    if "cnn" in kinds and config.get("product_quant", 1) != 1:
        raise ConfigError(
            f"product_quant={config['product_quant']} of the published config has no CNN tokenizer: "
            "the public code fails on it, so no weights can exist"
        )
    return kinds


def _cnn(config: Mapping[str, Any], target: str, multipliers: str) -> Node:
    return {
        "_target_": f"tessera.backbones.{target}",
        "channels": config.get("ch", 128),
        "channel_multipliers": list(config.get(multipliers, _VQ16)),
        "num_res_blocks": config.get("num_res_blocks", 2),
        "z_channels": config.get("z_channels", 256),
        "norm_groups": config.get("num_groups", 32),
        "dropout": config.get("dropout_p", 0.0),
    }


def _vit(config: Mapping[str, Any], target: str, name: str, resolution: int) -> Node:
    sizes = {"width": config.get("embed_dim"), "depth": config.get("depth"), "num_heads": config.get("num_heads")}
    return {
        "_target_": f"tessera.backbones.{target}",
        "grid": _grid(config),
        "model": config.get(name, "vit_small_patch14_dinov2.lvd142m"),
        "resolution": resolution,
        "patch_size": config.get("patch_size", 16),
        "position": "absolute" if config.get("abs_pos_embed", False) else "learned",
        "pretrained": False,
        **{argument: value for argument, value in sizes.items() if value is not None},
    }


def _codebook(config: Mapping[str, Any]) -> Node:
    scales, size = len(config["v_patch_nums"]), config["codebook_size"]
    normalize = config.get("codebook_l2_norm", True)
    if not config.get("lfq"):
        # the public code passes the choice of normalisation on to its single-grid quantizer only
        kind = {"l2_normalize": normalize} if scales == 1 else {"l2_normalize": False, "search": "cosine"}
        return {"_target_": "tessera.quantizers.VQCodebook", "_partial_": True, "codebook_size": size, **kind}
    bits = config["codebook_embed_dim"]
    if scales == 1:
        raise ConfigError("lfq=true of the published config needs several scales in v_patch_nums")
    if size != 2**bits:
        raise ConfigError(
            f"codebook_size={size} of the published config contradicts lfq=true, which has 2^codebook_embed_dim = "
            f"{2**bits} codes"
        )
    name = "BSQCodebook" if normalize else "LFQCodebook"
    return {"_target_": f"tessera.quantizers.{name}", "_partial_": True, "bits": bits}


def _quantizer(config: Mapping[str, Any]) -> Node:
    branches = config.get("product_quant", 1)
    branch: Node = {
        "_target_": "tessera.quantizers.SingleGridQuantizer",
        "_partial_": True,
        "codebook": _codebook(config),
    }
    if len(config["v_patch_nums"]) > 1:
        branch |= {
            "_target_": "tessera.quantizers.MultiScaleQuantizer",
            "grids": list(config["v_patch_nums"]),
            "phi_convs": config.get("share_quant_resi", 4),
            "phi_ratio": abs(config.get("quant_resi", 0.5)),
        }
        if config.get("lfq"):
            branch["gain"] = config.get("scale", 1.0)
    return {
        "_target_": "tessera.quantizers.ProductQuantizer",
        "branches": branches,
        "dim": branches * config["codebook_embed_dim"],
        "branch": branch,
    }


def _check_magnitudes(config: Mapping[str, Any], weights: Mapping[str, Tensor]) -> None:
    """The stored magnitudes of binary codes must be those of the options."""
    bits = config["codebook_embed_dim"]
    unit = bits**-0.5 if config.get("codebook_l2_norm", True) else 1.0
    expected = [unit * config.get("scale", 1.0) ** k for k in range(len(config["v_patch_nums"]))]
    for key, value in weights.items():
        if value.is_meta:
            continue
        if re.fullmatch(XQGAN_BINARY_IGNORED[0], key) and not (
            value.numel() == len(expected) and value.allclose(value.new_tensor(expected), rtol=1e-4)
        ):
            raise CheckpointError(
                f"the published checkpoint has code magnitudes {key}={value.tolist()}, but scale, codebook_embed_dim "
                f"and codebook_l2_norm of its config give {expected}"
            )


def _tuning(config: Mapping[str, Any], weights: Mapping[str, Tensor], part: str) -> str | Node:
    """What of `part` has adapters in a state dict: "full" for nothing."""
    adapters = (value for key, value in weights.items() if re.fullmatch(rf"{part}\..*\.lora_A\.default\.weight", key))
    first = next(adapters, None)
    if first is None:
        return "full"
    saved = rf"{part}\.model\.base_model\.model\.(.*)\.modules_to_save\.default\..*"
    trained = {found[1] for key in weights if (found := re.fullmatch(saved, key))}
    lora = config.get("lora", {})
    node = {
        "_target_": "tessera.backbones.LoRA",
        "rank": first.shape[0],
        "alpha": lora.get("lora_alpha", 8),
        "train": sorted(trained),
    }
    return {**node, "targets": lora["target"]} if "target" in lora else node


def architecture(config: Mapping[str, Any], weights: Mapping[str, Tensor] | None = None) -> Node:
    """The `_target_` tree that builds the tokenizer of published options; `weights` show which backbones have adapters.

    Raises:
        ConfigError: an option that is missing or not supported.
    """
    missing = [name for name in ("codebook_size", "codebook_embed_dim", "v_patch_nums") if name not in config]
    if missing:
        raise ConfigError(f"the published config lacks {', '.join(missing)}")
    encoder_kind, decoder_kind = _kinds(config)
    if encoder_kind == "cnn":
        encoder = _cnn(config, "CNNEncoder", "encoder_ch_mult")
        resolution = _grid(config) * 2 ** (len(encoder["channel_multipliers"]) - 1)
    else:
        resolution = config.get("image_size", config.get("img_size", 256))
        encoder = _vit(config, "ViTEncoder", "encoder_model", resolution)
        encoder["groups"] = config.get("product_quant", 1)
    return {
        "_target_": "tessera.tokenizers.Tokenizer",
        "encoder": encoder,
        "quantizer": _quantizer(config),
        "decoder": _cnn(config, "CNNDecoder", "decoder_ch_mult")
        if decoder_kind == "cnn"
        else _vit(config, "ViTDecoder", "decoder_model", resolution),
        "resolution": resolution,
        "encoder_tuning": _tuning(config, weights or {}, "encoder"),
        "decoder_tuning": _tuning(config, weights or {}, "decoder"),
    }


def from_public(config: Mapping[str, Any], state_dict: Mapping[str, Any]) -> Tokenizer:
    """Build a tokenizer and load published weights strictly.

    Args:
        config: published names (see `public_options`); read are codebook_size, codebook_embed_dim, codebook_l2_norm,
            v_patch_nums, product_quant, num_latent_tokens, share_quant_resi (4), quant_resi (0.5), lfq, scale (1),
            enc_type, dec_type. For a ViT: encoder_model, decoder_model, abs_pos_embed, image_size (256), patch_size
            (16), and where they differ from the model's name embed_dim, depth, num_heads. For a CNN: z_channels,
            encoder_ch_mult, decoder_ch_mult, dropout_p, and the constants of the public classes ch (128), num_groups
            (32), num_res_blocks (2). For adapters: lora.lora_alpha (8), lora.target (a pattern of layers' names; the
            MLPs of all blocks). The other published options concern training and change nothing of a tokenizer.
        state_dict: published state dict, or the checkpoint around it (averaged weights are preferred).

    Returns:
        The tokenizer in eval mode; adapters of a LoRA checkpoint stay adapters (`tessera.backbones.merge` folds them).

    Raises:
        ConfigError: an option that is missing or not supported.
        CheckpointError: weights that do not fit; lists missing, unexpected and mis-shaped keys.
    """
    weights = public_weights(state_dict)
    config = public_options(config, weights)
    node = architecture(config, weights)
    if not weights:
        raise CheckpointError("the published checkpoint holds no weights under ema, model or state_dict")
    tokenizer = build(node, "the published config")
    ignored = XQGAN_IGNORED
    if config.get("lfq"):
        _check_magnitudes(config, weights)
        ignored = (*ignored, *XQGAN_BINARY_IGNORED)
    load_strictly(tokenizer, rename(weights, XQGAN, ignored), "the published checkpoint")
    return tokenizer.eval()
