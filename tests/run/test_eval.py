"""eval.py: exported models, and checkpoints and data that don't go together."""

import pytest
from hydra import compose, initialize_config_dir
from torch import nn

from data.pictures import image_folder
from run.checkpoints import CONF, TOKENIZER, generator_checkpoint, run, tokenizer_checkpoint
from stage_setup import tokenizer
from tessera.errors import CheckpointError, ConfigError
from tessera.run import load
from tessera.run.post_train import post_train
from tessera.zoo import export


def test_an_exported_tokenizer_is_evaluated(tmp_path):
    folder = export(tokenizer(), tmp_path / "exported", TOKENIZER)
    one_batch = ["callbacks=quality", "+trainer.limit_val_batches=1"]
    results = run(tmp_path, f"ckpt={folder}", "data=digits", "metrics=digits", *one_batch)
    assert {figure["name"] for figure in results["figures"]} == {"PSNR", "SSIM"}
    with pytest.raises(ConfigError, match=r"exported model.*needs data=\.\.\.$"):
        run(tmp_path, f"ckpt={folder}", "metrics=digits", *one_batch)


def test_an_exported_model_that_is_no_tokenizer_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(load, "from_pretrained", lambda path: nn.Identity())
    with pytest.raises(CheckpointError, match="Identity, no tokenizer"):
        load.load_tokenizer(str(tmp_path))


def test_checkpoints_and_data_that_do_not_fit_are_refused(tmp_path):
    path, other = generator_checkpoint(tmp_path), tokenizer_checkpoint(tmp_path, seed=5)
    chosen = [f"ckpt={path}", "metrics=digits"]
    with pytest.raises(CheckpointError, match=r"trained on the tokens of tokenizer \w+, but .*tokenizer5\.ckpt is \w+"):
        run(tmp_path, *chosen, f"tokenizer_ckpt={other}")
    image_folder(tmp_path / "images")
    with pytest.raises(ConfigError, match=r"the generator has 10 classes, but the data set images has 2; set data="):
        run(
            tmp_path, *chosen, "data=image_folder", f"data.dataset.root={tmp_path}/images", "data.dataset.resolution=16"
        )


def test_post_training_on_data_of_other_classes_is_refused(tmp_path):
    generator, images = generator_checkpoint(tmp_path), image_folder(tmp_path / "images")
    with initialize_config_dir(str(CONF), version_base=None):
        chosen = [f"generator.path={generator}", f"tokenizer.path={tmp_path}/tokenizer0.ckpt", "data=image_folder"]
        chosen += ["name=refused"]
        cfg = compose("post_train", overrides=[*chosen, f"paths.outputs={tmp_path}", f"data.dataset.root={images}"])
    with pytest.raises(ConfigError, match=r"the generator has 10 classes, but the data set images has 2; set data="):
        post_train(cfg)


def test_tasks_without_a_checkpoint_ask_for_it(tmp_path):
    with pytest.raises(ConfigError, match=r"^\w+ needs data=\.\.\. and metrics=\.\.\.; or set ckpt="):
        run(tmp_path)
    with pytest.raises(ConfigError, match=r"^ckpt is required"):
        run(tmp_path, "data=digits", "metrics=digits")
