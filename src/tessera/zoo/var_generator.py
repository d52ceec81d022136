"""Generators of VAR (FoundationVision/VAR) and ImageFolder (lxa9867/ImageFolder) from their published hyper-parameters
and weights, and what of their tokenizer lies in the same file."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from tessera.errors import CheckpointError, ConfigError
from tessera.generators import VAR
from tessera.grids import Grid, as_grid
from tessera.quantizers import ProductQuantizer
from tessera.tokenizers import Tokenizer
from tessera.zoo import var, xqgan
from tessera.zoo.export import build
from tessera.zoo.keys import XQGAN, XQGAN_IGNORED, load_strictly, rename
from tessera.zoo.nodes import Node

_GENERATOR, _TOKENIZER = "var_wo_ddp", "vae_local"
# Buffers that follow from the scales, and the row that replaces inputs in a training with p_drop > 0, which is no part
# of the model that is sampled
IGNORED: Sequence[str] = (r"lvl_1L", r"attn_bias_for_masking", r"blocks\.\d+\.attn\.zero_k_bias", r"empty_emb\.weight")


def split_checkpoint(checkpoint: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The weights of generator and tokenizer in a published file, under their names in either.

    Args:
        checkpoint: a training checkpoint (`trainer.var_wo_ddp`, `trainer.vae_local`), a state dict with these names as
            prefixes, or a generator's own state dict; with or without the `_orig_mod.` of compiled modules.

    Returns:
        The second is empty where the file holds a generator only.
    """
    inside = checkpoint.get("trainer", checkpoint)
    parts: dict[str, dict[str, Tensor]] = {_GENERATOR: {}, _TOKENIZER: {}}
    for part, found in parts.items():
        if isinstance(inside.get(part), Mapping):
            found.update(inside[part])
        found.update({k.removeprefix(f"{part}."): v for k, v in inside.items() if k.startswith(f"{part}.")})
    if not any(parts.values()):
        parts[_GENERATOR] = dict(inside)
    plain = ({key.replace("_orig_mod.", ""): value for key, value in found.items()} for found in parts.values())
    return next(plain), next(plain)


def _grids(config: Mapping[str, Any], weights: Mapping[str, Tensor]) -> list[Grid]:
    """The scales, by the config or else by the level of each position; they must fit the weights."""
    given, of_tokenizer = config.get("patch_nums"), config.get("v_patch_nums")
    if given is not None and of_tokenizer is not None and list(given) != list(of_tokenizer):
        raise ConfigError(
            f"patch_nums={list(given)} of the published config contradicts its v_patch_nums={list(of_tokenizer)}"
        )
    given = of_tokenizer if given is None else given
    levels = weights.get("lvl_1L")
    sizes = None if levels is None or levels.is_meta else levels.flatten().unique_consecutive(return_counts=True)[1]
    if given is None:
        if sizes is None:
            raise ConfigError("the published config lacks patch_nums, the scales, which its weights don't tell")
        given = [math.isqrt(size) for size in sizes.tolist()]
    grids = [as_grid(grid, "patch_nums of the published config") for grid in given]
    expected = [height * width for height, width in grids]
    positions = weights["pos_1LC"].shape[1] if "pos_1LC" in weights else sum(expected)
    if sum(expected) != positions or (sizes is not None and sizes.tolist() != expected):
        found = positions if sizes is None else sizes.tolist()
        raise CheckpointError(
            f"patch_nums={list(given)} of the published config are scales of {expected} tokens, {sum(expected)} in "
            f"all, but the weights have {found}; give the scales that they were trained with"
        )
    return grids


def _branches(config: Mapping[str, Any]) -> int:
    return config.get("product_quant", 1)


def _codes(config: Mapping[str, Any]) -> int | None:
    return config.get("vocab_size", config.get("codebook_size"))


def _branch_channels(config: Mapping[str, Any]) -> int | None:
    if "Cvae" in config:
        return config["Cvae"] // _branches(config)
    return config.get("codebook_embed_dim", config.get("z_channels"))


def _shape(weights: Mapping[str, Tensor], key: str, axis: int) -> int:
    if key not in weights:
        raise CheckpointError(f"the published checkpoint lacks {key}; is it that of a VAR generator?")
    return weights[key].shape[axis]


def architecture(config: Mapping[str, Any], weights: Mapping[str, Tensor]) -> Node:
    """The `_target_` tree that builds the generator of published options; what they leave out is read off the weights.

    Raises:
        ConfigError: an option that is missing or not supported.
        CheckpointError: weights of other scales.
    """
    if (eps := config.get("norm_eps", 1e-6)) != 1e-6:
        raise ConfigError(f"norm_eps={eps} of the published config is not supported here; 1e-6 is")
    branches, hidden = _branches(config), _shape(weights, "word_embed.weight", 0)
    hidden = config.get("embed_dim", hidden)
    blocks = {key.split(".")[1] for key in weights if key.startswith("blocks.")}
    depth = config.get("depth", len(blocks))
    scale = weights.get("blocks.0.attn.scale_mul_1H11")
    channels, codes = _branch_channels(config), _codes(config)
    node = {
        "_target_": "tessera.generators.VAR",
        "codebook_size": _shape(weights, "head.weight", 0) // branches if codes is None else codes,
        "grids": [list(grid) for grid in _grids(config, weights)],
        "latent_channels": _shape(weights, "word_embed.weight", 1) if channels is None else branches * channels,
        "num_classes": config.get("num_classes", _shape(weights, "class_emb.weight", 0) - 1),
        "num_branches": branches,
        "depth": depth,
        "hidden_size": hidden,
        "num_heads": config.get("num_heads", depth if scale is None else scale.shape[1]),
        "mlp_size": round(hidden * config["mlp_ratio"])
        if "mlp_ratio" in config
        else _shape(weights, "blocks.0.ffn.fc1.weight", 0),
        "shared_modulation": config.get("shared_aln", "shared_ada_lin.1.weight" in weights),
        "normalized_attention": config.get("attn_l2_norm", scale is not None),
        "class_dropout": config.get("cond_drop_rate", 0.1),
    }
    return node | ({"drop_path": config["drop_path_rate"]} if "drop_path_rate" in config else {})


