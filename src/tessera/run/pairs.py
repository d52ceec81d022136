"""Pairs of generated tokens and real images: `eval.py task=pairs`, and what post-training makes or is given."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tessera import distributed
from tessera.data import PairStore, build_pair_store
from tessera.data.pair_store import PairManifest
from tessera.errors import CheckpointError, ConfigError
from tessera.generators.base import Generator
from tessera.generators.sampling import SamplingConfig
from tessera.rng import IndexedRng
from tessera.run.load import check_classes
from tessera.run.ranks import in_ranks
from tessera.run.subject import Subject
from tessera.run.tokens import Encode, TokenSource, build_tokens, content_key, weights_fingerprint
from tessera.tokenizers import Tokenizer

log = logging.getLogger(__name__)


@dataclass(kw_only=True)
class PairSettings:
    """Which pairs to make.

    Attributes:
        sigma: preservation ratio in [0, 1], the probability that a token keeps the real image's value; or several.
        draws: generated versions of an image at each sigma.
        num_images: random images to make pairs of; None: all.
        seed: of the choice of images, the kept positions and the generator's draws.
        node: config node that holds these settings, for messages.

    Raises:
        ConfigError: values out of range, or an equal sigma twice.
    """

    sigma: float | Sequence[float] = 0.7
    draws: int = 1
    num_images: int | None = None
    seed: int = 0
    node: str = "pairs"

    def __post_init__(self) -> None:
        given = self.sigma if isinstance(self.sigma, Sequence) else [self.sigma]
        self.sigmas = [float(value) for value in given]
        for value in self.sigmas:
            if not 0 <= value <= 1:
                raise ConfigError(
                    f"{self.node}.sigma={value:g} is outside [0, 1]; it is the share of tokens kept from the real image"
                )
        if not self.sigmas or len(set(self.sigmas)) < len(self.sigmas):
            raise ConfigError(
                f"{self.node}.sigma={list(given)} must be one share or different ones; {self.node}.draws makes several "
                "versions of an image"
            )
        if self.draws < 1:
            raise ConfigError(f"{self.node}.draws={self.draws} must be at least 1")

    def indices(self, count: int) -> list[int] | None:
        """Numbers of the chosen images of `count`, in their order; None: all.

        Raises:
            ConfigError: num_images outside [1, count].
        """
        if self.num_images is None:
            return None
        if not 1 <= self.num_images <= count:
            raise ConfigError(
                f"{self.node}.num_images={self.num_images} is outside [1, {count}]; null takes all images"
            )
        order = torch.randperm(count, generator=torch.Generator().manual_seed(self.seed))
        return sorted(order[: self.num_images].tolist())


@dataclass(kw_only=True)
class PairSource(TokenSource):
    """How to make a store of pairs; `encode` gives tokens and keep, both (B R, P, L).

    Attributes:
        generator: fingerprint of its weights.
        sampling: its settings, and their kind.
        settings: which pairs.
        indices: numbers of the images; None: all.
    """

    generator: str
    sampling: dict[str, Any]
    settings: PairSettings
    indices: list[int] | None

    def fill(self, encode: Encode) -> Path:
        return build_pair_store(
            self.folder,
            self.dataset,
            encode,
            **self.token_space(),
            generator=self.generator,
            sampling=self.sampling,
            sigmas=self.settings.sigmas,
            draws=self.settings.draws,
            seed=self.settings.seed,
            indices=self.indices,
            batch_size=self.batch_size,
            num_workers=self.num_workers,
        )


def tokens_of_pairs(
    root: Path | None,
    dataset: Any,
    tokenizer: Tokenizer,
    generator: Generator,
    sampling: SamplingConfig,
    settings: PairSettings,
    batch_size: int,
    num_workers: int = 0,
    folder: Path | None = None,
) -> PairSource:
    """Each image's tokens, of which all but a share sigma are replaced by the generator's own (decoder post-training).

    Draw number d of an image is a function of (seed, image, d). Different sigmas share it, so that what a larger one
    keeps includes what a smaller one does; sigma 1 gives the image's own tokens, 0 plain samples of its class.

    Args:
        root: folder of all stores, in which this one is named by its content.
        dataset: the images.
        tokenizer, generator: of one token space.
        sampling: of the generator.
        settings: which pairs.
        batch_size: images per call of the generator.
        num_workers: processes that read images.
        folder: of the store, instead of the one in `root`.

    Raises:
        ConfigError: settings that the data set or the generator can't follow.

    Source: RobusTok's paired data (arXiv 2509.12474), as tokens instead of PNG files.
    """
    generator.check_sampling(sampling)
    indices = settings.indices(len(dataset))
    generator_id = weights_fingerprint(generator)
    sampled = {"kind": type(sampling).__name__, **vars(sampling)}
    if folder is None:
        facts = (settings.sigmas, settings.draws, settings.num_images, settings.seed)
        key = content_key(tokenizer.fingerprint(), dataset.fingerprint(), generator_id, sampled, facts)
        folder = root / f"pairs-{key}"

    def encode(batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        teacher, rows = tokenizer.tokenize(batch["image"]), []
        for sigma in settings.sigmas:
            for draw in range(settings.draws):
                rng = IndexedRng(settings.seed, batch["index"], step=draw)
                keep = rng.uniform("pairs/keep", *teacher.shape[1:]) < sigma
                tokens = generator.generate(batch["label"], sampling, teacher=teacher, keep=keep, rng=rng)
                rows.append((tokens, keep))
        tokens, keep = (torch.stack(parts, 1).flatten(0, 1) for parts in zip(*rows, strict=True))
        return tokens, keep

    return PairSource(
        folder=folder,
        dataset=dataset,
        tokenizer=tokenizer,
        encode=encode,
        models=[tokenizer, generator],
        batch_size=batch_size,
        num_workers=num_workers,
        generator=generator_id,
        sampling=sampled,
        settings=settings,
        indices=indices,
    )


def given_pairs(
    path: str | Path,
    dataset: Any,
    tokenizer: Tokenizer,
    generator: Generator | None,
    batch_size: int = 64,
    num_workers: int = 0,
) -> PairSource | None:
    """Check a store that exists already.

    Args:
        path: its folder.
        dataset: the images it must have been made of.
        tokenizer: whose tokens it must hold.
        generator: that must have made it; None: it isn't at hand, and must have done its work.
        batch_size, num_workers: for completing it.

    Returns:
        What completes it; None where it is complete.

    Raises:
        MissingFileError: no store there.
        CheckpointError: made by other weights, of other images, damaged; cut short, without the generator.
    """
    folder = Path(path)
    manifest = PairStore.read_manifest(folder, "pairs.path")
    check_origin(manifest, folder, dataset, tokenizer, generator)
    if manifest.complete or generator is None:
        PairStore.open(folder, key="pairs.path")
        return None
    log.info("%s was cut short; completing it", folder)
    chosen = manifest.images if "indices" in manifest.extra else None
    settings = PairSettings(sigma=manifest.sigmas, draws=manifest.draws, num_images=chosen, seed=manifest.seed)
    kinds = {kind.__name__: kind for kind in generator.sampling_types}
    sampling = kinds[manifest.sampling["kind"]](**{k: v for k, v in manifest.sampling.items() if k != "kind"})
    return tokens_of_pairs(
        None, dataset, tokenizer, generator, sampling, settings, batch_size, num_workers, folder=folder
    )


def check_origin(
    manifest: PairManifest, folder: Path, dataset: Any, tokenizer: Tokenizer, generator: Generator | None
) -> None:
    """Refuse pairs of another tokenizer, generator or data set.

    Raises:
        CheckpointError: says which, and the remedy.
    """
    anew = "or leave pairs.path out to make new pairs"
    found = tokenizer.fingerprint()
    if manifest.tokenizer != found:
        raise CheckpointError(
            f"pairs.path={folder} holds tokens of tokenizer {manifest.tokenizer}, but tokenizer.path is {found}; give "
            f"the tokenizer that the pairs were made with (or one post-trained from it), {anew}"
        )
    if generator is not None and manifest.generator != (found := weights_fingerprint(generator)):
        raise CheckpointError(
            f"pairs.path={folder} was made by generator {manifest.generator}, but generator.path is {found}; give the "
            f"generator that made the pairs (generator.weights=ema for its averaged weights), {anew}"
        )
    if manifest.data != (found := dataset.fingerprint()):
        raise CheckpointError(
            f"pairs.path={folder} was made of other images ({manifest.data}) than data.dataset gives ({found}); set "
            f"data=... to the one the pairs were made of, {anew}"
        )


class Pairs:
    """Makes pairs of the training images, where post-training with the same settings finds them.

    A killed run is completed by the same command, a finished store left alone. What the store holds depends on neither
    the number of processes nor on how often it was interrupted.

    Args:
        sigma: preservation ratio in [0, 1], the share of tokens that keep the real image's value; or a list of them.
        draws: generated versions of an image at each sigma.
        num_images: random images to make pairs of; None: all.
        seed: of the choice of images, the kept positions and the generator's draws.
        batch_size: images per call of the generator, per process.
        path: folder of the store; None: named by its content, in paths.tokens.

    Raises:
        ConfigError: values out of range.

    Source: RobusTok (arXiv:2509.12474), section 4.
    """

    def __init__(
        self,
        sigma: float | Sequence[float] = 0.7,
        draws: int = 1,
        num_images: int | None = None,
        seed: int = 0,
        batch_size: int = 64,
        path: str | None = None,
    ):
        self.settings = PairSettings(sigma=sigma, draws=draws, num_images=num_images, seed=seed, node="task")
        if batch_size < 1:
            raise ConfigError(f"task.batch_size={batch_size} must be at least 1")
        self.batch_size, self.path = batch_size, path

    def run(self, subject: Subject) -> dict[str, Any]:
        """Make the pairs, complete them, or find them finished.

        Raises:
            ConfigError: a tokenizer's checkpoint, impossible settings, data of other classes.
            CheckpointError: a tokenizer of another token space; the folder holds other pairs.
            DataError: full disk, an unreadable image.
        """
        models, data = subject.generation(), subject.data()
        images = data.images("train")
        check_classes(models.generator, images)
        source = tokens_of_pairs(
            Path(subject.cfg.paths.tokens),
            images,
            models.tokenizer,
            models.generator,
            models.sampling,
            self.settings,
            self.batch_size,
            data.num_workers,
            folder=None if self.path is None else Path(self.path),
        )
        folder = in_ranks(subject.trainer(), lambda device: build_tokens(source, device))
        report = described(folder)
        if distributed.rank() == 0:
            log.info("%s: %d pairs; post_train.py pairs.path=%s", folder, report["rows"], folder)
        return {"pairs": report}


def described(folder: str | Path) -> dict[str, Any]:
    """What results.json says about a finished store."""
    store = PairStore.open(folder, key="pairs.path")
    kept = {f"{sigma:g}": round(share, 6) for sigma, share in store.kept_shares().items()}
    return {"path": str(folder), "rows": len(store), "kept_shares": kept, "manifest": store.manifest.facts()}
