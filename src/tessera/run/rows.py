"""Published rows: what the headers of the recipes in `conf/experiment` tell, and the command that trains each."""

import re
import shlex
from dataclasses import dataclass
from functools import cache

from omegaconf import DictConfig

from tessera.run.compose import composed
from tessera.run.strict import CONF

SYSTEMS = ("xqgan", "robustok", "ibq", "rar", "titok", "var")
COMMAND = re.compile(r"python (?P<script>train|post_train|eval)\.py (?P<arguments>.+)")
LAST = re.compile(r"outputs/(?P<name>\S+)/checkpoints/last\.ckpt$")


@dataclass(frozen=True)
class Step:
    """A command.

    Attributes:
        script: train, post_train or eval.
        overrides: its arguments.
    """

    script: str
    overrides: tuple[str, ...]

    @classmethod
    def parse(cls, text: str) -> "Step":
        """The command in a text such as "Command: python train.py seed=1"."""
        match = COMMAND.search(text)
        return cls(match["script"], tuple(shlex.split(match["arguments"])))

    def value(self, key: str) -> str | None:
        """What the command sets `key` to; None where it doesn't."""
        found = [text.partition("=")[2] for text in self.overrides if text.lstrip("+").partition("=")[0] == key]
        return found[-1] if found else None

    @cache  # noqa: B019  # commands of one call of the program
    def composed(self) -> tuple[DictConfig, dict[str, str]]:
        """The checked configuration, and the option of each config group (`tessera.run.compose`)."""
        # an evaluation's own come from its checkpoint, which doesn't exist yet
        metrics = ["metrics=inception"] if self.script == "eval" and self.value("metrics") is None else []
        return composed(self.script, [*self.overrides, *metrics])

    def __str__(self) -> str:
        return shlex.join(["python", f"{self.script}.py", *self.overrides])


@dataclass(frozen=True)
class Row:
    """A recipe.

    Attributes:
        name: e.g. "rar/b".
        title: first sentence of its header.
        step: the command in its header; a training continues, or finds itself finished.
        figures: the published ones, as the header has them.
    """

    name: str
    title: str
    step: Step
    figures: str

    @property
    def config(self) -> DictConfig:
        """What the command composes to."""
        return self.step.composed()[0]

    @property
    def choices(self) -> dict[str, str]:
        """The option of each config group."""
        return self.step.composed()[1]

    @property
    def needs(self) -> list[str]:
        """The rows whose checkpoints the command names."""
        found = (LAST.search(text) for text in self.step.overrides)
        return [match["name"] for match in found if match is not None]


@cache
def row(name: str) -> Row:
    """The row that `conf/experiment/<name>.yaml`, which exists, trains."""
    text = (CONF / "experiment" / f"{name}.yaml").read_text(encoding="utf-8")
    lines = re.sub(r"\\\n#\s*", "", text).splitlines()  # a backslash continues a line
    header = [line.removeprefix("#").strip() for line in lines if line.startswith("#") and "@package" not in line]
    command = next(line for line in header if line.startswith("Command:"))
    step = Step.parse(command)
    if step.script != "eval":
        step = Step(step.script, (*step.overrides, "ckpt=auto"))
    return Row(name, _sentence(header, ""), step, _sentence(header, "Figures:"))


def _sentence(header: list[str], field: str) -> str:
    """The text of a field, up to a full stop at a line's end."""
    start = next(number for number, line in enumerate(header) if line.startswith(field))
    end = next(number for number, line in enumerate(header) if number >= start and line.endswith("."))
    return " ".join(header[start : end + 1]).removeprefix(field).strip()


def rows() -> list[str]:
    """Names of all published rows, sorted."""
    root = CONF / "experiment"
    paths = (path for system in SYSTEMS for path in (root / system).glob("*.yaml"))
    return sorted(path.relative_to(root).with_suffix("").as_posix() for path in paths)