def _quantizer(config: Mapping[str, Any], weights: Mapping[str, Tensor], generator: VAR) -> ProductQuantizer:
    """The quantizer in a tokenizer's state dict, whose keys are already ours."""
    # ImageFolder always compares by cosine
    options = {"using_znorm": "codebook_size" in config, **config, "v_patch_nums": generator.grids}
    branches = generator.num_branches
    node = var.quantizer_node(options, generator.codebook_size, generator.latent_channels // branches, branches)
    quantizer = build(node, "the published config")
    own = {key.removeprefix("quantizer."): value for key, value in weights.items() if key.startswith("quantizer.")}
    load_strictly(quantizer, own, "the quantizer of the published checkpoint")
    return quantizer.eval()


def _tokenizer_architecture(config: Mapping[str, Any]) -> Node:
    """The tree of the tokenizer that a generator's options describe beside its own."""
    if "vocab_size" in config:
        return var.architecture(config)
    # these are the generator's; those of the ViT have other names beside them
    sizes = {"embed_dim": "vit_dim", "depth": "vit_depth", "num_heads": "vit_heads"}
    options = {"enc_type": "dinov2", "dec_type": "dinov2", **{k: v for k, v in config.items() if k not in sizes}}
    return xqgan.architecture(options | {ours: config[name] for ours, name in sizes.items() if name in config})


def _renamed_tokenizer(config: Mapping[str, Any], weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    if "vocab_size" in config:
        return var.renamed(weights, len(config.get("ch_mult", (1, 1, 2, 2, 4))))
    return rename(weights, XQGAN, XQGAN_IGNORED)


def decoder(config: Mapping[str, Any], checkpoint: Mapping[str, Any]) -> nn.Module:
    """The pixel decoder that lies in a generator's file: latents of `VAR.generate_latent` -> images.

    Where the encoder lies there, too, `from_public("var" or "xqgan", ...)` builds the whole tokenizer from
    `split_checkpoint`'s second part and the tokenizer's own options.

    Args:
        config: of the generator and of the tokenizer in one, as `from_public` takes them.
        checkpoint: see `split_checkpoint`.

    Returns:
        In eval mode: (B, C, h, w) float -> (B, 3, H, W) float; not clamped.

    Raises:
        ConfigError: an option that is missing or not supported.
        CheckpointError: weights that do not fit, or none of a decoder.
    """
    tokenizer = build(_tokenizer_architecture(config), "the published config")
    parts = nn.ModuleDict(tokenizer.decoder_modules())
    state = _renamed_tokenizer(config, split_checkpoint(checkpoint)[1])
    own = {key: value for key, value in state.items() if key.startswith(tuple(f"{name}." for name in parts))}
    load_strictly(parts, own, "the decoder of the published checkpoint")
    return nn.Sequential(*parts.values()).eval()


def converter(config: Mapping[str, Any], checkpoint: Mapping[str, Any]) -> Callable[..., nn.Module]:
    """What builds the model of a file of VAR's or ImageFolder's: a generator, or a tokenizer where there is none."""
    if str(config.get("cls", "")).endswith("VQModel"):
        return xqgan.from_public
    if "depth" not in config:
        return var.from_public
    generator, tokenizer = split_checkpoint(checkpoint)
    return _tokenizer_from_public if tokenizer and not generator else from_public


def _tokenizer_from_public(config: Mapping[str, Any], checkpoint: Mapping[str, Any]) -> Tokenizer:
    """The tokenizer whose options lie beside those of a generator."""
    tokenizer = build(_tokenizer_architecture(config), "the published config")
    state = _renamed_tokenizer(config, split_checkpoint(checkpoint)[1])
    load_strictly(tokenizer, state, "the published checkpoint")
    return tokenizer.eval()


def from_public(config: Mapping[str, Any], state_dict: Mapping[str, Any]) -> VAR:
    """Build a generator and load published weights strictly.

    Args:
        config: published names; read are patch_nums (or v_patch_nums), product_quant (1), vocab_size or codebook_size,
            Cvae or z_channels or codebook_embed_dim, depth, embed_dim, num_heads, mlp_ratio, num_classes,
            shared_aln, attn_l2_norm, cond_drop_rate (0.1), drop_path_rate; what is missing follows from the weights.
            For the quantizer: share_quant_resi (4), quant_resi (0.5), using_znorm.
        state_dict: see `split_checkpoint`. Buffers are left out; so is the row that replaces inputs in trainings with
            p_drop > 0: such a model can be sampled and trained on, without that masking.

    Returns:
        The generator in eval mode; bound to the quantizer if the file holds one, else to be bound.

    Raises:
        ConfigError: an option that is missing or not supported.
        CheckpointError: weights that do not fit; lists missing, unexpected and mis-shaped keys.
    """
    weights, of_tokenizer = split_checkpoint(state_dict)
    generator = build(architecture(config, weights), "the published config")
    load_strictly(generator, rename(weights, (), IGNORED), "the published checkpoint")
    generator.eval()
    if any(key.startswith("quantize") for key in of_tokenizer):
        generator.bind(_quantizer(config, _renamed_tokenizer(config, of_tokenizer), generator))
    return generator
