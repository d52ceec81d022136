"""Llama: autoregressive transformer in raster order with rotary positions, conditioned on the class in every block."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tessera.errors import ConfigError
from tessera.generators.autoregression import sample_sequence
from tessera.generators.base import Generator, check_transformer
from tessera.generators.layers import Linear
from tessera.generators.llama_decoder import LlamaDecoder
from tessera.generators.llama_layers import AdaptiveRMSNorm, ClassEmbedding, LlamaBlock
from tessera.generators.rotary import rotary_table
from tessera.generators.sampling import Rng, SamplingConfig
from tessera.generators.scores import site_sums, token_losses
from tessera.grids import Grid, as_grid
from tessera.quantizers import ProductQuantizer
from tessera.rng import SampleRng, as_sample_rng


class Llama(Generator):
    """Autoregressive generator of IBQ: Llama's blocks, modulated by the class.

    The sequence is [class, t_0, t_1, ...]; position i predicts token t_i. A token's place in the image enters by
    rotating queries and keys by its own cell, the class's query and key being zero vectors.

    With num_branches = 1 and one grid the parameters are those of the published files. For P branches the token table
    holds the branches one after another (token t of branch b is row b * K + t), a position's input is the sum of its P
    embeddings, and the head gives P * K logits: P codes predicted in parallel, independent of each other given what
    came before. For several grids each token also gets a learned vector of its scale.

    Args:
        codebook_size, num_tokens, num_classes, num_branches: see `Generator`.
        grids: (height, width) of each scale, whose cells are the L tokens; a 1-D tokenizer's are (1, L).
        hidden_size: channels d; a multiple of num_heads.
        depth: number of blocks.
        num_heads: attention heads; d / num_heads is a multiple of 4.
        mlp_size: hidden channels of the MLPs; None: the least multiple of mlp_multiple of at least 8 d / 3.
        mlp_multiple: see mlp_size.
        token_dropout: of the blocks' input. Dropouts are drawn from torch's global generator.
        residual_dropout: after attention projections.
        mlp_dropout: after the MLPs.
        attention_dropout: on attention probabilities.
        class_dropout: share of samples whose label is dropped in training.
        gate_init: factor on the initial gates of the blocks, which are small for stability.
        rope_base: of the rotary frequencies.
        norm_eps: of the blocks' norms.
        checkpoint_blocks: recompute each block in the backward pass instead of keeping its activations.

    Raises:
        ConfigError: a value out of range, or grids of another number of tokens.

    Source: Shi et al. 2024 (arXiv:2412.02692); modules/transformer/llama.py of TencentARC/SEED-Voken, which the
        parameter names follow. Branches and scales are an addition.
    """

    can_compile_sampling = True

    def __init__(
        self,
        codebook_size: int,
        num_tokens: int,
        num_classes: int,
        grids: Sequence[int | Sequence[int]],
        num_branches: int = 1,
        hidden_size: int = 1024,
        depth: int = 16,
        num_heads: int = 16,
        mlp_size: int | None = None,
        mlp_multiple: int = 256,
        token_dropout: float = 0.1,
        residual_dropout: float = 0.1,
        mlp_dropout: float = 0.1,
        attention_dropout: float = 0.0,
        class_dropout: float = 0.1,
        gate_init: float = 1e-3,
        rope_base: float = 10000.0,
        norm_eps: float = 1e-5,
        checkpoint_blocks: bool = False,
    ):
        super().__init__(codebook_size, num_branches, num_tokens, num_classes, class_dropout)
        sizes = {"hidden_size": hidden_size, "depth": depth, "num_heads": num_heads, "mlp_multiple": mlp_multiple}
        dropouts = {"token_dropout": token_dropout, "residual_dropout": residual_dropout, "mlp_dropout": mlp_dropout}
        check_transformer(
            sizes if mlp_size is None else sizes | {"mlp_size": mlp_size},
            dropouts | {"attention_dropout": attention_dropout},
        )
        if hidden_size // num_heads % 4:
            raise ConfigError(
                f"generator.num_heads={num_heads} leaves heads of {hidden_size // num_heads} channels of "
                f"generator.hidden_size={hidden_size}; rotating by row and column needs a multiple of 4"
            )
        for name, value in (("gate_init", gate_init), ("rope_base", rope_base), ("norm_eps", norm_eps)):
            if not value > 0:
                raise ConfigError(f"generator.{name}={value} must be positive")
        self.grids: list[Grid] = [as_grid(grid, "generator.grids") for grid in grids]
        cells = sum(height * width for height, width in self.grids)
        if cells != num_tokens:
            raise ConfigError(f"generator.grids={self.grids} have {cells} cells, but generator.num_tokens={num_tokens}")
        if mlp_size is None:
            mlp_size = -(-int(8 * hidden_size / 3) // mlp_multiple) * mlp_multiple
        self.hidden_size, self.num_heads, self.rope_base = hidden_size, num_heads, rope_base
        self.checkpoint_blocks = checkpoint_blocks

        self.tok_emb = nn.Embedding(num_branches * codebook_size, hidden_size)
        self.class_emb = ClassEmbedding(num_classes, hidden_size)
        self.level_emb = nn.Embedding(len(self.grids), hidden_size) if len(self.grids) > 1 else None
        self.tok_dropout = nn.Dropout(token_dropout)
        self.blocks = nn.ModuleList(
            LlamaBlock(hidden_size, num_heads, mlp_size, norm_eps, residual_dropout, mlp_dropout, attention_dropout)
            for _ in range(depth)
        )
        self.head_nm = AdaptiveRMSNorm(hidden_size)
        self.head = Linear(hidden_size, num_branches * codebook_size, bias=False)
        self._init_weights(gate_init)

    def _init_weights(self, gate_init: float) -> None:
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)
        gates = 2 * self.hidden_size
        with torch.no_grad():
            for block in self.blocks:
                block.ada_lin[1].weight[:gates] *= gate_init
                block.ada_lin[1].weight[gates:] *= 0.5
            self.head_nm.ada_lin[1].weight *= 0.5
        nn.init.zeros_(self.head.weight)

    @classmethod
    def sizes(cls, quantizer: ProductQuantizer, num_classes: int) -> dict[str, Any]:
        return {**super().sizes(quantizer, num_classes), "grids": [tuple(grid) for grid in quantizer.grids]}

    def embed_tokens(self, tokens: Tensor) -> Tensor:
        """Sum over branches of the embeddings of tokens, without their scales': (B, P, N) int64 -> (B, N, d)."""
        if self.num_branches == 1:
            return self.tok_emb(tokens[:, 0])
        first = torch.arange(self.num_branches, device=tokens.device) * self.codebook_size
        return self.tok_emb(tokens + first[:, None]).sum(1)

    def levels(self) -> Tensor | None:
        """(L, d), the vector of each token's scale; None for a single one."""
        if self.level_emb is None:
            return None
        scales = zip(self.level_emb.weight, self.grids, strict=True)
        return torch.cat([vector.expand(height * width, -1) for vector, (height, width) in scales])

    def rotation(self) -> Tensor:
        """(2, 1 + L, d / H) float32, the rotary table of class and tokens.

        Made when needed: a buffer would follow the module to half precision.
        """
        return rotary_table(self.grids, self.hidden_size // self.num_heads, self.rope_base, self.head.weight.device)

    def logits(self, features: Tensor) -> Tensor:
        """(..., d) normalised features -> (..., P, K)."""
        return self.head(features).unflatten(-1, (self.num_branches, self.codebook_size))

    def forward(self, tokens: Tensor, conditions: Tensor) -> Tensor:
        """Logits of every next token; the plain pass without a cache.

        Args:
            tokens: (B, P, n) int64, the first n <= L tokens.
            conditions: (B,) int64 from `condition_ids`.

        Returns:
            (B, n + 1, P, K); row i predicts token i. Row L, after a complete sequence, has no meaning.
        """
        return self.logits(self.features(tokens, conditions))

    def features(self, tokens: Tensor, conditions: Tensor) -> Tensor:
        """(B, n + 1, d), what the head gets; arguments as in `forward`."""
        length = tokens.shape[2]
        condition, content = self.class_emb(conditions)[:, None], self.embed_tokens(tokens)
        levels = self.levels()
        if levels is not None:
            content = content + levels[:length]
        x = self.tok_dropout(torch.cat([condition, content], 1))
        activated, rotation = F.silu(condition), self.rotation()[:, : length + 1]
        for block in self.blocks:
            if self.checkpoint_blocks and self.training and torch.is_grad_enabled():
                x = checkpoint(block, x, activated, rotation, use_reentrant=False)
            else:
                x = block(x, activated, rotation)
        return self.head_nm(x, activated)

    def loss(
        self,
        tokens: Tensor,
        labels: Tensor,
        *,
        progress: float = 1.0,
        rng: SampleRng | torch.Generator | None = None,
    ) -> dict[str, Tensor]:
        """See `Generator.loss`. Labels are dropped in training mode only, by the stream "class_dropout".

        Ranges are checked where that costs no synchronisation, on the CPU.
        """
        batch, device = len(labels), tokens.device
        self.check_batch(tokens, labels)
        dropped = None
        if self.training:
            dropped = as_sample_rng(rng, batch, device).uniform("class_dropout").to(device) < self.class_dropout
        # the last token predicts nothing, so it isn't fed
        features = self.features(tokens[:, :, :-1], self.condition_ids(labels, dropped))
        losses, hits = token_losses(features, self.head.weight, None, tokens)
        return {"loss": losses.mean(), **site_sums(losses, hits)}

    def generate(
        self,
        labels: Tensor,
        sampling: SamplingConfig,
        *,
        teacher: Tensor | None = None,
        keep: Tensor | None = None,
        rng: Rng = None,
    ) -> Tensor:
        """See `Generator.generate`; each step feeds one position, in raster order (`llama_decoder`)."""
        self.check_labels(labels)
        self.check_sampling(sampling)
        self.check_teacher(teacher, keep, len(labels))
        return sample_sequence(self, partial(LlamaDecoder, self), labels, sampling, teacher, keep, rng)
