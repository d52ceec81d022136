"""The claims study: what it plans, how it judges, and the report of given values."""

import json

import pytest

from conf_commands import composed
from tessera.errors import MissingFileError
from tessera.run.claims.claims import CLAIMS
from tessera.run.claims.findings import FAILS, HOLDS, OPEN, Value, at_most, combined, higher, lower, rank_correlations
from tessera.run.claims.measured import collect, load_summary, save_summary
from tessera.run.claims.plan import all_runs, chains, ranked_tokenizers
from tessera.run.claims.report import verdict_of, write_report
from tessera.run.claims.study import main
from tessera.run.strict import check_config

LEFT, RIGHT = Value("left", "gFID"), Value("right", "gFID")


def values(**runs):
    """Measured values of one metric: run=[one per seed]."""
    return {name: {seed: {"": {"gFID": v}} for seed, v in enumerate(found)} for name, found in runs.items()}


@pytest.mark.parametrize(
    ("left", "right", "verdict"),
    [
        ([1, 2, 3], [2, 3, 4], HOLDS),
        ([2, 3, 4], [1, 2, 3], FAILS),
        ([1, 3, 1], [2, 2, 2], OPEN),
        ([1, 1], [2], HOLDS),  # seeds that both sides have
        ([], [1, 2], "not measured"),
    ],
)
def test_a_verdict_takes_every_seed(left, right, verdict):
    assert lower("", LEFT, RIGHT).verdict(values(left=left, right=right)) == verdict
    assert higher("", RIGHT, LEFT).verdict(values(left=left, right=right)) == verdict


def test_little_cost_is_a_ratio():
    cost = at_most("", LEFT, RIGHT, 1.12)
    assert cost.verdict(values(left=[1.1, 1.0], right=[1.0, 1.0])) == HOLDS
    assert cost.verdict(values(left=[1.2, 1.2], right=[1.0, 1.0])) == FAILS
    assert cost.numbers(values(left=[1.0, 3.0], right=[1.0, 2.0])) == "2 against 1.5 (x 1.25 ± 0.25)"


def test_numbers_are_differences_within_a_seed():
    assert lower("", LEFT, RIGHT).numbers(values(left=[1, 5], right=[2, 8])) == "3 against 5 (-2 ± 1)"


def test_a_claim_needs_all_of_its_statements():
    assert combined([HOLDS, HOLDS]) == HOLDS
    assert combined([FAILS, FAILS]) == FAILS
    assert combined([HOLDS, FAILS, OPEN]) == "fails in part"
    assert combined([HOLDS, OPEN]) == combined([HOLDS, "not measured"]) == OPEN


def test_ranks_leave_incomplete_seeds_out():
    measured = {}
    for number, name in enumerate("abc"):
        measured[name] = {seed: {"": {"pFID": number}} for seed in (0, 1)}
        measured[f"{name}/rar"] = {0: {"": {"gFID": -number}}, 1: {"": {"gFID": number * 2.0}}}
    assert rank_correlations(measured, "abc", "pFID") == pytest.approx({0: -1.0, 1: 1.0})
    del measured["c/rar"][1]
    assert rank_correlations(measured, "abc", "pFID") == pytest.approx({0: -1.0})


def test_runs_follow_what_they_need():
    assert len({run.name for run in all_runs()}) == len(all_runs())
    assert len(ranked_tokenizers()) >= 8
    for chain in chains():
        done = set()
        for run in chain:
            assert {run.tokenizer, run.generator} <= {None, *done}, run
            done.add(run.name)


@pytest.mark.parametrize("run", {(run.recipe, run.overrides): run for run in all_runs()}.values(), ids=lambda r: r.name)
def test_every_command_composes(run):
    check_config(composed(run.script, run.arguments(0, "outputs")), run.script)


def test_every_statement_is_about_planned_runs():
    names = {run.name for run in all_runs()}
    for claim in CLAIMS:
        for comparison in claim.comparisons:
            assert {comparison.left.run, comparison.right.run} <= names, comparison.text


def as_results(folder, figures):
    folder.mkdir(parents=True)
    listed = {
        state: [{"name": k, "label": f"{k}@N=10", "value": v} for k, v in found.items()]
        for state, found in figures.items()
    }
    content = {"figures": listed.get("", listed), "seconds": 1.5, "stopped_by": None}
    (folder / "results.json").write_text(json.dumps(content))


@pytest.fixture
def outputs(tmp_path):
    """Results of every run of two seeds, in which every post-training helps and the IBQ runs use more codes."""
    for seed in (0, 1):
        for number, run in enumerate(all_runs()):
            if run.generator:
                found = {
                    "before": {"gFID": 9.0 + seed, "rFID": 3.0},
                    "after_raw": {"gFID": 8.0, "rFID": 3.0},
                    "after_ema": {"gFID": 7.0 + seed + 0.01 * number, "rFID": 3.0},
                }
            elif run.tokenizer:
                found = {"": {"gFID": 10.0 + number}}
            else:
                usage = 0.9 if run.name.startswith("ibq") else 0.2
                found = {
                    "": {
                        "PSNR": 20.0 + number,
                        "rFID": 5.0 - 0.01 * number,
                        "pFID": 6.0 + number,
                        "usage_branch0": usage,
                    }
                }
            as_results(tmp_path / "outputs" / run.folder(seed), found)
    return tmp_path / "outputs"


def test_the_report_says_what_was_measured(outputs, tmp_path):
    measured, facts = collect(outputs, seeds=3)
    assert facts["labels"]["gFID"] == ["gFID@N=10"] and facts["seconds"] == round(1.5 * 2 * len(all_runs()))
    save_summary(tmp_path / "claims" / "results.json", measured, facts)
    again, facts = load_summary(tmp_path / "claims" / "results.json")
    assert again == measured
    verdicts = {claim.key: verdict_of(claim, measured) for claim in CLAIMS}
    assert verdicts["c"] == verdicts["g"] == HOLDS
    assert verdicts["e"] == HOLDS  # pFID rises with gFID from run to run, rFID falls
    page = write_report(tmp_path, measured, facts).read_text()
    for claim in CLAIMS:
        assert f"## ({claim.key}) {claim.text}" in page and f"Here: **{verdicts[claim.key]}**" in page
    assert "| pFID | 1.00 ± 0.00 | 1.00, 1.00 |" in page and "| rFID | -1.00 ± 0.00 | -1.00, -1.00 |" in page
    assert "9.50 ± 0.50" in page  # mean and half range over seeds of a gFID before
    for run in all_runs():
        assert f"python {run.script}.py {' '.join(run.arguments(0, 'outputs'))}\n" in page
    for plot in ("sigma", "ranks", "usage"):
        assert f"(claims/{plot}.png)" in page and (tmp_path / "claims" / f"{plot}.png").stat().st_size > 1000


def test_an_unfinished_study_is_reported_as_such(tmp_path):
    as_results(tmp_path / "outputs/claims/seed0/plain", {"": {"rFID": 1.0, "pFID": 2.0}})
    main(["--outputs", str(tmp_path / "outputs"), "--docs", str(tmp_path), "--report-only"])
    page = (tmp_path / "claims.md").read_text()
    assert "**not measured**" in page and "**holds**" not in page.split("## Summary")[1]


def test_a_missing_summary_is_named(tmp_path):
    with pytest.raises(MissingFileError, match=r"results\.json"):
        main(["--docs", str(tmp_path), "--from-summary"])
