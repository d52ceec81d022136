"""Figures of a generator's images: which samples are taken, and their measurement in one pass."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from tessera import distributed
from tessera.errors import ConfigError, DataError, MissingFileError
from tessera.metrics.checks import balance_warnings, reference_warnings, size_warnings
from tessera.metrics.comparison import KEEPS_FEATURES, chosen_figures, figures_against
from tessera.metrics.features import FeatureExtractor
from tessera.metrics.protocol import Figure
from tessera.metrics.reference import Reference
from tessera.metrics.set_measure import Measured, SetMeasure

log = logging.getLogger(__name__)


class Draws:
    """Samples of a generator: number i has class i mod C, or the chosen ones in turn, and random draws of its own.

    Args:
        generate: labels (B,) and sample numbers (B,) -> tokens (B, P, L).
        num_samples: N.
        num_classes: C.
        classes: chosen ones; None: all.
        offset: of the numbers that `generate` gets.
    """

    path: Path | None = None

    def __init__(
        self,
        generate: Callable[[Tensor, Tensor], Tensor],
        num_samples: int,
        num_classes: int,
        classes: Sequence[int] | None = None,
        offset: int = 0,
    ):
        self.generate, self.offset = generate, offset
        self.classes = None if classes is None else list(classes)
        each = torch.tensor(self.classes or range(num_classes))
        self.labels = each[torch.arange(num_samples) % len(each)]

    def tokens(self, start: int, stop: int, device: torch.device) -> Tensor:
        """(stop - start, P, L) int64 of the samples from `start` on."""
        index = torch.arange(start, stop, device=device)
        return self.generate(self.labels[start:stop].to(device), index + self.offset)


class TokenFile:
    """The samples of a file: two decoders measured on the same tokens differ by no sampling noise.

    Args:
        path: safetensors file with `tokens` (N, P, L) int64 and `labels` (N,).
        num_samples: of them, the first ones; None: all.
        key: config key of the file's part, for messages.

    Raises:
        MissingFileError: no such file.
        DataError: another file, or fewer samples.
    """

    classes: list[int] | None = None

    def __init__(self, path: str | Path, num_samples: int | None, key: str):
        self.path = Path(path)
        if not self.path.is_file():
            raise MissingFileError(f"{key}.tokens={path} does not exist; give a file that task=sample has written")
        try:
            with safe_open(self.path, framework="pt") as file:
                if not {"tokens", "labels"} <= set(file.keys()):
                    raise DataError(f"{key}.tokens={path} lacks `tokens` or `labels`")
                self.labels = file.get_tensor("labels")
        except SafetensorError as error:
            raise DataError(f"{key}.tokens={path} is not a safetensors file ({error})") from error
        if (num_samples or 0) > len(self.labels):
            raise DataError(f"{key}.num_samples={num_samples} but {path} holds {len(self.labels)}; lower it")
        self.labels = self.labels[:num_samples]

    def tokens(self, start: int, stop: int, device: torch.device) -> Tensor:
        """As `Draws.tokens`."""
        with safe_open(self.path, framework="pt") as file:
            return file.get_slice("tokens")[start:stop].to(device)


def check_classes(key: str, classes: Sequence[int] | None, num_classes: int) -> None:
    """Refuse chosen classes that a generator doesn't have.

    Args:
        key: config key of the choice, for the message.
        classes: chosen ones; None: all.
        num_classes: of the generator.

    Raises:
        ConfigError: names the key.
    """
    for label in classes or ():
        if not 0 <= label < num_classes:
            raise ConfigError(f"{key} has {label}, outside of the generator's classes [0, {num_classes})")


def measure_generated(
    samples: Draws | TokenFile,
    decode: Callable[[Tensor], Tensor],
    extractor: FeatureExtractor,
    figures: Sequence[str],
    batch_size: int,
    device: torch.device,
    save_tokens: str | Path | None = None,
) -> Measured:
    """Generate and decode the samples and measure their images; all processes call it and share the work.

    Args:
        samples: which ones.
        decode: tokens (B, P, L) -> images (B, 3, H, W) in [-1, 1].
        extractor: of the features.
        figures: that are wanted later, see `generated_figures`.
        batch_size: per process.
        device: where generator, decoder and extractor are.
        save_tokens: file to write, as `TokenFile` reads it.

    Raises:
        DataError: images out of range, or features that are not finite (the sample is named).
    """
    keep = bool(KEEPS_FEATURES & set(figures))
    measure = SetMeasure(extractor, len(samples.labels), keep, "IS" in figures, device)
    own, kept = distributed.share(len(samples.labels)), []
    for start in range(own.start, own.stop, batch_size):
        stop = min(start + batch_size, own.stop)
        tokens = samples.tokens(start, stop, device)
        measure.update(decode(tokens), torch.arange(start, stop))
        if save_tokens is not None:
            kept.append(tokens.cpu())
    if save_tokens is not None:
        _save(Path(save_tokens), kept, samples.labels)
    return measure.finish()


def _save(path: Path, kept: list[Tensor], labels: Tensor) -> None:
    parts = [kept]
    if distributed.is_distributed():
        parts = [None] * distributed.world_size()
        torch.distributed.all_gather_object(parts, kept)
    if distributed.rank() == 0:
        path.parent.mkdir(parents=True, exist_ok=True)
        tokens = torch.cat([batch for part in parts for batch in part])
        save_file({"tokens": tokens.contiguous(), "labels": labels.contiguous()}, path)
        log.info("generated tokens in %s", path)


def generated_figures(
    measured: Measured,
    reference: Reference,
    extractor: FeatureExtractor,
    figures: Sequence[str] | None,
    labels: Tensor | None,
    device: torch.device | str = "cpu",
    size: tuple[int, int] | None = None,
    num_classes: int | None = None,
    classes: Sequence[int] | None = None,
    settings: dict[str, Any] | None = None,
) -> list[Figure]:
    """gFID, sFID, IS, precision, recall and KID of a generator's images.

    Every sample counts, as each was drawn: images that came out alike are warned about, but remain in the names' N.

    Args:
        measured: the images.
        reference, extractor: as `compare`.
        figures: some of `FIGURES`; None: all that extractor and reference allow.
        labels: (N,) int64 classes of the samples; None where they are not known.
        device: where distances are computed.
        size: (H, W) of the images, where known.
        num_classes: of the generator, where known.
        classes: chosen ones, part of the names; None: all.
        settings: of the sampling, for the protocol.

    Raises:
        ConfigError: figures that can't be measured.
    """
    warnings = reference_warnings(reference.id) + size_warnings(size or reference.size, reference.size)
    if measured.unique < measured.samples:
        warnings.append(
            f"{measured.samples - measured.unique} of {measured.samples} samples are exact repeats of others; the "
            "generator may have collapsed, or is sampled with too little noise"
        )
    about = {}
    if labels is not None:
        counts = torch.bincount(labels)
        about = {"classes": int((counts > 0).sum()), "per_class": sorted({int(n) for n in counts if n > 0})}
        warnings += balance_warnings(labels, None if classes else num_classes)
    return figures_against(
        replace(measured, unique=measured.samples),
        reference,
        extractor,
        chosen_figures(figures, extractor, reference),
        warnings,
        prefix="g",
        device=device,
        settings={**about, "chosen": classes and list(classes), **(settings or {})},
        in_label=("classes",) if classes else (),
    )
