"""train.py on a tokenizer that is trained already."""

from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.hydra_config import HydraConfig

from tessera.errors import ConfigError, MissingFileError
from tessera.run.train import train_tokenizer

CONF = Path(__file__).parents[2] / "conf"


@pytest.fixture
def composed():
    """Configuration of a fine-tuning, with Hydra's own part as on the command line."""
    previous = HydraConfig.instance().cfg

    def make(*overrides):
        with initialize_config_dir(str(CONF), version_base=None):
            given = ["tokenizer=pretrained", "tokenizer.path=/none.ckpt", *overrides]
            cfg = compose("train", overrides=given, return_hydra_config=True)
        HydraConfig.instance().set_config(cfg)
        return cfg

    yield make
    HydraConfig.instance().cfg = previous


@pytest.mark.parametrize(
    "choice", ["quantizer.branches=2", "+quantizer.branch.grid=4", "backbone=vit_small", "quantizer/codebook=ibq"]
)
def test_parts_that_a_trained_tokenizer_has_are_not_chosen_anew(composed, choice, tmp_path):
    with pytest.raises(ConfigError, match=r"has no effect, as tokenizer\.path=/none\.ckpt has its own"):
        train_tokenizer(composed(choice), tmp_path)


def test_other_choices_are_fine(composed, tmp_path):
    with pytest.raises(Exception, match=r"/none\.ckpt") as caught:
        train_tokenizer(composed("~backbone", "optimizer.lr=1e-5"), tmp_path)
    assert isinstance(caught.value.__cause__, MissingFileError)
