"""trainer=fsdp: two processes with half of a generator's weights each train as two with all of them."""

import copy
import os

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

from forked import run_forked
from generators.generator_cases import CASES, batch, build
from stage_setup import data, generator, generator_stage, post_training_stage, token_cache, tokenizer_stage, trainer
from tessera.callbacks import EMA, LastCheckpoint, ResumeState
from tessera.errors import CheckpointError, ConfigError
from tessera.rng import IndexedRng
from tessera.run.launch import SubmititEnvironment
from tessera.stages import GeneratorTraining
from tessera.stages.sharding import FSDP, gather, scatter, shard


def gradients_and_samples(rank, world, names):
    """Whether a sharded model has the gradients and the samples of the whole one."""
    for name in names:
        whole = build(name)
        sharded = copy.deepcopy(whole)
        shard(sharded, sharded.blocks, init_device_mesh("cpu", (world,)), ("loss",))
        shard(sharded, sharded.blocks, None, ("loss",))  # once is enough
        largest = max(sharded.parameters(), key=lambda parameter: parameter.numel())
        assert isinstance(largest, DTensor) and largest.to_local().numel() < 0.7 * largest.numel(), name
        tokens, labels = batch(whole, 4)
        numbers = torch.arange(4)
        own = numbers.chunk(world)[rank]
        for step in range(2):  # sampling in between leaves no trace
            for model in (whole, sharded):
                model.zero_grad()
            for index in numbers.chunk(world):  # the mean of the processes' losses
                rng = IndexedRng(0, index, step)
                (whole.loss(tokens[index], labels[index], progress=0.3, rng=rng)["loss"] / world).backward()
            rng = IndexedRng(0, own, step)
            sharded.loss(tokens[own], labels[own], progress=0.3, rng=rng)["loss"].backward()
            for (key, expected), found in zip(whole.named_parameters(), sharded.parameters(), strict=True):
                if expected.grad is not None:
                    message = f"{name}: {key}"
                    torch.testing.assert_close(
                        found.grad.full_tensor(), expected.grad, atol=1e-5, rtol=1e-4, msg=message
                    )
            with torch.no_grad():
                gather(sharded)
                for _ in range(rank + 1):  # processes may sample different numbers of batches
                    drawn = sharded.generate(labels, CASES[name].sampling, rng=IndexedRng(1, numbers))
                scatter(sharded)
                assert torch.equal(drawn, whole.generate(labels, CASES[name].sampling, rng=IndexedRng(1, numbers)))
    return True


def test_every_generator(tmp_path):
    assert run_forked(gradients_and_samples, list(CASES)) == [True, True]


def fit(rank, world, folder, strategy, max_steps, ckpt=None, callbacks=(), stage=None, serve="tokens"):
    """Trains as one of two processes."""
    os.environ |= {"SUBMITIT_EXECUTOR": "local", "SUBMITIT_LOCAL_NTASKS": str(world)}
    os.environ |= {f"SUBMITIT_LOCAL_{name}": str(rank) for name in ("GLOBALID", "LOCALID")}
    GeneratorTraining.total_steps = 6  # schedules see the whole training in every part
    stage = stage or generator_stage(generator=generator(dropout=0.0))
    changes = {"devices": world, "strategy": strategy, "plugins": [SubmititEnvironment()]}
    parts = [ResumeState(), LastCheckpoint(folder), *callbacks]
    loop = trainer(folder, max_steps, parts, enable_checkpointing=True, inference_mode=False, **changes)
    loop.fit(stage, data(serve, folder.parent, batch_size=16), ckpt_path=ckpt, weights_only=True)
    return loop


def fits(rank, world, root):
    """Trainings whose checkpoints are compared."""
    fit(rank, world, root / "ddp", "ddp", 6)
    loop = fit(rank, world, root / "fsdp", FSDP(), 6)
    weights = dict(loop.lightning_module.generator.named_parameters())
    assert all(isinstance(weight, DTensor) for weight in weights.values())
    states = loop.optimizers[0].state.values()
    assert all(isinstance(state["exp_avg"], DTensor) for state in states)
    fit(rank, world, root / "half", FSDP(), 3)
    fit(rank, world, root / "resumed", FSDP(), 6, ckpt=root / "half/last.ckpt")
    refused = []
    for strategy, other in (("ddp", "half"), (FSDP(), "ddp")):
        with pytest.raises(CheckpointError) as caught:
            fit(rank, world, root / "other", strategy, 6, ckpt=root / other / "last.ckpt")
        refused.append(str(caught.value))
    return refused


def test_training(tmp_path):
    token_cache(tmp_path / "tokens")
    refused, _ = run_forked(fits, tmp_path)
    assert "written with trainer=fsdp" in refused[0] and "another trainer than fsdp" in refused[1]
    found = {name: torch.load(tmp_path / name / "last.ckpt", weights_only=True) for name in ("ddp", "fsdp", "resumed")}
    assert all(content["global_step"] == 6 for content in found.values())
    states = {name: content["state_dict"] for name, content in found.items()}
    assert not any(isinstance(value, DTensor) for value in states["fsdp"].values())
    torch.testing.assert_close(states["fsdp"], states["ddp"], atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(states["resumed"], states["fsdp"], atol=0, rtol=0)
    torch.testing.assert_close(found["resumed"]["optimizer_states"], found["fsdp"]["optimizer_states"], atol=0, rtol=0)


@pytest.mark.parametrize(
    ("stage", "callbacks", "message"),
    [
        (tokenizer_stage, [], "is for training generators; choose trainer=ddp"),
        (post_training_stage, [], "is for training generators"),
        (lambda: generator_stage(accumulate_grad_batches=2), [], r"takes no stage\.accumulate_grad_batches"),
        (generator_stage, [EMA(0.9)], r"callbacks\.ema can't average sharded weights"),
    ],
)
def test_refusals(stage, callbacks, message, tmp_path):
    strategy = FSDP()
    loop = trainer(tmp_path, 2, callbacks, strategy=strategy, devices=1)
    with pytest.raises(ConfigError, match=message):
        loop.fit(stage(), data("images", tmp_path))
