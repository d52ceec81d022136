"""Generators of IBQ (TencentARC/SEED-Voken) from their published hyper-parameters and weights."""

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from tessera.errors import ConfigError
from tessera.generators import Llama
from tessera.zoo.export import build
from tessera.zoo.keys import load_strictly
from tessera.zoo.nodes import Node

_GENERATOR, _FIRST_STAGE = "transformer.", "first_stage_model."
# published name -> ours, and the value of configs that leave it to the public code's default
_REQUIRED = {
    "vocab_size": "codebook_size", "block_size": "num_tokens", "class_num": "num_classes", "n_embd": "hidden_size",
    "n_layer": "depth", "n_head": "num_heads",
}  # fmt: skip
_OPTIONAL = {
    "ffn_hidden": "mlp_size", "multiple_of": "mlp_multiple", "token_drop": "token_dropout",
    "resid_dropout_p": "residual_dropout", "ffn_dropout_p": "mlp_dropout", "attn_dropout_p": "attention_dropout",
    "class_dropout_prob": "class_dropout", "alng": "gate_init", "rope_base": "rope_base", "norm_eps": "norm_eps",
}  # fmt: skip


def public_weights(checkpoint: Mapping[str, Any]) -> dict[str, Tensor]:
    """The generator's weights in a published checkpoint, under their names in the generator.

    Left out are the tokenizer that it holds under `first_stage_model.`, and caches of keys and values that a module
    keeps after sampling.

    Args:
        checkpoint: Lightning checkpoint, its state dict, or the generator's own.
    """
    state = checkpoint.get("state_dict", checkpoint)
    kept = {key: v for key, v in state.items() if not key.startswith(_FIRST_STAGE) and "kv_cache" not in key}
    return {key.removeprefix(_GENERATOR): value for key, value in kept.items()}


def architecture(config: Mapping[str, Any]) -> Node:
    """The `_target_` tree that builds the generator of published hyper-parameters; see `from_public`.

    Raises:
        ConfigError: an option that is missing or not supported.
    """
    missing = [name for name in _REQUIRED if name not in config]
    if missing:
        raise ConfigError(f"the published config lacks {', '.join(missing)}")
    # what the public code has no working path for, or what would be another function
    fixed = {
        "cls_token_num": 1,
        "n_kv_head": config["n_head"],
        "cond_dim": config["n_embd"],
        "head_dim": config["n_embd"] // config["n_head"],
        "shared_aln": False,
        "use_pretrained_codebook": False,
        "drop_path_rate": 0.0,
    }
    for name, value in fixed.items():
        if config.get(name) not in (None, value):
            raise ConfigError(f"{name}={config[name]} of the published config is not supported here, only {value}")
    side = math.isqrt(config["block_size"])
    if side**2 != config["block_size"]:
        raise ConfigError(f"block_size={config['block_size']} of the published config is no square of tokens")
    given = {ours: config[name] for name, ours in (_REQUIRED | _OPTIONAL).items() if config.get(name) is not None}
    return {"_target_": "tessera.generators.Llama", **given, "grids": [[side, side]]}


def from_public(config: Mapping[str, Any], state_dict: Mapping[str, Any]) -> Llama:
    """Build a generator and load published weights strictly.

    Args:
        config: published names; read are vocab_size, block_size, class_num, n_embd, n_layer, n_head, multiple_of or
            ffn_hidden, rope_base, norm_eps, and the dropouts and initial gates that only training needs. The others
            concern training or sampling.
        state_dict: published checkpoint or its state dict; see `public_weights`.

    Returns:
        The generator in eval mode.

    Raises:
        ConfigError: an option that is missing or not supported.
        CheckpointError: weights that do not fit; lists missing, unexpected and mis-shaped keys.
    """
    generator = build(architecture(config), "the published config")
    load_strictly(generator, public_weights(state_dict), "the published checkpoint")
    return generator.eval()
