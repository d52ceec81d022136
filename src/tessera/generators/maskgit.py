"""MaskGIT: bidirectional transformers that fill in masked tokens, all positions at once, in a few rounds."""

import math
from abc import abstractmethod
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tessera.errors import ConfigError
from tessera.generators.base import Generator, check_transformer
from tessera.generators.layers import Linear
from tessera.generators.maskgit_layers import PostNormBlock, PreNormBlock
from tessera.generators.maskgit_sampling import MaskGITSampling, generate_masked
from tessera.generators.sampling import Rng, SamplingConfig
from tessera.generators.scores import site_sums, token_losses
from tessera.rng import IndexedRng, SampleRng, as_sample_rng, permutations


class MaskGIT(Generator):
    """What the MaskGIT generators share: embeddings, masks, loss and sampling. Subclasses are the transformers.

    The sequence is [class, t_0, ..., t_(L-1)] in raster order, with learned positions; a masked token is replaced by
    a mask embedding. Masks are per token: of P branches, any may be masked at a position. A position's input is the
    sum of its P embeddings, and the head gives P * K logits there.

    Ids of the embedding table, which for one branch are the published ones: token t of branch b is b * K + t; the
    mask P*K; label y is P*K + 1 + y; the last, `none_id`, stands for no condition.

    Args:
        codebook_size, num_tokens, num_classes, num_branches: see `Generator`.
        hidden_size: channels d; a multiple of num_heads.
        depth: number of blocks.
        num_heads: attention heads.
        mlp_size: hidden channels of the MLPs.
        dropout: of the blocks' branches. Drawn from torch's global generator.
        attention_dropout: on attention probabilities, likewise.
        class_dropout: share of samples whose label is dropped in training.
        label_smoothing: in [0, 1), share of the target that is spread over all codes.
        unmasked_weight: >= 0, weight in the loss of tokens that aren't masked; masked ones have 1.
        checkpoint_blocks: recompute each block in the backward pass instead of keeping its activations.

    Raises:
        ConfigError: a value out of range.

    Source: Chang et al. 2022 (arXiv:2202.04200); modeling/maskgit.py and modeling/modules/losses.py of
        bytedance/1d-tokenizer. Branches are an addition.
    """

    sampling_types: ClassVar[tuple[type[SamplingConfig], ...]] = (MaskGITSampling,)

    def __init__(
        self,
        codebook_size: int,
        num_tokens: int,
        num_classes: int,
        num_branches: int,
        hidden_size: int,
        depth: int,
        num_heads: int,
        mlp_size: int,
        dropout: float,
        attention_dropout: float,
        class_dropout: float,
        label_smoothing: float,
        unmasked_weight: float,
        checkpoint_blocks: bool,
    ):
        super().__init__(codebook_size, num_branches, num_tokens, num_classes, class_dropout)
        sizes = {"hidden_size": hidden_size, "depth": depth, "num_heads": num_heads, "mlp_size": mlp_size}
        rates = {"dropout": dropout, "attention_dropout": attention_dropout, "label_smoothing": label_smoothing}
        check_transformer(sizes, rates)
        if not (math.isfinite(unmasked_weight) and unmasked_weight >= 0):
            raise ConfigError(f"generator.unmasked_weight={unmasked_weight} must be at least 0")
        self.label_smoothing, self.unmasked_weight = label_smoothing, unmasked_weight
        self.checkpoint_blocks = checkpoint_blocks
        token_ids = num_branches * codebook_size
        self.mask_id, self.first_class_id = token_ids, token_ids + 1
        self.embeddings = nn.Embedding(self.none_id + 1, hidden_size)
        self.pos_embed = nn.Parameter(torch.empty(1, num_tokens + 1, hidden_size))
        self.lm_head = Linear(hidden_size, token_ids)

    def _init_weights(self) -> None:
        """N(0, 0.02) for tables and linear layers, zero biases."""
        nn.init.normal_(self.pos_embed, std=0.02)
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)

    @abstractmethod
    def encode(self, x: Tensor) -> Tensor:
        """The transformer: (B, L + 1, d) embedded sequence -> (B, L + 1, d), what the head gets."""

    def _run(self, block: nn.Module, *inputs: Tensor) -> Tensor:
        if self.checkpoint_blocks and self.training and torch.is_grad_enabled():
            return checkpoint(block, *inputs, use_reentrant=False)
        return block(*inputs)

    def embed_tokens(self, tokens: Tensor, masked: Tensor) -> Tensor:
        """Sum over branches of the embeddings: (B, P, L) int64, (B, P, L) bool -> (B, L, d)."""
        first = torch.arange(self.num_branches, device=tokens.device) * self.codebook_size
        ids = torch.where(masked, self.mask_id, tokens + first[:, None])
        return self.embeddings(ids[:, 0]) if self.num_branches == 1 else self.embeddings(ids).sum(1)

    def head(self, x: Tensor) -> Tensor:
        """(..., d) features -> (..., P, K) logits."""
        return self.lm_head(x).unflatten(-1, (self.num_branches, self.codebook_size))

    def features(self, tokens: Tensor, masked: Tensor, conditions: Tensor) -> Tensor:
        """(B, L, d), what the head gets; arguments as in `forward`."""
        content = [self.embeddings(conditions)[:, None], self.embed_tokens(tokens, masked)]
        return self.encode(torch.cat(content, 1) + self.pos_embed)[:, 1:]

    def forward(self, tokens: Tensor, masked: Tensor, conditions: Tensor) -> Tensor:
        """Logits of every token.

        Args:
            tokens: (B, P, L) int64; not read where masked.
            masked: (B, P, L) bool.
            conditions: (B,) int64 from `condition_ids`.

        Returns:
            (B, L, P, K).
        """
        return self.head(self.features(tokens, masked, conditions))

    def draw_masks(self, draws: SampleRng, device: torch.device) -> Tensor:
        """Random masks of a batch.

        Of the P L tokens round(P L arccos(u) / (pi / 2)), at least one, are masked, u ~ U(0, 1). Streams of `draws`:
        "mask/share" (B,), "mask/order" (B, P, L).

        Returns:
            (B, P, L) bool.
        """
        total = self.num_branches * self.num_tokens
        share = (draws.uniform("mask/share").to(device).arccos() / (math.pi / 2)).clamp(1e-6, 1.0)
        count = (total * share).round().clamp_min(1)
        noise = draws.uniform("mask/order", self.num_branches, self.num_tokens).to(device)
        masked = permutations(noise.flatten(1)) < count[:, None]
        return masked.unflatten(1, (self.num_branches, self.num_tokens))

    def fixed_masks(self, tokens: Tensor) -> Tensor:
        """Masks (B, P, L) bool that follow from each sample's own tokens (B, P, L), the same at every call."""
        places = torch.arange(1, 2 * self.num_branches * self.num_tokens, 2, device=tokens.device)
        return self.draw_masks(IndexedRng(0, (tokens.flatten(1) * places.square()).sum(1)), tokens.device)

    def masked_loss(self, tokens: Tensor, masked: Tensor, conditions: Tensor) -> dict[str, Tensor]:
        """Cross-entropy of all tokens given the unmasked ones; nothing is drawn here but dropout.

        loss = sum(w l) / (sum(w) + 1e-8) over the batch, w = 1 where masked, else `unmasked_weight`.

        Args:
            tokens: (B, P, L) int64.
            masked: (B, P, L) bool.
            conditions: (B,) int64 from `condition_ids`.

        Returns:
            As `Generator.loss`; all but the loss itself is of masked tokens. (The published accuracy is the mean of
            the samples' accuracies.)
        """
        features = self.features(tokens, masked, conditions)
        head = self.lm_head
        losses, hits = token_losses(features, head.weight, head.bias, tokens, self.label_smoothing)
        weights = torch.where(masked, 1.0, self.unmasked_weight)
        loss = (losses * weights).sum() / (weights.sum() + 1e-8)
        return {"loss": loss, **site_sums(losses, hits, masked)}

    def loss(
        self,
        tokens: Tensor,
        labels: Tensor,
        *,
        progress: float = 1.0,
        rng: SampleRng | torch.Generator | None = None,
    ) -> dict[str, Tensor]:
        """See `Generator.loss`. Random masks and dropped labels in training mode only.

        In eval mode the masks are `fixed_masks`, so that a figure is the same each time. Streams of `rng`:
        "class_dropout" and those of `draw_masks`. `progress` is not read: the published training has no schedule of
        masks. Ranges are checked where that costs no synchronisation, on the CPU.
        """
        batch, device = len(labels), tokens.device
        self.check_batch(tokens, labels)
        if not self.training:
            return self.masked_loss(tokens, self.fixed_masks(tokens), self.condition_ids(labels))
        draws = as_sample_rng(rng, batch, device)
        dropped = draws.uniform("class_dropout").to(device) < self.class_dropout
        return self.masked_loss(tokens, self.draw_masks(draws, device), self.condition_ids(labels, dropped))

    def generate(
        self,
        labels: Tensor,
        sampling: SamplingConfig,
        *,
        teacher: Tensor | None = None,
        keep: Tensor | None = None,
        rng: Rng = None,
    ) -> Tensor:
        """See `Generator.generate`. All positions at once, in `sampling.num_steps` rounds.

        Kept tokens are unmasked from the start and never masked again; the schedule counts the others. A round draws
        from "sample/<round>" (B, P, L, K) and "confidence/<round>" (B, P, L), uniforms that become Gumbel noise; so
        `rng` is no function of probabilities here, but any `SampleRng` may supply given uniforms.
        """
        self.check_labels(labels)
        self.check_sampling(sampling)
        self.check_teacher(teacher, keep, len(labels))
        return generate_masked(self, labels, sampling, teacher, keep, rng)


