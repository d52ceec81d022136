"""MaskGIT's VQGAN from its published weights (`fun-research/TiTok`, maskgit-vqgan-imagenet-f16-256.bin)."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from tessera.errors import ConfigError
from tessera.tokenizers import Tokenizer
from tessera.zoo.export import build
from tessera.zoo.files import read_public
from tessera.zoo.keys import Rules, load_strictly, rename
from tessera.zoo.nodes import Node, single_grid

# The published network of 256 x 256 images
PUBLISHED: Mapping[str, Any] = {
    "channel_mult": (1, 1, 2, 2, 4),
    "num_resolutions": 5,
    "num_res_blocks": 2,
    "hidden_channels": 128,
    "num_channels": 3,
    "z_channels": 256,
    "resolution": 256,
    "dropout": 0.0,
    "num_embeddings": 1024,
}


def decoder_rules(published: str, ours: str, levels: int) -> Rules:
    """Rules for a decoder's keys under the prefixes `published` and `ours`.

    Its levels are published by resolution (0 the finest), and lie in the order of their use here.
    """
    rules = [
        (rf"{published}\.up\.{level}\.block\.(\d+)\.(.*)", rf"{ours}.levels.{levels - 1 - level}.res.\1.\2")
        for level in range(levels)
    ]
    rules += [
        (rf"{published}\.up\.{level}\.upsample_conv\.(.*)", rf"{ours}.levels.{levels - 1 - level}.resample.conv.\1")
        for level in range(levels)
    ]
    return [*rules, (rf"{published}\.(.*)", rf"{ours}.\1")]


def rules(levels: int) -> Rules:
    """Published keys of the whole tokenizer -> ours."""
    return [
        (r"quantize\.embedding\.weight", r"quantizer.branches.0.codebooks.0.embedding"),
        (r"encoder\.down\.(\d+)\.block\.(\d+)\.(.*)", r"encoder.levels.\1.res.\2.\3"),
        (r"(encoder\..*)", r"\1"),
        *decoder_rules("decoder", "decoder", levels),
    ]


def sizes(config: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of the encoder and decoder from the published names.

    Raises:
        ConfigError: a missing name, or as many multipliers as levels.
    """
    missing = [
        name for name in ("channel_mult", "num_res_blocks", "hidden_channels", "z_channels") if name not in config
    ]
    if missing:
        raise ConfigError(f"the published config lacks {', '.join(missing)}")
    multipliers = list(config["channel_mult"])
    if config.get("num_resolutions", len(multipliers)) != len(multipliers):
        raise ConfigError(
            f"num_resolutions={config['num_resolutions']} of the published config contradicts the "
            f"{len(multipliers)} entries of channel_mult"
        )
    return {
        "channels": config["hidden_channels"],
        "channel_multipliers": multipliers,
        "num_res_blocks": config["num_res_blocks"],
        "z_channels": config["z_channels"],
        "dropout": config.get("dropout", 0.0),
        "in_channels": config.get("num_channels", 3),
    }


def architecture(config: Mapping[str, Any]) -> Node:
    """The `_target_` tree that builds the tokenizer of published hyper-parameters, flat or with networks under `vqgan`.

    Raises:
        ConfigError: an option that is missing.
    """
    config = {**config, **config.get("vqgan", {})}
    networks = sizes(config)
    missing = [name for name in ("num_embeddings", "resolution") if name not in config]
    if missing:
        raise ConfigError(f"the published config lacks {', '.join(missing)}")
    return {
        "_target_": "tessera.tokenizers.Tokenizer",
        "encoder": {"_target_": "tessera.backbones.MaskGITEncoder", **networks},
        "quantizer": single_grid(
            "VQCodebook", networks["z_channels"], codebook_size=config["num_embeddings"], l2_normalize=False
        ),
        "decoder": {"_target_": "tessera.backbones.MaskGITDecoder", **networks},
        "resolution": config["resolution"],
        "projection_kernel": None,
    }


def from_public(config: Mapping[str, Any], state_dict: Mapping[str, Tensor]) -> Tokenizer:
    """Build MaskGIT's VQGAN and load published weights strictly.

    Args:
        config: published names: channel_mult, num_resolutions, num_res_blocks, hidden_channels, num_channels,
            z_channels, resolution, dropout, num_embeddings. commitment_cost concerns training only.
        state_dict: encoder.*, decoder.*, quantize.embedding.weight.

    Returns:
        The tokenizer in eval mode; images in [-1, 1] as everywhere here.

    Raises:
        ConfigError: an option that is missing.
        CheckpointError: weights that do not fit; lists missing, unexpected and mis-shaped keys.
    """
    tokenizer = build(architecture(config), "the published config")
    renamed = rename(state_dict, rules(len(tokenizer.decoder.levels)))
    load_strictly(tokenizer, renamed, "the published checkpoint")
    return tokenizer.eval()


def maskgit_vqgan(path: str | Path) -> Tokenizer:
    """The published MaskGIT-VQGAN of 256 x 256 images, from the file `maskgit-vqgan-imagenet-f16-256.bin`.

    Raises:
        MissingFileError: no such file.
        CheckpointError: a file of other content.
    """
    hint = "download maskgit-vqgan-imagenet-f16-256.bin of fun-research/TiTok from the Hugging Face hub"
    return from_public(PUBLISHED, read_public(path, hint))
