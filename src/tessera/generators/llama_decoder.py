"""Incremental decoding of Llama: the same function as its plain pass, with everything that doesn't depend on tokens
computed once and nothing of the past computed twice."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch.nn.functional as F
from torch import Tensor

from tessera.generators.cache import KVCache, Position
from tessera.generators.compilation import Slots, compiled, keep_address
from tessera.generators.inference import compute_dtype, float32_head

if TYPE_CHECKING:
    from tessera.generators.llama import Llama


class LlamaDecoder:
    """Feeds one position after another to a Llama in eval mode.

    What makes it cheaper than the plain pass, at equal results up to rounding:

    - keys and values of earlier positions lie in a preallocated cache, of which attention reads what is filled;
    - the modulation depends on the class alone: it is computed once, for the distinct classes of the batch (the
      unconditional half is one);
    - so are the rotary table and the vectors of the scales.

    No operation waits for the device after construction. Every step has the same shapes but for the length of the
    cache that attention reads.

    Args:
        model: in eval mode.
        conditions: (R,) int64 from `Llama.condition_ids`, one per row.
    """

    def __init__(self, model: Llama, conditions: Tensor):
        self.model, self.rotation, self.levels = model, model.rotation(), model.levels()
        distinct, member = conditions.unique(return_inverse=True)
        embedded = model.class_emb(distinct)
        self.condition = embedded[member, None]
        activated = F.silu(embedded)
        *self.modulations, self.last = (
            layer.modulation(activated)[member, None] for layer in (*model.blocks, model.head_nm)
        )
        weight = model.head.weight
        length = model.num_tokens  # the class and all but the last token, which is never fed back
        self.slots = Slots(length, weight.device) if model.compiles_sampling else None
        self.cache = KVCache(
            len(model.blocks),
            len(conditions),
            model.num_heads,
            length if self.slots is None else self.slots.length,
            model.hidden_size // model.num_heads,
            compute_dtype(weight),
            weight.device,
        )
        if self.slots is not None:
            keep_address(self.cache)
        self.head = float32_head(model.head)

    def _run(self, x: Tensor, rotation: Tensor, position: Position) -> Tensor:
        """Run the blocks on the (R, 1, d) input of a position; (R, d) features before the head."""
        for layer, (block, modulation) in enumerate(zip(self.model.blocks, self.modulations, strict=True)):
            x = block.extend(x, modulation, rotation, self.cache, layer, position)
        return self.model.head_nm.modulate(x, self.last)[:, 0]

    def _advance(self, tokens: Tensor, level: Tensor | None, rotation: Tensor, position: Position) -> Tensor:
        """A step: no shape but the slot's and no number in here depends on the position."""
        x = self.model.embed_tokens(tokens[:, :, None])
        if level is not None:
            x = x + level
        return self._run(x.repeat(len(self.condition) // len(tokens), 1, 1), rotation, position)

    def start(self) -> Tensor:
        """Feed the class; (R, d) features that predict the first token."""
        return self._run(self.condition, self.rotation[:, :1], 0)

    def step(self, tokens: Tensor, index: int) -> Tensor:
        """Feed a token; (R, d) features that predict the next.

        Args:
            tokens: (B, P) int64, token number `index` of each sample. R is a multiple of B; row r gets the
                token of sample r mod B.
            index: 0 .. L - 2.
        """
        position = index + 1
        level = None if self.levels is None else self.levels[index]
        inputs = (tokens, level, self.rotation[:, position : position + 1])
        if self.slots is None:
            return self._advance(*inputs, position)
        return compiled(LlamaDecoder._advance, tokens.device.type)(self, *inputs, self.slots[position])

    def logits(self, features: Tensor) -> Tensor:
        """(B, d) features -> (B, P, K) float32."""
        return self.head(features).unflatten(-1, (self.model.num_branches, self.model.codebook_size))
