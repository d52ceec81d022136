"""VAR: autoregressive transformer over scales; all tokens of a scale are predicted at once from the coarser ones."""

import math
from collections.abc import Sequence
from itertools import chain
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tessera.errors import ConfigError
from tessera.generators.base import Generator, check_transformer
from tessera.generators.layers import Linear, adaptive_projection
from tessera.generators.sampling import Draw, Rng, SamplingConfig
from tessera.generators.scores import site_sums, token_losses
from tessera.generators.var_decoder import generate_scales
from tessera.generators.var_layers import HeadNorm, VARBlock
from tessera.grids import as_grid
from tessera.quantizers import ProductQuantizer
from tessera.rng import SampleRng, as_sample_rng


class _Shared(tuple):
    """Modules that aren't registered as parts, and that a copy of their holder (an average of its weights) shares."""

    def __deepcopy__(self, memo: dict[int, Any]) -> "_Shared":
        return self


class VAR(Generator):
    """Next-scale generator for the tokens of a multi-scale (or residual) tokenizer.

    The tokens of scale k are predicted from the class and from the latent that the tokenizer sums up of the scales
    before k, shrunk to the size of k; so position i of a scale predicts token i of the same scale. Attention reaches
    the own and all earlier scales. What turns tokens into that latent is the tokenizer's quantizer: `bind` it before
    `loss` and `generate`. It is no part of the state dict.

    Parameters are those of the published files for any number of branches P: the latent has the channels of all
    branches, and the head gives P * K logits, those of branch 0 first.

    Args:
        codebook_size, num_classes, num_branches: see `Generator`.
        grids: (height, width) or a number for a square, per scale.
        latent_channels: of the quantizer, those of all branches.
        depth: number of blocks.
        hidden_size: channels C, a multiple of num_heads; None: 64 depth.
        num_heads: attention heads; None: depth.
        mlp_size: hidden channels of the feed-forward networks; None: 4 C.
        shared_modulation: one projection of the class for all blocks (the 512-pixel model).
        normalized_attention: queries and keys of unit length, with a learned scale per head.
        class_dropout: share of samples whose label is dropped in training.
        drop_path: largest rate of stochastic depth, that of the last block; it rises evenly from 0 at the first. None:
            0.1 depth / 24.
        label_smoothing: share of a target's weight that is spread over all codes, in training mode.
        init_std: standard deviation of initial weights; None: sqrt(1 / (3 C)).
        init_gate, init_modulation, init_head: factors of the initial weights of gates, of the other modulation, and of
            the head. Published models differ in init_gate: the deeper, the smaller.
        checkpoint_blocks: recompute each block in the backward pass instead of keeping its activations.

    Raises:
        ConfigError: a value out of range.

    Source: Tian et al. 2024 (arXiv:2404.02905), FoundationVision/VAR; P branches: lxa9867/ImageFolder. Differences on
        purpose: labels are dropped in training mode only, and the residual stream stays in float32 under autocast. The
        masking of inputs that ImageFolder's code has (p_drop) is left out; the published model was trained without.
    """

    can_compile_sampling = True

    def __init__(
        self,
        codebook_size: int,
        grids: Sequence[int | Sequence[int]],
        latent_channels: int,
        num_classes: int,
        num_branches: int = 1,
        depth: int = 16,
        hidden_size: int | None = None,
        num_heads: int | None = None,
        mlp_size: int | None = None,
        shared_modulation: bool = False,
        normalized_attention: bool = True,
        class_dropout: float = 0.1,
        drop_path: float | None = None,
        label_smoothing: float = 0.0,
        init_std: float | None = None,
        init_gate: float = 1e-3,
        init_modulation: float = 0.5,
        init_head: float = 0.02,
        checkpoint_blocks: bool = False,
    ):
        grids = [as_grid(grid, "generator.grids") for grid in grids]
        if len(grids) < 2:
            raise ConfigError(f"generator.grids={grids} must be two scales or more; take another generator for one")
        sizes = [height * width for height, width in grids]
        super().__init__(codebook_size, num_branches, sum(sizes), num_classes, class_dropout)
        self.grids, self.scale_sizes = grids, sizes
        hidden_size = 64 * depth if hidden_size is None else hidden_size
        num_heads = depth if num_heads is None else num_heads
        mlp_size = 4 * hidden_size if mlp_size is None else mlp_size
        drop_path = 0.1 * depth / 24 if drop_path is None else drop_path
        counts = {"latent_channels": latent_channels, "depth": depth, "hidden_size": hidden_size}
        rates = {"drop_path": drop_path, "label_smoothing": label_smoothing}
        check_transformer(counts | {"num_heads": num_heads, "mlp_size": mlp_size}, rates)
        init_std = math.sqrt(1 / (3 * hidden_size)) if init_std is None else init_std
        if init_std <= 0:
            raise ConfigError(f"generator.init_std={init_std} must be positive, or null for sqrt(1 / (3 hidden_size))")
        factors = {"init_gate": init_gate, "init_modulation": init_modulation, "init_head": init_head}
        for name, value in factors.items():
            if value < 0:
                raise ConfigError(f"generator.{name}={value} must not be negative")
        self.latent_channels, self.hidden_size, self.num_heads = latent_channels, hidden_size, num_heads
        self.label_smoothing, self.checkpoint_blocks = label_smoothing, checkpoint_blocks
        self.drop_path = drop_path
        self._bound = _Shared()

        self.pos_start = nn.Parameter(torch.empty(1, self.scale_sizes[0], hidden_size))
        self.pos_1LC = nn.Parameter(torch.empty(1, self.num_tokens, hidden_size))
        self.word_embed = Linear(latent_channels, hidden_size)
        self.class_emb = nn.Embedding(num_classes + 1, hidden_size)
        self.lvl_embed = nn.Embedding(len(self.grids), hidden_size)
        self.shared_ada_lin = adaptive_projection(hidden_size, 6) if shared_modulation else None
        self.blocks = nn.ModuleList(
            VARBlock(hidden_size, num_heads, self.scale_sizes, mlp_size, normalized_attention, shared_modulation)
            for _ in range(depth)
        )
        self.head_nm = HeadNorm(hidden_size)
        self.head = Linear(hidden_size, num_branches * codebook_size)
        self._init_weights(init_std, **factors)

    def _init_weights(self, std: float, init_gate: float, init_modulation: float, init_head: float) -> None:
        """Published initialisation: nothing depends on a layer's fan-in; biases are 0."""
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(parameter)
            elif name.startswith("pos_"):
                nn.init.trunc_normal_(parameter, std=math.sqrt(1 / (3 * self.hidden_size)))
            elif not name.endswith(("scale_mul_1H11", "ada_gss")):
                nn.init.trunc_normal_(parameter, std=std)
        with torch.no_grad():
            gains = torch.tensor([init_gate] * 2 + [init_modulation] * 4, device=self.pos_start.device)[:, None]
            for block in self.blocks:
                for layer in (block.attn.proj, block.ffn.fc2):
                    layer.weight /= math.sqrt(2 * len(self.blocks))
                if block.ada_gss is not None:
                    block.ada_gss.copy_(torch.randn_like(block.ada_gss) / math.sqrt(self.hidden_size) * gains)
                else:
                    block.ada_lin[1].weight.unflatten(0, (6, -1)).mul_(gains[..., None])
            self.head_nm.ada_lin[1].weight *= init_modulation
            self.head.weight *= init_head

    @classmethod
    def sizes(cls, quantizer: ProductQuantizer, num_classes: int) -> dict[str, Any]:
        """See `Generator.sizes`; the grids give the number of tokens."""
        found = super().sizes(quantizer, num_classes)
        del found["num_tokens"]
        if len(quantizer.grids) < 2:
            raise ConfigError(
                f"{cls.__name__} predicts scale by scale, but the tokens of this tokenizer lie on a single grid "
                f"{quantizer.grids[0]}; give one with quantizer=multiscale (or residual), or choose another generator"
            )
        return {**found, "grids": list(quantizer.grids), "latent_channels": quantizer.dim}

    def bind(self, quantizer: ProductQuantizer) -> None:
        """See `Generator.bind`; also keeps the quantizer, which turns tokens into the input of the next scale."""
        super().bind(quantizer)
        self._bound = _Shared([quantizer])

    @property
    def quantizer(self) -> ProductQuantizer:
        """The bound quantizer, on this model's device; in float32, whatever this model's type is.

        Raises:
            ConfigError: none was bound.
        """
        if not self._bound:
            raise ConfigError(
                f"{type(self).__name__} needs its tokenizer's quantizer to read tokens: call "
                "generator.bind(tokenizer.quantizer) first"
            )
        (quantizer,) = self._bound
        device = self.pos_start.device
        if any(value.device != device for value in chain(quantizer.parameters(), quantizer.buffers())):
            quantizer.to(device)
        return quantizer

    def places(self) -> Tensor:
        """(L, C), what is added to every position: the embeddings of its place and of its scale."""
        levels = torch.cat([row.expand(n, -1) for row, n in zip(self.lvl_embed.weight, self.scale_sizes, strict=True)])
        return levels + self.pos_1LC[0]

    def embed_latents(self, latents: Tensor) -> Tensor:
        """(B, N, latent channels) shrunk sums of earlier scales -> (B, N, C); not under autocast."""
        with torch.autocast(latents.device.type, enabled=False):
            return self.word_embed(latents.to(self.word_embed.weight.dtype))

    def conditions(self, classes: Tensor) -> tuple[Tensor, Tensor]:
        """Of class embeddings (B, C): their SiLU, and the condition that the blocks take."""
        activated = F.silu(classes)
        return activated, activated if self.shared_ada_lin is None else self.shared_ada_lin(activated)

    def features(self, latents: Tensor, condition_ids: Tensor, survival: Tensor | None = None) -> Tensor:
        """What the head gets, by the plain pass without a cache.

        Args:
            latents: (B, L - l_0, latent channels) float, from `ProductQuantizer.next_scale_input`.
            condition_ids: (B,) int64 from `condition_ids`.
            survival: (B, depth, 2), factors of stochastic depth; None: all 1.

        Returns:
            (B, L, C).
        """
        classes = self.class_emb(condition_ids)
        x = torch.cat([classes[:, None] + self.pos_start, self.embed_latents(latents)], 1) + self.places()
        activated, condition = self.conditions(classes)
        survivals = [None] * len(self.blocks) if survival is None else survival.unbind(1)
        for block, kept in zip(self.blocks, survivals, strict=True):
            if self.checkpoint_blocks and self.training and torch.is_grad_enabled():
                x = checkpoint(block, x, condition, kept, use_reentrant=False)
            else:
                x = block(x, condition, kept)
        return self.head_nm(x, *self.head_nm.modulation(activated))

    def forward(self, tokens: Tensor, condition_ids: Tensor) -> Tensor:
        """Logits of all tokens, each from the scales before its own.

        Args:
            tokens: (B, P, L) int64.
            condition_ids: (B,) int64 from `condition_ids`.

        Returns:
            (B, P, L, K).
        """
        logits = self.head(self.features(self.latents(tokens), condition_ids))
        return logits.unflatten(-1, (self.num_branches, self.codebook_size)).transpose(1, 2)

    @torch.no_grad()
    def latents(self, tokens: Tensor) -> Tensor:
        """(B, L - l_0, latent channels) float32, what the model reads of tokens (B, P, L)."""
        return self.quantizer.next_scale_input(tokens)

    def teacher_forced_loss(
        self,
        tokens: Tensor,
        condition_ids: Tensor,
        survival: Tensor | None = None,
        label_smoothing: float = 0.0,
    ) -> dict[str, Tensor]:
        """Mean cross-entropy of all tokens; nothing is drawn here.

        Args:
            tokens: (B, P, L) int64.
            condition_ids, survival: see `features`.
            label_smoothing: share of a target's weight that is spread over all codes.

        Returns:
            As `Generator.loss`.
        """
        features = self.features(self.latents(tokens), condition_ids, survival)
        losses, hits = token_losses(features, self.head.weight, self.head.bias, tokens, label_smoothing)
        return {"loss": losses.mean(), **site_sums(losses, hits)}

    def loss(
        self,
        tokens: Tensor,
        labels: Tensor,
        *,
        progress: float = 1.0,
        rng: SampleRng | torch.Generator | None = None,
    ) -> dict[str, Tensor]:
        """See `Generator.loss`. Dropped labels, stochastic depth and label smoothing in training mode only.

        Streams of `rng`: "class_dropout", "drop_path". Ranges are checked where that costs no synchronisation, on the
        CPU.

        Raises:
            ConfigError: no quantizer is bound.
        """
        batch, device = len(labels), tokens.device
        self.check_batch(tokens, labels)
        if not self.training:
            return self.teacher_forced_loss(tokens, self.condition_ids(labels))
        draws = as_sample_rng(rng, batch, device)
        dropped = draws.uniform("class_dropout").to(device) < self.class_dropout
        survival = None
        if self.drop_path > 0:
            kept = torch.linspace(1, 1 - self.drop_path, len(self.blocks), device=device)[:, None]
            survival = (draws.uniform("drop_path", len(self.blocks), 2).to(device) < kept) / kept
        return self.teacher_forced_loss(tokens, self.condition_ids(labels, dropped), survival, self.label_smoothing)

    def generate(
        self,
        labels: Tensor,
        sampling: SamplingConfig,
        *,
        teacher: Tensor | None = None,
        keep: Tensor | None = None,
        rng: Rng = None,
    ) -> Tensor:
        """See `Generator.generate`. A step is a scale: the settings' schedules run over scales (`var_decoder`)."""
        self._check_generate(labels, sampling, teacher, keep)
        return generate_scales(self, labels, sampling, teacher, keep, rng, tokens_only=True)[0]

    def generate_latent(
        self,
        labels: Tensor,
        sampling: SamplingConfig,
        *,
        teacher: Tensor | None = None,
        keep: Tensor | None = None,
        rng: Rng = None,
        smooth: bool | Draw = False,
    ) -> tuple[Tensor, Tensor]:
        """Sample tokens and the latent that they sum up to.

        Args:
            labels, sampling, teacher, keep, rng: see `Generator.generate`.
            smooth: go on from mixtures of codes in place of the drawn ones, for smoother pictures; not for figures.
                Their weights are softmax((l (1 + r) + g) / t) with the filtered logits l, r = k / (S - 1) and t =
                max(0.27 (1 - 0.95 r), 0.005) at scale k of S, and Gumbel noise g of the stream "smooth/<scale>". Where
                rng is a function, it can't give g: then smooth is one, too, (probs (B, P, n, K), scale) -> g.

        Returns:
            tokens (B, P, L) int64; the latent (B, latent channels, h, w) float32, which the tokenizer decodes. Without
            `smooth` it is that of the tokens.

        Raises:
            DataError, ConfigError: see `Generator.generate`.

        Source: `more_smooth` of FoundationVision/VAR.
        """
        self._check_generate(labels, sampling, teacher, keep)
        return generate_scales(self, labels, sampling, teacher, keep, rng, smooth)

    def _check_generate(
        self, labels: Tensor, sampling: SamplingConfig, teacher: Tensor | None, keep: Tensor | None
    ) -> None:
        self.check_labels(labels)
        self.check_sampling(sampling)
        self.check_teacher(teacher, keep, len(labels))
