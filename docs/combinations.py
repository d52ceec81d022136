"""Writes docs/combinations.md: which parts go together, and which published model each combination reproduces.

Every combination is built at full size on the meta device, from the files of conf/; what a constructor refuses is
listed with its reason. `--check` only tells whether the file is up to date.
"""

import argparse
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig, OmegaConf

from tessera.errors import ConfigError
from tessera.run.build import make
from tessera.tokenizers import Tokenizer

ROOT = Path(__file__).parents[1]
CONF, PAGE = ROOT / "conf", Path(__file__).with_suffix(".md")
STRUCTURES = {"single": "single grid", "residual": "residual", "multiscale": "multi-scale"}
BRANCHES = (1, 2)
RESOLUTION, CELLS, ROW = 256, 16, 64
OWN_DATA = ("claims", "digits", "fashion_mnist")  # recipes that reproduce nothing published

# name -> file of conf/backbone and what differs from it
ENCODERS: dict[str, tuple[str, dict[str, Any]]] = {
    "CNN": ("cnn", {}),
    "MaskGIT-VQGAN": ("maskgit_vqgan", {}),
    "ViT": ("vit", {}),
    "TiTok": ("titok", {"num_latent_tokens": ROW}),
    "TiTok as a map": ("titok", {"num_latent_tokens": CELLS**2, "grid": [CELLS, CELLS]}),
}
DECODERS = {
    "CNN": "cnn",
    "MaskGIT-VQGAN": "maskgit_vqgan",
    "ViT": "vit",
    "TiTok": "titok",
    "TiTok, two stages": "titok_two_stage",
}
Pair = tuple[str, str]
Cell = tuple[str, str, int]  # codebook file, structure file, P


@dataclass
class Recipe:
    """A recipe of a published model: where it lies in the tables, and what its header says."""

    name: str
    title: str
    figures: str
    pair: Pair | None = None
    cell: Cell | None = None
    generator: str | None = None  # its class; None for a tokenizer
    notes: list[str] = field(default_factory=list)


def composed(*overrides: str) -> DictConfig:
    """conf/train.yaml with overrides, and under `hydra` what was chosen."""
    with initialize_config_dir(str(CONF), version_base=None):
        return compose("train", [*overrides], return_hydra_config=True)


@cache
def backbone(name: str) -> DictConfig:
    """A file of conf/backbone at 256 pixels, without pretrained weights."""
    cfg = composed(f"backbone={name}", "data=imagenet")
    for part in (cfg.backbone.encoder, cfg.backbone.decoder):
        if "pretrained" in part:
            part.pretrained = False
    return cfg.backbone


def built(node: Any, **changes: Any) -> Any:
    with torch.device("meta"):
        return make(OmegaConf.create({**OmegaConf.to_container(node, resolve=True), **changes}))


@cache
def encoder_of(name: str, branches: int) -> Any:
    file, changes = ENCODERS[name]
    node = backbone(file).encoder
    return built(node, **changes, **({"groups": branches} if "groups" in node else {}))


@cache
def decoder_of(name: str, grid: tuple[int, int]) -> Any:
    node = backbone(DECODERS[name]).decoder
    return built(node, **({"num_latent_tokens": grid[0] * grid[1]} if "num_latent_tokens" in node else {}))


def codebooks() -> list[str]:
    return sorted(path.stem for path in (CONF / "quantizer" / "codebook").glob("*.yaml"))


@cache
def quantizer(codebook: str, structure: str, branches: int, grid: tuple[int, int]) -> Any:
    """The quantizer of a cell for a latent grid."""
    node = OmegaConf.to_container(OmegaConf.load(CONF / "quantizer" / f"{structure}.yaml"))
    del node["defaults"]
    node["branch"]["codebook"] = OmegaConf.to_container(
        OmegaConf.load(CONF / "quantizer" / "codebook" / f"{codebook}.yaml")
    )
    learned = "codebook_size" in node["branch"]["codebook"]
    node |= {"branches": branches, "dim": 32 * branches if learned else None}
    if structure == "multiscale" and grid[0] == 1:
        node["branch"]["grids"] = [[1, width] for width in (1, 4, 16) if width < grid[1]] + [list(grid)]
    with torch.device("meta"):
        return make(OmegaConf.create(node))


def attempt(pair: Pair) -> tuple[dict[Cell, str | None], str | None]:
    """For each cell the reason why it can't be built, or None; and the reason why the pair can't be at all."""
    found: dict[Cell, str | None] = {}
    for branches in BRANCHES:
        encoder = encoder_of(pair[0], branches)
        grid = encoder.latent_grid(RESOLUTION)
        decoder = decoder_of(pair[1], grid)
        for codebook in codebooks():
            for structure in STRUCTURES:
                try:
                    with torch.device("meta"):
                        made = quantizer(codebook, structure, branches, grid)
                        Tokenizer(encoder, made, decoder, RESOLUTION)
                    reason = None
                except ConfigError as error:
                    reason = " ".join(str(error).split())
                found[codebook, structure, branches] = reason
    reasons = set(found.values())
    return found, reasons.pop() if len(reasons) == 1 else None


