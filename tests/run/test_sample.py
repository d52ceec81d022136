"""`eval.py task=sample`: what the samples are, how they are stored, resuming, processes, and refusals."""

import json
import os
import signal

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from forked import run_forked
from run.checkpoints import generator_checkpoint, run, tokenizer_checkpoint
from stage_setup import generator, tokenizer
from tessera import distributed
from tessera.data import resumable, to_uint8
from tessera.errors import CheckpointError, ConfigError, DataError, MissingFileError
from tessera.generators import SamplingConfig
from tessera.rng import IndexedRng
from tessera.run import sample as sample_module
from tessera.run.sample import BulkSampling
from tessera.stages.evaluation import Evaluation

SAMPLING = SamplingConfig(temperature=1.1, guidance_scale=1.5)


def models(seed: int = 3) -> Evaluation:
    return Evaluation(tokenizer().eval(), generator().eval(), SAMPLING, seed)


@torch.inference_mode()
def sample(folder, model=None, **options):
    """(task, what it made) outside of a trainer."""
    task, model = BulkSampling(**({"num_samples": 23, "batch_size": 5} | options)), model or models()
    labels = task.sample_labels(10)
    manifest = task.manifest(model, labels, "32-true")
    return task, task.sample(folder, manifest, model, labels, torch.device("cpu"))


def same(images, expected):
    """Equal but for a level where a batch of another size has rounded otherwise."""
    difference = np.abs(images.astype(int) - expected)
    return images.shape == expected.shape and difference.max() <= 1 and (difference > 0).mean() < 1e-3


def images_in(folder):
    with np.load(folder / "samples.npz") as content:
        assert content.files == ["arr_0"]
        return content["arr_0"]


@torch.inference_mode()
def by_hand(labels, seed=3, rounding="half_up"):
    model = models(seed)
    rng = IndexedRng(seed, torch.arange(len(labels)))
    tokens = model.generator.generate(torch.tensor(labels), SAMPLING, rng=rng)
    return tokens, to_uint8(model.tokenizer.detokenize(tokens), rounding).permute(0, 2, 3, 1).numpy()


@pytest.mark.parametrize("rounding", ["half_up", "truncate"])
@pytest.mark.parametrize("decode_batch_size", [None, 2])
def test_samples_and_their_files(tmp_path, rounding, decode_batch_size):
    options = {"rounding": rounding, "decode_batch_size": decode_batch_size, "png": True}
    _, made = sample(tmp_path / "s", **options)
    labels = [number % 10 for number in range(23)]
    tokens, images = by_hand(labels, rounding=rounding)
    found = images_in(tmp_path / "s")
    assert found.dtype == np.uint8 and same(found, images)
    stored = load_file(tmp_path / "s" / "tokens.safetensors")
    assert torch.equal(stored["tokens"], tokens) and stored["labels"].tolist() == labels
    assert len(list((tmp_path / "s" / "png").iterdir())) == 23
    assert np.array_equal(np.asarray(Image.open(tmp_path / "s" / "png" / "000017.png")), found[17])
    assert made["made"] == 23 and made["seconds"]["all"] >= made["seconds"]["generate"] > 0
    names = {"build.lock", "manifest.json", "samples.npz", "tokens.safetensors", "png"}
    assert set(os.listdir(tmp_path / "s")) == names


@pytest.mark.parametrize("options", [{"batch_size": 1}, {"batch_size": 64}, {"chunk_samples": 7}])
def test_a_sample_depends_on_its_number_alone(tmp_path, options):
    sample(tmp_path / "a")
    sample(tmp_path / "b", **options)
    assert same(images_in(tmp_path / "a"), images_in(tmp_path / "b"))
    first, second = (load_file(tmp_path / name / "tokens.safetensors") for name in "ab")
    assert torch.equal(first["tokens"], second["tokens"])


