"""`eval.py task=export`: the models of a checkpoint as folders for users, with model cards."""

import json
import logging
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tessera.callbacks.ema import ema_weights
from tessera.distributed import rank
from tessera.errors import CheckpointError, MissingFileError
from tessera.run.build import plain, read_checkpoint
from tessera.run.load import is_published
from tessera.run.results import FILE
from tessera.run.subject import Subject
from tessera.zoo import ModelCard, export, push_to_hub

log = logging.getLogger(__name__)


class Export:
    """Writes `tokenizer/`, and of a generator's checkpoint `generator/` too, for `tessera.zoo.from_pretrained`.

    A card's figures are those that its checkpoint's run ended with (`results.json`), unless files are named.

    Args:
        folder: of both; None: `export` in the run folder.
        title: of the models, to which their kind is added; None: the name of the run that trained them.
        licence: of the weights, an SPDX id; None: not stated.
        results: `results.json` files whose figures the card of `ckpt`'s model shall have, e.g. those of `task=figures`.
        push: uploads to the repositories `<push>-tokenizer` and `<push>-generator` of the Hugging Face hub; None: none.
    """

    def __init__(
        self,
        folder: str | None = None,
        title: str | None = None,
        licence: str | None = None,
        results: Sequence[str] | None = None,
        push: str | None = None,
    ):
        self.folder, self.title, self.licence = folder, title, licence
        self.results, self.push = results, push

    def run(self, subject: Subject) -> dict[str, Any]:
        """See the class.

        Returns:
            By model the paths of the folders, and the addresses of the uploads.

        Raises:
            MissingFileError: a named results file doesn't exist.
            CheckpointError: one that isn't ours; the hub refuses.
        """
        # (model, its checkpoint, which weights, its figures' files, sampling)
        weights = subject.cfg.weights
        if subject.holds_generator:
            models = subject.generation()
            sampling = plain(subject.cfg.get("sampling"))
            parts = {
                "tokenizer": (models.tokenizer, str(subject.cfg.tokenizer_ckpt), "ema", None, None),
                "generator": (models.generator, subject.ckpt, weights, self.results, sampling),
            }
        else:
            parts = {"tokenizer": (subject.tokenizer(), subject.ckpt, weights, self.results, None)}
        found: dict[str, Any] = {"folders": {}, "uploads": {}}
        if rank() != 0:
            return found
        for kind, (model, checkpoint, used, results, sampling) in parts.items():
            card = self.card(kind, checkpoint, used, results)
            base = subject.run / "export" if self.folder is None else Path(self.folder)
            folder = export(model, base / kind, card=card, sampling=sampling)
            found["folders"][kind] = str(folder)
            log.info("%s exported to %s", kind, folder)
            if self.push is not None:
                found["uploads"][kind] = push_to_hub(folder, f"{self.push}-{kind}")
        return found

    def card(self, kind: str, checkpoint: str, weights: str, results: Sequence[str] | None) -> ModelCard | None:
        """What a checkpoint and its run tell of a model; None of an exported folder (it has one) or a published one."""
        if is_published(checkpoint) or Path(checkpoint).is_dir():
            return None
        content = read_checkpoint(checkpoint)
        record = content["tessera"]
        own = Path(checkpoint).parent.parent / FILE
        if results is None and not own.is_file():
            log.info("%s does not exist; the card of the %s has no figures", own, kind)
        files = ([own] if own.is_file() else []) if results is None else results
        config, git = record["config"], record.get("git") or {}
        return ModelCard(
            name=f"{self.title or config['name']} {kind}",
            licence=self.licence,
            dataset=_dataset(config),
            figures=[figure for file in files for figure in _figures(Path(file))],
            weights="raw" if ema_weights(content) is None else weights,
            command=_command(record["command"]),
            commit=git["commit"] + (" (with changes)" if git.get("dirty") else "") if git else None,
        )


def _command(command: str) -> str:
    """A recorded command without the folder of its script."""
    python, script, *rest = shlex.split(command)
    return shlex.join([python, Path(script).name, *rest])


def _dataset(config: dict[str, Any]) -> str:
    dataset = config["data"]["dataset"]
    return str(dataset.get("name") or dataset["_target_"].rpartition(".")[2])


def _figures(path: Path) -> list[dict[str, Any]]:
    if not path.is_file():
        raise MissingFileError(f"task.results: {path} does not exist; give results.json files of runs")
    try:
        return list(json.loads(path.read_text())["figures"])
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"task.results: {path} is not the results.json of a run ({error})") from error
