"""Generation: equal to the plain pass, pinned by a teacher, nothing done twice."""

import functools
import sys
from pathlib import Path

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from generators.llama_reference import plain_generate, small_llama
from tessera.generators import SamplingConfig
from tessera.generators.llama_decoder import LlamaDecoder
from tessera.generators.sampling import make_draw
from tessera.rng import IndexedRng

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
from plain.llama import PlainLlama

GUIDED = SamplingConfig(temperature=1.1, guidance_scale=4.0, guidance_schedule="constant")
SETTINGS = [
    SamplingConfig(),
    SamplingConfig(guidance_scale=1.0, guidance_schedule="constant"),
    GUIDED,
    SamplingConfig(temperature=1.4, temperature_end=0.6, top_k=4, top_p=0.8, guidance_scale=3.0, guidance_power=1.5),
]
LABELS = torch.tensor([1, 3, 1, 0, 2])
STRUCTURES = [{}, {"num_branches": 3}, {"num_branches": 2, "grids": [(1, 1), (2, 2), (1, 4)]}]


def rng(count=5, seed=0):
    return IndexedRng(seed, torch.arange(count))


def teacher_and_keep(model, share, count=5):
    generator = torch.Generator().manual_seed(9)
    shape = (count, model.num_branches, model.num_tokens)
    teacher = torch.randint(0, model.codebook_size, shape, generator=generator)
    return teacher, torch.rand(shape, generator=generator) < share


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("sampling", SETTINGS)
def test_equals_the_plain_pass(structure, sampling):
    model = small_llama(**structure)
    draw = make_draw(rng(), 5, torch.device("cpu"))
    expected, _ = plain_generate(model, LABELS, sampling, draw)
    assert torch.equal(model.generate(LABELS, sampling, rng=rng()), expected)


@pytest.mark.parametrize("filters", [{}, {"top_k": 6}, {"top_k": 7, "top_p": 0.7}, {"top_p": 0.8}])
def test_equals_the_benchmarks_plain_loop(filters):
    model = small_llama()
    sampling = SamplingConfig(temperature=1.2, guidance_scale=2.0, guidance_schedule="constant", **filters)
    draw = make_draw(rng(), 5, torch.device("cpu"))
    assert torch.equal(PlainLlama(model)(LABELS, sampling, draw), model.generate(LABELS, sampling, rng=rng()))


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_teacher(share):
    model = small_llama(num_branches=2)
    teacher, keep = teacher_and_keep(model, share)
    hidden = torch.where(keep, teacher, -1)  # read at kept positions only
    pinned = model.generate(LABELS, GUIDED, teacher=hidden, keep=keep, rng=rng())
    assert torch.equal(pinned[keep], teacher[keep])
    draw = make_draw(rng(), 5, torch.device("cpu"))
    assert torch.equal(pinned, plain_generate(model, LABELS, GUIDED, draw, teacher, keep)[0])
    plain = model.generate(LABELS, GUIDED, rng=rng())
    # not merely pasted over a plain sample: later tokens saw the teacher's
    assert (pinned != plain)[~keep].any() == (share == 0.5)


def test_modulation_is_computed_once_per_class(monkeypatch):
    model, seen = small_llama(), []
    for block in model.blocks:
        block.ada_lin.register_forward_pre_hook(lambda _, arguments: seen.append(tuple(arguments[0].shape)))
    model.generate(LABELS, GUIDED, rng=rng())
    assert seen == [(5, 16)] * 2  # four classes and none; 9 steps, 10 rows
    rows = []

    class Watched(LlamaDecoder):
        def __init__(self, model, conditions):
            rows.append(len(conditions))
            super().__init__(model, conditions)

    monkeypatch.setattr("tessera.generators.llama.LlamaDecoder", Watched)
    for sampling in SETTINGS[:3]:
        model.generate(LABELS, sampling, rng=rng())
    assert rows == [5, 5, 10]  # the unconditional half runs only where it counts


def test_head_runs_once_per_sample():
    model, seen = small_llama(), []
    model.head.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0].shape))
    model.generate(LABELS, GUIDED, rng=rng())
    assert seen == [(5, 16)] * 9


def test_single_token():
    model = small_llama(num_tokens=1, grids=[1])
    assert model.generate(LABELS, GUIDED, rng=rng()).shape == (5, 1, 1)
    assert model.train().loss(torch.zeros(5, 1, 1, dtype=torch.int64), LABELS)["loss"].isfinite()


@pytest.mark.parametrize("structure", [{"num_tokens": 40, "grids": [(5, 8)]}, STRUCTURES[2]])
def test_compiled_step(structure, monkeypatch):
    """The same tokens, from code that isn't compiled again for other positions, labels or draws."""
    counts = CompileCounterWithBackend("eager")
    compile_step = functools.cache(lambda function, mode: torch.compile(function, backend=counts, fullgraph=True))
    monkeypatch.setattr("tessera.generators.compilation._compile", compile_step)
    torch._dynamo.reset()
    model = small_llama(**structure)
    model.compile_sampling()
    model.generate(LABELS, GUIDED, rng=rng())
    compilations = counts.frame_count
    assert 1 <= compilations <= 3  # once for the first bucket, then for any number of them
    found = model.generate(LABELS.flip(0), GUIDED, rng=rng(seed=1))
    assert counts.frame_count == compilations
    assert torch.equal(found, small_llama(**structure).generate(LABELS.flip(0), GUIDED, rng=rng(seed=1)))
    torch._dynamo.reset()