def test_labels(tmp_path):
    assert BulkSampling().sample_labels(3).tolist() == [0, 1, 2] * 50
    assert BulkSampling(classes=[7, 2]).sample_labels(10).tolist() == [7, 2] * 50
    assert BulkSampling(classes=[7, 2], num_samples=3).sample_labels(10).tolist() == [7, 2, 7]
    assert BulkSampling(labels=[4, 4, 1]).sample_labels(10).tolist() == [4, 4, 1]
    np.save(tmp_path / "labels.npy", np.array([5, 6], dtype=np.int32))
    (tmp_path / "labels.txt").write_text("5\n6\n")
    for name in ("labels.npy", "labels.txt"):
        assert BulkSampling(labels=str(tmp_path / name), num_samples=2).sample_labels(10).tolist() == [5, 6]


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"classes": [3, 10]}, ConfigError, r"task\.classes has 10, outside of the generator's classes \[0, 10\)"),
        ({"labels": [-1]}, ConfigError, r"task\.labels has -1, outside"),
        ({"labels": [1, 2], "num_samples": 3}, ConfigError, r"task\.num_samples=3 but task\.labels has 2"),
        ({"labels": [1], "classes": [1]}, ConfigError, "exclude each other"),
        ({"classes": []}, ConfigError, r"task\.classes is empty"),
        ({"labels": [0.5]}, DataError, r"task\.labels has shape \(1,\) and type float64"),
        ({"labels": "/none.npy"}, MissingFileError, r"task\.labels=/none\.npy does not exist"),
        ({"rounding": "up"}, ConfigError, r"task\.rounding='up'"),
        ({"batch_size": 0}, ConfigError, r"task\.batch_size=0"),
        ({"num_samples": 0}, ConfigError, r"task\.num_samples=0"),
    ],
)
def test_impossible_settings(options, error, message):
    with pytest.raises(error, match=message):
        BulkSampling(**options).sample_labels(10)


def test_unreadable_label_files(tmp_path):
    (tmp_path / "labels.txt").write_text("one two")
    with pytest.raises(DataError, match=r"labels\.txt can't be read as whole numbers"):
        BulkSampling(labels=str(tmp_path / "labels.txt")).sample_labels(10)


def test_resumes_after_kill_at_any_time(tmp_path, monkeypatch):
    """A child process is killed in the middle of a chunk, and once more while the images are packed."""
    sample(tmp_path / "whole", png=True)
    folder, calls = tmp_path / "s", []

    def child(function):
        process = os.fork()
        if process == 0:
            try:
                function()
            finally:
                os._exit(0)
        assert os.WTERMSIG(os.waitpid(process, 0)[1]) == signal.SIGKILL

    def die(*_):
        os.kill(os.getpid(), signal.SIGKILL)

    def die_in_third_chunk():
        write = sample_module.write_samples

        def write_or_die(writer, start, *rest):
            return die() if start == 12 else write(writer, start, *rest)

        monkeypatch.setattr(sample_module, "write_samples", write_or_die)
        sample(folder, png=True, decode_batch_size=2)

    child(die_in_third_chunk)
    assert np.fromfile(folder / "done.bin", np.uint8).tolist() == [1] * 10 + [0] * 13

    def die_when_packing():
        monkeypatch.setattr(sample_module, "pack", die)
        sample(folder, png=True)

    child(die_when_packing)
    assert not (folder / "samples.npz").exists()
    model = models()
    monkeypatch.setattr(model, "generate_tokens", lambda *arguments: calls.append(arguments))
    _, made = sample(folder, model, png=True)
    assert made["made"] == 0 and not calls
    for name in ("samples.npz", "tokens.safetensors"):
        assert (folder / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert len(list((folder / "png").iterdir())) == 23
    before = os.stat(folder / "samples.npz").st_mtime_ns
    assert sample(folder, model, png=True)[1] is None and not calls
    assert os.stat(folder / "samples.npz").st_mtime_ns == before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_samples": 24}, "samples is 23, not 24"),
        ({"rounding": "truncate"}, "settings.rounding is 'half_up', not 'truncate'"),
        ({"classes": [1]}, r"settings.classes is None, not \[1\]"),
        ({"png": True}, "png is False, not True"),
        ({"model": models(seed=4)}, "settings.seed is 3, not 4"),
        ({"model": Evaluation(tokenizer().eval(), generator().eval(), seed=3)}, r".*temperature is 1\.1, not 1\.0"),
        ({"model": Evaluation(tokenizer().eval(), generator(0.2).train(), SAMPLING, 3)}, None),
    ],
)  # fmt: skip
def test_other_settings_are_refused_by_name(tmp_path, change, message):
    sample(tmp_path)
    if message is None:  # the same weights, built otherwise
        assert sample(tmp_path, **change)[1] is None
        return
    with pytest.raises(CheckpointError, match=f"holds other samples: {message}"):
        sample(tmp_path, **change)


