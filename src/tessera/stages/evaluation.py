"""Evaluation only: a tokenizer, and optionally a generator on its tokens, behind the hooks the callbacks use."""

from typing import Any

import lightning
from torch import Tensor

from tessera.generators.base import Generator
from tessera.generators.sampling import SamplingConfig
from tessera.rng import IndexedRng
from tessera.tokenizers import Tokenizer


class Evaluation(lightning.LightningModule):
    """Reconstructs validation batches and generates tokens on request; trains nothing.

    Args:
        tokenizer: decodes reconstructions and generated tokens.
        generator: optional; None where only the tokenizer is evaluated.
        sampling: how the generator is sampled; None: its plain sampling.
        seed: of the generated samples; sample number i depends on (seed, i) alone.

    Raises:
        CheckpointError: a generator of other token shapes than the tokenizer's.
        ConfigError: sampling settings that the generator can't follow.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        generator: Generator | None = None,
        sampling: SamplingConfig | None = None,
        seed: int = 0,
    ):
        super().__init__()
        self.tokenizer, self.generator = tokenizer, generator
        self.seed = seed
        if generator is not None:
            generator.bind(tokenizer.quantizer)
            self.sampling = sampling or generator.sampling_types[0]()
            generator.check_sampling(self.sampling)

    def validation_step(self, batch: dict[str, Tensor], batch_index: int) -> dict[str, Any]:
        output = self.tokenizer(batch["image"])
        return {"reconstruction": output.reconstruction.clamp(-1, 1), "tokens": output.tokens, "z": output.z}

    def generate_tokens(self, labels: Tensor, index: Tensor) -> Tensor:
        """Tokens (B, P, L) of samples number `index` (B,) with class `labels` (B,)."""
        return self.generator.generate(labels, self.sampling, rng=IndexedRng(self.seed, index))
