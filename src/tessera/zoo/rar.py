"""The generators of RAR (bytedance/1d-tokenizer) and RobusTok (qiuk2/RobusTok) from their published hyper-parameters
and weights. The weights have our names."""

from collections.abc import Mapping
from typing import Any

from tessera.errors import ConfigError
from tessera.generators import RAR
from tessera.zoo.export import build
from tessera.zoo.keys import load_strictly

_REQUIRED = {
    "codebook_size": "codebook_size", "image_seq_len": "num_tokens", "condition_num_classes": "num_classes",
    "hidden_size": "hidden_size", "num_hidden_layers": "depth", "num_attention_heads": "num_heads",
    "intermediate_size": "mlp_size",
}  # fmt: skip
_OPTIONAL = {"dropout": "dropout", "attn_drop": "attention_dropout", "class_label_dropout": "class_dropout"}
_MASK = "attn_mask"  # the causal mask, a buffer that follows from the sizes


def is_generator(config: Mapping[str, Any]) -> bool:
    """Whether a published config is that of a generator, not of a tokenizer of the family."""
    return "num_hidden_layers" in config.get("rar", config)


def architecture(config: Mapping[str, Any]) -> dict[str, Any]:
    """The `_target_` tree that builds the generator of published hyper-parameters; see `from_public`.

    Raises:
        ConfigError: an option that is missing, or a head_dim that isn't that of hidden_size and num_attention_heads.
    """
    options = config.get("rar", config)
    missing = [name for name in _REQUIRED if name not in options]
    if missing:
        raise ConfigError(f"the published config lacks {', '.join(missing)}")
    hidden, heads = options["hidden_size"], options["num_attention_heads"]
    if options.get("head_dim", hidden // heads) != hidden // heads:
        raise ConfigError(
            f"head_dim={options['head_dim']} of the published config is not hidden_size / num_attention_heads = "
            f"{hidden} / {heads}"
        )
    given = {ours: options[name] for name, ours in (_REQUIRED | _OPTIONAL).items() if name in options}
    # the public code's rounding
    given["mlp_size"] = int(hidden * (given["mlp_size"] / hidden))
    return {"_target_": "tessera.generators.RAR", **given}


def from_public(config: Mapping[str, Any], state_dict: Mapping[str, Any]) -> RAR:
    """Build a generator and load published weights strictly.

    Args:
        config: published names, at the top or under "rar"; read are codebook_size, image_seq_len,
            condition_num_classes, hidden_size, num_hidden_layers, num_attention_heads, head_dim, intermediate_size, and
            the dropouts dropout, attn_drop and class_label_dropout (0.1), which only training needs.
        state_dict: published state dict.

    Returns:
        The generator in eval mode.

    Raises:
        ConfigError: an option that is missing or not supported.
        CheckpointError: weights that do not fit; lists missing, unexpected and mis-shaped keys.
    """
    generator = build(architecture(config), "the published config")
    weights = {key: value for key, value in state_dict.items() if key != _MASK}
    load_strictly(generator, weights, "the published checkpoint")
    return generator.eval()
