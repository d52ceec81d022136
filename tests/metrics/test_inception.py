import zlib

import numpy as np
import pytest
import torch

from golden_cases import golden
from tessera.metrics.features import InceptionFeatures


def generated_weights(shapes: dict[str, torch.Size], base_seed: int) -> dict[str, torch.Tensor]:
    """Weights drawn from the names of the parameters, as the golden file's notes describe."""
    state = {}
    for key, shape in shapes.items():
        if key.endswith("num_batches_tracked"):
            state[key] = torch.zeros(shape, dtype=torch.int64)
            continue
        draw = np.random.RandomState((zlib.crc32(key.encode()) ^ base_seed) & 0xFFFFFFFF)
        b = draw.standard_normal(tuple(shape)).astype(np.float32)
        if key.endswith("conv.weight"):
            b = b * np.float32(np.sqrt(2 / (shape[1] * shape[2] * shape[3])))
        elif key.endswith("bn.weight"):
            b = 1 + 0.1 * b
        elif key.endswith("running_var"):
            b = np.exp(0.2 * b)
        else:
            b = (0.05 if key == "fc.weight" else 0.1) * b
        state[key] = torch.from_numpy(np.asarray(b, dtype=np.float32))
    return state


@pytest.mark.golden
@pytest.mark.slow
@pytest.mark.parametrize("case", ["eval_inception"])
def test_features_of_the_fid_inception(case, tmp_path, monkeypatch):
    from torch_fidelity import feature_extractor_inceptionv3 as public

    file = golden(case)
    # the layout only: construction without weights
    monkeypatch.setattr(public.FeatureExtractorInceptionV3, "load_state_dict", lambda self, state: None)
    monkeypatch.setattr(public, "load_state_dict_from_url", lambda *arguments, **options: {})
    layout = public.FeatureExtractorInceptionV3("layout", ["2048"])
    shapes = {key: value.shape for key, value in layout.state_dict().items()}
    monkeypatch.undo()
    torch.save(generated_weights(shapes, file.config["base_seed"]), tmp_path / "inception.pth")
    extractor = InceptionFeatures(tmp_path / "inception.pth", weights_label="generated")
    assert file.config["images"]
    for number, (count, height, width) in enumerate(file.config["images"]):
        images = file.input[f"images_{number}"]
        assert images.shape == (count, 3, height, width) and images.dtype == torch.uint8
        features = extractor(images)
        expected = file.output[f"images_{number}/adm/2048"]
        assert (features - expected).norm() <= 2e-4 * expected.norm()
        # another resize is told apart
        antialiased = file.output[f"images_{number}/pytorch_fid_seedvoken/2048"]
        assert (features - antialiased).norm() > 1e-3 * expected.norm()
    assert extractor.identity.startswith("generated:") and not extractor.is_image_quality
