"""Train a tokenizer, or a generator on a tokenizer's tokens: `python train.py experiment=digits/tokenizer`."""

from typing import Any

from omegaconf import DictConfig

from tessera.cli import hydra_entry


@hydra_entry("train")
def main(cfg: DictConfig) -> dict[str, Any]:
    """Run as configured; heavy packages are imported only now, so that --help is quick."""
    from tessera.run.train import train

    return train(cfg)


if __name__ == "__main__":
    main()
