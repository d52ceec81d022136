"""Train a tokenizer's decoder on a generator's tokens: `python post_train.py experiment=digits/post_train ...`."""

from typing import Any

from omegaconf import DictConfig

from tessera.cli import hydra_entry


@hydra_entry("post_train")
def main(cfg: DictConfig) -> dict[str, Any]:
    """Run as configured; heavy packages are imported only now, so that --help is quick."""
    from tessera.run.post_train import post_train

    return post_train(cfg)


if __name__ == "__main__":
    main()
