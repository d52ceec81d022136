"""Generator training with every generator: steps, logs, accumulation, averages, compilation, resuming."""

from functools import partial
from pathlib import Path

import pytest
import torch
from lightning.pytorch.loggers.logger import Logger
from omegaconf import OmegaConf
from torch import nn

from generators.generator_cases import ALL, CASES
from stage_setup import ADAM, DIGITS, trainer
from tessera.backbones import CNNDecoder, CNNEncoder
from tessera.callbacks import EMA, ResumeState
from tessera.data import ImageDataModule, build_token_cache
from tessera.errors import ConfigError
from tessera.optim import ConstantSchedule, CosineSchedule
from tessera.quantizers import MultiScaleQuantizer, ProductQuantizer, SingleGridQuantizer, VQCodebook
from tessera.stages import GeneratorTraining
from tessera.tokenizers import Tokenizer

CODES = 16


def tokenizer(multiscale, branches):
    size = {"channels": 8, "channel_multipliers": (1, 1, 1), "num_res_blocks": 1, "z_channels": 8, "norm_groups": 4}
    structure = partial(MultiScaleQuantizer, grids=[1, 2, 4]) if multiscale else SingleGridQuantizer
    branch = partial(structure, codebook=partial(VQCodebook, codebook_size=CODES))
    torch.manual_seed(0)
    return Tokenizer(CNNEncoder(**size), ProductQuantizer(branch, branches, dim=8), CNNDecoder(**size), 16).eval()


@pytest.fixture(scope="module")
def caches(tmp_path_factory):
    """Token caches by (multiscale, branches), made when first asked for."""
    made = {}

    def get(multiscale, branches):
        if (multiscale, branches) not in made:
            model = tokenizer(multiscale, branches)
            shape = (branches, model.quantizer.num_tokens)
            with torch.inference_mode():
                made[multiscale, branches] = build_token_cache(
                    tmp_path_factory.mktemp("cache") / "tokens", DIGITS(split="train"),
                    lambda batch: model.tokenize(batch["image"]), batch_size=256,
                    tokenizer_fingerprint=model.fingerprint(), codebook_size=CODES, shape=shape,
                )  # fmt: skip
        return made[multiscale, branches]

    return get


def setup(caches, name, branches=1, batch_size=16, **changes):
    """A stage and its data."""
    case = CASES[name]
    model = tokenizer(case.multiscale, branches)
    torch.manual_seed(1)
    generator = case.make(**case.options, **case.make.sizes(model.quantizer, 10))
    settings = {"optimizer": ADAM, "scheduler": CosineSchedule(), "sampling": case.sampling, **changes}
    data = ImageDataModule(
        DIGITS, batch_size, eval_batch_size=60, serve="tokens", token_cache=caches(case.multiscale, branches)
    )
    return GeneratorTraining(generator=generator, tokenizer=model, **settings), data


VALIDATION = {"limit_val_batches": 2, "val_check_interval": 2, "check_val_every_n_epoch": None}