# ---- what does not go together for other reasons than the pair's

# what a command line asks for
MISFITS = (
    ("quantizer.branches=3", "quantizer.dim=64"),
    ("quantizer/codebook=bsq", "quantizer.branches=2", "quantizer.dim=32"),
    ("quantizer/codebook=fsq", "quantizer.dim=32"),
    ("quantizer=multiscale", "quantizer.branch.grids=[1,4,32]"),
    ("quantizer=multiscale", "quantizer.branch.grids=[1,32,16]"),
    ("+quantizer.dropout=0.1",),
    ("quantizer=multiscale", "quantizer.dropout=0.1", "quantizer.dropout_start=10"),
    ("backbone=vit", "backbone.encoder.groups=2"),
    ("tokenizer.encoder_tuning=lora",),
    ("tokenizer.projection_kernel=null",),
)


def refusal(overrides: tuple[str, ...]) -> str:
    """The reason why the tokenizer of a command can't be built."""
    cfg = composed("data=imagenet", "backbone=cnn", *overrides)
    try:
        built(cfg.tokenizer)
    except Exception as error:  # Hydra wraps what a nested constructor raises
        while error.__cause__ is not None and not isinstance(error, ConfigError):
            error = error.__cause__
        if isinstance(error, ConfigError):
            return " ".join(str(error).split())
        raise
    raise AssertionError(f"{' '.join(overrides)} can be built now; take it out of MISFITS")


# ---- recipes


def header(name: str) -> str:
    lines = (CONF / "experiment" / f"{name}.yaml").read_text().splitlines()
    return "\n".join(line.removeprefix("#").strip() for line in lines if line.startswith("#"))


def recipes() -> list[Recipe]:
    """All recipes of published models, in the order of their names."""
    found = []
    for path in sorted((CONF / "experiment").rglob("*.yaml")):
        name = path.relative_to(CONF / "experiment").with_suffix("").as_posix()
        if name.split("/")[0] in OWN_DATA:
            continue
        text = header(name)
        if "python eval.py" in text:
            continue  # it trains nothing
        title = re.search(r"^(?!@package)(.+)$", text, re.MULTILINE)[1]
        figures = re.search(r"^Figures: (.+)$", text, re.MULTILINE)
        recipe = Recipe(name, re.sub(r"[:(].*", "", title).strip(" ."), figures[1] if figures else "")
        earlier = re.search(r"tokenizer\.path=outputs/(\S+?)/checkpoints", text)
        cfg = None if "python post_train.py" in text else composed(f"experiment={name}")
        if cfg is None:
            recipe.notes.append("trains the decoder of a trained tokenizer")
        elif cfg.hydra.runtime.choices.stage == "generator":
            recipe.generator = targets(cfg.generator)
        elif earlier:
            recipe.notes.append(f"trains the decoder of `{earlier[1]}`")
        else:
            place(recipe, cfg)
        found.append(recipe)
    return found


def targets(node: Any) -> str:
    return node["_target_"].rpartition(".")[2]


def place(recipe: Recipe, cfg: DictConfig) -> None:
    """Find the pair and the cell of a recipe by the classes that it builds."""
    parts = {
        side: next(
            key
            for key, file in names.items()
            if targets(backbone(file if side == "decoder" else file[0])[side]) == targets(cfg.backbone[side])
        )
        for side, names in (("encoder", ENCODERS), ("decoder", DECODERS))
    }
    recipe.pair = parts["encoder"], parts["decoder"]
    node = cfg.quantizer
    if "branch" not in node:
        recipe.notes.append("continuous latents: no codebook")
        return
    choices = cfg.hydra.runtime.choices
    recipe.cell = choices["quantizer/codebook"], choices["quantizer"], node.branches


# ---- generators


def generators() -> dict[str, str]:
    """Class -> file of conf/generator that builds it, the first of each."""
    found: dict[str, str] = {}
    for path in sorted((CONF / "generator").glob("*.yaml")):
        name = path.stem
        if name != "pretrained":
            found.setdefault(targets(composed("stage=generator", f"generator={name}").generator), name)
    return found


def fit(name: str, structure: str, branches: int) -> str | None:
    """Why the generator of a file can't be built on the tokens of a structure; None where it can."""
    grids = "quantizer.branch.grids=[1,2,3,4,5,6,8,10,13,16]"
    extra = [grids] if structure == "multiscale" else []
    cfg = composed("data=imagenet", "backbone=cnn", f"quantizer={structure}", f"quantizer.branches={branches}", *extra)
    quantizer = built(cfg.tokenizer).quantizer
    factory = make(composed("stage=generator", f"generator={name}").generator)
    try:
        with torch.device("meta"):
            factory(**factory.func.sizes(quantizer, 1000)).bind(quantizer)
    except ConfigError as error:
        return " ".join(str(error).split())
    return None


