"""The whole ADM protocol on a tiny network: from images to figures, through the classes that eval.py uses."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from golden_cases import assert_close, golden
from tessera.metrics.comparison import compare
from tessera.metrics.features import FeatureExtractor, Features
from tessera.metrics.image_sets import ArrayImageSet
from tessera.metrics.inception_score import InceptionScore
from tessera.metrics.precision_recall import precision_recall
from tessera.metrics.reference import load_reference
from tessera.metrics.resize import resize
from tessera.metrics.set_measure import measure_set
from tessera.metrics.statistics import ADM_EXTRACTOR


class TinyGraph(FeatureExtractor):
    """The stand-in for the Inception graph that the notes of the file describe."""

    name, weights_id, resize = ADM_EXTRACTOR.split(":")
    normalisation = "(x-128)/128"

    def __init__(self, weights: dict[str, torch.Tensor], size: int):
        super().__init__()
        for key, value in weights.items():
            self.register_buffer(key, value.permute(3, 2, 0, 1).contiguous() if value.ndim == 4 else value)
        self.input_size = size
        self.num_features, self.num_classes = self.fc.shape
        sides = ((size - 1) // 2 - 1) // 2
        self.num_spatial = 7 * sides * sides
        self.freeze()

    def all_features(self, images_u8: torch.Tensor) -> Features:
        x = (resize(images_u8, self.input_size) - 128) * 0.0078125
        x = F.conv2d(x, self.c1w, self.c1b, stride=2).relu()
        x = F.conv2d(x, self.c2w, self.c2b, stride=2).relu()
        pooled = F.conv2d(x, self.c3w, self.c3b).relu().mean((2, 3))
        spatial = x[:, :7].permute(0, 2, 3, 1).flatten(1)
        return Features(pooled, spatial, pooled @ self.fc)


@pytest.mark.golden
@pytest.mark.parametrize("case", ["eval_adm_pipeline"])
def test_whole_protocol(case, tmp_path):
    file = golden(case)
    config, out = file.config["pipeline"], dict(file.output)
    extractor = TinyGraph(file.weights, config["resize"])
    reference_images, generated_images = (file.input[f"{side}_images"].numpy() for side in ("ref", "gen"))
    assert reference_images.shape == (config["n_ref"], config["h"], config["w"], 3)
    assert generated_images.shape == (config["n_gen"], config["h"], config["w"], 3)
    np.savez(tmp_path / "generated.npz", generated_images)
    np.savez_compressed(tmp_path / "reference.npz", reference_images)
    generated = ArrayImageSet(tmp_path / "generated.npz")
    options = {"batch_size": config["batch"]}

    # without statistics in the file they come from its images
    reference = load_reference(tmp_path / "reference.npz", extractor, **options)
    measured = measure_set(generated, extractor, keep_features=True, **options)
    spatial = torch.cat([extractor.extract(images).spatial for _, images in generated.batches(0, len(generated), 7)])
    images = torch.from_numpy(reference_images).permute(0, 3, 1, 2)
    assert_close(spatial, out.pop("gen_spatial"), atol=1e-4)
    assert_close(extractor.extract(images).spatial, out.pop("ref_spatial"), atol=1e-4)
    assert_close(measured.features, out.pop("gen_pool"), atol=1e-4)
    assert_close(reference.features, out.pop("ref_pool"), atol=1e-4)
    for statistics, suffix in ((reference.statistics, ""), (reference.statistics.spatial, "_s")):
        assert_close(statistics.mu, out.pop(f"ref_mu{suffix}"), atol=1e-5)
        assert_close(statistics.sigma, out.pop(f"ref_sigma{suffix}"), atol=1e-5)

    values = {figure.name: figure.value for figure in compare(generated, reference, extractor, **options)}
    assert values["FID"] == pytest.approx(float(out.pop("fid")), abs=1e-4)
    assert values["sFID"] == pytest.approx(float(out.pop("sfid")), abs=1e-3)
    # distances in float16 may move a sample or two across the boundary
    for name, exact in (("precision", config["n_gen"]), ("recall", config["n_ref"])):
        assert values[name] == float(out.pop(f"{name}_float32_branch"))
        assert abs(values[name] - float(out.pop(name))) <= 2.5 / exact

    logits = torch.cat([extractor.extract(x).logits for _, x in generated.batches(0, len(generated), 9)])
    for key, size in (("inception_score", config["is_split"]), ("inception_score_default_split", 5000)):
        score = InceptionScore(extractor.num_classes, len(generated), size, shuffle_seed=None)
        score.update(logits, index=torch.arange(len(generated)))
        assert float(score.compute()) == pytest.approx(float(out.pop(key)), abs=1e-5)
    assert len(generated) > 5000 or values["IS"] == pytest.approx(float(score.compute()), rel=1e-6)

    # stored statistics are used where the file has them, its images for precision and recall alone
    stored = {key: file.output[f"ref_{key}"].numpy() for key in ("mu", "sigma", "mu_s", "sigma_s")}
    np.savez(tmp_path / "few.npz", arr_0=reference_images[:10], extractor=extractor.identity, **stored)
    few = load_reference(tmp_path / "few.npz", extractor, **options)
    assert few.id == "few" and len(few.features) == 10
    values = {figure.name: figure.value for figure in compare(generated, few, extractor, **options)}
    assert values["FID"] == pytest.approx(float(out.pop("fid_with_npz_stats")), abs=1e-4)
    exact = precision_recall(real=few.features, generated=measured.features)
    for position, name in enumerate(("precision", "recall")):
        assert values[name] == exact[position]
        expected, count = float(out.pop(f"{name}_npz10")), (config["n_gen"], 10)[position]
        assert abs(values[name] - expected) <= 2.5 / count
    assert not out
