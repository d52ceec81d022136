import logging

import lightning
import pytest
import torch
from lightning.pytorch.callbacks import TQDMProgressBar
from torch.utils.data import DataLoader

from tessera.callbacks import PlainProgress, progress_display
from tessera.errors import ConfigError


class Counter(lightning.LightningModule):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(1))

    def training_step(self, batch, batch_index):
        loss = (self.weight * batch).sum() ** 2
        self.log("train/loss/total", loss, prog_bar=True)
        return loss

    def validation_step(self, batch, batch_index):
        self.log("val/figure", batch.sum())

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.01)


def lines(caplog, display, tmp_path, steps=5):
    loader = DataLoader(torch.ones(steps, 1), batch_size=1)
    trainer = lightning.Trainer(
        max_steps=steps,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        callbacks=[display],
        default_root_dir=tmp_path,
        num_sanity_val_steps=1,
    )
    with caplog.at_level(logging.INFO, logger="tessera.callbacks.progress"):
        trainer.fit(Counter(), loader, loader)
    return [record.getMessage() for record in caplog.records if record.name == "tessera.callbacks.progress"]


def test_plain_lines_at_the_first_and_last_step(caplog, tmp_path):
    found = lines(caplog, PlainProgress(every_seconds=1000), tmp_path)
    steps = [line for line in found if line.startswith("step")]
    assert [line.split(",")[0] for line in steps] == ["step 1 of 5", "step 5 of 5"]
    assert "train/loss/total" in steps[0] and "steps/s" in steps[0]
    assert sum("val/figure 1" in line for line in found) == 1  # none for the sanity check


def test_every_step_when_asked(caplog, tmp_path):
    assert sum(line.startswith("step") for line in lines(caplog, PlainProgress(every_seconds=0), tmp_path)) == 5


def test_silent_when_disabled(caplog, tmp_path):
    display = PlainProgress(every_seconds=0)
    display.disable()
    assert lines(caplog, display, tmp_path) == []


def test_choice_of_display():
    assert isinstance(progress_display(plain=True), PlainProgress)
    assert isinstance(progress_display(plain=False), TQDMProgressBar)
    assert isinstance(progress_display(), PlainProgress)  # output is captured here: no terminal
    with pytest.raises(ConfigError, match="every_seconds"):
        PlainProgress(every_seconds=-1)
