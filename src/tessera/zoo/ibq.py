"""Tokenizers of IBQ (TencentARC/SEED-Voken) from their published hyper-parameters and weights."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from tessera.errors import CheckpointError, ConfigError
from tessera.tokenizers import Tokenizer
from tessera.zoo.export import build
from tessera.zoo.keys import Rules, load_strictly, rename
from tessera.zoo.nodes import Node, single_grid
from tessera.zoo.taming import cnn_rules

WEIGHTS = ("ema", "live")
_EMA, _FIRST_STAGE, _GENERATOR = "model_ema.", "first_stage_model.", "transformer."


def rules(levels: int) -> Rules:
    """Published keys of the tokenizer -> ours."""
    return [
        (r"quantize\.embedding\.weight", r"quantizer.branches.0.codebooks.0.embedding"),
        *cnn_rules(levels),
    ]


def public_weights(checkpoint: Mapping[str, Any], weights: str = "ema") -> dict[str, Tensor]:
    """The tokenizer's weights in a published checkpoint, under their live names.

    Training losses are left out. Averaged weights are stored under `model_ema.` and the live name without dots. A
    checkpoint of the generator holds the tokenizer, already averaged, under `first_stage_model.`.

    Args:
        checkpoint: Lightning checkpoint, or its state dict.
        weights: "ema": averaged where the checkpoint has them; published figures are theirs. "live": the others.

    Raises:
        ConfigError: unknown `weights`.
        CheckpointError: averaged weights that belong to no live one, or the other way round.
    """
    if weights not in WEIGHTS:
        raise ConfigError(f"weights={weights!r} is unknown; choose one of {', '.join(WEIGHTS)}")
    state = checkpoint.get("state_dict", checkpoint)
    if any(key.startswith(_FIRST_STAGE) for key in state):
        state = {key.removeprefix(_FIRST_STAGE): v for key, v in state.items() if not key.startswith(_GENERATOR)}
    live = {key: value for key, value in state.items() if not key.startswith((_EMA, "loss."))}
    shadows = {key.removeprefix(_EMA): value for key, value in state.items() if key.startswith(_EMA)}
    for name in ("decay", "num_updates"):
        shadows.pop(name, None)
    shadows = {name: value for name, value in shadows.items() if not name.startswith("loss")}
    if weights == "live" or not shadows:
        return live
    names = {key.replace(".", ""): key for key in live}
    if names.keys() != shadows.keys():
        odd = sorted(names.keys() ^ shadows.keys())
        raise CheckpointError(f"{len(odd)} weights have no partner between live and averaged ones, e.g. {odd[0]}")
    return {names[name]: value for name, value in shadows.items()}


def architecture(config: Mapping[str, Any]) -> Node:
    """The `_target_` tree that builds the tokenizer of published hyper-parameters; see `from_public`.

    Raises:
        ConfigError: an option that is missing or not supported.
    """
    missing = [name for name in ("n_embed", "embed_dim", "ddconfig") if name not in config]
    if missing:
        raise ConfigError(f"the published config lacks {', '.join(missing)}")
    networks = config["ddconfig"]
    for name in ("double_z", "tanh_out", "attn_type_linear"):
        if networks.get(name):
            raise ConfigError(f"ddconfig.{name}=true of the published config is not supported here")
    if config.get("l2_normalize"):
        raise ConfigError("l2_normalize=true of the published config has no effect there and is not supported here")
    levels = len(networks["ch_mult"])
    sizes = {
        "channels": networks["ch"],
        "channel_multipliers": list(networks["ch_mult"]),
        "num_res_blocks": networks["num_res_blocks"],
        "z_channels": networks["z_channels"],
        "norm_groups": config.get("num_groups", 32),
        "dropout": networks.get("dropout", 0.0),
        # placed by the configured resolution, whatever images come
        "attention_levels": [
            level for level in range(levels) if networks["resolution"] // 2**level in networks["attn_resolutions"]
        ],
    }
    return {
        "_target_": "tessera.tokenizers.Tokenizer",
        "encoder": {
            "_target_": "tessera.backbones.CNNEncoder",
            **sizes,
            "in_channels": networks.get("in_channels", 3),
        },
        "quantizer": single_grid(
            "IBQCodebook",
            config["embed_dim"],
            codebook_size=config["n_embed"],
            use_entropy=config.get("use_entropy_loss", True),
            entropy_temperature=config.get("entropy_temperature", 0.01),
        ),
        "decoder": {"_target_": "tessera.backbones.CNNDecoder", **sizes, "in_channels": networks.get("out_ch", 3)},
        "resolution": networks["resolution"],
    }


def from_public(config: Mapping[str, Any], state_dict: Mapping[str, Any], weights: str = "ema") -> Tokenizer:
    """Build a tokenizer and load published weights strictly.

    Args:
        config: published names; read are n_embed, embed_dim, ddconfig (z_channels, resolution, in_channels, out_ch, ch,
            ch_mult, num_res_blocks, attn_resolutions, dropout), use_entropy_loss, entropy_temperature. The others
            concern training.
        state_dict: published checkpoint or its state dict; see `public_weights`.
        weights: "ema" (averaged where there are any) or "live".

    Returns:
        The tokenizer in eval mode.

    Raises:
        ConfigError: an option that is missing or not supported.
        CheckpointError: weights that do not fit; lists missing, unexpected and mis-shaped keys.
    """
    tokenizer = build(architecture(config), "the published config")
    state = rename(public_weights(state_dict, weights), rules(len(config["ddconfig"]["ch_mult"])))
    load_strictly(tokenizer, state, "the published checkpoint")
    return tokenizer.eval()