def generator_lines(published: list[Recipe]) -> Iterator[str]:
    """The page's part on generators."""
    yield from (
        "",
        "## Generators",
        "",
        "Generators (rows, files of conf/generator) on tokens of each structure, P = 1 and 2, whatever the codebook",
        "and the backbone.",
        "",
    )
    reasons: list[str] = []
    rows = []
    for kind, name in generators().items():
        row = [f"{kind} (`{name}`)"]
        for structure in STRUCTURES:
            refused = {fit(name, structure, branches) for branches in BRANCHES}
            (reason,) = refused  # the branches never decide
            if reason is not None and reason not in reasons:
                reasons.append(reason)
            row.append("yes" if reason is None else f"no ({reasons.index(reason) + 1})")
        rows.append(row)
    yield from table(["generator", *STRUCTURES.values()], rows)
    yield from ("", *(f"{number}. {reason}" for number, reason in enumerate(reasons, 1)))
    yield from ("", "## Published generators", "")
    rows = [[f"`{r.name}`", r.title, str(r.generator), r.figures.rstrip(".")] for r in published if r.generator]
    yield from table(["recipe", "generator", "class", "figures"], rows)


# ---- the page


def table(head: list[str], rows: list[list[str]]) -> Iterator[str]:
    yield "| " + " | ".join(head) + " |"
    yield "|" + " --- |" * len(head)
    for row in rows:
        yield "| " + " | ".join(row) + " |"


def cell_text(found: dict[Cell, str | None], codebook: str, structure: str, here: list[Recipe]) -> str:
    """Numbers of branches that can be built, each followed by its recipes."""
    parts = []
    for branches in BRANCHES:
        if found[codebook, structure, branches] is not None:
            continue
        names = [f"`{recipe.name}`" for recipe in here if recipe.cell == (codebook, structure, branches)]
        parts.append(f"**{branches}**: {', '.join(names)}" if names else str(branches))
    return "; ".join(parts) or "no"


def render() -> str:
    """The page."""
    pairs = {(encoder, decoder): attempt((encoder, decoder)) for encoder in ENCODERS for decoder in DECODERS}
    published = recipes()
    lines = [
        "# Combinations",
        "",
        "Written by `make docs` (docs/combinations.py), which builds every tokenizer below at full size; do not edit.",
        "",
        "Encoders (rows) and decoders (columns). A number is the reason why a constructor refuses a pair.",
        "",
    ]
    reasons: list[str] = []
    rows = []
    for encoder in ENCODERS:
        row = [f"**{encoder}**"]
        for decoder in DECODERS:
            reason = pairs[encoder, decoder][1]
            if reason is not None and reason not in reasons:
                reasons.append(reason)
            row.append("yes" if reason is None else f"no ({reasons.index(reason) + 1})")
        rows.append(row)
    lines += table(["encoder \\ decoder", *DECODERS], rows)
    lines += ["", *(f"{number}. {reason}" for number, reason in enumerate(reasons, 1)), ""]
    lines += [
        "Codebooks (files of conf/quantizer/codebook) in structures (files of conf/quantizer), for each pair: the",
        "numbers of branches P that can be built, bold where a recipe under conf/experiment does so for a published",
        "tokenizer.",
        "",
    ]
    same: dict[str, list[Pair]] = {}
    for pair, (found, refused) in pairs.items():
        if refused is None:
            here = [recipe for recipe in published if recipe.pair == pair]
            rows = [[f"`{c}`", *(cell_text(found, c, s, here) for s in STRUCTURES)] for c in codebooks()]
            text = "\n".join(table(["codebook", *STRUCTURES.values()], rows))
            others = sorted({reason for reason in found.values() if reason is not None})
            same.setdefault("\n".join([text, *(f"\nRefused: {reason}" for reason in others)]), []).append(pair)
    for text, sharing in sorted(same.items(), key=lambda item: len(item[1])):
        title = "; ".join(f"{encoder} → {decoder}" for encoder, decoder in sharing)
        if len(sharing) > 2:
            lines += [f"## Pairs without a published tokenizer of discrete codes ({len(sharing)})", "", f"{title}.", ""]
        else:
            lines += [f"## {title}", ""]
        lines += [*text.split("\n"), ""]
    lines += ["## Refused", "", "With `data=imagenet backbone=cnn` where no other backbone is named.", ""]
    lines += table(["asked for", "reason"], [[f"`{' '.join(each)}`", refusal(each)] for each in MISFITS])
    lines += ["", "## Published tokenizers", ""]
    lines += table(
        ["recipe", "tokenizer", "parts", "figures"],
        [[f"`{r.name}`", r.title, parts_text(r), r.figures.rstrip(".")] for r in published if r.generator is None],
    )
    lines += generator_lines(published)
    return "\n".join(lines) + "\n"


def parts_text(recipe: Recipe) -> str:
    parts = []
    if recipe.pair is not None:
        parts.append(f"{recipe.pair[0]} → {recipe.pair[1]}")
    if recipe.cell is not None:
        codebook, structure, branches = recipe.cell
        parts.append(f"`{codebook}`, {STRUCTURES[structure]}, P = {branches}")
    return "; ".join([*parts, *recipe.notes])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="fail where the file is not up to date")
    check = parser.parse_args().check
    text = render()
    if not check:
        PAGE.write_text(text)
    elif not PAGE.exists() or PAGE.read_text() != text:
        print("docs/combinations.md is not up to date; run make docs", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
