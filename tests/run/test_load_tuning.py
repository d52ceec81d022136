"""Tuning modes from the command line's side: training with adapters, resuming, export, fine-tuning what was trained."""

from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.errors import InstantiationException

from golden_cases import assert_close
from tessera.backbones import LoRA
from tessera.backbones.tuning import adapters
from tessera.run.build import read_checkpoint
from tessera.run.load import load_tokenizer
from tessera.run.train import train
from tessera.zoo import export

CONF = Path(__file__).parents[2] / "conf"
QUICK = [
    "logger=none",
    "discriminator=none",
    "scheduler.warmup_steps=0",
    "data.batch_size=8",
    "+trainer.limit_val_batches=0",
    "trainer.deterministic=false",
]


def run(outputs, name, *overrides):
    with initialize_config_dir(str(CONF), version_base=None):
        recipe = ["experiment=digits/tokenizer_vit", *QUICK]
        cfg = compose("train", overrides=[*recipe, f"paths.outputs={outputs}", f"name={name}", *overrides])
    train(cfg)
    return outputs / name / "checkpoints" / "last.ckpt"


@pytest.fixture(scope="module")
def chain(tmp_path_factory):
    """A short training with adapters in the encoder and a frozen decoder, and one in full that continues from it."""
    torch.set_num_threads(1)
    outputs = tmp_path_factory.mktemp("outputs")
    tuned = ["tokenizer.encoder_tuning=lora", "tokenizer.decoder_tuning=frozen"]
    run(outputs, "tuned", *tuned, "trainer.max_steps=2")
    first = run(outputs, "tuned", *tuned, "trainer.max_steps=4", "ckpt=auto")
    full = ["tokenizer.encoder_tuning=full", "tokenizer.decoder_tuning=lora"]
    pretrained = ["tokenizer=pretrained", f"tokenizer.path={first}", *full]
    return first, run(outputs, "again", *pretrained, "trainer.max_steps=2")


def test_the_mode_is_in_the_checkpoint(chain):
    checkpoint = read_checkpoint(chain[0])
    architecture = checkpoint["tessera"]["architecture"]["tokenizer"]
    assert (architecture["encoder_tuning"], architecture["decoder_tuning"]) == ("lora", "frozen")
    assert checkpoint["global_step"] == 4
    moved = [value for key, value in checkpoint["state_dict"].items() if key.endswith("lora_b")]
    assert moved and all(value.abs().sum() > 0 for value in moved)
    # the optimizer knows the adapters: it has as many states as trained parameters
    tokenizer = load_tokenizer(str(chain[0]), weights="raw")
    trained = [p for p in tokenizer.parameters() if p.requires_grad]
    assert len(checkpoint["optimizer_states"][0]["state"]) == len(trained)


def test_training_goes_on_in_another_mode(chain):
    architecture = read_checkpoint(chain[1])["tessera"]["architecture"]["tokenizer"]
    assert (architecture["encoder_tuning"], architecture["decoder_tuning"]) == ("full", "lora")
    tokenizer = load_tokenizer(str(chain[1]))
    assert {name.split(".")[0] for name, _ in adapters(tokenizer)} == {"decoder"}


def test_loading_with_another_mode_keeps_the_function(chain, tmp_path):
    images = torch.rand(2, 3, 16, 16) * 2 - 1
    saved = load_tokenizer(str(chain[0]))
    assert len(list(adapters(saved))) == 4 and not saved.training
    changed = load_tokenizer(str(chain[0]), encoder_tuning="frozen", decoder_tuning=LoRA(rank=2))
    assert [name.split(".")[0] for name, _ in adapters(changed)] == ["decoder"] * 4
    assert not any(p.requires_grad for p in changed.encoder.network.parameters())
    with torch.no_grad():
        assert_close(changed.encode(images), saved.encode(images), atol=1e-5)
        z = torch.randn(2, changed.quantizer.dim, 4, 4)
        assert_close(changed.decode(z), saved.decode(z), atol=1e-5)
    again = load_tokenizer(str(export(changed, tmp_path)), encoder_tuning="lora")
    assert len(list(adapters(again))) == 4
    with torch.no_grad():
        assert_close(again.encode(images), saved.encode(images), atol=1e-5)


def test_adapters_on_a_cnn_are_refused_by_the_training(tmp_path):
    message = r"tokenizer\.encoder_tuning=lora needs a transformer.*tokenizer\.encoder_tuning=full"
    with pytest.raises(InstantiationException, match=message):
        run(tmp_path, "cnn", "backbone=cnn_small", "tokenizer.encoder_tuning=lora")
