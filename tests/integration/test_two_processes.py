"""Two CPU processes train as one process with the joint batch does."""

import pytest
import torch

from forked import run_forked
from stage_setup import STAGES, data, generator, guided_stage, token_cache, trainer

STAGES = {**STAGES, "guided": (guided_stage, "images")}


def _no_dropout(name):
    return {"generator": generator(dropout=0.0)} if name == "generator" else {}


def losses_of(rank, world, name, folder, batch_size):
    """Logged losses of each step, averaged over processes by the caller; and a weight."""
    build, serve = STAGES[name]
    stage = build(**_no_dropout(name))
    values = []

    def record(*_):
        metrics = stage.trainer.callback_metrics
        values.append({key: float(value) for key, value in metrics.items() if key.startswith("train/loss")})

    stage.on_train_batch_end = record
    changes = {}
    if world > 1:
        from lightning.pytorch.plugins.environments import LightningEnvironment
        from lightning.pytorch.strategies import DDPStrategy

        class Forked(LightningEnvironment):
            """The process group that the test made."""

            creates_processes_externally = True

            def world_size(self):
                return world

            def global_rank(self):
                return rank

            def local_rank(self):
                return rank

            def set_world_size(self, size):
                pass

            def set_global_rank(self, rank):
                pass

        strategy = DDPStrategy(process_group_backend="gloo", find_unused_parameters=True, cluster_environment=Forked())
        changes = {"strategy": strategy, "devices": world}
    trainer(folder, 4, **changes).fit(stage, data(serve, folder, batch_size=batch_size))
    # codebook statistics, batch norm's and LeCam's running means included
    weights = torch.cat([value.flatten() for value in stage.state_dict().values() if value.is_floating_point()])
    return values, weights.tolist()


@pytest.mark.parametrize("name", STAGES)
def test_same_losses_and_weights(tmp_path, name):
    token_cache(tmp_path / "tokens")
    expected, weights = losses_of(0, 1, name, tmp_path, 32)
    (first, weights0), (second, weights1) = run_forked(losses_of, name, tmp_path, 16)
    assert weights0 == weights1
    torch.testing.assert_close(torch.tensor(weights0), torch.tensor(weights), atol=2e-4, rtol=1e-3)
    for step, (joint, a, b) in enumerate(zip(expected, first, second, strict=True)):
        for key in joint:
            assert (a[key] + b[key]) / 2 == pytest.approx(joint[key], rel=2e-3, abs=1e-5), (step, key)
