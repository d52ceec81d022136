"""RAR: autoregressive transformer trained on randomised token orders that give way to the raster order."""

from functools import partial
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tessera.errors import ConfigError
from tessera.generators.autoregression import sample_sequence
from tessera.generators.base import Generator, check_transformer
from tessera.generators.layers import AdaptiveBlock, AdaptiveNorm, Linear
from tessera.generators.orders import (
    RARSampling,
    check_orders,
    inverse,
    permute,
    random_ratio,
    raster_orders,
    sample_orders,
)
from tessera.generators.rar_decoder import RARDecoder
from tessera.generators.sampling import Rng, SamplingConfig
from tessera.generators.scores import site_sums, token_losses
from tessera.rng import SampleRng, as_sample_rng, permutations


class RAR(Generator):
    """Randomised autoregressive generator.

    The sequence is [cls, condition, t_0, t_1, ...] in prediction order. Each position also gets the position
    of the token it is to predict (target-aware embedding), so one model serves every order; each position's
    blocks are modulated by class and step.

    With num_branches = 1 the parameters are those of the published files, loadable strictly. For P branches
    the token table holds the branches one after another (token t of branch b is row b * K + t), a position's
    input is the sum of its P embeddings, and the head gives P * K logits: P codes predicted in parallel,
    independent of each other given what came before.

    Ids of the embedding table: tokens 0 .. P*K - 1; P*K a mask token that RAR never uses; label y is
    P*K + 1 + y; the last, `none_id`, stands for no condition.

    Args:
        codebook_size, num_tokens, num_classes, num_branches: see `Generator`.
        hidden_size: channels d; a multiple of num_heads.
        depth: number of blocks.
        num_heads: attention heads.
        mlp_size: hidden channels of the MLPs.
        dropout: after attention projections and in the MLPs. Drawn from torch's global generator.
        attention_dropout: on attention probabilities, likewise.
        class_dropout: share of samples whose label is dropped in training.
        order_anneal: (start, end), shares of training between which the probability of a random order falls
            from 1 to 0.
        extra_positions, extra_timesteps: rows of the position tables and the step table beyond L; published
            1024 and 100, of which 2 are used.
        checkpoint_blocks: recompute each block in the backward pass instead of keeping its activations.

    Raises:
        ConfigError: a value out of range.

    Source: Yu et al. 2024 (arXiv:2411.00776); modeling/rar.py of bytedance/1d-tokenizer, which the parameter
        names follow. Branches and sampling in other orders are additions.
    """

    sampling_types: ClassVar[tuple[type[SamplingConfig], ...]] = (SamplingConfig, RARSampling)
    can_compile_sampling = True

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
        order_anneal: tuple[float, float] = (0.5, 0.75),
        extra_positions: int = 1024,
        extra_timesteps: int = 100,
        checkpoint_blocks: bool = False,
    ):
        super().__init__(codebook_size, num_branches, num_tokens, num_classes, class_dropout)
        sizes = {"hidden_size": hidden_size, "depth": depth, "num_heads": num_heads, "mlp_size": mlp_size}
        check_transformer(sizes, {"dropout": dropout, "attention_dropout": attention_dropout})
        for name, value in (("extra_positions", extra_positions), ("extra_timesteps", extra_timesteps)):
            if value < 2:
                raise ConfigError(f"generator.{name}={value} must be at least 2")
        if len(order_anneal) != 2 or not 0 <= order_anneal[0] <= order_anneal[1] <= 1:
            raise ConfigError(
                f"generator.order_anneal={list(order_anneal)} must be [start, end] with "
                "0 <= start <= end <= 1, shares of training"
            )
        self.order_anneal = tuple(order_anneal)
        self.hidden_size, self.num_heads = hidden_size, num_heads
        self.checkpoint_blocks = checkpoint_blocks
        token_ids = num_branches * codebook_size
        self.first_class_id = token_ids + 1

        self.cls_token = nn.Parameter(torch.zeros(1, 1, hidden_size))
        self.pos_embed = nn.Parameter(torch.empty(1, num_tokens + extra_positions, hidden_size))
        self.target_aware_pos_embed = nn.Parameter(torch.empty(1, num_tokens + extra_positions, hidden_size))
        self.timesteps_embeddings = nn.Parameter(torch.empty(1, num_tokens + extra_timesteps, hidden_size))
        self.embeddings = nn.Embedding(self.none_id + 1, hidden_size)
        self.blocks = nn.ModuleList(
            AdaptiveBlock(hidden_size, num_heads, mlp_size, dropout, attention_dropout) for _ in range(depth)
        )
        self.adaln_before_head = AdaptiveNorm(hidden_size)
        self.lm_head = Linear(hidden_size, token_ids)
        self._init_weights()

    def _init_weights(self) -> None:
        for table in (self.pos_embed, self.target_aware_pos_embed, self.timesteps_embeddings):
            nn.init.trunc_normal_(table, std=0.02)
        nn.init.trunc_normal_(self.embeddings.weight, std=0.02)
        linears = [self.lm_head]
        for block in self.blocks:
            linears += [block.attn.qkv, block.attn.proj, block.mlp.fc1, block.mlp.fc2]
        for linear in linears:  # the adaptive projections stay at zero
            nn.init.trunc_normal_(linear.weight, std=0.02)
            nn.init.zeros_(linear.bias)

    def embed_tokens(self, tokens: Tensor) -> Tensor:
        """Sum over branches of the embeddings of tokens: (B, P, N) int64 -> (B, N, d)."""
        if self.num_branches == 1:
            return self.embeddings(tokens[:, 0])
        first = torch.arange(self.num_branches, device=tokens.device) * self.codebook_size
        return self.embeddings(tokens + first[:, None]).sum(1)

    def conditioning(self, conditions: Tensor, length: int) -> Tensor:
        """Vector that modulates each position: class embedding + step embedding.

        Args:
            conditions: (B,) int64 from `condition_ids`.
            length: N; positions 0 .. N - 1, of which 0 is cls.

        Returns:
            (B, N, d).
        """
        return self.embeddings(conditions)[:, None] + self.timesteps_embeddings[:, :length]

    def head(self, x: Tensor) -> Tensor:
        """(..., d) normalised features -> (..., P, K) logits."""
        return self.lm_head(x).unflatten(-1, (self.num_branches, self.codebook_size))

    def sequence(self, tokens: Tensor, conditions: Tensor, orders: Tensor) -> Tensor:
        """Input of the first block; arguments as in `forward`, orders not None. Returns (B, n + 2, d)."""
        batch, _, length = tokens.shape
        content = torch.cat(
            [
                self.cls_token.expand(batch, -1, -1),
                self.embeddings(conditions)[:, None],
                self.embed_tokens(tokens),
            ],
            1,
        )
        prefix = self.pos_embed[0, :2].expand(batch, -1, -1)
        position = torch.cat([prefix, self.pos_embed[0][orders[:, :length] + 2]], 1)
        # from the condition on, each position is told the place of the token it predicts; cls predicts
        # nothing, nor does the last token of a complete sequence
        target = self.target_aware_pos_embed[0][orders[:, : length + 1] + 2]
        target = F.pad(target, (0, 0, 1, length + 1 - target.shape[1]))
        return content + position + target

    def forward(self, tokens: Tensor, conditions: Tensor, orders: Tensor | None = None) -> Tensor:
        """Logits of every next token; the plain pass without a cache.

        Args:
            tokens: (B, P, n) int64, the first n <= L tokens in prediction order.
            conditions: (B,) int64 from `condition_ids`.
            orders: (B, L) int64 permutations: the k-th token of `tokens` belongs to place orders[b, k] of the
                image. None: raster.

        Returns:
            (B, n + 1, P, K); row k predicts the k-th token. Row L, after a complete sequence, has no meaning.
        """
        return self.head(self.features(tokens, conditions, orders))

    def features(self, tokens: Tensor, conditions: Tensor, orders: Tensor | None = None) -> Tensor:
        """(B, n + 1, d), what the head gets; arguments as in `forward`."""
        batch, _, length = tokens.shape
        if orders is None:
            orders = raster_orders(batch, self.num_tokens, tokens.device)
        x = self.sequence(tokens, conditions, orders)
        activated = F.silu(self.conditioning(conditions, length + 2))
        for block in self.blocks:
            if self.checkpoint_blocks and self.training and torch.is_grad_enabled():
                x = checkpoint(block, x, activated, use_reentrant=False)
            else:
                x = block(x, activated)
        return self.adaln_before_head(x[:, 1:], activated[:, 1:])

    def loss_in_order(self, tokens: Tensor, conditions: Tensor, orders: Tensor) -> dict[str, Tensor]:
        """Mean cross-entropy of the tokens in given orders; nothing is drawn here but dropout.

        Args:
            tokens: (B, P, L) int64, in raster order.
            conditions: (B,) int64 from `condition_ids`.
            orders: (B, L) int64 permutations.

        Returns:
            As `Generator.loss`.
        """
        targets = permute(tokens, orders)
        # the last token predicts nothing, so it isn't fed
        features = self.features(targets[:, :, :-1], conditions, orders)
        losses, hits = token_losses(features, self.lm_head.weight, self.lm_head.bias, targets)
        places = inverse(orders)
        return {"loss": losses.mean(), **site_sums(permute(losses.detach(), places), permute(hits, places))}

    def loss(
        self,
        tokens: Tensor,
        labels: Tensor,
        *,
        progress: float = 1.0,
        rng: SampleRng | torch.Generator | None = None,
    ) -> dict[str, Tensor]:
        """See `Generator.loss`. Random orders and dropped labels in training mode only.

        Streams of `rng`: "class_dropout", "order/random", "order/permutation". Ranges are checked where that
        costs no synchronisation, on the CPU.
        """
        batch, device = len(labels), tokens.device
        self.check_batch(tokens, labels)
        if not self.training:
            return self.loss_in_order(tokens, self.condition_ids(labels), raster_orders(batch, self.num_tokens, device))
        draws = as_sample_rng(rng, batch, device)
        dropped = draws.uniform("class_dropout").to(device) < self.class_dropout
        orders = sample_orders(draws, batch, self.num_tokens, random_ratio(progress, *self.order_anneal), device)
        return self.loss_in_order(tokens, self.condition_ids(labels, dropped), orders)

    def generate(
        self,
        labels: Tensor,
        sampling: SamplingConfig,
        *,
        teacher: Tensor | None = None,
        keep: Tensor | None = None,
        rng: Rng = None,
        orders: Tensor | None = None,
    ) -> Tensor:
        """See `Generator.generate`; each step feeds one position (`rar_decoder`).

        Args:
            orders: (B, L) int64 permutations: sample b's k-th token is that of place orders[b, k]. None: as
                `RARSampling.order` says. Whatever the order, tokens, teacher and keep are by place of the image.

        Raises:
            ConfigError: also where random orders are asked for and orders are given, or rng is a function.
            DataError: also where orders are no permutations.
        """
        self.check_labels(labels)
        self.check_sampling(sampling)
        self.check_teacher(teacher, keep, len(labels))
        orders = self._sampling_orders(orders, sampling, rng, len(labels))
        if orders is None:
            return sample_sequence(self, partial(RARDecoder, self), labels, sampling, teacher, keep, rng)
        if teacher is not None:
            teacher, keep = (permute(given.to(orders.device), orders) for given in (teacher, keep))
        decoder = partial(RARDecoder, self, orders=orders)
        return permute(sample_sequence(self, decoder, labels, sampling, teacher, keep, rng), inverse(orders))

    def _sampling_orders(
        self, orders: Tensor | None, sampling: SamplingConfig, rng: Rng, batch_size: int
    ) -> Tensor | None:
        """The orders to sample in, on the model's device; None: raster. Random ones: stream "order/permutation"."""
        device = self.lm_head.weight.device
        is_random = isinstance(sampling, RARSampling) and sampling.order == "random"
        if orders is not None:
            if is_random:
                raise ConfigError(
                    "sampling.order=random, but orders are given; choose sampling.order=raster to use them"
                )
            check_orders(orders, batch_size, self.num_tokens)
            return orders.to(device)
        if not is_random:
            return None
        if callable(rng):
            raise ConfigError(
                "sampling.order=random needs a source of draws, but rng is a function; give orders instead"
            )
        uniform = as_sample_rng(rng, batch_size, device).uniform("order/permutation", self.num_tokens)
        if len(uniform) != batch_size:
            raise ConfigError(
                f"rng draws for {len(uniform)} samples but {batch_size} labels were given; give the random source one "
                "index per label"
            )
        return permutations(uniform.to(device))
