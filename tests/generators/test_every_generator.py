"""What every generator promises, whatever it is inside."""

import json
import math

import pytest
import torch

from generators.generator_cases import ALL, CASES, CODES, batch, build, quantizer
from tessera.errors import CheckpointError, ConfigError, DataError
from tessera.generators import SamplingConfig
from tessera.rng import IndexedRng
from tessera.zoo import export, from_pretrained

every = pytest.mark.parametrize("name", CASES)
everywhere = pytest.mark.parametrize(("name", "branches"), ALL)
LABELS = torch.tensor([1, 3, 1, 0, 2])
# parameters that shift all scores of a query alike, which changes nothing
INERT = ("k_norm.bias",)


def rng(count=5, seed=0, step=0):
    return IndexedRng(seed, torch.arange(count), step)


def sample(model, name, seed=0, **arguments):
    return model.generate(LABELS, CASES[name].sampling, **{"rng": rng(seed=seed), **arguments})


@everywhere
def test_tokens_of_the_tokenizer(name, branches):
    model = build(name, branches)
    tokens = sample(model, name)
    assert tokens.shape == (5, branches, model.num_tokens) and tokens.dtype == torch.int64
    assert tokens.min() >= 0 and tokens.max() < CODES and not tokens.requires_grad
    assert len(tokens.unique()) > CODES // 2
    assert not torch.equal(tokens, sample(model, name, seed=1))


@pytest.mark.parametrize(("name", "branches"), [(name, branches) for name, branches in ALL if CASES[name].sequential])
def test_sampling_follows_the_distribution_of_the_loss(name, branches):
    """The probabilities of given tokens, recorded step by step, are those of which training takes the logarithm."""
    model = build(name, branches)
    tokens, labels = batch(model, 3)
    logs = []

    def draw(probs, step):
        first = sum(log.shape[2] for log in logs)
        by_site = probs if probs.ndim == 4 else probs[:, :, None]  # (B, P, n, K)
        chosen = tokens[:, :, first : first + by_site.shape[2]]
        logs.append(by_site.gather(-1, chosen[..., None])[..., 0].log())
        return chosen.reshape(probs.shape[:-1])

    drawn = model.generate(labels, SamplingConfig(), rng=draw)
    assert torch.equal(drawn, tokens)
    with torch.no_grad():
        expected = model.loss(tokens, labels)["site_loss"]
    torch.testing.assert_close(-torch.cat(logs, 2).sum(0), expected, atol=1e-4, rtol=1e-4)


def teacher_and_keep(model, share):
    generator = torch.Generator().manual_seed(9)
    tokens, _ = batch(model, seed=9)
    return {"teacher": tokens, "keep": torch.rand(tokens.shape, generator=generator) < share}


@everywhere
def test_kept_tokens(name, branches):
    model = build(name, branches)
    plain = sample(model, name)
    everything, nothing, half = (teacher_and_keep(model, share) for share in (1.0, 0.0, 0.5))
    assert torch.equal(sample(model, name, **everything), everything["teacher"])
    assert torch.equal(sample(model, name, **nothing), plain)
    kept = sample(model, name, **half)
    assert torch.equal(kept[half["keep"]], half["teacher"][half["keep"]])
    # not merely pasted over a plain sample: other tokens saw the teacher's, of which only the kept are read
    assert (kept != plain)[~half["keep"]].any()
    hidden = half["teacher"].where(half["keep"], -1)
    assert torch.equal(sample(model, name, teacher=hidden, keep=half["keep"]), kept)


@everywhere
def test_a_sample_does_not_depend_on_its_batch(name, branches):
    model, sampling = build(name, branches), CASES[name].sampling
    index, order = torch.tensor([4, 40, 2, 11, 7]), torch.tensor([3, 0, 4, 2, 1])
    together = model.generate(LABELS, sampling, rng=IndexedRng(3, index))
    shuffled = model.generate(LABELS[order], sampling, rng=IndexedRng(3, index[order]))
    assert torch.equal(shuffled, together[order])
    alone = [model.generate(LABELS[i : i + 1], sampling, rng=IndexedRng(3, index[i : i + 1])) for i in range(5)]
    assert torch.equal(torch.cat(alone), together)


@every
def test_sources_of_randomness(name):
    model, sampling = build(name), CASES[name].sampling
    first, second = (model.generate(LABELS, sampling, rng=torch.Generator().manual_seed(2)) for _ in range(2))
    assert torch.equal(first, second)
    torch.manual_seed(1)
    third = model.generate(LABELS, sampling)
    torch.manual_seed(1)
    assert torch.equal(third, model.generate(LABELS, sampling)) and not torch.equal(first, third)
    with pytest.raises(ConfigError, match="one index per label"):
        model.generate(LABELS, sampling, rng=rng(3))


@everywhere
def test_no_sample_at_all(name, branches):
    model = build(name, branches)
    assert model.generate(LABELS[:0], CASES[name].sampling).shape == (0, branches, model.num_tokens)
    assert model.generate(LABELS[:1], CASES[name].sampling).shape == (1, branches, model.num_tokens)


