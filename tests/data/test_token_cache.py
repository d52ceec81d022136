"""Building, resuming, refusing and reading token caches."""

import errno
import fcntl
import json
import os
import pickle
from functools import partial

import numpy as np
import pytest
import torch

from data.pictures import Squares, image_folder
from forked import run_forked
from tessera.data import FolderImages, TokenCache, build_token_cache, resumable
from tessera.data.manifest import FolderManifest
from tessera.errors import CheckpointError, ConfigError, DataError, MissingFileError

LENGTH = 3


class Encoder:
    """Tokens that tell the image, the view, the branch and the position; can fail at a given call."""

    def __init__(self, branches=2, codebook_size=1000, fail_at=None):
        self.branches, self.codebook_size, self.fail_at = branches, codebook_size, fail_at
        self.calls, self.images = 0, []

    def __call__(self, batch):
        self.calls += 1
        if self.calls == self.fail_at:
            raise KeyboardInterrupt
        self.images += batch["index"].tolist()
        grey = ((batch["image"][:, 0, 1, 1] + 1) * 127.5).round().long()
        site = torch.arange(self.branches * LENGTH).view(1, self.branches, LENGTH)
        # the bright corner is on the left, or on the right of the mirrored view
        mirrored = (batch["image"][:, 0, 0, -1] > batch["image"][:, 0, 0, 0]).long()
        return (grey[:, None, None] * 10 + site + 400 * mirrored[:, None, None]) % self.codebook_size


def expected(number, branches=2, codebook_size=1000, mirrored=False):
    site = torch.arange(branches * LENGTH).view(branches, LENGTH)
    return (number % 256 * 10 + site + 400 * mirrored) % codebook_size


def build(folder, dataset=None, encoder=None, **changes):
    encoder = encoder or Encoder()
    settings = {
        "tokenizer_fingerprint": "t0",
        "codebook_size": encoder.codebook_size,
        "shape": (encoder.branches, LENGTH),
        "batch_size": 4,
        "chunk_images": 6,
    }
    return build_token_cache(folder, dataset or Squares("train"), encoder, **(settings | changes))


@pytest.mark.parametrize("views", ["none", "flip"])
@pytest.mark.parametrize("workers", [0, 2])
def test_rows_are_image_major_and_view_minor(tmp_path, views, workers):
    count = {"none": 1, "flip": 2}[views]
    cache = TokenCache.open(build(tmp_path / "c", views=views, num_workers=workers))
    assert len(cache) == 40 * count
    for row in range(len(cache)):
        number, view = divmod(row, count)
        batch = cache.rows([row])
        assert torch.equal(batch["tokens"][0], expected(number, mirrored=view == 1))
        assert (batch["label"].item(), batch["index"].item()) == (number % 3, row)
    picked = cache.rows([7, 3, 7])
    assert picked["tokens"].shape == (3, 2, LENGTH) and picked["index"].tolist() == [7, 3, 7]
    assert {value.dtype for value in picked.values()} == {torch.int64}
    cache.verify()


def test_ten_crops(tmp_path):
    cache = TokenCache.open(build(tmp_path / "c", Squares("train", 5), views="ten_crop"))
    assert cache.tokens.shape == (50, 2, LENGTH) and cache.labels.shape == (5,)
    assert cache.rows([49])["index"].item() == 49


