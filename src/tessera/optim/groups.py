"""Which parameters weight decay applies to."""

from typing import Any

from torch import nn

from tessera.errors import ConfigError

RULES = ("explicit", "public", "var", "matrix", "all")
# Parts of names that the published trainings of RAR and TiTok exclude, matched case-sensitively; post_quant_conv is
# TiTok's decoder_embed
PUBLIC_PARTS = (
    "ln", "bias", "latent_tokens", "mask_token", "embedding", "norm", "gamma", "embed", "post_quant_conv",
)  # fmt: skip
# Likewise of VAR's training, which also excludes names that end with "bias"
VAR_PARTS = (
    "cls_token", "start_token", "task_token", "cfg_uncond", "pos_embed", "pos_1LC", "pos_start", "start_pos",
    "lvl_embed", "gamma", "beta", "ada_gss", "moe_bias", "scale_mul",
)  # fmt: skip


def decayed_names(module: nn.Module, rule: str = "explicit") -> set[str]:
    """Names of the trainable parameters that weight decay applies to.

    Args:
        module: whose parameters.
        rule: "explicit": the weights of linear and convolution layers. "public": at least two dimensions and no part
            of PUBLIC_PARTS in the name, as the published trainings of RAR and TiTok do (which decays `cls_token` but,
            as its name contains "ln", not `adaln_before_head`). "var": at least two dimensions, no part of VAR_PARTS
            in the name and no "bias" at its end, as VAR does. "matrix": at least two dimensions, as IBQ's generators
            do. "all": everything, as XQ-GAN does.

    Raises:
        ConfigError: another rule.

    Source: bytedance/1d-tokenizer, scripts/train_rar.py, for "public"; FoundationVision/VAR, utils/lr_control.py, for
        "var"; TencentARC/SEED-Voken, cond_transformer_llama.py, for "matrix".
    """
    if rule not in RULES:
        raise ConfigError(f"stage.decay_rule={rule!r} is unknown; choose one of {', '.join(RULES)}")
    parameters = {name: value for name, value in module.named_parameters() if value.requires_grad}
    if rule == "all":
        return set(parameters)
    matrices = {name for name, value in parameters.items() if value.ndim >= 2}
    if rule == "matrix":
        return matrices
    if rule == "public":
        return {name for name in matrices if not any(part in name for part in PUBLIC_PARTS)}
    if rule == "var":
        matrices = {name for name in matrices if not name.endswith("bias")}
        return {name for name in matrices if not any(part in name for part in VAR_PARTS)}
    layers = (nn.Linear, nn.modules.conv._ConvNd)
    weights = {f"{prefix}.weight".lstrip(".") for prefix, layer in module.named_modules() if isinstance(layer, layers)}
    return weights & set(parameters)


def decay_groups(module: nn.Module, weight_decay: float, rule: str = "explicit") -> list[dict[str, Any]]:
    """Optimizer parameter groups: the decayed parameters, then the others with weight decay 0; empty ones left out."""
    decayed = decayed_names(module, rule)
    named = [(name, value) for name, value in module.named_parameters() if value.requires_grad]
    groups = [
        {"params": [value for name, value in named if name in decayed], "weight_decay": weight_decay},
        {"params": [value for name, value in named if name not in decayed], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]
