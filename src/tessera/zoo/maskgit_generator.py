"""MaskGIT generators of TiTok (bytedance/1d-tokenizer) from their published hyper-parameters and weights."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from tessera.errors import ConfigError
from tessera.generators.maskgit import MaskGIT
from tessera.zoo.export import build
from tessera.zoo.keys import Rules, load_strictly, rename
from tessera.zoo.nodes import Node

# published name -> ours
_REQUIRED = {
    "image_seq_len": "num_tokens", "condition_num_classes": "num_classes", "hidden_size": "hidden_size",
    "num_hidden_layers": "depth", "num_attention_heads": "num_heads", "intermediate_size": "mlp_size",
}  # fmt: skip
_DROPOUTS = {"dropout": "dropout", "attn_drop": "attention_dropout"}
_LOSSES = {"label_smoothing": "label_smoothing", "loss_weight_unmasked_token": "unmasked_weight"}
_LAYER = r"model\.encoder\.layer\.(\d+)\."
BERT: Rules = (
    (r"model\.embeddings\.word_embeddings\.weight", r"embeddings.weight"),
    (r"model\.embeddings\.position_embeddings\.weight", r"pos_embed"),
    (r"model\.embeddings\.token_type_embeddings\.weight", r"type_embed"),
    (r"model\.embeddings\.LayerNorm\.(.*)", r"embed_norm.\1"),
    (_LAYER + r"attention\.self\.qkv\.(.*)", r"blocks.\1.attn.qkv.\2"),
    (_LAYER + r"attention\.output\.dense\.(.*)", r"blocks.\1.attn.proj.\2"),
    (_LAYER + r"attention\.output\.LayerNorm\.(.*)", r"blocks.\1.norm1.\2"),
    (_LAYER + r"intermediate\.dense\.(.*)", r"blocks.\1.mlp.fc1.\2"),
    (_LAYER + r"output\.dense\.(.*)", r"blocks.\1.mlp.fc2.\2"),
    (_LAYER + r"output\.LayerNorm\.(.*)", r"blocks.\1.norm2.\2"),
    (r"model\.lm_head\.(.*)", r"lm_head.\1"),
)
# A buffer of old files: 0, 1, 2, ...
BERT_IGNORED: Sequence[str] = (r"model\.embeddings\.position_ids",)


def is_generator(config: Mapping[str, Any]) -> bool:
    """Whether published hyper-parameters of TiTok, flat or nested, are those of a generator."""
    model = config.get("model", config)
    return "generator" in model or "model_type" in model


def architecture(config: Mapping[str, Any]) -> Node:
    """The `_target_` tree that builds the generator of published hyper-parameters; see `from_public`.

    Raises:
        ConfigError: an option that is missing or not supported.
    """
    model = config.get("model", config)
    found = {**model.get("vq_model", {}), **model, **model.get("generator", {})}
    missing = [name for name in ("model_type", "codebook_size", *_REQUIRED) if found.get(name) is None]
    if missing:
        raise ConfigError(f"the published config lacks {', '.join(missing)}")
    losses = config.get("losses", {})
    given = {ours: found[name] for name, ours in _REQUIRED.items()}
    given |= {ours: losses[name] for name, ours in _LOSSES.items() if name in losses}
    if "class_label_dropout" in found:
        given["class_dropout"] = found["class_label_dropout"]
    given["codebook_size"] = found["codebook_size"]
    if found["model_type"] == "ViT":
        dropouts = {ours: found[name] for name, ours in _DROPOUTS.items() if name in found}
        return {"_target_": "tessera.generators.MaskGITViT", **given, **dropouts}
    if found["model_type"] == "UViT":
        # the middle block isn't counted, and the published dropouts don't reach the blocks
        given["depth"] = 2 * (found["num_hidden_layers"] // 2) + 1
        return {"_target_": "tessera.generators.MaskGITUViT", **given}
    raise ConfigError(f"model_type={found['model_type']!r} of the published config is unknown; it is ViT or UViT")


def renamed(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Published weights of either model under our names and in our shapes.

    Of BERT's, the projections to queries, keys and values become one layer. U-ViT's names are ours.
    """
    state = dict(state_dict)
    for key in state_dict:
        if key.endswith(".attention.self.query.weight") or key.endswith(".attention.self.query.bias"):
            parts = [key.replace(".query.", f".{name}.") for name in ("query", "key", "value")]
            if all(part in state for part in parts):
                state[key.replace(".query.", ".qkv.")] = torch.cat([state.pop(part) for part in parts])
    state = rename(state, BERT, BERT_IGNORED)
    if "pos_embed" in state and state["pos_embed"].ndim == 2:  # a table there
        state["pos_embed"] = state["pos_embed"][None]
    return state


def from_public(config: Mapping[str, Any], state_dict: Mapping[str, Tensor]) -> MaskGIT:
    """Build a generator and load published weights strictly.

    Args:
        config: published names, flat, below `generator`, or nested as in the hub's config.json: model_type (ViT or
            UViT), codebook_size, image_seq_len, condition_num_classes, hidden_size, num_hidden_layers,
            num_attention_heads, intermediate_size; for training dropout, attn_drop, class_label_dropout and, below
            `losses`, label_smoothing and loss_weight_unmasked_token.
        state_dict: published state dict.

    Returns:
        The generator in eval mode.

    Raises:
        ConfigError: an option that is missing or not supported.
        CheckpointError: weights that do not fit; lists missing, unexpected and mis-shaped keys.
    """
    generator = build(architecture(config), "the published config")
    load_strictly(generator, renamed(state_dict), "the published checkpoint")
    return generator.eval()
