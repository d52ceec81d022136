"""Generation: equal to the plain pass, pinned by a teacher, independent of the batch."""

import functools

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from generators.rar_reference import plain_generate, small_rar
from tessera.errors import ConfigError, DataError
from tessera.generators import RAR, RARSampling, SamplingConfig
from tessera.generators.rar_decoder import RARDecoder
from tessera.generators.sampling import make_draw
from tessera.rng import IndexedRng, permutations

GUIDED = SamplingConfig(temperature=1.1, guidance_scale=4.0, guidance_power=1.5)
SETTINGS = [
    SamplingConfig(),
    SamplingConfig(guidance_scale=1.0, guidance_power=2.0),
    SamplingConfig(guidance_scale=2.5),
    GUIDED,
    SamplingConfig(top_k=4, top_p=0.8, guidance_scale=3.0),
]
LABELS = torch.tensor([1, 3, 1, 0, 2])


def rng(count=5, seed=0):
    return IndexedRng(seed, torch.arange(count))


def teacher_and_keep(model, share, count=5):
    generator = torch.Generator().manual_seed(9)
    shape = (count, model.num_branches, model.num_tokens)
    teacher = torch.randint(0, model.codebook_size, shape, generator=generator)
    return teacher, torch.rand(shape, generator=generator) < share


@pytest.mark.parametrize("branches", [1, 3])
@pytest.mark.parametrize("sampling", SETTINGS)
def test_equals_the_plain_pass(branches, sampling):
    model = small_rar(num_branches=branches)
    draw = make_draw(rng(), 5, torch.device("cpu"))
    expected, _, _ = plain_generate(model, LABELS, sampling, draw)
    assert torch.equal(model.generate(LABELS, sampling, rng=rng()), expected)


@pytest.mark.parametrize("modulation_bytes", [0, 20_000, 2**28])
def test_modulation_in_pieces(modulation_bytes):
    """Whatever number of positions the modulation table holds, features are those of the plain pass."""
    model = small_rar()
    conditions = torch.cat([model.condition_ids(LABELS), torch.tensor([model.none_id])])
    tokens = torch.randint(0, 11, (6, 1, 9))
    with torch.no_grad():
        decoder = RARDecoder(model, conditions, modulation_bytes=modulation_bytes)
        features = [decoder.start()] + [decoder.step(tokens[:, :, i], i) for i in range(8)]
        logits = model.head(torch.stack(features, 1))
        expected = model(tokens[:, :, :-1], conditions)
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)
    assert (decoder.chunk == 2) == (modulation_bytes == 0)


def shuffled(count=5, length=9):
    return torch.stack([torch.randperm(length, generator=torch.Generator().manual_seed(s)) for s in range(count)])


@pytest.mark.parametrize("sampling", [SETTINGS[0], GUIDED])
@pytest.mark.parametrize("pinned", [False, True])
def test_any_order_equals_the_plain_pass(sampling, pinned):
    """Tokens, and pinned ones, belong to places of the image; draws to steps."""
    model, orders = small_rar(num_branches=2), shuffled()
    given = teacher_and_keep(model, 0.4) if pinned else (None, None)
    draw = make_draw(rng(), 5, torch.device("cpu"))
    expected, _, _ = plain_generate(model, LABELS, sampling, draw, *given, orders)
    teacher, keep = given
    actual = model.generate(LABELS, sampling, teacher=teacher, keep=keep, rng=rng(), orders=orders)
    assert torch.equal(actual, expected)
    assert not pinned or torch.equal(actual[keep], teacher[keep])
    assert not torch.equal(actual, model.generate(LABELS, sampling, teacher=teacher, keep=keep, rng=rng()))


def test_raster_order_given_or_named():
    model = small_rar()
    expected = model.generate(LABELS, GUIDED, rng=rng())
    raster = torch.arange(9).repeat(5, 1)
    assert torch.equal(model.generate(LABELS, GUIDED, rng=rng(), orders=raster), expected)
    named = RARSampling(temperature=1.1, guidance_scale=4.0, guidance_power=1.5)
    assert torch.equal(model.generate(LABELS, named, rng=rng()), expected)


