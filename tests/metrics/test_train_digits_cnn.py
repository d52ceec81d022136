import torch

from tessera.metrics import train_digits_cnn
from tessera.metrics.classifier_features import DigitsFeatures
from tessera.metrics.feature_cnn import read_weights


def test_training_learns_and_is_deterministic(tmp_path):
    parts = {split: (x[:640], y[:640]) for split, (x, y) in train_digits_cnn.digits().items()}
    recipe = train_digits_cnn.RECIPES["digits"] | {"epochs": 2, "widths": [8, 16, 16]}
    first, accuracy = train_digits_cnn.train(parts, **recipe)
    second, _ = train_digits_cnn.train(parts, **recipe)
    assert accuracy > 0.3  # chance is 0.1
    assert not first.training
    for a, b in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b)


def test_command_writes_weights_that_load(tmp_path, monkeypatch):
    small = {split: (x[:64], y[:64]) for split, (x, y) in train_digits_cnn.digits().items()}
    monkeypatch.setattr(train_digits_cnn, "digits", lambda: small)
    accuracy = train_digits_cnn.main(["--epochs", "1", "--output", str(tmp_path / "w.safetensors")])
    architecture, _ = read_weights(tmp_path / "w.safetensors")
    assert architecture["num_features"] == 64 and 0 <= accuracy <= 1
    assert DigitsFeatures(tmp_path / "w.safetensors").weights_id != DigitsFeatures().weights_id
