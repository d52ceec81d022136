"""Keys and values of the positions generated so far, in buffers of fixed size that are written in place."""

import torch
from torch import Tensor


class KVCache:
    """Preallocated key/value store of one generation; an explicit object that no module holds on to.

    Nothing is concatenated, moved or reallocated while a sequence grows: addresses stay the same.

    Args:
        layers: number of attention layers.
        rows: sequences in the batch (both guidance halves).
        heads: attention heads.
        length: positions it can hold.
        head_dim: channels of a head.
        dtype, device: of the buffers; keys and values are stored in this type.
    """

    def __init__(
        self,
        layers: int,
        rows: int,
        heads: int,
        length: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
    ):
        shape = (layers, rows, heads, length, head_dim)
        self.keys = torch.empty(shape, dtype=dtype, device=device)
        self.values = torch.empty(shape, dtype=dtype, device=device)

    def write(self, layer: int, position: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Store the keys and values of N consecutive positions and return all up to and including them.

        Args:
            layer: index of the attention layer.
            position: of the first of the N.
            keys, values: (rows, heads, N, head_dim).

        Returns:
            Keys and values (rows, heads, position + N, head_dim), views of the buffers.
        """
        end = position + keys.shape[2]
        self.keys[layer, :, :, position:end] = keys
        self.values[layer, :, :, position:end] = values
        return self.keys[layer, :, :, :end], self.values[layer, :, :, :end]
