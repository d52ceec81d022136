"""The benchmark of generator training: both sides are the same function, and its FLOPs are those of the products."""

import json
import sys
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import generator_training as benchmark

SMALL = {"hidden_size": 32, "num_heads": 2}
TINY = {
    "rar": benchmark.CASES["rar"]._replace(grids=((3, 3),), codes=13),
    "var": benchmark.CASES["var"]._replace(grids=((1, 1), (2, 2), (3, 4)), codes=13),
    "llama": benchmark.CASES["llama"]._replace(grids=((3, 3),), codes=13),
    "maskgit": benchmark.CASES["maskgit"]._replace(grids=((1, 5),), codes=13),
}
TINY = {name: case._replace(options={**case.options, **SMALL}) for name, case in TINY.items()}


def batch(model, case):
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, case.codes, (3, 1, model.num_tokens), generator=generator)
    return tokens, torch.randint(0, benchmark.CLASSES, (3,), generator=generator)


@pytest.mark.parametrize("name", TINY)
def test_plain_and_ours_are_the_same_function(name):
    case = TINY[name]
    model = benchmark.build(case, 2)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.0, 0.2, generator=generator)
    found = []
    for is_plain in (True, False):
        step = benchmark.Step(model, *batch(model, case), torch.float32, is_plain)
        step()
        found.append((step.loss, [parameter.grad.clone() for parameter in model.parameters()]))
    torch.testing.assert_close(*found, atol=1e-5, rtol=1e-4)


def pairs(model, name):
    """Pairs of a position and one that it sees."""
    if name == "maskgit":
        return (model.num_tokens + 1) ** 2
    if name == "var":
        scale = torch.arange(len(model.scale_sizes)).repeat_interleave(torch.tensor(model.scale_sizes))
        return int((scale[:, None] >= scale).sum())
    length = model.num_tokens + (name == "rar")
    return int(torch.ones(length, length).tril().sum())


@pytest.mark.parametrize("name", TINY)
def test_flops_are_those_of_the_products(name):
    case, layers = TINY[name], 3
    model = benchmark.build(case, layers).eval()
    tokens, labels = (part[:1] for part in batch(model, case))
    conditions = model.condition_ids(labels)
    calls = {
        "rar": lambda: model(tokens[:, :, :-1], conditions),
        "llama": lambda: model(tokens[:, :, :-1], conditions),
        "maskgit": lambda: model(tokens, torch.ones_like(tokens, dtype=torch.bool), conditions),
    }
    if name == "var":
        latents = model.latents(tokens)
        calls["var"] = lambda: model.head(model.features(latents, conditions))
    with FlopCounterMode(display=False) as counter:
        calls[name]()
    counted = {str(op): flops for op, flops in counter.get_flop_counts()["Global"].items()}
    products = sum(flops for op, flops in counted.items() if "attention" not in op)
    assert case.flops(model, layers) - 4 * 32 * layers * pairs(model, name) == products


@pytest.mark.parametrize("options", [[], ["--checkpoint", "--dtype", "bfloat16"]])
def test_it_runs(options, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(benchmark, "CASES", TINY)
    monkeypatch.setattr(benchmark, "matmul_rate", lambda *_: 1e9)
    arguments = ["--models", "rar", "var", "--repeats", "1", "--depth", "1", "--json", str(tmp_path / "out.json")]
    monkeypatch.setattr(sys, "argv", ["generator_training.py", *arguments, *options])
    benchmark.main()
    rows = json.loads((tmp_path / "out.json").read_text())["rows"]
    assert [row["model"] for row in rows] == ["RAR-B", "VAR-d16"] and capsys.readouterr().out.count("x; plain") == 2
    for row in rows:
        for side in ("plain", "ours"):
            assert row[side]["seconds"] > 0 and row[side]["peak_bytes"] > 0
            assert row[side]["share_of_matmul_rate"] == pytest.approx(row["gflop"] / row[side]["seconds"])
