"""Parts of the `_target_` trees that the tokenizers of several families share."""

from typing import Any

Node = dict[str, Any]


def single_grid(codebook: str, dim: int, **arguments: Any) -> Node:
    """A quantizer of one branch and one code per cell.

    Args:
        codebook: name of its class in `tessera.quantizers`.
        dim: channels of the latent.
        arguments: of the codebook.
    """
    return {
        "_target_": "tessera.quantizers.ProductQuantizer",
        "branches": 1,
        "dim": dim,
        "branch": {
            "_target_": "tessera.quantizers.SingleGridQuantizer",
            "_partial_": True,
            "codebook": {"_target_": f"tessera.quantizers.{codebook}", "_partial_": True, **arguments},
        },
    }
