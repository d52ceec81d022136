"""Key rules of CNNs that keep the names of taming-transformers' VQGAN: IBQ and VAR."""

from collections.abc import Mapping

from torch import Tensor

from tessera.zoo.keys import Rules


def cnn_rules(levels: int) -> Rules:
    """Published keys of encoder and decoder -> those of `CNNEncoder` and `CNNDecoder`.

    The decoder's levels are published by resolution (0 the finest), and lie in the order of their use here.
    """
    rules = [
        (r"(encoder|decoder)\.mid\.block_1\.(.*)", r"\1.mid.0.\2"),
        (r"(encoder|decoder)\.mid\.attn_1\.(.*)", r"\1.mid.1.\2"),
        (r"(encoder|decoder)\.mid\.block_2\.(.*)", r"\1.mid.2.\2"),
        (r"encoder\.down\.(\d+)\.block\.(.*)", r"encoder.conv_blocks.\1.res.\2"),
        (r"encoder\.down\.(\d+)\.(attn|downsample)\.(.*)", r"encoder.conv_blocks.\1.\2.\3"),
    ]
    for level in range(levels):
        ours = levels - 1 - level
        rules += [
            (rf"decoder\.up\.{level}\.block\.(.*)", rf"decoder.conv_blocks.{ours}.res.\1"),
            (rf"decoder\.up\.{level}\.(attn|upsample)\.(.*)", rf"decoder.conv_blocks.{ours}.\1.\2"),
        ]
    return rules


def split_qkv(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """State dict with each joint projection `*.qkv.*` (3 C, ...) as the three `*.q.*`, `*.k.*` and `*.v.*`."""
    found: dict[str, Tensor] = {}
    for key, value in state.items():
        if ".qkv." in key:
            for name, part in zip("qkv", value.chunk(3), strict=True):
                found[key.replace(".qkv.", f".{name}.")] = part
        else:
            found[key] = value
    return found