def test_full_disk_is_found_before_the_first_sample(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(resumable.os, "posix_fallocate", full)
    model = models()
    model.generate_tokens = None
    with pytest.raises(DataError, match=r"no room for .* MiB .*paths\.outputs"):
        sample(tmp_path, model)


def _ranks(rank, world, folder):
    _, made = sample(folder, batch_size=3, chunk_samples=6, decode_batch_size=4)
    return made["made"], made["processes"], distributed.world_size()


def test_two_processes_equal_one_bit_by_bit(tmp_path):
    sample(tmp_path / "one", batch_size=3, chunk_samples=6, decode_batch_size=4)
    assert run_forked(_ranks, tmp_path / "two") == [(23, 2, 2)] * 2
    for name in ("samples.npz", "tokens.safetensors", "manifest.json"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def _fails_in_one(rank, world, folder):
    model = models()
    if rank == 1:
        model.generate_tokens = lambda *_: (_ for _ in ()).throw(DataError("broken on purpose"))
    try:
        sample(folder, model)
    except DataError as error:
        return str(error)


def test_a_failing_process_stops_all(tmp_path):
    first, second = run_forked(_fails_in_one, tmp_path)
    assert "process 1 failed" in first and "broken on purpose" in first and second == "broken on purpose"


def test_command(tmp_path):
    path = generator_checkpoint(tmp_path)
    chosen = [f"ckpt={path}", "task=sample", "name=s", "task.num_samples=12", "sampling=default", "seed=3"]
    chosen += ["sampling.temperature=1.1", "sampling.guidance_scale=1.5"]
    results = run(tmp_path, *chosen)
    assert same(images_in(tmp_path / "s" / "samples"), by_hand([number % 10 for number in range(12)])[1])
    written = (tmp_path / "s" / "results.json").read_bytes()
    content = json.loads(written)
    assert content["samples"]["settings"]["sampling"]["temperature"] == 1.1
    assert content["samples"]["images_per_second"] > 0 and content["figures"] == []
    assert run(tmp_path, *chosen) == results and (tmp_path / "s" / "results.json").read_bytes() == written
    with pytest.raises(CheckpointError, match=r"settings\.seed is 3, not 4"):
        run(tmp_path, *chosen, "seed=4")


def test_gfid_measures_the_same_samples(tmp_path):
    path = generator_checkpoint(tmp_path)
    run(tmp_path, f"ckpt={path}", "task=sample", "name=s", "task.num_samples=20")
    only = [f"ckpt={path}", "callbacks=gfid", "metrics=digits", "metrics.num_samples=20"]
    expected = run(tmp_path, *only, "name=a")["figures"][0]["value"]
    tokens = f"+callbacks.gfid.tokens={tmp_path}/s/samples/tokens.safetensors"
    assert run(tmp_path, *only, tokens, "name=b")["figures"][0]["value"] == pytest.approx(expected, rel=1e-6)


def test_commands_that_are_refused(tmp_path):
    path, other = generator_checkpoint(tmp_path), tokenizer_checkpoint(tmp_path, seed=5)
    with pytest.raises(ConfigError, match=r"needs a generator's checkpoint; ckpt=.*is a tokenizer's"):
        run(tmp_path, f"ckpt={other}", "task=sample")
    with pytest.raises(CheckpointError, match=r"trained on the tokens of tokenizer \w+, but .*tokenizer5\.ckpt is \w+"):
        run(tmp_path, f"ckpt={path}", f"tokenizer_ckpt={other}", "task=sample")
    with pytest.raises(ConfigError, match=r"ckpt is required; set ckpt=\.\.\."):
        run(tmp_path, "task=sample")
    (tmp_path / "eval" / "samples").mkdir(parents=True)
    (tmp_path / "eval" / "samples" / "mine.txt").write_text("not a sample")
    with pytest.raises(ConfigError, match=r"holds other files \(mine\.txt\); choose another folder for samples"):
        run(tmp_path, f"ckpt={path}", "task=sample")
