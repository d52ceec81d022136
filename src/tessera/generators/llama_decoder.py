"""Incremental decoding of Llama: the same function as its plain pass, with everything that doesn't depend on tokens
computed once and nothing of the past computed twice."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from tessera.generators.cache import KVCache
from tessera.generators.inference import compute_dtype, evaluating, guided
from tessera.generators.sampling import Rng, SamplingConfig, make_draw, probabilities

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
        self.cache = KVCache(
            len(model.blocks),
            len(conditions),
            model.num_heads,
            model.num_tokens,  # the class and all but the last token, which is never fed back
            model.hidden_size // model.num_heads,
            compute_dtype(weight),
            weight.device,
        )

    def _feed(self, x: Tensor, position: int) -> Tensor:
        """Run the blocks on the (R, 1, d) input of a position; (R, d) features before the head."""
        rotation = self.rotation[:, position : position + 1]
        for layer, (block, modulation) in enumerate(zip(self.model.blocks, self.modulations, strict=True)):
            x = block.extend(x, modulation, rotation, self.cache, layer, position)
        return self.model.head_nm.modulate(x, self.last)[:, 0]

    def start(self) -> Tensor:
        """Feed the class; (R, d) features that predict the first token."""
        return self._feed(self.condition, 0)

    def step(self, tokens: Tensor, index: int) -> Tensor:
        """Feed a token; (R, d) features that predict the next.

        Args:
            tokens: (B, P) int64, token number `index` of each sample. R is a multiple of B; row r gets the
                token of sample r mod B.
            index: 0 .. L - 2.
        """
        x = self.model.embed_tokens(tokens[:, :, None])
        if self.levels is not None:
            x = x + self.levels[index]
        return self._feed(x.repeat(len(self.condition) // len(tokens), 1, 1), index + 1)


def generate_raster(
    model: Llama,
    labels: Tensor,
    sampling: SamplingConfig,
    teacher: Tensor | None = None,
    keep: Tensor | None = None,
    rng: Rng = None,
) -> Tensor:
    """Sample raster-order tokens; arguments as in `Generator.generate`, already checked.

    Both halves of guidance run as one batch and are combined before the head, which is linear, so that the head runs
    once per sample. Without guidance, or where every weight is 1, the unconditional half doesn't run.
    """
    device = model.head.weight.device
    labels, batch = labels.to(device), len(labels)
    tokens = torch.empty(batch, model.num_branches, model.num_tokens, dtype=torch.int64, device=device)
    if batch == 0:
        return tokens
    if teacher is not None:
        teacher, keep = teacher.to(device), keep.to(device)
    weights, temperatures = sampling.guidance_weights(model.num_tokens), sampling.temperatures(model.num_tokens)
    draw = make_draw(rng, batch, device)
    with evaluating(model):
        conditions = model.condition_ids(labels)
        if weights is not None:
            conditions = torch.cat([conditions, torch.full_like(conditions, model.none_id)])
        decoder = LlamaDecoder(model, conditions)
        for index in range(model.num_tokens):
            features = decoder.start() if index == 0 else decoder.step(tokens[:, :, index - 1], index - 1)
            if weights is not None:
                features = guided(features, weights[index])
            drawn = draw(probabilities(model.logits(features), sampling, temperatures[index]), index)
            if teacher is not None:
                drawn = torch.where(keep[:, :, index], teacher[:, :, index], drawn)
            tokens[:, :, index] = drawn
    return tokens
