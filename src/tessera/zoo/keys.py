"""State-dict keys of published checkpoints: rename tables, and strict loading.

The names of other code bases live here and nowhere else.
"""

import re
from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from tessera.errors import CheckpointError

# (pattern of the whole published key, our key). The first match decides; a key without match keeps its name.
Rules = Sequence[tuple[str, str]]

XQGAN_SINGLE_GRID: Rules = (
    (r"quantize\.embedding\.weight", r"quantizer.branches.0.codebooks.0.embedding"),
    (r"quantizes\.(\d+)\.embedding\.weight", r"quantizer.branches.\1.codebooks.0.embedding"),
)
XQGAN_MULTI_SCALE: Rules = (
    (r"quantize\.quant_resi\.(?:qresi_ls\.)?(\d+)\.(weight|bias)", r"quantizer.branches.0.phi.\1.\2"),
    (r"quantize\.quant_resi\.qresi\.(weight|bias)", r"quantizer.branches.0.phi.0.\1"),
    (r"quantizes\.(\d+)\.quant_resi\.(?:qresi_ls\.)?(\d+)\.(weight|bias)", r"quantizer.branches.\1.phi.\2.\3"),
    (r"quantizes\.(\d+)\.quant_resi\.qresi\.(weight|bias)", r"quantizer.branches.\1.phi.0.\2"),
)
# peft wraps a network as base_model.model, a target layer as base_layer, and copies layers that train in full
_NETWORK = r"(encoder|decoder)\.model\.(?:base_model\.model\.)?"
XQGAN_BACKBONES: Rules = (
    (r"(encoder|decoder)\.lvl_embed\.weight", r"\1.level_embed"),
    (r"decoder\.to_pixel\.model\.0\.linear\.(.*)", r"decoder.to_pixel.hidden.\1"),
    (r"decoder\.to_pixel\.model\.(?:1\.)?(?:linear\.)?(weight|bias)", r"decoder.to_pixel.projection.\1"),
    (_NETWORK + r"(.*)\.lora_A\.default\.weight", r"\1.network.\2.lora_a"),
    (_NETWORK + r"(.*)\.lora_B\.default\.weight", r"\1.network.\2.lora_b"),
    (_NETWORK + r"(.*)\.(?:base_layer|modules_to_save\.default)\.(weight|bias)", r"\1.network.\2.\3"),
    (_NETWORK + r"(.*)", r"\1.network.\2"),
)
XQGAN: Rules = (*XQGAN_SINGLE_GRID, *XQGAN_MULTI_SCALE, *XQGAN_BACKBONES)
# Code magnitudes of LFQ, which follow from the options
XQGAN_BINARY_IGNORED: Sequence[str] = (r"quantizes?\.(?:\d+\.)?scaler",)
# Frozen teachers, training-only layers, usage statistics, and peft's untrained copies: nothing a tokenizer needs to run
XQGAN_IGNORED: Sequence[str] = (
    r"semantic_model\..*",
    r"detail_model\..*",
    r"sem_linear\..*",
    r".*\.ema_vocab_hit_SV",
    r"(?:encoder|decoder)\.lvl1LC",
    r".*\.original_module\.(?:weight|bias)",
)


def rename(state: Mapping[str, Tensor], rules: Rules, ignored: Sequence[str] = ()) -> dict[str, Tensor]:
    """State dict under our names.

    Args:
        state: published state dict.
        rules: (pattern, replacement) pairs; the first pattern that matches the whole key decides.
        ignored: patterns of keys to leave out.

    Raises:
        CheckpointError: two published keys become one of ours.
    """
    renamed: dict[str, Tensor] = {}
    for key, value in state.items():
        if any(re.fullmatch(pattern, key) for pattern in ignored):
            continue
        matches = (re.fullmatch(pattern, key) for pattern, _ in rules)
        found = next(((m, new) for m, (_, new) in zip(matches, rules, strict=True) if m), None)
        ours = found[0].expand(found[1]) if found else key
        if ours in renamed:
            raise CheckpointError(f"two published keys stand for {ours}; the second is {key}")
        renamed[ours] = value
    return renamed


def key_problems(expected: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> list[str]:
    """Missing, unexpected and mis-shaped keys of `state`, in words; empty when it fits."""
    problems = [f"missing {key}" for key in expected if key not in state]
    problems += [f"unexpected {key}" for key in state if key not in expected]
    for key, value in expected.items():
        if key in state and state[key].shape != value.shape:
            problems.append(f"{key} is {tuple(state[key].shape)}, not {tuple(value.shape)}")
    return problems


def load_strictly(module: nn.Module, state: Mapping[str, Tensor], source: str, shown: int = 12) -> None:
    """Load a state dict that must fit exactly.

    Args:
        source: where the weights come from, for the message.
        shown: problems listed before "and n more".

    Raises:
        CheckpointError: lists missing, unexpected and mis-shaped keys; the module is left as it was.
    """
    problems = key_problems(module.state_dict(), state)
    if problems:
        more = f"; and {len(problems) - shown} more" if len(problems) > shown else ""
        raise CheckpointError(
            f"{source} does not fit this {type(module).__name__}: {'; '.join(problems[:shown])}{more}"
        )
    module.load_state_dict(dict(state))
