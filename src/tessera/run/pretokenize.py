"""Token caches from the command line: `eval.py task=pretokenize`, `task=export_tokens` and `task=import_tokens`."""

import logging
from pathlib import Path
from typing import Any

from tessera import distributed
from tessera.data import TokenCache, export_jsonl, import_jsonl
from tessera.data.views import Views
from tessera.errors import ConfigError
from tessera.run.ranks import in_ranks
from tessera.run.subject import Subject
from tessera.run.tokens import build_tokens, tokens_of_images

log = logging.getLogger(__name__)


class Pretokenize:
    """Builds the token cache of a data set's split, where training a generator on the same data finds it.

    Args:
        split: train or val.
        views: crops of each image: none, flip, ten_crop or random.
        num_views: V of random ones.
        seed: of random ones.
        batch_size: images encoded at once, per process, views counted.

    Raises:
        ConfigError: unknown views, or another number of them.
    """

    def __init__(
        self,
        split: str = "train",
        views: str = "none",
        num_views: int | None = None,
        seed: int = 0,
        batch_size: int = 64,
    ):
        self.split, self.views, self.batch_size = split, Views.of(views, num_views, seed, "task"), batch_size

    def run(self, subject: Subject) -> dict[str, Any]:
        """Build the cache, or find it finished.

        Raises:
            ConfigError: a generator's checkpoint, or a tokenizer without tokens.
            DataError: full disk, an unreadable image.
        """
        tokenizer, data = subject.tokenizer(), subject.data()
        root, images = Path(subject.cfg.paths.tokens), data.images(self.split)
        source = tokens_of_images(root, images, tokenizer, self.views, self.batch_size, data.num_workers)
        return described(in_ranks(subject.trainer(), lambda device: build_tokens(source, device)))


class ExportTokens:
    """Writes a token cache in the published text layout: JSON lines of `class_id` and `tokens`.

    Args:
        cache: folder of the cache.
        path: of the file to write.
    """

    def __init__(self, cache: str, path: str):
        self.cache, self.path = cache, path

    def run(self, subject: Subject) -> dict[str, Any]:
        """Write the file.

        Raises:
            MissingFileError, CheckpointError: no finished cache there.
            ConfigError: the file exists.
        """
        cache = TokenCache.open(self.cache, key="task.cache")
        if Path(self.path).exists():
            raise ConfigError(f"task.path={self.path} exists; delete it, or choose another file")
        export_jsonl(cache, self.path)
        log.info("%s: %d lines", self.path, len(cache))
        return {**described(self.cache), "path": self.path}


class ImportTokens:
    """Converts JSON lines into a token cache, on which a generator is trained by `tokens.path`.

    The tokens must be those of the checkpoint's tokenizer; nothing in the file tells more than their shape and range.

    Args:
        path: of the file.
        cache: folder of the new cache.
        num_classes: labels are below it; None: the data set's.
        views: what consecutive lines are; see `tessera.data.import_jsonl`.
    """

    def __init__(self, path: str, cache: str, num_classes: int | None = None, views: str = "none"):
        self.path, self.cache, self.num_classes, self.views = path, cache, num_classes, views

    def run(self, subject: Subject) -> dict[str, Any]:
        """Convert.

        Raises:
            MissingFileError, DataError: no such file, or bad lines (named).
            CheckpointError: the folder holds a cache already.
        """
        tokenizer = subject.tokenizer()
        num_classes = subject.data().images("val").num_classes if self.num_classes is None else self.num_classes
        quantizer = tokenizer.quantizer
        folder = import_jsonl(
            self.path,
            self.cache,
            tokenizer_fingerprint=tokenizer.fingerprint(),
            codebook_size=quantizer.codebook_size,
            num_classes=num_classes,
            views=self.views,
            shape=(quantizer.num_branches, quantizer.num_tokens),
        )
        return described(folder)


def described(folder: str | Path) -> dict[str, Any]:
    """What results.json says about a cache."""
    manifest = TokenCache.open(folder).manifest
    if distributed.rank() == 0:
        log.info("%s: %d rows of %d x %d tokens", folder, manifest.rows, manifest.branches, manifest.length)
    return {"token_cache": str(folder), "rows": manifest.rows, "manifest": manifest.facts()}
