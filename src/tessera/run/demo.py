"""The whole chain on a small data set: two tokenizers, a generator on each, post-training of both decoders.

Run as `python -m tessera.run.demo`. Prints a table of figures with their protocols and the paths of the pictures.
A part whose results exist is not repeated, so an interrupted demo continues where it stopped.
"""

import argparse
import json
import logging
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

CONF = Path(__file__).parents[3] / "conf"
TOKENIZERS = ("plain", "perturbed")
STEPS = ("tokenizer", "generator", "post_train")


@dataclass(frozen=True)
class Part:
    """One training of the chain: which script, which recipe, and where it writes."""

    script: str
    experiment: str
    name: str
    overrides: tuple[str, ...] = ()


def parts(dataset: str, root: str, seed: int) -> list[Part]:
    """The six trainings of one seed, in order."""
    chain = []
    for kind in TOKENIZERS:
        name = {step: f"{root}/seed{seed}/{kind}/{step}" for step in STEPS}
        recipe = "tokenizer" if kind == "plain" else "tokenizer_perturbed"
        tokenizer = f"tokenizer.path=${{paths.outputs}}/{name['tokenizer']}/checkpoints/last.ckpt"
        generator = f"generator.path=${{paths.outputs}}/{name['generator']}/checkpoints/last.ckpt"
        chain += [
            Part("train", f"{dataset}/{recipe}", name["tokenizer"]),
            Part("train", f"{dataset}/generator", name["generator"], (tokenizer,)),
            Part("post_train", f"{dataset}/post_train", name["post_train"], (tokenizer, generator)),
        ]
    return chain


def run_part(part: Part, seed: int, extra: list[str]) -> dict[str, Any]:
    """Train one part, or read its results where they exist."""
    from hydra import compose, initialize_config_dir

    from tessera.run.post_train import post_train
    from tessera.run.results import FILE
    from tessera.run.train import train

    overrides = [f"experiment={part.experiment}", f"name={part.name}", f"seed={seed}", "ckpt=auto", *part.overrides, *extra]
    with initialize_config_dir(str(CONF), version_base=None):
        cfg = compose(part.script, overrides=overrides)
    results = Path(cfg.paths.run) / FILE
    if results.exists():
        content = json.loads(results.read_text())
        if content.get("stopped_by") is None:
            return content
    return {"train": train, "post_train": post_train}[part.script](cfg)