def test_random_orders_belong_to_samples():
    model, sampling, index = small_rar(), RARSampling(order="random"), torch.tensor([4, 40, 2, 11, 7])
    together = model.generate(LABELS, sampling, rng=IndexedRng(3, index))
    orders = permutations(IndexedRng(3, index).uniform("order/permutation", 9))
    assert torch.equal(together, model.generate(LABELS, SETTINGS[0], rng=IndexedRng(3, index), orders=orders))
    alone = [model.generate(LABELS[i : i + 1], sampling, rng=IndexedRng(3, index[i : i + 1])) for i in range(5)]
    assert torch.equal(together, torch.cat(alone))
    torch.manual_seed(0)
    first = model.generate(LABELS, sampling)
    torch.manual_seed(0)
    assert torch.equal(first, model.generate(LABELS, sampling))


@pytest.mark.parametrize(
    ("sampling", "arguments", "error", "message"),
    [
        (RARSampling(order="random"), {"orders": shuffled()}, ConfigError, "orders are given"),
        (RARSampling(order="random"), {"rng": lambda probs, step: probs.argmax(-1)}, ConfigError, "rng is a function"),
        (RARSampling(order="random"), {"rng": rng(3)}, ConfigError, "one index per label"),
        (GUIDED, {"orders": shuffled(4)}, DataError, r"orders have shape \(4, 9\).*need \(5, 9\) int64"),
        (GUIDED, {"orders": shuffled().int()}, DataError, "need .* int64"),
        (GUIDED, {"orders": shuffled().clamp(max=7)}, DataError, "the order of sample 0 is no permutation of 0 .. 8"),
    ],
)
def test_bad_orders_are_refused(sampling, arguments, error, message):
    with pytest.raises(error, match=message):
        small_rar().generate(LABELS, sampling, **arguments)


def test_unknown_order_is_refused():
    with pytest.raises(ConfigError, match=r"sampling\.order='diagonal' is unknown"):
        RARSampling(order="diagonal")


@pytest.fixture
def compiling(monkeypatch, request):
    """Steps compiled by the given backend, and the number of times each was compiled."""
    counts = CompileCounterWithBackend(request.param)
    compile_step = functools.cache(lambda function, mode: torch.compile(function, backend=counts, fullgraph=True))
    monkeypatch.setattr("tessera.generators.compilation._compile", compile_step)
    torch._dynamo.reset()
    yield counts
    torch._dynamo.reset()


@pytest.mark.slow
@pytest.mark.parametrize("compiling", ["inductor"], indirect=True)
def test_compiled_kernels(compiling):
    sizes = {"num_tokens": 5, "depth": 1}
    expected = small_rar(**sizes).generate(LABELS, GUIDED, rng=rng())
    model = small_rar(**sizes)
    model.compile_sampling()
    assert torch.equal(model.generate(LABELS, GUIDED, rng=rng()), expected)
    assert compiling.frame_count == 1


@pytest.mark.parametrize("compiling", ["eager"], indirect=True)
def test_compiled_step(compiling):
    """The same tokens, from code that isn't compiled again for other positions, labels, orders or draws."""
    sizes = {"num_branches": 2, "num_tokens": 100, "depth": 1}
    model = small_rar(**sizes)
    model.compile_sampling()
    state = set(model.state_dict())
    model.generate(LABELS, GUIDED, rng=rng())
    compilations = compiling.frame_count
    assert 1 <= compilations <= 3  # once for the first bucket, then for any number of them
    labels = LABELS.flip(0)
    found = model.generate(labels, GUIDED, rng=rng(seed=1))
    assert compiling.frame_count == compilations
    assert torch.equal(found, small_rar(**sizes).generate(labels, GUIDED, rng=rng(seed=1)))
    assert set(model.state_dict()) == state


@pytest.mark.parametrize("compiling", ["eager"], indirect=True)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiled_step_in_any_order_with_a_teacher(compiling, dtype):
    model, orders = small_rar(num_tokens=40).to(dtype), shuffled(5, 40)
    teacher, keep = teacher_and_keep(model, 0.3)
    arguments = {"teacher": teacher, "keep": keep, "orders": orders}
    expected = model.generate(LABELS, GUIDED, rng=rng(), **arguments)
    model.compile_sampling()
    found = model.generate(LABELS, GUIDED, rng=rng(), **arguments)
    assert compiling.frame_count
    if dtype == torch.float32:
        assert torch.equal(found, expected)
    assert torch.equal(found[keep], teacher[keep])


def test_a_generator_without_a_compiled_step_says_so():
    class Other(RAR):
        can_compile_sampling = False

    with pytest.raises(ConfigError, match="Other has no compiled sampling step"):
        Other(11, 9, 4, hidden_size=16, depth=1, num_heads=2, mlp_size=24).compile_sampling()


