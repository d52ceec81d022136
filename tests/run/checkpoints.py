"""Checkpoints as training writes them, as far as evaluation reads them, of the tiny models in stage_setup.py."""

from pathlib import Path
from typing import Any

import torch
from hydra import compose, initialize_config_dir

from stage_setup import generator, tokenizer
from tessera.run.eval import evaluate

CONF = Path(__file__).parents[2] / "conf"
NETWORK = {"channels": 8, "channel_multipliers": [1, 2, 2], "num_res_blocks": 1, "z_channels": 8, "norm_groups": 4}
CODEBOOK = {"_target_": "tessera.quantizers.VQCodebook", "_partial_": True, "codebook_size": 32}
BRANCH = {"_target_": "tessera.quantizers.SingleGridQuantizer", "_partial_": True, "codebook": CODEBOOK}
TOKENIZER = {
    "_target_": "tessera.tokenizers.Tokenizer",
    "encoder": {"_target_": "tessera.backbones.CNNEncoder", **NETWORK},
    "quantizer": {"_target_": "tessera.quantizers.ProductQuantizer", "branch": BRANCH, "branches": 1, "dim": 8},
    "decoder": {"_target_": "tessera.backbones.CNNDecoder", **NETWORK},
    "resolution": 16,
}
GENERATOR = {
    "_target_": "tessera.generators.RAR",
    "codebook_size": 32,
    "num_branches": 1,
    "num_tokens": 16,
    "num_classes": 10,
    "hidden_size": 16,
    "depth": 1,
    "num_heads": 2,
    "mlp_size": 32,
    "extra_positions": 2,
    "extra_timesteps": 2,
}
DATASET = {"_target_": "tessera.data.DigitsImages", "_partial_": True, "resolution": 16}
CONFIG = {
    "data": {"_target_": "tessera.data.ImageDataModule", "_partial_": True, "dataset": DATASET, "batch_size": 64},
    "metrics": {"features": {"_target_": "tessera.metrics.DigitsFeatures"}, "num_samples": 10, "reference": None},
}


def write(path: Path, name: str, module: torch.nn.Module, architecture: dict[str, Any], **record: Any) -> Path:
    """A checkpoint of one model; `record` adds to what SaveRecord writes."""
    content = {"config": CONFIG, "architecture": {name: architecture}, "stage": name, **record}
    state = {f"{name}.{key}": value for key, value in module.state_dict().items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save({"state_dict": state, "tessera": content}, path)
    return path


def tokenizer_checkpoint(folder: Path, seed: int = 0) -> Path:
    return write(folder / f"tokenizer{seed}.ckpt", "tokenizer", tokenizer(seed), TOKENIZER)


def generator_checkpoint(folder: Path) -> Path:
    """A generator on the tokens of `tokenizer_checkpoint(folder)`."""
    config = {**CONFIG, "generator": {}, "tokenizer": {"path": str(tokenizer_checkpoint(folder))}}
    record = {"config": config, "tokenizer_fingerprint": tokenizer().fingerprint()}
    return write(folder / "generator.ckpt", "generator", generator(), GENERATOR, **record)


def run(folder: Path, *overrides: str) -> dict[str, Any]:
    """eval.py with its outputs below `folder`."""
    with initialize_config_dir(str(CONF), version_base=None):
        cfg = compose("eval", overrides=[f"paths.outputs={folder}", "name=eval", *overrides])
    return evaluate(cfg)
