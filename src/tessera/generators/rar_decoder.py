"""Incremental decoding of RAR: the same function as its plain pass, with everything that doesn't depend on tokens
computed once and nothing of the past computed twice."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from tessera.generators.cache import KVCache, Position
from tessera.generators.compilation import Slots, compiled, keep_address
from tessera.generators.inference import compute_dtype, float32_head
from tessera.generators.orders import raster_orders

if TYPE_CHECKING:
    from tessera.generators.rar import RAR

MODULATION_BYTES = 256 * 2**20


class RARDecoder:
    """Feeds one position after another to a RAR in eval mode.

    What makes it cheaper than the plain pass, at equal results up to rounding:

    - what a position adds to its token, its own embedding and that of the place it predicts, is summed once; in raster
      order it is the same for every sample;
    - keys and values of earlier positions lie in a preallocated cache;
    - the modulation of the blocks depends on class and position only: it is computed for the distinct classes
      of the batch (the unconditional half is one), for as many positions at once as `modulation_bytes` hold.

    No operation waits for the device after construction. Every step has the same shapes but for the length of
    the cache that attention reads.

    Args:
        model: in eval mode.
        conditions: (R,) int64 from `RAR.condition_ids`, one per row.
        orders: (B, L) int64 permutations, R a multiple of B: tokens are fed and predicted in this order. None: raster.
        modulation_bytes: bound of the modulation table; at least two positions are held.
    """

    def __init__(
        self,
        model: RAR,
        conditions: Tensor,
        orders: Tensor | None = None,
        modulation_bytes: int = MODULATION_BYTES,
    ):
        self.model, self.length = model, model.num_tokens + 1  # the last token is never fed back
        weight = model.lm_head.weight
        places = (raster_orders(1, model.num_tokens, weight.device) if orders is None else orders) + 2
        prefix = model.pos_embed[:, :2].expand(len(places), -1, -1)
        self.places = torch.cat([prefix, model.pos_embed[0][places[:, :-1]]], 1)  # (B or 1, L + 1, d)
        self.places[:, 1:] += model.target_aware_pos_embed[0][places]
        self.distinct, self.member = conditions.unique(return_inverse=True)
        self.conditions = conditions
        dtype = compute_dtype(weight)
        width = 6 * len(model.blocks) + 2
        row_bytes = len(self.distinct) * width * model.hidden_size * torch.finfo(dtype).bits // 8
        self.chunk = min(max(2, modulation_bytes // row_bytes), self.length)
        self.table = weight.new_empty(self.chunk, len(self.distinct), width, model.hidden_size, dtype=dtype)
        self.first, self.held = 0, 0  # positions first .. first + held - 1 are in the table
        self.slots = Slots(self.length, weight.device) if model.compiles_sampling else None
        self.cache = KVCache(
            len(model.blocks),
            len(conditions),
            model.num_heads,
            self.length if self.slots is None else self.slots.length,
            model.hidden_size // model.num_heads,
            dtype,
            weight.device,
        )
        if self.slots is not None:
            keep_address(self.cache)
        self.head = float32_head(model.lm_head)

    def _hold(self, first: int) -> None:
        """Compute the modulation of positions `first` and following, as many as the table holds."""
        model = self.model
        steps = model.timesteps_embeddings[0, first : min(first + self.chunk, self.length)]
        activated = F.silu(steps[:, None] + model.embeddings(self.distinct))  # (positions, classes, d)
        self.first, self.held, start = first, len(steps), 0
        for layer in (*model.blocks, model.adaln_before_head):
            modulation = layer.modulation(activated)
            end = start + modulation.shape[-2]
            self.table[: self.held, :, start:end] = modulation
            start = end

    def modulation(self, position: int, count: int) -> Tensor:
        """(count, classes, 6 n + 2, d): the modulation of all layers at `count` positions from `position` on."""
        if not self.first <= position < position + count <= self.first + self.held:
            self._hold(position)
        return self.table[position - self.first : position - self.first + count]

    def _rows(self, x: Tensor) -> Tensor:
        """(B, N, d) of the samples -> (R, N, d) of the rows."""
        return x.repeat(len(self.conditions) // len(x), 1, 1)

    def _run(self, x: Tensor, modulation: Tensor, position: Position) -> Tensor:
        """Run the blocks on the (R, N, d) inputs of N positions; (R, d) features of the last, before the head."""
        modulation = modulation.index_select(1, self.member).transpose(0, 1)  # (R, N, 6 n + 2, d)
        *blocks, last = modulation.split([6] * len(self.model.blocks) + [2], 2)
        for layer, (block, part) in enumerate(zip(self.model.blocks, blocks, strict=True)):
            x = block.extend(x, part, self.cache, layer, position)
        return self.model.adaln_before_head.modulate(x[:, -1], last[:, -1])

    def _advance(self, tokens: Tensor, places: Tensor, modulation: Tensor, position: Position) -> Tensor:
        """A step: no shape but the slot's and no number in here depends on the position."""
        return self._run(self._rows(self.model.embed_tokens(tokens[:, :, None]) + places), modulation, position)

    def start(self) -> Tensor:
        """Feed cls and condition; (R, d) features that predict the first token."""
        content = self.model.embeddings(self.conditions)[:, None]
        x = torch.cat([self.model.cls_token.expand(len(content), -1, -1), content], 1)
        return self._run(x + self._rows(self.places[:, :2]), self.modulation(0, 2), 0)

    def step(self, tokens: Tensor, index: int) -> Tensor:
        """Feed a token; (R, d) features that predict the next.

        Args:
            tokens: (B, P) int64, the token fed as number `index` of each sample. R is a multiple of B; row r gets the
                token of sample r mod B.
            index: 0 .. L - 2.
        """
        position = index + 2
        inputs = (tokens, self.places[:, position : position + 1], self.modulation(position, 1))
        if self.slots is None:
            return self._advance(*inputs, position)
        return compiled(RARDecoder._advance, tokens.device.type)(self, *inputs, self.slots[position])

    def logits(self, features: Tensor) -> Tensor:
        """(B, d) features -> (B, P, K) float32."""
        return self.head(features).unflatten(-1, (self.model.num_branches, self.model.codebook_size))