def test_encoder_sees_labels_and_ids_of_its_views(tmp_path):
    seen = {}

    def encode(batch):
        for label, index, image in zip(batch["label"], batch["index"], batch["image"], strict=True):
            seen[index.item()] = (label.item(), image)
        return torch.zeros(len(batch["image"]), 1, LENGTH, dtype=torch.int32)

    dataset = Squares("train", 9)
    build_token_cache(
        tmp_path / "d", dataset, encode, tokenizer_fingerprint="t", codebook_size=2, shape=(1, LENGTH), views="flip"
    )
    assert sorted(seen) == list(range(18))
    for index, (label, image) in seen.items():
        assert label == dataset.label(index // 2)
        assert torch.equal(image, dataset.views(index // 2, "flip")["image"][index % 2])


@pytest.mark.parametrize(
    ("codebook_size", "dtype"),
    [(1, np.uint8), (256, np.uint8), (257, np.uint16), (65536, np.uint16), (65537, np.uint32)],
)
def test_smallest_type_that_holds_the_codes(tmp_path, codebook_size, dtype):
    def encode(batch):
        return torch.full((len(batch["label"]), 1, LENGTH), codebook_size - 1)

    folder = build(tmp_path / "c", encoder=encode_with(encode, codebook_size))
    cache = TokenCache.open(folder)
    assert cache.tokens.dtype == dtype and os.path.getsize(folder / "tokens.bin") == 40 * LENGTH * cache.tokens.itemsize
    assert (cache.rows([0])["tokens"] == codebook_size - 1).all()


def encode_with(function, codebook_size):
    function.codebook_size, function.branches = codebook_size, 1
    return function


def test_build_goes_on_after_a_kill_without_repeating_chunks(tmp_path):
    folder, whole = tmp_path / "c", build(tmp_path / "whole")
    killed = Encoder(fail_at=6)  # chunks of 6 images are batches of 4 and 2: in the middle of the third
    with pytest.raises(KeyboardInterrupt):
        build(folder, encoder=killed)
    assert len(killed.images) == 16 and not json.loads((folder / "manifest.json").read_text())["complete"]
    with pytest.raises(CheckpointError, match="not finished"):
        TokenCache.open(folder)
    again = Encoder()
    build(folder, encoder=again)
    assert again.images == list(range(12, 40)), "the two finished chunks must not be encoded again"
    done, reference = TokenCache.open(folder), TokenCache.open(whole)
    assert done.manifest == reference.manifest
    assert np.array_equal(done.tokens, reference.tokens) and np.array_equal(done.labels, reference.labels)
    third = Encoder()
    build(folder, encoder=third)
    assert third.calls == 0, "a finished cache is left as it is"


def test_another_chunk_size_after_a_kill_keeps_what_is_done(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        build(tmp_path / "c", encoder=Encoder(fail_at=6))
    encoder = Encoder()
    build(tmp_path / "c", encoder=encoder, chunk_images=7)
    assert encoder.images == list(range(12, 40))
    assert np.array_equal(TokenCache.open(tmp_path / "c").tokens, TokenCache.open(build(tmp_path / "w")).tokens)


def test_kill_before_the_manifest_starts_over(tmp_path, monkeypatch):
    folder = tmp_path / "c"
    monkeypatch.setattr(FolderManifest, "write", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        build(folder)
    monkeypatch.undo()
    build(folder)
    TokenCache.open(folder).verify()


def build_forked(rank, world, folder, fail):
    encoder = Encoder()
    if fail and rank == 1:
        encoder = Encoder(fail_at=2)
        encode, encoder = encoder, type("E", (), {"codebook_size": 1000, "branches": 2})()

        def broken(batch):
            try:
                return encode(batch)
            except KeyboardInterrupt:
                raise DataError("broken on purpose") from None

        broken.codebook_size, broken.branches, broken.images = 1000, 2, encode.images
        encoder = broken
    try:
        build(folder, encoder=encoder)
    except DataError as error:
        return str(error), encoder.images
    return "", encoder.images


def test_two_processes_share_the_work(tmp_path):
    alone = TokenCache.open(build(tmp_path / "alone"))
    shares = [images for _, images in run_forked(build_forked, tmp_path / "two", False)]
    assert sorted(shares[0] + shares[1]) == list(range(40)) and all(len(share) >= 16 for share in shares)
    both = TokenCache.open(tmp_path / "two")
    both.verify()
    assert both.manifest == alone.manifest and np.array_equal(both.tokens, alone.tokens)


def test_a_failing_process_stops_all_and_another_number_of_them_completes(tmp_path):
    (first, done), (second, half) = run_forked(build_forked, tmp_path / "c", True)
    assert "process 1 failed" in first and "broken on purpose" in first and second == "broken on purpose"
    encoder = Encoder()
    build(tmp_path / "c", encoder=encoder)
    # chunk 1 of process 1 was cut short after its first batch; all chunks of process 0 are kept
    assert not set(encoder.images) & set(done) and set(half) <= set(encoder.images)
    assert np.array_equal(TokenCache.open(tmp_path / "c").tokens, TokenCache.open(build(tmp_path / "w")).tokens)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"tokenizer_fingerprint": "t1"}, "tokenizer is 't0', not 't1'"),
        ({"views": "flip"}, "views is 'none', not 'flip'"),
        ({"extra": {"sigma": 0.5}}, r"extra.sigma is None, not 0.5"),
        ({"dataset": Squares("train", 41)}, "data is"),
        ({"indices": range(40)}, "extra.indices is"),
    ],
)
@pytest.mark.parametrize("complete", [True, False])
def test_building_over_other_tokens_is_refused(tmp_path, change, named, complete):
    if complete:
        build(tmp_path / "c")
    else:
        with pytest.raises(KeyboardInterrupt):
            build(tmp_path / "c", encoder=Encoder(fail_at=2))
    encoder = Encoder()
    with pytest.raises(CheckpointError, match=named):
        build(tmp_path / "c", encoder=encoder, **change)
    assert encoder.calls == 0


def test_opening_other_tokens_is_refused(tmp_path):
    extra = {"generator": "g", "sigma": 0.7, "sampling": {"temperature": 1.0, "top_k": None}, "seed": 3}
    folder = build(tmp_path / "c", extra=extra)
    data = Squares("train").fingerprint()
    TokenCache.open(folder, tokenizer_fingerprint="t0", data=data, views="none", extra=extra, codebook_size=1000)
    with pytest.raises(CheckpointError, match=r"data\.token_cache=.*tokens of tokenizer t0, not of t1"):
        TokenCache.open(folder, tokenizer_fingerprint="t1")
    for wanted in ({"data": "x"}, {"views": "flip"}, {"extra": {**extra, "sigma": 0.8}}, {"codebook_size": 999}):
        with pytest.raises(CheckpointError, match=f"other tokens: {next(iter(wanted))}.* is"):
            TokenCache.open(folder, **wanted)


def test_missing_and_damaged_caches(tmp_path):
    with pytest.raises(MissingFileError, match=r"no manifest\.json.*data\.token_cache"):
        TokenCache.open(tmp_path)
    folder = build(tmp_path / "c")
    cache = TokenCache.open(folder)
    content = (folder / "tokens.bin").read_bytes()
    (folder / "tokens.bin").write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(CheckpointError, match="checksum"):
        cache.verify()
    (folder / "tokens.bin").write_bytes(content[:-1])
    with pytest.raises(CheckpointError, match=rf"tokens\.bin has {len(content) - 1} bytes, not {len(content)}"):
        TokenCache.open(folder)
    manifest = json.loads((folder / "manifest.json").read_text())
    for text, message in [
        (json.dumps({**manifest, "num_classes": 7}), "changed after"),
        (json.dumps({**manifest, "format": 99}), "version 99, not 2"),
        (json.dumps({**manifest, "colour": 1}), "version|damaged"),
        (json.dumps(manifest)[:-9], "damaged"),
        ("[]", "damaged"),
    ]:
        (folder / "manifest.json").write_text(text)
        with pytest.raises(CheckpointError, match=message):
            TokenCache.open(folder)


def test_subsets_keep_the_numbers_of_their_images(tmp_path):
    indices = [31, 2, 17]
    folder = build(tmp_path / "c", indices=indices, views="flip")
    cache = TokenCache.open(folder)
    assert cache.index.tolist() == indices
    batch = cache.rows(range(6))
    assert batch["index"].tolist() == [62, 63, 4, 5, 34, 35] and batch["label"].tolist() == [1, 1, 2, 2, 2, 2]
    assert torch.equal(batch["tokens"][4], expected(17))
    with pytest.raises(CheckpointError, match="other tokens"):
        build(tmp_path / "c", indices=[31, 2, 18], views="flip")
    with pytest.raises(ConfigError, match="from 3 to 40, but there are 40"):
        build(tmp_path / "d", indices=[3, 40])
    with pytest.raises(ConfigError, match="no images"):
        build(tmp_path / "d", indices=[])


def test_skipped_images_are_stored_under_the_number_of_their_substitute(tmp_path):
    root = image_folder(tmp_path / "images")
    bad = root / "train" / "class0" / "2.png"
    bad.write_bytes(bad.read_bytes()[:50])

    def encode(batch):
        return torch.zeros(len(batch["label"]), 1, LENGTH, dtype=torch.int64)

    encoder = encode_with(encode, 5)
    with pytest.raises(DataError, match=r"2\.png can't be read"):
        build(tmp_path / "c", FolderImages("train", root, 16), encoder)
    build(tmp_path / "c", FolderImages("train", root, 16, on_error="skip"), encoder)
    assert TokenCache.open(tmp_path / "c").index.tolist() == [0, 2, 2, 3, 4, 5]


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        (torch.full((4, 2, LENGTH), 1000), r"token 1000, outside \[0, 1000\)"),
        (torch.full((4, 2, LENGTH), -1), "token -1, outside"),
        (torch.zeros(4, 1, LENGTH, dtype=torch.int64), r"shape \(4, 1, 3\), not integers \(4, 2, 3\)"),
        (torch.zeros(4, 2, LENGTH), "float32"),
    ],
)
def test_impossible_tokens_are_refused(tmp_path, tokens, message):
    def encode(batch):
        return tokens

    encode.codebook_size, encode.branches = 1000, 2
    with pytest.raises(DataError, match=message):
        build(tmp_path / "c", encoder=encode)


