import json
import os

import numpy as np
import pytest
import torch

from forked import run_forked
from tessera.data import DigitsImages, TokenCache, build_token_cache
from tessera.errors import CheckpointError, ConfigError, DataError, MissingFileError

FACTS = {"tokenizer_fingerprint": "abc", "codebook_size": 300, "shape": (2, 3)}


def encode(batch):
    """Tokens that are a function of the image and of its row."""
    value = ((batch["image"].mean((1, 2, 3)) + 1) * 100).long().clamp(0, 299)
    return torch.stack([value, value + 1, batch["index"] % 300], dim=1)[:, None].expand(-1, 2, -1).clamp(max=299)


def build(folder, encode=encode, **changes):
    return build_token_cache(
        folder, DigitsImages("val", 8), encode, **{**FACTS, "batch_size": 16, "chunk_images": 50, **changes}
    )


@pytest.mark.parametrize("views", ["none", "flip"])
def test_round_trip(tmp_path, views):
    images = DigitsImages("val", 8)
    cache = TokenCache(build(tmp_path / "c", views=views), "abc", data=images.fingerprint())
    count = 2 if views == "flip" else 1
    assert len(cache) == len(images) * count and cache.tokens.dtype == np.uint16
    numbers = [0, 5, 101, len(cache) - 1]
    tokens, labels = cache.rows(numbers)
    assert tokens.dtype == labels.dtype == torch.int64
    for row, found, label in zip(numbers, tokens, labels, strict=True):
        image = images.views(row // count, views)[row % count]
        assert torch.equal(found, encode({"image": image[None], "index": torch.tensor([row])})[0])
        assert label == images.label(row // count)
    cache.verify()


def test_smallest_type():
    sizes = {}
    for size in (256, 257, 65536, 65537):
        from tessera.data.token_cache import Manifest

        sizes[size] = Manifest("", "", "none", 1, 1, 1, size, 10).dtype.itemsize
    assert sizes == {256: 1, 257: 2, 65536: 2, 65537: 4}


def test_continues_after_a_kill_without_repeating_work(tmp_path):
    calls = []

    def dying(batch):
        calls.append(batch["index"].tolist())
        if len(calls) == 12:
            raise KeyboardInterrupt
        return encode(batch)

    with pytest.raises(KeyboardInterrupt):
        build(tmp_path / "c", dying)
    with pytest.raises(CheckpointError, match=r"not finished"):
        TokenCache(tmp_path / "c")
    finished = set(np.flatnonzero(np.fromfile(tmp_path / "c" / "done.bin", np.uint8)))
    assert finished == {0, 1}
    again = []

    def counting(batch):
        again.extend(batch["index"].tolist())
        return encode(batch)

    build(tmp_path / "c", counting)
    assert again == list(range(100, 359))
    build(tmp_path / "whole")
    assert (tmp_path / "c" / "tokens.bin").read_bytes() == (tmp_path / "whole" / "tokens.bin").read_bytes()
    build(tmp_path / "c", counting)
    assert len(again) == 259  # a finished cache is left alone


def _build_on_rank(rank, world, folder):
    seen = []

    def counting(batch):
        seen.extend(batch["index"].tolist())
        return encode(batch)

    build(folder, counting)
    return seen


def test_processes_share_the_work(tmp_path):
    first, second = run_forked(_build_on_rank, str(tmp_path / "c"))
    assert sorted(first + second) == list(range(359)) and first and second
    build(tmp_path / "whole")
    assert (tmp_path / "c" / "tokens.bin").read_bytes() == (tmp_path / "whole" / "tokens.bin").read_bytes()
    assert TokenCache(tmp_path / "c").manifest == TokenCache(tmp_path / "whole").manifest


def test_other_content_is_refused(tmp_path):
    folder = build(tmp_path / "c", extra={"sigma": 0.7})
    with pytest.raises(CheckpointError, match=r"tokenizer abc, not of xyz"):
        TokenCache(folder, "xyz")
    with pytest.raises(CheckpointError, match=r"data="):
        TokenCache(folder, "abc", data="other")
    with pytest.raises(CheckpointError, match=r"extra is \{'sigma': 0\.7\} instead of \{'sigma': 0\.8\}"):
        build(tmp_path / "c", extra={"sigma": 0.8})
    with pytest.raises(ConfigError, match=r"tokens\.views='five'"):
        build(tmp_path / "d", views="five")
    with pytest.raises(MissingFileError, match="no manifest"):
        TokenCache(tmp_path / "nothing")


def test_damage_is_found(tmp_path):
    folder = build(tmp_path / "c")
    path = folder / "tokens.bin"
    content = bytearray(path.read_bytes())
    content[7] ^= 1
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match="checksum"):
        TokenCache(folder).verify()
    path.write_bytes(content[:-2])
    with pytest.raises(CheckpointError, match=r"tokens\.bin has \d+ bytes instead of"):
        TokenCache(folder)
    (folder / "manifest.json").write_text("{")
    with pytest.raises(CheckpointError, match="damaged"):
        TokenCache(folder)


def test_wrong_tokens_are_refused(tmp_path):
    with pytest.raises(DataError, match=r"shape \(16, 1, 3\)"):
        build(tmp_path / "a", lambda batch: encode(batch)[:, :1])
    with pytest.raises(DataError, match=r"outside \[0, 300\)"):
        build(tmp_path / "b", lambda batch: encode(batch) + 300)


def test_full_disk_is_reported_before_anything_is_computed(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(DataError, match=r"no room for .* paths\.tokens"):
        build(tmp_path / "c", lambda batch: pytest.fail("computed"))


def test_manifest_is_readable(tmp_path):
    content = json.loads((build(tmp_path / "c") / "manifest.json").read_text())
    assert content["complete"] and content["images"] == 359 and content["views"] == "none"
