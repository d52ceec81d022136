"""Sampling of VAR scale by scale: the same function as its plain pass, with nothing of the past computed twice and
what doesn't depend on tokens computed once."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tessera.errors import ConfigError
from tessera.generators.cache import KVCache
from tessera.generators.compilation import compiled, keep_address
from tessera.generators.inference import compute_dtype, evaluating, float32_head, guided
from tessera.generators.sampling import Draw, Rng, SamplingConfig, make_draw, probabilities
from tessera.rng import as_sample_rng, exponential

if TYPE_CHECKING:
    from tessera.generators.var import VAR


class VARDecoder:
    """Feeds one scale after another to a VAR in eval mode.

    What makes it cheaper than the plain pass, at equal results up to rounding:

    - keys and values of earlier scales lie in a preallocated cache, so that a scale runs alone and without a mask;
    - the modulation depends on the class only: it is computed once, for the distinct classes of the batch (the
      unconditional half is one);
    - biases of joint projections and scales of queries are put together once.

    No operation waits for the device after construction. A scale has the same shapes in every call, so that its kernels
    can be launched as one graph (`VAR.compile_sampling`).

    Args:
        model: in eval mode.
        condition_ids: (R,) int64 from `VAR.condition_ids`, one per row.
    """

    def __init__(self, model: VAR, condition_ids: Tensor):
        self.model, self.places = model, model.places()
        self.classes = model.class_emb(condition_ids)
        distinct, member = condition_ids.unique(return_inverse=True)
        activated, condition = model.conditions(model.class_emb(distinct))
        self.modulations = [[part[member] for part in block.modulation(condition)] for block in model.blocks]
        self.head_modulation = [part[member] for part in model.head_nm.modulation(activated)]
        self.constants = [block.attn.constants() for block in model.blocks]
        weight = model.head.weight
        self.head = float32_head(model.head)
        self.cache = KVCache(
            len(model.blocks),
            len(condition_ids),
            model.num_heads,
            model.num_tokens,
            model.hidden_size // model.num_heads,
            compute_dtype(weight),
            weight.device,
        )
        if model.compiles_sampling:
            keep_address(self.cache)
        self.position = 0

    def _run(self, x: Tensor, first: int) -> Tensor:
        """Blocks and last norm on the (R, n, C) inputs of the positions from `first` on."""
        settings = zip(self.model.blocks, self.modulations, self.constants, strict=True)
        for layer, (block, modulation, constants) in enumerate(settings):
            x = block.extend(x, modulation, constants, self.cache, layer, first)
        return self.model.head_nm(x, *self.head_modulation)

    def step(self, latents: Tensor | None) -> Tensor:
        """Feed the next scale; its features before the head.

        Args:
            latents: (B, n, latent channels), `ProductQuantizer.advance`'s second result; None for the first scale. R is
                a multiple of B; row r gets those of sample r mod B.

        Returns:
            (R, n, C).
        """
        model, rows = self.model, len(self.classes)
        if latents is None:
            x = self.classes[:, None] + model.pos_start
        else:
            x = model.embed_latents(latents).repeat(rows // len(latents), 1, 1)
        first, self.position = self.position, self.position + x.shape[1]
        run = compiled(VARDecoder._run, x.device.type) if model.compiles_sampling else VARDecoder._run
        return run(self, x + self.places[first : self.position], first)

    def logits(self, features: Tensor) -> Tensor:
        """(B, n, C) features -> (B, P, n, K) float32."""
        return self.head(features).unflatten(-1, (self.model.num_branches, -1)).transpose(1, 2)


def gumbel_draw(rng: Rng, batch_size: int, device: torch.device) -> Draw:
    """Gumbel noise of rng's streams "smooth/<scale>", as a function of (probs (B, ..., K), scale).

    Raises:
        ConfigError: rng is a function of probabilities, which gives no noise.
    """
    if callable(rng):
        raise ConfigError(
            "smooth=True needs a source of noise, but rng is a function; give smooth=function (probs, scale) -> noise"
        )
    source = as_sample_rng(rng, batch_size, device)
    return lambda probs, scale: -exponential(source.uniform(f"smooth/{scale}", *probs.shape[1:]).to(probs.device)).log()


def mixtures(model: VAR, probs: Tensor, noise: Tensor, scale: int) -> Tensor:
    """Mixtures of codes in place of drawn ones (`VAR.generate_latent`).

    Args:
        probs: (B, P, n, K) float32, of which the logarithm stands for the filtered logits: constants cancel.
        noise: Gumbel noise of the same shape.
        scale: from 0.

    Returns:
        (B, n, latent channels) float32, channels of branch 0 first.
    """
    share = scale / (len(model.grids) - 1)
    weights = ((probs.log() * (1 + share) + noise) / max(0.27 * (1 - 0.95 * share), 0.005)).softmax(-1)
    every = torch.arange(model.codebook_size, device=probs.device).expand(1, model.num_branches, -1)
    codes = model.quantizer.embed(every, scale)[0].unflatten(-1, (model.num_branches, -1))  # (K, P, D)
    return torch.einsum("bpnk,kpd->bnpd", weights, codes.float()).flatten(2)


def generate_scales(
    model: VAR,
    labels: Tensor,
    sampling: SamplingConfig,
    teacher: Tensor | None = None,
    keep: Tensor | None = None,
    rng: Rng = None,
    smooth: bool | Draw = False,
    tokens_only: bool = False,
) -> tuple[Tensor, Tensor]:
    """Sample all scales; arguments as in `VAR.generate_latent`, already checked.

    Both halves of guidance run as one batch and are combined before the head, which is affine, so that the head runs
    once per sample. Without guidance the unconditional half doesn't run.

    Args:
        tokens_only: leave the last scale out of the latent.

    Returns:
        tokens (B, P, L) int64; the latent (B, latent channels, h, w) float32.
    """
    quantizer, device, batch = model.quantizer, model.head.weight.device, len(labels)
    labels, scales = labels.to(device), len(model.grids)
    tokens = torch.empty(batch, model.num_branches, model.num_tokens, dtype=torch.int64, device=device)
    latent, latents = torch.zeros(batch, model.latent_channels, *model.grids[-1], device=device), None
    if batch == 0:
        return tokens, latent
    weights, temperatures = sampling.guidance_weights(scales), sampling.temperatures(scales)
    if teacher is not None:
        teacher, keep = teacher.to(device), keep.to(device)
    draw = make_draw(rng, batch, device)
    noise = smooth if callable(smooth) else gumbel_draw(rng, batch, device) if smooth else None
    with evaluating(model):
        condition_ids = model.condition_ids(labels)
        if weights is not None:
            condition_ids = torch.cat([condition_ids, torch.full_like(condition_ids, model.none_id)])
        decoder = VARDecoder(model, condition_ids)
        for scale in range(scales):
            first = decoder.position
            features = decoder.step(latents)
            if weights is not None:
                features = guided(features, weights[scale])
            probs = probabilities(decoder.logits(features), sampling, temperatures[scale])
            drawn = draw(probs, scale)
            sites = slice(first, decoder.position)
            if teacher is not None:
                drawn = torch.where(keep[:, :, sites], teacher[:, :, sites], drawn)
            tokens[:, :, sites] = drawn
            if tokens_only and scale == scales - 1:
                break
            vectors = quantizer.embed(drawn, scale)
            if noise is not None:
                mixed = mixtures(model, probs, noise(probs, scale), scale)
                vectors = mixed if teacher is None else _by_branch(keep[:, :, sites], vectors, mixed)
            latent, latents = quantizer.advance(latent, vectors, scale)
    return tokens, latent


def _by_branch(choice: Tensor, chosen: Tensor, other: Tensor) -> Tensor:
    """`chosen` or `other` (B, n, P D) by branch and place, as `choice` (B, P, n) bool says."""
    parts = (values.unflatten(-1, (choice.shape[1], -1)) for values in (chosen, other))
    return torch.where(choice.transpose(1, 2)[..., None], *parts).flatten(2)
