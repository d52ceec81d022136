"""What every generator of tokens offers, and the checks of its inputs."""

from abc import ABC, abstractmethod
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from tessera.errors import CheckpointError, ConfigError, DataError
from tessera.generators.sampling import Rng, SamplingConfig
from tessera.quantizers import ProductQuantizer
from tessera.rng import SampleRng


def check_transformer(sizes: dict[str, int], rates: dict[str, float]) -> None:
    """Refuse impossible hyper-parameters of a transformer.

    Args:
        sizes: by name, `hidden_size` and `num_heads` among them; at least 1 each, and heads divide channels.
        rates: probabilities and shares by name, in [0, 1).

    Raises:
        ConfigError: names the first that is wrong.
    """
    for name, value in sizes.items():
        if value < 1:
            raise ConfigError(f"generator.{name}={value} must be at least 1")
    hidden_size, num_heads = sizes["hidden_size"], sizes["num_heads"]
    if hidden_size % num_heads:
        raise ConfigError(f"generator.num_heads={num_heads} does not divide generator.hidden_size={hidden_size}")
    for name, value in rates.items():
        if not 0 <= value < 1:
            raise ConfigError(f"generator.{name}={value} is outside [0, 1)")


class Generator(nn.Module, ABC):
    """Class-conditional model of an image's tokens.

    Args:
        codebook_size: K, codes of each branch.
        num_branches: P, predicted in parallel at each position.
        num_tokens: L, tokens of an image in one branch.
        num_classes: labels are 0 .. num_classes - 1.
        class_dropout: share of samples whose label is dropped in training, by which the model learns what
            classifier-free guidance needs; with 0 it can't be guided.

    Attributes:
        sampling_types: the settings that `generate` takes, the first by default.
        first_class_id: row of class 0 in the table that holds the classes.
        can_compile_sampling: whether `compile_sampling` is available.

    Raises:
        ConfigError: a size below 1; class_dropout outside [0, 1].
    """

    sampling_types: ClassVar[tuple[type[SamplingConfig], ...]] = (SamplingConfig,)
    first_class_id: int = 0
    can_compile_sampling: ClassVar[bool] = False
    compiles_sampling: bool = False

    def __init__(
        self, codebook_size: int, num_branches: int, num_tokens: int, num_classes: int, class_dropout: float = 0.1
    ):
        super().__init__()
        self.codebook_size, self.num_branches = codebook_size, num_branches
        self.num_tokens, self.num_classes = num_tokens, num_classes
        for name in ("codebook_size", "num_branches", "num_tokens", "num_classes"):
            if getattr(self, name) < 1:
                raise ConfigError(f"generator.{name}={getattr(self, name)} must be at least 1")
        if not 0 <= class_dropout <= 1:
            raise ConfigError(f"generator.class_dropout={class_dropout} is outside [0, 1]; it is a share")
        self.class_dropout = class_dropout

    @property
    def none_id(self) -> int:
        """Condition that stands for no class: the row behind those of the classes."""
        return self.first_class_id + self.num_classes

    def condition_ids(self, labels: Tensor, dropped: Tensor | None = None) -> Tensor:
        """Rows of the table of classes for labels.

        Args:
            labels: (B,) int64 in [0, num_classes).
            dropped: (B,) bool; True: no condition.

        Returns:
            (B,) int64.
        """
        ids = labels + self.first_class_id
        return ids if dropped is None else torch.where(dropped, self.none_id, ids)

    @classmethod
    def sizes(cls, quantizer: ProductQuantizer, num_classes: int) -> dict[str, Any]:
        """The constructor's arguments that follow from the tokenizer and the data, of plain types.

        Raises:
            ConfigError: tokens of a structure that this generator can't model.
        """
        return {
            "codebook_size": quantizer.codebook_size,
            "num_tokens": quantizer.num_tokens,
            "num_branches": quantizer.num_branches,
            "num_classes": num_classes,
        }

    def bind(self, quantizer: ProductQuantizer) -> None:
        """Check that a quantizer makes the tokens this model was built for, before any are exchanged.

        Raises:
            CheckpointError: another codebook size, number of branches or of tokens.
        """
        expected = self.sizes(quantizer, self.num_classes)
        different = [
            f"{name}={getattr(self, name)} where the tokenizer has {value}"
            for name, value in expected.items()
            if getattr(self, name) != value
        ]
        if different:
            raise CheckpointError(
                f"the generator ({type(self).__name__}) does not fit the tokenizer: {', '.join(different)}; give the "
                "tokenizer it was made for, or train a generator on this one's tokens"
            )

    @abstractmethod
    def loss(
        self,
        tokens: Tensor,
        labels: Tensor,
        *,
        progress: float = 1.0,
        rng: SampleRng | torch.Generator | None = None,
    ) -> dict[str, Tensor]:
        """Training loss of a batch.

        Args:
            tokens: (B, P, L) int64 in [0, K).
            labels: (B,) int64 in [0, num_classes).
            progress: in [0, 1], share of training done; schedules inside the model read it.
            rng: draws by sample; None: torch's global generator.

        Returns:
            "loss": float32 scalar with gradient; "accuracy": float32 scalar, share of the tokens to predict that are
            the most probable; "site_loss", "site_hits" and "site_count": (P, L) float32, sums over the batch by place
            of the image (`tessera.generators.scores.site_sums`).

        Raises:
            DataError: wrong shapes, or values out of range.
        """

    @abstractmethod
    def generate(
        self,
        labels: Tensor,
        sampling: SamplingConfig,
        *,
        teacher: Tensor | None = None,
        keep: Tensor | None = None,
        rng: Rng = None,
    ) -> Tensor:
        """Sample tokens, in eval mode and without gradient whatever the module's mode is.

        Args:
            labels: (B,) int64 in [0, num_classes).
            sampling: temperature, guidance, top-k, top-p; one of `sampling_types`.
            teacher: (B, P, L) int64; given tokens. Only values at kept positions are read.
            keep: (B, P, L) bool; where True the sampled token is replaced by the teacher's before it is fed
                back, so that later tokens are conditioned on it. The draw is made all the same: draws of
                other positions don't depend on `keep`.
            rng: `IndexedRng` makes each sample's tokens independent of the batch it is in; a
                `torch.Generator`, None (torch's global one), or a function (probs (B, P, K), step) -> (B, P).

        Returns:
            (B, P, L) int64 in [0, K).

        Raises:
            DataError: wrong shapes, or values out of range.
            ConfigError: only one of teacher and keep is given; settings that `check_sampling` refuses.
        """

    def compile_sampling(self) -> None:
        """Let `generate` run a compiled step, with the same result up to rounding; state and weights stay as they are.

        Compiling takes its time at the first images, and again for another batch size. On CUDA a step is launched as
        one graph. On a CPU the steps as they are, with packed weights, are faster.

        Raises:
            ConfigError: a generator without a compiled step.
        """
        if not self.can_compile_sampling:
            raise ConfigError(f"{type(self).__name__} has no compiled sampling step; leave compile_sampling off")
        self.compiles_sampling = True

    def check_sampling(self, sampling: SamplingConfig) -> None:
        """Refuse settings that are another generator's or that this model can't follow.

        Raises:
            ConfigError: another type; guidance of a model that was trained without dropped labels; top_k above K.
        """
        if type(sampling) not in self.sampling_types:
            names = " or ".join(kind.__name__ for kind in self.sampling_types)
            raise ConfigError(
                f"{type(self).__name__} is sampled with {names}, not {type(sampling).__name__}; choose its sampling=..."
            )
        if sampling.is_guided and self.class_dropout == 0:
            raise ConfigError(
                f"sampling.guidance_scale={sampling.guidance_scale} needs a generator that was trained with dropped "
                "labels, but generator.class_dropout=0; set the scale to null, or train with class_dropout=0.1"
            )
        if (sampling.top_k or 0) > self.codebook_size:
            raise ConfigError(
                f"sampling.top_k={sampling.top_k} is more than the {self.codebook_size} codes of the generator "
                "(generator.codebook_size); lower it, or use 0 for all"
            )

    def check_batch(self, tokens: Tensor, labels: Tensor) -> None:
        """`check_labels` and `check_tokens` of a training batch where that costs no synchronisation, on the CPU."""
        if tokens.device.type == "cpu":
            self.check_labels(labels)
            self.check_tokens(tokens, len(labels))

    def check_labels(self, labels: Tensor) -> None:
        """Refuse labels that are no (B,) integers in [0, num_classes)."""
        if labels.ndim != 1 or labels.dtype != torch.int64:
            raise DataError(f"labels have shape {tuple(labels.shape)} and type {labels.dtype}; need (B,) int64")
        self._check_range("label", labels, self.num_classes, "generator.num_classes")

    def check_tokens(self, tokens: Tensor, batch_size: int) -> None:
        """Refuse tokens that are no (B, P, L) integers in [0, K)."""
        self._check_shape("tokens", tokens, batch_size)
        if tokens.dtype != torch.int64:
            raise DataError(f"tokens have type {tokens.dtype}; need int64")
        self._check_range("token", tokens, self.codebook_size, "generator.codebook_size")

    def check_teacher(self, teacher: Tensor | None, keep: Tensor | None, batch_size: int) -> None:
        """Refuse a teacher without keep or the reverse, wrong shapes, and kept tokens outside [0, K)."""
        if teacher is None and keep is None:
            return
        if teacher is None or keep is None:
            missing = "keep" if keep is None else "teacher"
            raise ConfigError(
                f"generate() needs teacher and keep together, but {missing} is missing; give both "
                "(keep: (B, P, L) bool, True where the teacher's token stays) or neither"
            )
        self._check_shape("keep", keep, batch_size)
        if keep.dtype != torch.bool:
            raise DataError(f"keep has type {keep.dtype}; need bool, True where the teacher's token stays")
        self._check_shape("teacher", teacher, batch_size)
        self.check_tokens(torch.where(keep, teacher, 0), batch_size)

    def _check_shape(self, name: str, value: Tensor, batch_size: int) -> None:
        expected = (batch_size, self.num_branches, self.num_tokens)
        if tuple(value.shape) != expected:
            raise DataError(
                f"{name} have shape {tuple(value.shape)} but the generator works on {expected} (batch, "
                "generator.num_branches, generator.num_tokens); set these to the tokenizer's"
            )

    def _check_range(self, name: str, value: Tensor, size: int, key: str) -> None:
        if not value.numel():
            return
        low, high = (int(bound) for bound in value.aminmax())
        if low < 0 or high >= size:
            wrong = low if low < 0 else high
            raise DataError(f"{name} {wrong} is outside [0, {size}); check the data or raise {key}")