@every
def test_generation_leaves_the_module_as_it_was(name):
    model = build(name, 2).train()
    frozen = next(iter(model.blocks))
    frozen.eval()
    state = {key: value.clone() for key, value in model.state_dict().items()}
    attributes = [(part, set(vars(part)), part.training) for part in model.modules()]
    tokens = sample(model, name)
    assert all(set(vars(part)) == names and part.training == mode for part, names, mode in attributes)
    after = model.state_dict()
    assert after.keys() == state.keys() and all(torch.equal(after[key], value) for key, value in state.items())
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())
    assert torch.equal(tokens, sample(model.eval(), name))  # sampled in eval mode all the same

    class Failing(IndexedRng):
        def uniform(self, *_):
            raise RuntimeError("stop")

    model.train()
    with pytest.raises(RuntimeError, match="stop"):
        sample(model, name, rng=Failing(0, torch.arange(5)))
    assert model.training and torch.is_grad_enabled()


@everywhere
def test_half_precision(name, branches):
    model = build(name, branches)
    tokens, labels = batch(model)
    expected = model.loss(tokens, labels)["loss"]
    with torch.autocast("cpu", torch.bfloat16):
        autocast = model.loss(tokens, labels)["loss"]
        # weights that autocast cast without gradient during generation must not serve the next training step
        sample(model, name)
        model.loss(tokens, labels)["loss"].backward()
    assert all(p.grad is not None and p.grad.any() for p in model.blocks[0].parameters() if p.ndim > 1)
    model = model.to(torch.bfloat16)
    low = model.loss(tokens, labels)["loss"]
    low.backward()
    for loss in (autocast, low):
        assert loss.dtype == torch.float32
        torch.testing.assert_close(loss, expected, atol=0.1, rtol=0.05)
    drawn = sample(model, name)
    assert drawn.dtype == torch.int64 and drawn.min() >= 0 and drawn.max() < CODES


@everywhere
def test_the_loss_and_its_sums(name, branches):
    model = build(name, branches)
    tokens, labels = batch(model)
    for mode in (True, False):
        result = model.train(mode).loss(tokens, labels, rng=rng())
        assert set(result) == {"loss", "accuracy", "site_loss", "site_hits", "site_count"}
        assert result["loss"].shape == () and result["loss"].requires_grad
        for key, value in result.items():
            assert value.dtype == torch.float32 and (key == "loss" or not value.requires_grad), key
        sums = [result[key] for key in ("site_loss", "site_hits", "site_count")]
        assert {tuple(value.shape) for value in sums} == {(branches, model.num_tokens)}
        loss, hits, count = (value.sum().item() for value in sums)
        assert result["accuracy"].item() == pytest.approx(hits / count)
        assert (sums[1] <= sums[2]).all() and (sums[0] >= 0).all()
        if CASES[name].sequential:
            assert (sums[2] == len(labels)).all()
            assert result["loss"].item() == pytest.approx(loss / count, rel=1e-5)
        else:
            assert 0 < count < tokens.numel() if mode else count > 0


@everywhere
def test_an_untrained_model_knows_nothing(name, branches):
    model = build(name, branches, random=False)
    tokens, labels = batch(model, 64)
    assert model.loss(tokens, labels)["loss"].item() == pytest.approx(math.log(CODES), abs=0.15)


@everywhere
def test_every_parameter_gets_a_gradient(name, branches):
    model = build(name, branches, class_dropout=0.5).train()
    tokens, labels = batch(model, 16)
    model.loss(tokens, labels, progress=0.0, rng=rng(16))["loss"].backward()
    for parameter_name, parameter in model.named_parameters():
        assert parameter.grad is not None, parameter_name
        assert parameter_name.endswith(INERT) or parameter.grad.abs().max() > 1e-7, parameter_name


@every
def test_recomputed_blocks_give_the_same_gradients(name):
    model = build(name, 2).train()
    tokens, labels = batch(model)
    gradients, runs = [], []
    for block in model.blocks:
        block.register_forward_pre_hook(lambda *_: runs.append(model.checkpoint_blocks))
    for model.checkpoint_blocks in (False, True):
        model.zero_grad()
        model.loss(tokens, labels, rng=rng())["loss"].backward()
        gradients.append([parameter.grad.clone() for parameter in model.parameters()])
    torch.testing.assert_close(gradients[0], gradients[1])
    assert runs.count(True) == 2 * runs.count(False) == 2 * len(model.blocks)
    assert build(name, checkpoint_blocks=True).checkpoint_blocks


@every
def test_compiled_blocks_give_the_same_loss_and_keys(name):
    torch.compiler.reset()
    model = build(name).train()
    tokens, labels = batch(model)
    expected, keys = model.loss(tokens, labels, rng=rng())["loss"], list(model.state_dict())
    for block in model.blocks:
        block.compile(backend="eager")
    for model.checkpoint_blocks in (False, True):
        loss = model.loss(tokens, labels, rng=rng())["loss"]
        torch.testing.assert_close(loss, expected)
        loss.backward()
    assert list(model.state_dict()) == keys
    assert all(p.grad is not None for p in model.parameters())
    torch.testing.assert_close(sample(model, name), sample(build(name), name))


