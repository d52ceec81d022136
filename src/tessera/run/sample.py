"""`eval.py task=sample`: many class-conditional images of a generator, straight into one file."""

import hashlib
import logging
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tessera import distributed
from tessera.data.pixels import ROUNDINGS, to_uint8
from tessera.data.resumable import RowWriter, fill
from tessera.data.samples import NPZ, PNG, TOKENS, SampleManifest, pack, write_samples
from tessera.errors import ConfigError, DataError, MissingFileError
from tessera.run.ranks import in_ranks
from tessera.run.results import read_results
from tessera.run.subject import Subject
from tessera.run.tokens import weights_fingerprint
from tessera.stages.evaluation import Evaluation

log = logging.getLogger(__name__)

PER_CLASS = 50  # as in the published protocols


class BulkSampling:
    """Class-balanced samples in the `.npz` layout of ADM's evaluation tools (`arr_0` uint8 (N, H, W, 3)).

    Sample number i has class i mod C (or as chosen) and random draws of its own: it is a function of the settings and
    i, whatever the number of processes; only batches of another size may round a probability otherwise. The samples are
    those that gFID measures with the same seed and settings. A killed run is completed by the same command, a finished
    one left alone.

    Args:
        num_samples: N; None: 50 per class, or one per entry of `labels`.
        classes: of the samples, taken in turn; None: all.
        labels: classes of samples 0, 1, ... instead: a list, or a file of whole numbers (.npy, or text).
        batch_size: samples generated at once, per process.
        decode_batch_size: images decoded at once; None: as `batch_size`.
        chunk_samples: samples between two markers on disk, the most work per process that a kill can cost; None: as
            `batch_size`.
        rounding: of pixels to uint8 (`tessera.data.to_uint8`): half_up, half_even, or truncate as published sampling
            scripts do.
        save_tokens: keep the tokens as `tokens.safetensors`, which `callbacks.gfid.tokens` reads.
        png: write image files as well.
        folder: of the samples; None: `samples` in the run folder.

    Raises:
        ConfigError: values out of range; both classes and labels.

    Source: openai/guided-diffusion, scripts/image_sample.py and evaluations (layout); 50 images of each class as in
        LlamaGen, VAR, RAR and IBQ.
    """

    def __init__(
        self,
        num_samples: int | None = None,
        classes: Sequence[int] | None = None,
        labels: Sequence[int] | str | None = None,
        batch_size: int = 64,
        decode_batch_size: int | None = None,
        chunk_samples: int | None = None,
        rounding: str = "half_up",
        save_tokens: bool = True,
        png: bool = False,
        folder: str | None = None,
    ):
        sizes = {"num_samples": num_samples, "batch_size": batch_size, "decode_batch_size": decode_batch_size}
        for key, value in (sizes | {"chunk_samples": chunk_samples}).items():
            if value is not None and value < 1:
                raise ConfigError(f"task.{key}={value} must be at least 1")
        if rounding not in ROUNDINGS:
            raise ConfigError(f"task.rounding={rounding!r} is unknown; choose one of {', '.join(ROUNDINGS)}")
        if classes is not None and labels is not None:
            raise ConfigError("task.classes and task.labels exclude each other; labels are the classes one by one")
        if classes is not None and not classes:
            raise ConfigError("task.classes is empty; list classes, or set it to null for all")
        self.num_samples, self.classes, self.labels = num_samples, classes, labels
        self.batch_size, self.decode_batch_size = batch_size, decode_batch_size or batch_size
        self.chunk_samples = chunk_samples or batch_size
        self.rounding, self.save_tokens, self.png, self.folder = rounding, save_tokens, png, folder

    def sample_labels(self, num_classes: int) -> np.ndarray:
        """(N,) int64 classes of all samples.

        Raises:
            ConfigError: a class that the generator doesn't have; another number of labels than of samples.
        """
        if self.labels is not None:
            labels, key = read_labels(self.labels), "task.labels"
            if self.num_samples not in (None, len(labels)):
                raise ConfigError(
                    f"task.num_samples={self.num_samples} but task.labels has {len(labels)}; leave num_samples out"
                )
        else:
            classes = np.asarray(range(num_classes) if self.classes is None else self.classes, dtype=np.int64)
            count = self.num_samples or PER_CLASS * len(classes)
            labels, key = classes[np.arange(count) % len(classes)], "task.classes"
        wrong = labels[(labels < 0) | (labels >= num_classes)]
        if len(wrong):
            raise ConfigError(f"{key} has {wrong[0]}, outside of the generator's classes [0, {num_classes})")
        return labels

    def run(self, subject: Subject) -> dict[str, Any]:
        """Sample.

        Raises:
            ConfigError: a tokenizer's checkpoint, impossible labels or sampling settings.
            CheckpointError: a tokenizer of another token space; the folder holds other samples.
            DataError: full disk.
        """
        models = subject.generation()
        labels = self.sample_labels(models.generator.num_classes)
        trainer = subject.trainer()
        manifest = self.manifest(models, labels, str(trainer.precision))
        folder = subject.run / "samples" if self.folder is None else Path(self.folder)
        made = in_ranks(trainer, lambda device: self.sample(folder, manifest, models, labels, device), models)
        return self._report(subject.run, folder, manifest, made)

    def manifest(self, models: Evaluation, labels: np.ndarray, precision: str) -> SampleManifest:
        """Everything that determines the samples."""
        quantizer, resolution = models.tokenizer.quantizer, models.tokenizer.resolution
        chosen = {"classes": self.classes and list(self.classes)}
        if self.labels is not None:
            chosen = {"labels": hashlib.sha256(labels.tobytes()).hexdigest()[:16]}
        settings = {
            "generator": weights_fingerprint(models.generator),
            "tokenizer": weights_fingerprint(models.tokenizer),
            "sampling": {"kind": type(models.sampling).__name__, **vars(models.sampling)},
            "seed": models.seed,
            **chosen,
            "rounding": self.rounding,
            "precision": precision,
        }
        return SampleManifest(
            samples=len(labels),
            height=resolution,
            width=resolution,
            branches=quantizer.num_branches,
            length=quantizer.num_tokens,
            save_tokens=self.save_tokens,
            png=self.png,
            settings=settings,
        )

    def sample(
        self, folder: Path, manifest: SampleManifest, models: Evaluation, labels: np.ndarray, device: torch.device
    ) -> dict[str, Any] | None:
        """Fill the folder; all processes share the work.

        Returns:
            `made`, the number of samples of all `processes`, and `seconds` that this one took to `generate`, `decode`
            and `write`, and of `all`; None where the folder was complete.
        """
        seconds = {"generate": 0.0, "decode": 0.0, "write": 0.0}
        made = 0

        def timed(part: str, since: float) -> float:
            now = time.perf_counter()  # what precedes has brought its result to the host
            seconds[part] += now - since
            return now

        def work(writer: RowWriter, chunks: list[range]) -> None:
            nonlocal made
            for chunk in chunks:
                now = time.perf_counter()
                tokens = torch.cat([self._generate(models, labels, part) for part in split(chunk, self.batch_size)])
                tokens_on_host = tokens.cpu().numpy()
                now = timed("generate", now)
                for part in split(chunk, self.decode_batch_size):
                    rows = slice(part.start - chunk.start, part.stop - chunk.start)
                    images = self._decode(models, tokens[rows]).cpu().numpy()
                    now = timed("decode", now)
                    write_samples(writer, part.start, images, tokens_on_host[rows], labels[part.start : part.stop])
                    now = timed("write", now)
                writer.mark(chunk)
                timed("write", now)
                made += len(chunk)

        start = time.perf_counter()
        if not fill(folder, manifest, self.chunk_samples, work, lambda: pack(folder), "samples"):
            return None
        seconds["all"] = time.perf_counter() - start
        total = int(distributed.all_reduce_sum(torch.tensor(made, device=device)))
        return {"seconds": seconds, "made": total, "processes": distributed.world_size()}

    def _generate(self, models: Evaluation, labels: np.ndarray, numbers: range) -> Tensor:
        index = torch.arange(numbers.start, numbers.stop, device=models.device)
        own = torch.from_numpy(labels[numbers.start : numbers.stop]).to(models.device)
        return models.generate_tokens(own, index)

    def _decode(self, models: Evaluation, tokens: Tensor) -> Tensor:
        """(n, H, W, 3) uint8 of tokens (n, P, L)."""
        images = models.tokenizer.detokenize(tokens)
        return to_uint8(images, self.rounding).permute(0, 2, 3, 1).contiguous()

    def _report(self, run: Path, folder: Path, manifest: SampleManifest, made: dict[str, Any] | None) -> dict[str, Any]:
        if made is None:
            log.info("%s is complete; nothing was sampled", folder / NPZ)
            found = read_results(run) or {}
            if found.get("samples", {}).get("settings") == manifest.facts()["settings"]:
                return {**found, "figures": []}
        report = {
            "npz": str(folder / NPZ),
            "tokens": str(folder / TOKENS) if self.save_tokens else None,
            "png": str(folder / PNG) if self.png else None,
            "count": manifest.samples,
            "settings": manifest.facts()["settings"],
            "batch_size": self.batch_size,
            "decode_batch_size": self.decode_batch_size,
        }
        if made is not None:
            report |= {**made, "seconds": {key: round(value, 3) for key, value in made["seconds"].items()}}
            report["images_per_second"] = round(made["made"] / made["seconds"]["all"], 2)
            log.info("%s: %d samples, %.1f images/s", folder / NPZ, made["made"], report["images_per_second"])
        return {"samples": report}


def split(numbers: range, size: int) -> Iterator[range]:
    """Consecutive parts of at most `size`."""
    for start in range(numbers.start, numbers.stop, size):
        yield range(start, min(start + size, numbers.stop))


def read_labels(labels: Sequence[int] | str) -> np.ndarray:
    """(N,) int64 of a list, or of a file: .npy, or text with whole numbers between blanks.

    Raises:
        MissingFileError: no such file.
        DataError: no list of whole numbers, or an empty one.
    """
    origin, values = "task.labels", labels
    if isinstance(labels, str):
        origin, path = f"task.labels={labels}", Path(labels)
        if not path.is_file():
            raise MissingFileError(f"{origin} does not exist; give a file of labels, or a list")
        try:
            values = np.load(path) if path.suffix == ".npy" else [int(word) for word in path.read_text().split()]
        except (ValueError, OSError, EOFError) as error:
            raise DataError(f"{origin} can't be read as whole numbers ({error})") from error
    array = np.asarray(values)
    if array.ndim != 1 or array.dtype.kind not in "iu" or not len(array):
        raise DataError(f"{origin} has shape {array.shape} and type {array.dtype}; need one whole number per sample")
    return array.astype(np.int64)