class MaskGITViT(MaskGIT):
    """MaskGIT with the encoder of BERT: post-norm blocks behind a normalised sum of embeddings.

    Args: see `MaskGIT`. The embeddings have dropout too.

    `type_embed` holds the published table of token types, of which the first is added everywhere.

    Source: ImageBert of modeling/maskgit.py, bytedance/1d-tokenizer: TiTok-L-32 and B-64.
    """

    def __init__(
        self,
        codebook_size: int,
        num_tokens: int,
        num_classes: int,
        num_branches: int = 1,
        hidden_size: int = 768,
        depth: int = 24,
        num_heads: int = 16,
        mlp_size: int = 3072,
        dropout: float = 0.1,
        attention_dropout: float = 0.1,
        class_dropout: float = 0.1,
        label_smoothing: float = 0.1,
        unmasked_weight: float = 0.1,
        checkpoint_blocks: bool = False,
    ):
        super().__init__(
            codebook_size, num_tokens, num_classes, num_branches, hidden_size, depth, num_heads, mlp_size, dropout,
            attention_dropout, class_dropout, label_smoothing, unmasked_weight, checkpoint_blocks,
        )  # fmt: skip
        self.type_embed = nn.Parameter(torch.empty(2, hidden_size))
        self.embed_norm = nn.LayerNorm(hidden_size, eps=1e-12)
        self.embed_drop = nn.Dropout(dropout)
        self.blocks = nn.ModuleList(
            PostNormBlock(hidden_size, num_heads, mlp_size, dropout, attention_dropout) for _ in range(depth)
        )
        self._init_weights()
        nn.init.normal_(self.type_embed, std=0.02)

    def encode(self, x: Tensor) -> Tensor:
        x = self.embed_drop(self.embed_norm(x + self.type_embed[0]))
        for block in self.blocks:
            x = self._run(block, x)
        return x


