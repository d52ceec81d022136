"""Runs recipes inside this process, for drivers that chain many of them."""

import os
from typing import Any

from tessera.run.strict import CONF

THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")


def single_threaded() -> None:
    """Let processes that start from here use one thread each; their torch reads the variables when it starts."""
    for variable in THREAD_VARIABLES:
        os.environ.setdefault(variable, "1")


def run_recipe(script: str, overrides: list[str]) -> dict[str, Any]:
    """What `python <script>.py <overrides> ckpt=auto` does; returns its results.

    A finished run is not repeated, and one that was stopped continues.

    Args:
        script: train or post_train.
        overrides: `experiment=...` and whatever differs from it.
    """
    from hydra import compose, initialize_config_dir

    from tessera.run.post_train import post_train
    from tessera.run.train import train

    with initialize_config_dir(str(CONF), version_base=None):
        cfg = compose(script, overrides=[*overrides, "ckpt=auto"])
    return {"train": train, "post_train": post_train}[script](cfg)