@pytest.mark.parametrize(("key", "value"), [("batch_size", 0), ("chunk_images", 0), ("views", "three")])
def test_impossible_settings_are_refused(tmp_path, key, value):
    with pytest.raises(ConfigError, match=rf"tokens\.{key}"):
        build(tmp_path / "c", **{key: value})


def no_space(*_):
    raise OSError(errno.ENOSPC, "No space left on device")


def test_full_disk_is_found_before_anything_is_encoded(tmp_path, monkeypatch):
    monkeypatch.setattr(resumable.os, "posix_fallocate", no_space)
    encoder = Encoder()
    with pytest.raises(DataError, match=r"no room for .* MiB .*paths\.tokens"):
        build(tmp_path / "c", encoder=encoder)
    assert encoder.calls == 0
    monkeypatch.undo()
    build(tmp_path / "c", encoder=encoder)
    TokenCache.open(tmp_path / "c").verify()


def test_disk_that_fills_up_later_loses_no_chunk(tmp_path, monkeypatch):
    """File systems that copy on write don't keep the reserved space."""
    real, writes = os.pwrite, []

    def pwrite(*arguments):
        writes.append(arguments)
        return no_space() if len(writes) > 16 else real(*arguments)

    monkeypatch.setattr(resumable.os, "pwrite", pwrite)
    first = Encoder()
    with pytest.raises(DataError, match=r"no room.*finished chunks are kept"):
        build(tmp_path / "c", encoder=first)
    monkeypatch.undo()
    second = Encoder()
    build(tmp_path / "c", encoder=second)
    assert second.images[0] == 12, "two chunks (of two batches, seven writes each) were finished"
    TokenCache.open(tmp_path / "c").verify()