class MaskGITUViT(MaskGIT):
    """MaskGIT with a U-ViT: pre-norm blocks, of which the later half also gets the outputs of the earlier, last first.

    With one branch the parameters are those of the published files, loadable strictly.

    Args: see `MaskGIT`. `depth` is odd: the middle block has no partner. The published model is configured with dropout
        0.1 but its blocks have none, hence the defaults.

    Source: UViTBert of modeling/maskgit.py, bytedance/1d-tokenizer: TiTok-S-128; Bao et al. 2023 (arXiv:2209.12152).
    """

    def __init__(
        self,
        codebook_size: int,
        num_tokens: int,
        num_classes: int,
        num_branches: int = 1,
        hidden_size: int = 1024,
        depth: int = 21,
        num_heads: int = 16,
        mlp_size: int = 4096,
        dropout: float = 0.0,
        attention_dropout: float = 0.0,
        class_dropout: float = 0.1,
        label_smoothing: float = 0.1,
        unmasked_weight: float = 0.1,
        checkpoint_blocks: bool = False,
    ):
        super().__init__(
            codebook_size, num_tokens, num_classes, num_branches, hidden_size, depth, num_heads, mlp_size, dropout,
            attention_dropout, class_dropout, label_smoothing, unmasked_weight, checkpoint_blocks,
        )  # fmt: skip
        if depth % 2 == 0:
            raise ConfigError(f"generator.depth={depth} must be odd: pairs of blocks around a middle one")

        def block(has_skip: bool) -> PreNormBlock:
            return PreNormBlock(hidden_size, num_heads, mlp_size, has_skip, dropout, attention_dropout)

        self.in_blocks = nn.ModuleList(block(False) for _ in range(depth // 2))
        self.mid_block = block(False)
        self.out_blocks = nn.ModuleList(block(True) for _ in range(depth // 2))
        self.norm = nn.LayerNorm(hidden_size)
        self._init_weights()

    @property
    def blocks(self) -> list[nn.Module]:
        """All blocks, in the order in which they run."""
        return [*self.in_blocks, self.mid_block, *self.out_blocks]

    def encode(self, x: Tensor) -> Tensor:
        skips = []
        for block in self.in_blocks:
            x = self._run(block, x)
            skips.append(x)
        x = self._run(self.mid_block, x)
        for block in self.out_blocks:
            x = self._run(block, x, skips.pop())
        return self.norm(x)
