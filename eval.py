"""Measure a checkpoint and write results.json: `python eval.py ckpt=...`."""

from typing import Any

from omegaconf import DictConfig

from tessera.cli import hydra_entry


@hydra_entry("eval")
def main(cfg: DictConfig) -> dict[str, Any]:
    """Run as configured; heavy packages are imported only now, so that --help is quick."""
    from tessera.run.eval import evaluate

    return evaluate(cfg)


if __name__ == "__main__":
    main()