def test_teacher_at_full_share_is_returned():
    model = small_rar(num_branches=2)
    teacher, keep = teacher_and_keep(model, 1.0)
    assert torch.equal(model.generate(LABELS, GUIDED, teacher=teacher, keep=keep, rng=rng()), teacher)


def test_teacher_at_share_zero_is_plain_sampling():
    model = small_rar(num_branches=2)
    teacher, keep = teacher_and_keep(model, 0.0)
    pinned = model.generate(LABELS, GUIDED, teacher=teacher, keep=keep, rng=rng())
    assert torch.equal(pinned, model.generate(LABELS, GUIDED, rng=rng()))


def test_kept_positions_are_the_teachers_and_condition_the_rest():
    model = small_rar(num_branches=2)
    teacher, keep = teacher_and_keep(model, 0.5)
    pinned = model.generate(LABELS, GUIDED, teacher=teacher, keep=keep, rng=rng())
    assert torch.equal(pinned[keep], teacher[keep])
    draw = make_draw(rng(), 5, torch.device("cpu"))
    assert torch.equal(pinned, plain_generate(model, LABELS, GUIDED, draw, teacher, keep)[0])
    # not merely pasted over a plain sample: later tokens saw the teacher's
    plain = model.generate(LABELS, GUIDED, rng=rng())
    assert (pinned != plain)[~keep].any()


def test_teacher_is_read_at_kept_positions_only():
    model = small_rar()
    teacher, keep = teacher_and_keep(model, 0.5)
    hidden = torch.where(keep, teacher, -1)
    expected = model.generate(LABELS, GUIDED, teacher=teacher, keep=keep, rng=rng())
    assert torch.equal(model.generate(LABELS, GUIDED, teacher=hidden, keep=keep, rng=rng()), expected)


@pytest.mark.parametrize("sampling", [SETTINGS[0], GUIDED])
def test_sample_does_not_depend_on_its_batch(sampling):
    model = small_rar()
    index = torch.tensor([4, 40, 2, 11, 7])
    together = model.generate(LABELS, sampling, rng=IndexedRng(3, index))
    order = torch.tensor([3, 0, 4, 2, 1])
    shuffled = model.generate(LABELS[order], sampling, rng=IndexedRng(3, index[order]))
    assert torch.equal(shuffled, together[order])
    for i in range(5):
        alone = model.generate(LABELS[i : i + 1], sampling, rng=IndexedRng(3, index[i : i + 1]))
        assert torch.equal(alone, together[i : i + 1])
    assert not torch.equal(together, model.generate(LABELS, sampling, rng=IndexedRng(4, index)))


def test_generator_reproduces():
    model = small_rar()
    first, second = (model.generate(LABELS, GUIDED, rng=torch.Generator().manual_seed(2)) for _ in range(2))
    assert torch.equal(first, second)
    torch.manual_seed(1)
    third = model.generate(LABELS, GUIDED)
    torch.manual_seed(1)
    assert torch.equal(third, model.generate(LABELS, GUIDED))


def test_top_k_one_is_argmax():
    model = small_rar()
    greedy = model.generate(LABELS, SamplingConfig(top_k=1), rng=rng(seed=1))
    argmax = model.generate(LABELS, SamplingConfig(), rng=lambda probs, step: probs.argmax(-1))
    assert torch.equal(greedy, argmax)


@pytest.mark.parametrize(("sampling", "rows"), [(SETTINGS[0], 5), (SETTINGS[1], 5), (SETTINGS[2], 10)])
def test_unconditional_half_runs_only_where_it_counts(monkeypatch, sampling, rows):
    seen = []

    class Watched(RARDecoder):
        def __init__(self, model, conditions):
            seen.append(len(conditions))
            super().__init__(model, conditions)

    monkeypatch.setattr("tessera.generators.rar.RARDecoder", Watched)
    small_rar().generate(LABELS, sampling, rng=rng())
    assert seen == [rows]


def test_guidance_follows_the_class():
    """Guidance makes the tokens more probable under their class."""
    model = small_rar()
    labels = torch.arange(4).repeat(50)
    index = torch.arange(200)
    losses = []
    for scale in (None, 4.0):
        tokens = model.generate(labels, SamplingConfig(guidance_scale=scale), rng=IndexedRng(0, index))
        conditional = model.loss(tokens, labels)["loss"]
        raster = torch.arange(9).expand(200, 9)
        unconditional = model.loss_in_order(tokens, torch.full((200,), model.none_id), raster)["loss"]
        losses.append((unconditional - conditional).item())
    assert losses[1] > losses[0] + 0.1