@everywhere
def test_draws_of_training_belong_to_samples(name, branches):
    """Sums over a batch are those over its parts, whatever the batch a sample comes in."""
    model = build(name, branches, class_dropout=0.5).train()
    tokens, labels = batch(model, 6)
    index = torch.tensor([7, 3, 9, 100, 5, 0])

    def sums(part, step=8):
        result = model.loss(tokens[part], labels[part], progress=0.6, rng=IndexedRng(1, index[part], step))
        return {key: result[key] for key in ("site_loss", "site_count")}

    whole = sums(slice(0, 6))
    parts = [sums(slice(i, i + 2)) for i in (0, 2, 4)]
    torch.testing.assert_close(whole, {key: sum(part[key] for part in parts) for key in whole})
    assert not torch.allclose(whole["site_loss"], sums(slice(0, 6), step=9)["site_loss"])


@everywhere
def test_nothing_is_random_in_eval_mode(name, branches):
    model = build(name, branches, class_dropout=1.0)
    tokens, labels = batch(model)
    first = model.loss(tokens, labels, progress=0.0, rng=rng())
    assert torch.equal(first["site_loss"], model.loss(tokens, labels, progress=1.0, rng=rng(seed=1))["site_loss"])
    other = model.loss(tokens, (labels + 1) % model.num_classes)  # labels are read: none was dropped
    assert not torch.allclose(first["site_loss"], other["site_loss"])


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda t, y: (t, y + 4), DataError, r"label \d is outside \[0, 4\).*generator.num_classes"),
        (lambda t, y: (t, y - 4), DataError, r"label -\d is outside"),
        (lambda t, y: (t, y.float()), DataError, r"labels .* need \(B,\) int64"),
        (lambda t, y: (t[..., :-1], y), DataError, "tokens have shape"),
        (lambda t, y: (t[:, 0], y), DataError, "tokens have shape"),
        (lambda t, y: (t.int(), y), DataError, "int64"),
        (lambda t, y: (t + CODES, y), DataError, r"token \d+ is outside \[0, 11\).*generator.codebook_size"),
    ],
)
@every
def test_bad_batches_are_refused(name, change, error, message):
    model = build(name, 2)
    with pytest.raises(error, match=message):
        model.loss(*change(*batch(model)))


@every
def test_bad_sampling_is_refused(name):
    model, sampling = build(name, 2), CASES[name].sampling
    kind = type(sampling)
    teacher = teacher_and_keep(model, 0.5)
    for labels, message in ((LABELS + 1, r"label 4 is outside \[0, 4\)"), (LABELS.float(), "int64")):
        with pytest.raises(DataError, match=message):
            model.generate(labels, sampling)
    for change, error, message in (
        ({"keep": None}, ConfigError, "keep is missing"),
        ({"teacher": None}, ConfigError, "teacher is missing"),
        ({"teacher": teacher["teacher"][:, :1]}, DataError, "teacher have shape"),
        ({"teacher": teacher["teacher"] + CODES}, DataError, "token .* is outside"),
        ({"keep": teacher["keep"].float()}, DataError, "keep .*bool"),
    ):
        with pytest.raises(error, match=message):
            sample(model, name, **{**teacher, **change})
    with pytest.raises(ConfigError, match=r"sampling.top_k=12 is more than the 11 codes"):
        model.generate(LABELS, kind(top_k=CODES + 1))

    class Other(kind):
        pass

    with pytest.raises(ConfigError, match=rf"is sampled with .*\b{kind.__name__}\b.*, not Other"):
        model.generate(LABELS, Other())
    with pytest.raises(ConfigError, match=r"sampling.guidance_scale=3.0 needs .*class_dropout=0"):
        build(name, class_dropout=0.0).generate(LABELS, sampling)


@pytest.mark.parametrize("change", ["branches", "codes", "grid"])
@every
def test_tokens_of_another_tokenizer_are_refused(name, change):
    model = build(name)
    other = quantizer(CASES[name].multiscale, **{change: {"branches": 2, "codes": 12, "grid": 4}[change]})
    with pytest.raises(CheckpointError, match=rf"\({type(model).__name__}\) does not fit the tokenizer: .*where"):
        model.bind(other)


@everywhere
def test_export_and_back(name, branches, tmp_path):
    model = build(name, branches)
    json.dumps(model.architecture)
    again = from_pretrained(export(model, tmp_path))
    assert not again.training and again.state_dict().keys() == model.state_dict().keys()
    again.bind(quantizer(CASES[name].multiscale, branches))
    assert torch.equal(sample(again, name), sample(model, name))
    tokens, labels = batch(model)
    assert again.loss(tokens, labels)["loss"] == model.loss(tokens, labels)["loss"]