def test_a_chunk_is_marked_only_after_it_reached_the_disk(tmp_path, monkeypatch):
    """Or a power failure could leave a marker without the tokens."""
    real, events = os.pwrite, []

    def pwrite(file, content, at):
        events.append("marked" if set(content) == {1} else "written")
        return real(file, content, at)

    monkeypatch.setattr(resumable.os, "pwrite", pwrite)
    monkeypatch.setattr(resumable.os, "fsync", lambda file: events.append("synced"))
    build(tmp_path / "c")
    steps = "".join(event[0] for event in events if event).rstrip("s")
    assert steps.count("sssm") == 7 and "wm" not in steps


def test_short_writes_are_continued(tmp_path, monkeypatch):
    real = os.pwrite
    monkeypatch.setattr(resumable.os, "pwrite", lambda file, content, at: real(file, content[:5], at))
    folder = build(tmp_path / "c")
    monkeypatch.undo()
    assert np.array_equal(TokenCache.open(folder).tokens, TokenCache.open(build(tmp_path / "w")).tokens)


def test_the_folder_is_locked_while_it_is_built(tmp_path):
    folder, held = tmp_path / "c", []

    def encode(batch):
        with open(folder / "build.lock") as file, pytest.raises(BlockingIOError):
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        held.append(True)
        return torch.zeros(len(batch["label"]), 1, LENGTH, dtype=torch.int64)

    build(folder, encoder=encode_with(encode, 5))
    assert held
    with open(folder / "build.lock") as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_pickled_cache_is_reopened_not_copied(tmp_path):
    cache = TokenCache.open(build(tmp_path / "c", Squares("train", 2000)))
    pickled = pickle.dumps(cache)
    assert len(pickled) < 2000 < cache.tokens.nbytes
    assert torch.equal(pickle.loads(pickled).rows([77])["tokens"], cache.rows([77])["tokens"])


def test_augmentation_does_not_reach_the_cache(tmp_path):
    root = image_folder(tmp_path / "images")
    seen = []

    def encode(batch):
        seen.append(batch["image"])
        return torch.zeros(len(batch["label"]), 1, LENGTH, dtype=torch.int64)

    train = partial(FolderImages, root=root, resolution=16)(split="train")
    build(tmp_path / "c", train, encode_with(encode, 5))
    plain = train.without_augmentation()
    assert torch.equal(torch.cat(seen), torch.stack([plain[n]["image"] for n in range(len(plain))]))
