"""The multi-scale tokenizer of VAR (FoundationVision/VAR) from its published hyper-parameters and weights."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from torch import Tensor

from tessera.backbones import CNNDecoder, CNNEncoder
from tessera.errors import ConfigError
from tessera.quantizers import MultiScaleQuantizer, ProductQuantizer, VQCodebook
from tessera.tokenizers import Tokenizer
from tessera.zoo.keys import XQGAN_IGNORED, XQGAN_MULTI_SCALE, Rules, load_strictly, rename
from tessera.zoo.taming import cnn_rules, split_qkv


def rules(levels: int) -> Rules:
    """Published keys of the tokenizer, joint projections split -> ours."""
    return [
        *XQGAN_MULTI_SCALE,
        (r"quantize\.embedding\.weight", r"quantizer.branches.0.codebooks.0.embedding"),
        *cnn_rules(levels),
    ]


def _side(grid: int | Sequence[int]) -> int:
    height, width = (grid, grid) if isinstance(grid, int) else grid
    if height != width:
        raise ConfigError(f"v_patch_nums ends in {list(grid)}; only square images are supported here")
    return height


def build(config: Mapping[str, Any]) -> Tokenizer:
    """The tokenizer of published hyper-parameters; arguments and errors as `from_public`."""
    required = ("vocab_size", "z_channels", "ch", "v_patch_nums")
    missing = [name for name in required if name not in config]
    if missing:
        raise ConfigError(f"the published config lacks {', '.join(missing)}")
    multipliers = tuple(config.get("ch_mult", (1, 1, 2, 2, 4)))
    sizes = {
        "channels": config["ch"],
        "channel_multipliers": multipliers,
        "num_res_blocks": config.get("num_res_blocks", 2),
        "z_channels": config["z_channels"],
        "norm_groups": config.get("norm_groups", config.get("groupnorm_groups", 32)),
        "dropout": config.get("dropout", 0.0),
        "attention_levels": None if config.get("using_sa", True) else (),
        "mid_attention": config.get("using_mid_sa", True),
    }
    codebook = partial(
        VQCodebook,
        codebook_size=config["vocab_size"],
        l2_normalize=False,
        search="cosine" if config.get("using_znorm", False) else "euclidean",
    )
    branch = partial(
        MultiScaleQuantizer,
        codebook=codebook,
        grids=config["v_patch_nums"],
        phi_convs=config.get("share_quant_resi", 4),
        phi_ratio=abs(config.get("quant_resi", 0.5)),
    )
    return Tokenizer(
        encoder=CNNEncoder(**sizes),
        quantizer=ProductQuantizer(branch=branch, branches=1, dim=config["z_channels"]),
        decoder=CNNDecoder(**sizes),
        resolution=_side(config["v_patch_nums"][-1]) * 2 ** (len(multipliers) - 1),
        projection_kernel=config.get("quant_conv_ks", 3),
    )


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
    tokenizer = build(config)
    state = rename(split_qkv(state_dict), rules(len(tokenizer.decoder.conv_blocks)), XQGAN_IGNORED)
    load_strictly(tokenizer, state, "the published checkpoint")
    return tokenizer.eval()
