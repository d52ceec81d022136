"""The multi-scale tokenizer of VAR (FoundationVision/VAR) from its published hyper-parameters and weights."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from tessera.errors import ConfigError
from tessera.grids import as_grid
from tessera.tokenizers import Tokenizer
from tessera.zoo.export import build
from tessera.zoo.keys import XQGAN_IGNORED, XQGAN_MULTI_SCALE, XQGAN_SINGLE_GRID, Rules, load_strictly, rename
from tessera.zoo.nodes import Node
from tessera.zoo.taming import cnn_rules, split_qkv


def rules(levels: int) -> Rules:
    """Published keys of the tokenizer, joint projections split -> ours."""
    return [*XQGAN_SINGLE_GRID, *XQGAN_MULTI_SCALE, *cnn_rules(levels)]


def _side(config: Mapping[str, Any]) -> int:
    """Side of the latent grid, which is the last scale."""
    height, width = as_grid(config["v_patch_nums"][-1], "v_patch_nums of the published config")
    if height != width:
        raise ConfigError(f"v_patch_nums ends in {[height, width]}; only square images are supported here")
    return height


def quantizer_node(config: Mapping[str, Any], size: int, channels: int, branches: int = 1) -> Node:
    """The `_target_` tree of VAR's quantizer, or of ImageFolder's, which differs by its cosine search.

    Args:
        config: v_patch_nums, share_quant_resi (4), quant_resi (0.5), using_znorm.
        size: codes of a branch.
        channels: of a branch.
    """
    return {
        "_target_": "tessera.quantizers.ProductQuantizer",
        "branches": branches,
        "dim": branches * channels,
        "branch": {
            "_target_": "tessera.quantizers.MultiScaleQuantizer",
            "_partial_": True,
            "codebook": {
                "_target_": "tessera.quantizers.VQCodebook",
                "_partial_": True,
                "codebook_size": size,
                "l2_normalize": False,
                "search": "cosine" if config.get("using_znorm", False) else "euclidean",
            },
            "grids": list(config["v_patch_nums"]),
            "phi_convs": config.get("share_quant_resi", 4),
            "phi_ratio": abs(config.get("quant_resi", 0.5)),
        },
    }


def architecture(config: Mapping[str, Any]) -> Node:
    """The `_target_` tree that builds the tokenizer of published hyper-parameters; see `from_public`.

    Raises:
        ConfigError: an option that is missing or not supported.
    """
    required = ("vocab_size", "z_channels", "ch", "v_patch_nums")
    missing = [name for name in required if name not in config]
    if missing:
        raise ConfigError(f"the published config lacks {', '.join(missing)}")
    multipliers = list(config.get("ch_mult", (1, 1, 2, 2, 4)))
    sizes = {
        "channels": config["ch"],
        "channel_multipliers": multipliers,
        "num_res_blocks": config.get("num_res_blocks", 2),
        "z_channels": config["z_channels"],
        "norm_groups": config.get("norm_groups", config.get("groupnorm_groups", 32)),
        "dropout": config.get("dropout", 0.0),
        "attention_levels": None if config.get("using_sa", True) else [],
        "mid_attention": config.get("using_mid_sa", True),
    }
    return {
        "_target_": "tessera.tokenizers.Tokenizer",
        "encoder": {"_target_": "tessera.backbones.CNNEncoder", **sizes},
        "quantizer": quantizer_node(config, config["vocab_size"], config["z_channels"]),
        "decoder": {"_target_": "tessera.backbones.CNNDecoder", **sizes},
        "resolution": _side(config) * 2 ** (len(multipliers) - 1),
        "projection_kernel": config.get("quant_conv_ks", 3),
    }


def renamed(state: Mapping[str, Tensor], levels: int) -> dict[str, Tensor]:
    """A published state dict, or part of one, under our names; usage statistics are left out.

    Args:
        levels: of the decoder.
    """
    return rename(split_qkv(state), rules(levels), XQGAN_IGNORED)


def from_public(config: Mapping[str, Any], state_dict: Mapping[str, Tensor]) -> Tokenizer:
    """Build the tokenizer and load published weights strictly.

    Args:
        config: published names: vocab_size, z_channels, ch, ch_mult, num_res_blocks, using_sa, using_mid_sa, dropout,
            using_znorm, quant_conv_ks, quant_resi, share_quant_resi, v_patch_nums; and the constant norm_groups (32).
            The weights fit any v_patch_nums, whose last entry decides the resolution: 16 for 256 pixels, 32 for 512.
        state_dict: published state dict; usage statistics are left out.

    Returns:
        The tokenizer in eval mode.

    Raises:
        ConfigError: an option that is missing.
        CheckpointError: weights that do not fit; lists missing, unexpected and mis-shaped keys.
    """
    tokenizer = build(architecture(config), "the published config")
    load_strictly(tokenizer, renamed(state_dict, len(tokenizer.decoder.conv_blocks)), "the published checkpoint")
    return tokenizer.eval()
