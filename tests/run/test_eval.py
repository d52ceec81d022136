"""eval.py on models that no training of ours left."""

from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from torch import nn

from stage_setup import tokenizer
from tessera.errors import CheckpointError, ConfigError
from tessera.run import load
from tessera.run.eval import evaluate
from tessera.zoo import export

CONF = Path(__file__).parents[2] / "conf"
NETWORK = {"channels": 8, "channel_multipliers": [1, 2, 2], "num_res_blocks": 1, "z_channels": 8, "norm_groups": 4}
CODEBOOK = {"_target_": "tessera.quantizers.VQCodebook", "_partial_": True, "codebook_size": 32}
BRANCH = {"_target_": "tessera.quantizers.SingleGridQuantizer", "_partial_": True, "codebook": CODEBOOK}
ARCHITECTURE = {
    "_target_": "tessera.tokenizers.Tokenizer",
    "encoder": {"_target_": "tessera.backbones.CNNEncoder", **NETWORK},
    "quantizer": {"_target_": "tessera.quantizers.ProductQuantizer", "branch": BRANCH, "branches": 1, "dim": 8},
    "decoder": {"_target_": "tessera.backbones.CNNDecoder", **NETWORK},
    "resolution": 16,
}


def run(folder, *overrides):
    with initialize_config_dir(str(CONF), version_base=None):
        cfg = compose("eval", overrides=[f"paths.outputs={folder}", *overrides])
    return evaluate(cfg)


def test_an_exported_tokenizer_is_evaluated(tmp_path):
    folder = export(tokenizer(), tmp_path / "exported", ARCHITECTURE)
    one_batch = ["callbacks=quality", "+trainer.limit_val_batches=1"]
    results = run(tmp_path, f"ckpt={folder}", "data=digits", "metrics=digits", *one_batch)
    assert {figure["name"] for figure in results["figures"]} == {"PSNR", "SSIM"}
    with pytest.raises(ConfigError, match=r"exported model.*set data=\.\.\.$"):
        run(tmp_path, f"ckpt={folder}", "metrics=digits", *one_batch)


def test_an_exported_model_that_is_no_tokenizer_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(load, "from_pretrained", lambda path: nn.Identity())
    with pytest.raises(CheckpointError, match="Identity, no tokenizer"):
        load.load_tokenizer(str(tmp_path))
