"""`eval.py task=figures`: what the callbacks measure on the validation images."""

from typing import Any

from tessera.callbacks import GenerationFID
from tessera.run.build import make
from tessera.run.results import figures_of
from tessera.run.subject import Subject


class Figures:
    """Validates once, with those of `callbacks` that apply to what the checkpoint holds."""

    def run(self, subject: Subject) -> dict[str, Any]:
        """Measure.

        Raises:
            ConfigError: neither the checkpoint nor the command says which data and metrics.
        """
        subject.require("data", "metrics")
        models = subject.models()
        callbacks = [callback for callback in map(make, (subject.cfg.callbacks or {}).values()) if callback]
        if models.generator is None:
            callbacks = [callback for callback in callbacks if not isinstance(callback, GenerationFID)]
        subject.trainer(callbacks).validate(models, subject.data(), verbose=False)
        return {"figures": figures_of(callbacks)}