@pytest.mark.parametrize(("name", "branches"), ALL)
def test_two_steps_and_their_logs(tmp_path, caches, name, branches):
    stage, data = setup(caches, name, branches)
    before = {key: value.clone() for key, value in stage.generator.state_dict().items()}
    fit = trainer(tmp_path, 2, [EMA(decay=0.5)], log_every_n_steps=1, **VALIDATION)
    fit.fit(stage, data)
    assert any(not torch.equal(value, before[key]) for key, value in stage.generator.state_dict().items())
    logs = {key: float(value) for key, value in fit.callback_metrics.items()}
    parts = [f"scale{i}" for i in range(3)] if CASES[name].multiscale else [f"quarter{i}" for i in range(4)]
    groups = [f"branch{i}" for i in range(branches)] if branches > 1 else []
    expected = {f"{kind}/{group}" for kind in ("loss", "accuracy") for group in [*groups, *parts]}
    expected |= {"loss/total", "accuracy"}
    assert set(logs) == {f"{split}/{key}" for split in ("train", "val") for key in expected} | {"train/lr/generator"}
    assert all(0 <= value < 10 for value in logs.values())
    if CASES[name].sequential:
        length = stage.generator.num_tokens
        weights = [1, 4, 16] if CASES[name].multiscale else [length // 4] * 4
        for split in ("train", "val"):
            mean = sum(w * logs[f"{split}/loss/{part}"] for w, part in zip(weights, parts, strict=True)) / length
            assert mean == pytest.approx(logs[f"{split}/loss/total"], rel=1e-4)
            hits = [logs[f"{split}/accuracy/{group}"] for group in groups]
            assert not groups or sum(hits) / branches == pytest.approx(logs[f"{split}/accuracy"], abs=1e-6)


class Records(Logger):
    name = version = "records"

    def __init__(self):
        super().__init__()
        self.steps = []

    def log_metrics(self, metrics, step=None):
        self.steps.append((step, metrics))

    def log_hyperparams(self, *_):
        pass


def test_logs_cover_the_steps_since_the_last(tmp_path, caches):
    stage, data = setup(caches, "rar", 2)
    seen, loss = [], stage.generator.loss
    stage.generator.loss = lambda *a, **b: seen.append(loss(*a, **b)) or seen[-1]
    records = Records()
    trainer(tmp_path, 6, logger=records, log_every_n_steps=3).fit(stage, data)
    logged = [metrics for _, metrics in records.steps if "train/loss/branch1" in metrics]
    assert len(logged) == 2
    for number, metrics in enumerate(logged):
        window = seen[3 * number : 3 * number + 3]
        for group, sites in {"branch1": (1,), "quarter2": (slice(None), slice(8, 12))}.items():
            total, count = (sum(part[key][sites].sum() for part in window) for key in ("site_loss", "site_count"))
            assert metrics[f"train/loss/{group}"] == pytest.approx((total / count).item())
        assert metrics["train/loss/total"] == pytest.approx(window[-1]["loss"].item())


def test_validation_means_do_not_depend_on_the_batches(tmp_path, caches):
    found = []
    for batch_size in (60, 25):
        stage, data = setup(caches, "var", 2)
        data.eval_batch_size = batch_size
        fit = trainer(tmp_path, 1, limit_val_batches=1.0)
        fit.validate(stage, data)
        found.append({key: float(value) for key, value in fit.callback_metrics.items()})
    assert "val/loss/scale2" in found[0]
    assert found[0] == pytest.approx(found[1], rel=1e-4)


@pytest.mark.parametrize("name", ["rar", "llama", "var"])
def test_accumulation_equals_the_joint_batch(tmp_path, caches, name):
    states = []
    for batch_size, windows in ((8, 2), (16, 1)):
        stage, data = setup(caches, name, batch_size=batch_size, accumulate_grad_batches=windows)
        stage.optimizer_factory = partial(torch.optim.SGD, lr=0.1)
        fit = trainer(tmp_path, 3)
        fit.fit(stage, data)
        assert fit.global_step == 3
        states.append(stage.generator.state_dict())
    torch.testing.assert_close(states[0], states[1], atol=1e-6, rtol=1e-4)


def test_averages_are_of_the_generator_alone(tmp_path, caches):
    stage, data = setup(caches, "var")
    ema, seen = EMA(decay=0.5), {}
    stage.on_validation_epoch_start = lambda: seen.update(weight=stage.generator.head.weight.clone())
    fit = trainer(tmp_path, 2, [ema], **VALIDATION)
    fit.fit(stage, data)
    averages = ema.averaged_state_dict()
    assert averages.keys() == {"generator"} and averages["generator"].keys() == stage.generator.state_dict().keys()
    assert torch.equal(seen["weight"], averages["generator"]["head.weight"])
    assert not torch.equal(seen["weight"], stage.generator.head.weight)
    fit.save_checkpoint(tmp_path / "last.ckpt")
    keys = torch.load(tmp_path / "last.ckpt", weights_only=False)["state_dict"]
    assert all(key.startswith("generator.") for key in keys) and len(keys) == len(averages["generator"])


def test_compiled_blocks_train_the_same_and_resume(tmp_path, caches, monkeypatch):
    compiled = []
    original = nn.Module.compile

    def compile(module):  # without a backend that takes long to compile
        compiled.append(module)
        original(module, backend="eager")

    monkeypatch.setattr(nn.Module, "compile", compile)
    torch.compiler.reset()

    def run(steps, is_compiled, resume=None):
        # nothing that depends on the length of training
        stage, data = setup(caches, "llama", compile=is_compiled, scheduler=ConstantSchedule())
        fit = trainer(tmp_path, steps, [EMA(decay=0.5), ResumeState()])
        fit.fit(stage, data, ckpt_path=resume, weights_only=False if resume else None)
        fit.save_checkpoint(tmp_path / f"{is_compiled}.ckpt")
        return stage

    plain = run(4, False)
    assert not compiled
    run(2, True)
    assert len(compiled) == 2
    resumed = run(4, True, tmp_path / "True.ckpt")
    torch.testing.assert_close(resumed.state_dict(), plain.state_dict())
    saved = [torch.load(tmp_path / f"{kind}.ckpt", weights_only=False) for kind in (True, False)]
    assert saved[0]["state_dict"].keys() == saved[1]["state_dict"].keys() == plain.state_dict().keys()
    torch.testing.assert_close(saved[0]["ema"], saved[1]["ema"])


@pytest.mark.parametrize(("rule", "decayed"), [("var", False), ("matrix", True)])
def test_decay_rule_reaches_the_groups(tmp_path, caches, rule, decayed):
    stage, data = setup(caches, "var", decay_rule=rule)
    trainer(tmp_path, 1).fit(stage, data)
    groups = {g["weight_decay"]: {id(p) for p in g["params"]} for g in stage.optimizers().param_groups}
    assert (id(stage.generator.lvl_embed.weight) in groups[0.01]) == decayed
    assert id(stage.generator.head.weight) in groups[0.01] and id(stage.generator.head.bias) in groups[0.0]
    with pytest.raises(ConfigError, match=r"stage\.decay_rule='none'"):
        setup(caches, "var", decay_rule="none")


@pytest.mark.parametrize("name", ["rar", "llama", "var", "maskgit"])
def test_recomputation_can_be_chosen_in_each_configuration(name):
    config = OmegaConf.load(Path(__file__).parents[2] / "conf" / "generator" / f"{name}.yaml")
    assert config.checkpoint_blocks is False
