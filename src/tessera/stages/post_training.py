"""Decoder post-training: the decoder learns to make real images of a generator's tokens."""

import copy
from typing import Any

import torch
from torch import Tensor, nn

from tessera.distributed import all_reduce_sum, rank
from tessera.errors import CheckpointError, ConfigError, DataError
from tessera.frozen import Unregistered
from tessera.rng import IndexedRng
from tessera.stages.base import check_tokens
from tessera.stages.reconstruction import ReconstructionStage

SOURCES = ("tokens", "reencode")


class DecoderPostTraining(ReconstructionStage):
    """Trains `post_quant_conv` and the decoder on generated tokens against the real images they were made from.

    Encoder, `quant_conv` and codebook are frozen, in eval mode, and verified to stay bit-identical, so that the tokens
    a generator was trained on keep their meaning and the checkpoint stays an ordinary tokenizer's.

    Args:
        source: "tokens" decodes the generated tokens, as sampling does. "reencode" decodes them with the original
            decoder, encodes that image again and decodes its tokens, as the public code does.
        clean_share: probability that an image's own tokens are decoded instead, to protect reconstruction.
        discriminator_warmup_steps: steps that train the discriminator alone before the decoder's training starts,
            for one that isn't loaded from the main training. They don't count as global steps.
        l2_start: weight of half the squared distance of the trained weights to those that training started from (L2-SP,
            arXiv:1802.01483); 0: off.
        **shared: see `ReconstructionStage`.

    Raises:
        ConfigError: values out of range; a tokenizer without tokens.

    Source: RobusTok (arXiv:2509.12474), section 4; it differs from the public script where that lets encoder tokens,
        `quant_conv` and codebook drift.
    """

    def __init__(
        self,
        *,
        source: str = "tokens",
        clean_share: float = 0.0,
        discriminator_warmup_steps: int = 0,
        l2_start: float = 0.0,
        **shared: Any,
    ):
        super().__init__(**shared)
        if source not in SOURCES:
            raise ConfigError(f"stage.source={source!r} is unknown; choose one of {', '.join(SOURCES)}")
        if not 0 <= clean_share <= 1:
            raise ConfigError(f"stage.clean_share={clean_share} is outside [0, 1]")
        if discriminator_warmup_steps < 0:
            raise ConfigError(f"stage.discriminator_warmup_steps={discriminator_warmup_steps} must not be negative")
        if self.tokenizer.quantizer.num_tokens == 0:
            raise ConfigError(
                "post-training decodes tokens, but the tokenizer's latents are continuous (quantizer=gaussian); give "
                "one with a codebook in tokenizer.path"
            )
        if l2_start < 0:
            raise ConfigError(f"stage.l2_start={l2_start} must not be negative")
        self.source, self.clean_share = source, clean_share
        self.discriminator_warmup_steps = discriminator_warmup_steps if self.discriminator is not None else 0
        self.warmup_done = 0
        for part in self.frozen_parts():
            part.requires_grad_(False)
        self.token_space = self.tokenizer.fingerprint()
        self._original = Unregistered(copy.deepcopy(self.tokenizer) if source == "reencode" else None)
        self.weights["l2_start"], start = l2_start, None
        if l2_start > 0:
            start = nn.ParameterList(p.detach().clone() for p in self.trained_parameters())
        self._start = Unregistered(start)
        self._agreement = torch.zeros(2, dtype=torch.int64)  # tokens equal after encoding again, and all

    def frozen_parts(self) -> list[nn.Module]:
        """The modules that define the tokens."""
        return [self.tokenizer.encoder, self.tokenizer.quant_conv, self.tokenizer.quantizer]

    def averaged_modules(self) -> dict[str, nn.Module]:
        return {f"tokenizer.{name}": module for name, module in self.tokenizer.decoder_modules().items()}

    def uncounted_steps(self) -> int:
        return self.discriminator_warmup_steps

    def discriminator_steps(self) -> int:
        return self.total_steps + self.discriminator_warmup_steps

    def train(self, mode: bool = True) -> "DecoderPostTraining":
        """The frozen parts stay in eval mode."""
        super().train(mode)
        for part in self.frozen_parts():
            part.eval()
        return self

    def sample_rng(self, batch: dict[str, Tensor]) -> IndexedRng:
        """As in any stage; steps of the discriminator alone, which are no global ones, have draws of their own."""
        return IndexedRng(self.seed, batch["index"], step=self.trainer.global_step + self.warmup_done)

    def decoded_tokens(self, batch: dict[str, Tensor]) -> Tensor:
        """The tokens (B, P, L) that this batch trains the decoder on."""
        tokens = batch["tokens"]
        # in float32, as the tokens on disk were made
        with torch.no_grad(), torch.autocast(self.device.type, enabled=False):
            if self.source == "reencode":
                original = self._original.get(self.device)
                again = original.tokenize(original.detokenize(tokens))
                equal = again == tokens
                self.log("train/reencoded_agreement", equal.float().mean())
                self._agreement = self._agreement.to(self.device)
                self._agreement[0] += equal.sum()
                self._agreement[1] += equal.numel()
                tokens = again
            if self.clean_share:
                clean = self.sample_rng(batch).uniform("post_training/clean") < self.clean_share
                tokens = torch.where(clean[:, None, None], self.tokenizer.tokenize(batch["image"]), tokens)
        return tokens

    def reencoded_agreement(self) -> float | None:
        """Share of the generated tokens that came back from decoding and encoding again, over all of training; None
        where there is none. All processes must call it."""
        equal, total = all_reduce_sum(self._agreement.to(self.device)).tolist()
        return equal / total if total else None

    def distance_to_start(self) -> Tensor:
        """Half the squared distance of the trained weights to those that training started from, float32 scalar."""
        pairs = zip(self.trained_parameters(), self._start.get(self.device), strict=True)
        return torch.stack([(now - start).float().square().sum() for now, start in pairs]).sum() / 2

    def training_step(self, batch: dict[str, Tensor], batch_index: int) -> None:
        images, rng = batch["image"], self.sample_rng(batch)
        with torch.no_grad():
            z_q = self.tokenizer.quantizer.decode(self.decoded_tokens(batch))
        step = self.open_window()
        self.log_rates(["decoder", "discriminator"])
        if self.warmup_done < self.discriminator_warmup_steps:
            with torch.no_grad():
                reconstruction = self.tokenizer.decode(z_q)
            self.discriminator_step(reconstruction, images, step, rng)
            self.warmup_done += int(step)
            return
        reconstruction = self.tokenizer.decode(z_q)
        adversarial = self.discriminator is not None
        others = {} if self._start.module is None else {"l2_start": self.distance_to_start()}
        self.generator_step(reconstruction, images, others, adversarial, step, rng)
        if adversarial:
            self.discriminator_step(reconstruction, images, step, rng)

    def on_before_batch_transfer(self, batch: dict[str, Tensor], dataloader_idx: int) -> dict[str, Tensor]:
        if self.trainer.training:
            check_tokens(batch, self.tokenizer.quantizer)
            if "image" not in batch:
                raise DataError("the batch holds no images to compare with; set data.serve=pairs")
        return batch

    def check_token_space(self) -> None:
        """CheckpointError where encoder or codebook are not bit-identical to those training started from."""
        found = self.tokenizer.fingerprint()
        if found != self.token_space:
            raise CheckpointError(
                f"the tokenizer's encoder or codebook changed in post-training (token space {self.token_space} became "
                f"{found}), so existing tokens lost their meaning; continue with the checkpoint and the tokenizer.path "
                "that belong together"
            )

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        self.check_token_space()
        checkpoint["warmup_done"] = self.warmup_done
        checkpoint["reencoded"] = all_reduce_sum(self._agreement.to(self.device)).tolist()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        self.warmup_done = checkpoint.get("warmup_done", 0)
        # sums of all processes, which one of them continues
        self._agreement = torch.tensor(checkpoint.get("reencoded", [0, 0]) if rank() == 0 else [0, 0])

    def on_fit_start(self) -> None:
        super().on_fit_start()
        self.check_token_space()  # a checkpoint of another tokenizer's post-training

    def on_fit_end(self) -> None:
        self.check_token_space()