def test_mode_and_gradients_are_left_as_they_were():
    model = small_rar(dropout=0.5).train()
    model.blocks[0].eval()  # a part that was frozen on purpose
    before = model.generate(LABELS, GUIDED, rng=rng())
    assert model.training and model.blocks[1].mlp.training and not model.blocks[0].training
    assert torch.equal(before, model.eval().generate(LABELS, GUIDED, rng=rng()))
    model.train()

    def failing(probs, step):
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        model.generate(LABELS, GUIDED, rng=failing)
    assert model.training and torch.is_grad_enabled()


def test_training_after_generation_in_one_autocast_region():
    """Weights that autocast cast without gradient during generation must not serve the next training step."""
    model = small_rar()
    tokens = torch.randint(0, 11, (5, 1, 9))
    with torch.autocast("cpu", torch.bfloat16):
        model.generate(LABELS, GUIDED, rng=rng())
        model.loss(tokens, LABELS)["loss"].backward()
    assert model.blocks[0].attn.qkv.weight.grad.abs().max() > 0
    assert model.lm_head.weight.grad.abs().max() > 0


@pytest.mark.parametrize("how", ["autocast", "module"])
def test_bfloat16(how):
    """Half precision runs and stays near float32: same distribution of the first token, caches in bfloat16."""
    model = small_rar()
    expected, seen = [], []

    def recording(store):
        def draw(probs, step):
            store.append(probs)
            return torch.full(probs.shape[:2], step % 11)

        return draw

    model.generate(LABELS, GUIDED, rng=recording(expected))
    if how == "module":
        model = model.to(torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"):
        tokens = model.generate(LABELS, GUIDED, rng=recording(seen))
        with torch.no_grad():
            assert RARDecoder(model, model.condition_ids(LABELS)).cache.keys.dtype == torch.bfloat16
    assert tokens.dtype == torch.int64
    logits = torch.stack(seen).log()
    assert (logits != logits.bfloat16()).any()  # drawn from float32 logits, not from rounded ones
    gap = torch.stack([(a - b).abs().sum(-1).mean() for a, b in zip(seen, expected, strict=True)])
    assert all(probs.dtype == torch.float32 for probs in seen)
    assert gap.max() < 0.15


def test_empty_batch():
    model = small_rar()
    assert model.generate(LABELS[:0], GUIDED).shape == (0, 1, 9)


def test_single_token():
    model = small_rar(num_tokens=1)
    assert model.generate(LABELS, GUIDED, rng=rng()).shape == (5, 1, 1)
    assert model.train().loss(torch.zeros(5, 1, 1, dtype=torch.int64), LABELS)["loss"].isfinite()


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"labels": LABELS + 1}, DataError, r"label 4 is outside \[0, 4\)"),
        ({"labels": LABELS - 1}, DataError, "label -1 is outside"),
        ({"labels": LABELS.float()}, DataError, "int64"),
        ({"keep": None}, ConfigError, "keep is missing"),
        ({"teacher": None}, ConfigError, "teacher is missing"),
        ({"teacher": torch.zeros(5, 9, dtype=torch.int64)}, DataError, "teacher"),
        ({"teacher": torch.zeros(4, 1, 9, dtype=torch.int64)}, DataError, "teacher"),
        ({"teacher": torch.full((5, 1, 9), 11)}, DataError, r"token 11 is outside \[0, 11\)"),
        ({"teacher": torch.zeros(5, 1, 9)}, DataError, "int64"),
        ({"keep": torch.ones(5, 1, 9)}, DataError, "keep .*bool"),
        ({"keep": torch.ones(5, 1, 8).bool()}, DataError, "keep"),
        ({"rng": rng(3)}, ConfigError, "one index per label"),
    ],
)
def test_bad_input_is_refused(change, error, message):
    arguments = {
        "labels": LABELS,
        "teacher": torch.zeros(5, 1, 9, dtype=torch.int64),
        "keep": torch.ones(5, 1, 9).bool(),
        "rng": rng(),
        **change,
    }
    with pytest.raises(error, match=message):
        small_rar().generate(arguments.pop("labels"), GUIDED, **arguments)
