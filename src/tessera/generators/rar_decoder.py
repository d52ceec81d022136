"""Incremental raster-order decoding of RAR: the same function as its plain pass, with everything that doesn't
depend on tokens computed once and nothing of the past computed twice."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from tessera.generators.cache import KVCache
from tessera.generators.inference import compute_dtype, evaluating, guided
from tessera.generators.sampling import Rng, SamplingConfig, make_draw, probabilities

if TYPE_CHECKING:
    from tessera.generators.rar import RAR

MODULATION_BYTES = 256 * 2**20


class RARDecoder:
    """Feeds one position after another to a RAR in eval mode.

    What makes it cheaper than the plain pass, at equal results up to rounding:

    - raster order makes the shift of the target-aware table constant: position p adds one row,
      M[p] = pos[p] + target[p + 1], M[0] = pos[0];
    - keys and values of earlier positions lie in a preallocated cache;
    - the modulation of the blocks depends on class and position only: it is computed for the distinct classes
      of the batch (the unconditional half is one), for as many positions at once as `modulation_bytes` hold.

    No operation waits for the device after construction. Every step has the same shapes but for the length of
    the cache that attention reads.

    Args:
        model: in eval mode.
        conditions: (R,) int64 from `RAR.condition_ids`, one per row.
        modulation_bytes: bound of the modulation table; at least two positions are held.
    """

    def __init__(self, model: RAR, conditions: Tensor, modulation_bytes: int = MODULATION_BYTES):
        self.model, self.length = model, model.num_tokens + 1  # the last token is never fed back
        weight = model.lm_head.weight
        self.places = model.pos_embed[0, : self.length].clone()
        self.places[1:] += model.target_aware_pos_embed[0, 2 : self.length + 1]
        self.distinct, self.member = conditions.unique(return_inverse=True)
        self.conditions = conditions
        dtype = compute_dtype(weight)
        width = (6 * len(model.blocks) + 2) * model.hidden_size
        row_bytes = len(self.distinct) * width * torch.finfo(dtype).bits // 8
        self.chunk = min(max(2, modulation_bytes // row_bytes), self.length)
        self.first, self.held, self.tables = 0, 0, []  # positions first .. first + held - 1 are in the tables
        self.cache = KVCache(
            len(model.blocks),
            len(conditions),
            model.num_heads,
            self.length,
            model.hidden_size // model.num_heads,
            dtype,
            weight.device,
        )

    def _hold(self, first: int) -> None:
        """Compute the modulation of positions `first` and following, as many as a table holds."""
        model = self.model
        self.tables = []  # free the old ones before the new ones are made
        steps = model.timesteps_embeddings[0, first : min(first + self.chunk, self.length)]
        activated = F.silu(steps[:, None] + model.embeddings(self.distinct))  # (positions, classes, d)
        self.first, self.held = first, len(steps)
        self.tables = [layer.modulation(activated) for layer in (*model.blocks, model.adaln_before_head)]

    def _feed(self, x: Tensor, position: int) -> Tensor:
        """Run the blocks on (R, N, d) inputs of N positions; (R, d) features of the last, before the head."""
        end = position + x.shape[1]
        if not self.first <= position < end <= self.first + self.held:
            self._hold(position)
        held = slice(position - self.first, end - self.first)
        *blocks, last = self.tables
        for layer, (block, table) in enumerate(zip(self.model.blocks, blocks, strict=True)):
            modulation = table[held].index_select(1, self.member).transpose(0, 1)  # (R, N, 6, d)
            x = block.extend(x, modulation, self.cache, layer, position)
        modulation = last[end - 1 - self.first].index_select(0, self.member)
        return self.model.adaln_before_head.modulate(x[:, -1], modulation)

    def start(self) -> Tensor:
        """Feed cls and condition; (R, d) features that predict the first token."""
        content = self.model.embeddings(self.conditions)[:, None]
        x = torch.cat([self.model.cls_token.expand(len(content), -1, -1), content], 1) + self.places[:2]
        return self._feed(x, 0)

    def step(self, tokens: Tensor, index: int) -> Tensor:
        """Feed a token; (R, d) features that predict the next.

        Args:
            tokens: (B, P) int64, token number `index` of each sample. R is a multiple of B; row r gets the
                token of sample r mod B.
            index: 0 .. L - 2.
        """
        x = self.model.embed_tokens(tokens[:, :, None]) + self.places[index + 2]
        return self._feed(x.repeat(len(self.conditions) // len(tokens), 1, 1), index + 2)


def generate_raster(
    model: RAR,
    labels: Tensor,
    sampling: SamplingConfig,
    teacher: Tensor | None = None,
    keep: Tensor | None = None,
    rng: Rng = None,
) -> Tensor:
    """Sample raster-order tokens; arguments as in `Generator.generate`, already checked.

    Both halves of guidance run as one batch and are combined before the head, which is affine, so that the
    head runs once per sample. Without guidance, or where every weight is 1, the unconditional half doesn't
    run.
    """
    device = model.lm_head.weight.device
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
        decoder = RARDecoder(model, conditions)
        for index in range(model.num_tokens):
            features = decoder.start() if index == 0 else decoder.step(tokens[:, :, index - 1], index - 1)
            if weights is not None:
                features = guided(features, weights[index])
            drawn = draw(probabilities(model.head(features), sampling, temperatures[index]), index)
            if teacher is not None:
                drawn = torch.where(keep[:, :, index], teacher[:, :, index], drawn)
            tokens[:, :, index] = drawn
    return tokens
