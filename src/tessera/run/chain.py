"""The commands that lead to a published row: from the data to its figures, or from its published checkpoint."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from omegaconf import OmegaConf

from tessera.run.compose import composed
from tessera.run.load import ZOO
from tessera.run.published import REFERENCES, reference
from tessera.run.rows import Row, Step, row
from tessera.zoo import Checkpoint, info, names

# names in the zoo, where they are other ones than the recipe's
CHECKPOINTS = {
    **{f"titok/{size}_stage2": f"titok/{size}" for size in ("b64", "l32", "s128")},
    "robustok/post_train_b": "robustok/post_train",
    # those of generators decode with it
    "robustok/b": "robustok/generator_b",
    "robustok/l": "robustok/generator_l",
}
WHOLE = ("robustok/b", "robustok/l")  # rows of all three stages, whose generators share two of them


@dataclass(frozen=True)
class Chain:
    """Commands that end in figures.

    Attributes:
        title: what they reproduce.
        steps: the commands, in order.
        published: the figures to compare with.
    """

    title: str
    steps: tuple[Step, ...]
    published: str


def training(published: Row) -> Chain:
    """Training of everything that the row stands on, of the row, and the evaluation of what comes out."""
    steps = dict.fromkeys(_trained(published))  # each once
    return Chain(published.title, (*steps, *_evaluated(published)), published.figures)


def whole(name: str) -> Chain:
    """One of `WHOLE`: samples of a generator, decoded by the post-trained tokenizer."""
    size = name[-1]
    generator, decoder = row(f"robustok/generator_{size}"), row("robustok/post_train_b")
    steps = dict.fromkeys([*_trained(decoder), *_trained(generator)])
    models = f"ckpt={_last(generator.name)}", f"tokenizer_ckpt={_last(decoder.name)}"
    title = f"RobusTok: main-training, RAR-{size.upper()}, pairs of RAR-B, and post-training (arXiv:2509.12474)."
    samples = _samples(name, decoder.config.data.dataset.resolution, *models)
    return Chain(title, (*steps, *samples), _figures(info(CHECKPOINTS[name])))


def _trained(published: Row) -> Iterator[Step]:
    for name in published.needs:
        yield from _trained(row(name))
    if (pairs := published.name.replace("/post_train_", "/pairs_")) != published.name:
        yield from _trained(row(pairs))
    if published.config.get("generator") is not None and published.step.script == "train":
        yield pretokenization(published)
    yield published.step


def pretokenization(published: Row) -> Step:
    """Makes the tokens that a generator's training would make of its data, so that more devices can share the work."""
    data = f"data={published.choices['data']}"
    plain = composed("eval", ["task=pretokenize", data, "metrics=inception"])[0]
    tokens = {key: value for key, value in published.config.tokens.items() if key in plain.task}
    path = published.step.value("tokenizer.path")
    model = f"zoo={path.removeprefix(ZOO)}" if path.startswith(ZOO) else f"ckpt={path}"
    changes = [
        *_changes("data.dataset", plain.data.dataset, published.config.data.dataset),
        *_changes("task", plain.task, OmegaConf.create(tokens)),
    ]
    return Step("eval", ("task=pretokenize", model, f"name={published.name}/tokens", data, *changes, "trainer=gpu"))


def _changes(key: str, before: Any, after: Any) -> Iterator[str]:
    """Overrides that make one node the other."""
    if OmegaConf.is_dict(after) and OmegaConf.is_dict(before):
        for name in after:
            if name not in before:
                yield f"+{key}.{name}={after[name]}"
            else:
                yield from _changes(f"{key}.{name}", before[name], after[name])
    elif before != after:
        yield f"{key}={after}"


def _last(name: str) -> str:
    return f"outputs/{name}/checkpoints/last.ckpt"


def _evaluated(published: Row) -> Iterator[Step]:
    name, step, figures = published.name, published.step, published.figures
    if step.script == "eval":
        return
    resolution = published.config.data.dataset.resolution
    if step.script == "post_train":
        yield from _samples(name, resolution, f"ckpt={step.value('generator.path')}", f"tokenizer_ckpt={_last(name)}")
    elif published.config.get("generator") is not None:
        yield from _samples(name, resolution, f"ckpt={_last(name)}")
    else:
        kinds = {"pfid": "pFID" in figures, "probe": "linear probe" in figures}
        yield from _tokenizer(name, f"ckpt={_last(name)}", **kinds)


def _samples(name: str, resolution: int, *models: str) -> Iterator[Step]:
    folder = f"{name}/samples"
    yield Step("eval", ("task=sample", *models, f"name={folder}", "trainer=gpu"))
    given = [*models, f"task.images=outputs/{folder}/samples/samples.npz"]
    if resolution in REFERENCES:
        given.append(f"task.reference={reference('${paths.data}', resolution)}")
    yield Step("eval", ("task=generation", *given, f"name={name}/generation", "trainer=gpu"))


def _tokenizer(name: str, *model: str, pfid: bool, probe: bool) -> Iterator[Step]:
    tasks = ["reconstruction"] + ["perturbation"] * pfid + ["linear_probe"] * probe
    for task in tasks:
        yield Step("eval", (f"task={task}", *model, f"name={name}/{task}", "trainer=gpu"))


def checkpoint_of(name: str) -> str | None:
    """Name in the zoo of what a row's recipe trains; None where it is not published."""
    other = CHECKPOINTS.get(name, name)
    return other if other in names() else None


def evaluation(name: str) -> Chain:
    """Evaluation of a published checkpoint, by its name in the zoo."""
    entry = info(name)
    model, reported = f"zoo={name}", entry.reported
    if entry.kind == "generator":
        steps = _samples(f"zoo/{name}", entry.resolution, model)
    else:
        kinds = {"pfid": "pFID" in reported, "probe": "linear_probe_top1" in reported}
        steps = _tokenizer(f"zoo/{name}", model, **kinds)
    return Chain(f"The published checkpoint {name}.", tuple(steps), _figures(entry))


def _figures(entry: Checkpoint) -> str:
    figures = ", ".join(f"{key} {value:g}" for key, value in entry.reported.items()) or "no figures"
    return figures + (f" ({entry.protocol})" if entry.protocol else "")
