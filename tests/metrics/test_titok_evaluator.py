"""TiTok's streaming evaluator against our sums, in one process and in several."""

import pytest
import torch

from golden_cases import golden
from tessera.data import unit_to_uint8
from tessera.metrics.codebook import CodebookUsage, entropy, usage
from tessera.metrics.fid import FrechetDistance
from tessera.metrics.inception_score import InceptionScore


@pytest.mark.golden
@pytest.mark.parametrize("case", ["eval_titok_evaluator"])
def test_streaming_evaluator(case):
    file = golden(case)
    config, out, compared = file.config, file.output, set()
    projection, head = file.weights["fake_inception.proj"], file.weights["fake_inception.fc"]

    def features(images_u8: torch.Tensor) -> torch.Tensor:
        return (((images_u8.double() - 128) / 128).flatten(1) @ projection.T).relu()

    def close(actual: torch.Tensor, key: str, tolerance: float = 1e-9) -> None:
        torch.testing.assert_close(torch.as_tensor(actual), out[key], rtol=tolerance, atol=tolerance)
        compared.add(key)

    batches = range(len(config["batches"]))
    for run, chosen in (("all", batches), ("rank0", batches[::2]), ("rank1", batches[1::2])):
        distance = FrechetDistance(config["d"])
        score, codes = InceptionScore(config["classes"]), CodebookUsage(config["codes"])
        for number in chosen:
            real, fake = (unit_to_uint8(file.input[f"{side}_{number}"], "truncate") for side in ("real", "fake"))
            tokens = file.input[f"indices_{number}"]
            assert tokens.shape == (config["batches"][number], config["tokens"]) and real.shape[-1] == config["s"]
            distance.update(features(real), real=True)
            distance.update(features(fake), real=False)
            score.update(features(fake) @ head.T)
            codes.update(tokens[:, None])
        close(distance.compute(), f"{run}/rFID", 1e-6 if int(distance.fake_n) > config["d"] else 1e-4)
        close(score.compute(), f"{run}/InceptionScore", 1e-9)
        counts = codes.compute()[0, 0]
        close(entropy(counts, base=2), f"{run}/CodebookEntropy", 1e-5)  # it adds 1e-8 inside the logarithm
        close(usage(counts), f"{run}/CodebookUsage")
        close(counts.double(), f"{run}/state_codebook_frequencies")
        close(distance.fake_n, f"{run}/state_num_examples")
        for side in ("real", "fake"):
            close(getattr(distance, f"{side}_sum"), f"{run}/state_rfid_{side}_total")
            close(getattr(distance, f"{side}_outer"), f"{run}/state_rfid_{side}_sigma")
        close(score.probability[0], f"{run}/state_is_prob_total")
        # there by class, here summed over them
        kl = out[f"{run}/state_is_total_kl_d"].sum()
        torch.testing.assert_close(score.negative_entropy[0], kl, rtol=1e-9, atol=1e-9)
        compared.add(f"{run}/state_is_total_kl_d")
    fake = file.input["fake_0"]
    assert torch.equal(unit_to_uint8(fake, "truncate"), out["uint8_fake_0"])
    assert torch.equal(unit_to_uint8(fake, "half_even"), out["uint8_fake_0_eval_reconstruction"])
    compared |= {"uint8_fake_0", "uint8_fake_0_eval_reconstruction"}
    assert compared == set(out)
