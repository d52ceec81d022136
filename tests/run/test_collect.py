"""The table of a sweep's runs: states, differing overrides, figures by label, averages."""

import csv
import json

import pytest
import yaml

from run.checkpoints import run as evaluate
from tessera.errors import ConfigError, DataError, MissingFileError
from tessera.run.collect import Collect, read_run

RFID, GFID = "rFID[x]@N=4", "gFID[x]@N=9"


def figure(label, value):
    return {"name": label.split("[")[0], "label": label, "value": value}


def write(folder, overrides, results=None, failure=None):
    folder.mkdir(parents=True)
    (folder / "run.yaml").write_text(yaml.safe_dump([{"overrides": ["seed=9"]}, {"overrides": overrides}]))
    if results is not None:
        (folder / "results.json").write_text(json.dumps(results))
    if failure is not None:
        (folder / "failed.yaml").write_text(yaml.safe_dump({"error": failure, "overrides": overrides}))


@pytest.fixture
def sweep(tmp_path):
    """Four finished runs, one stopped, one failed, one that runs or was killed."""
    common = ["experiment=digits/tokenizer", "ckpt=auto"]
    for part, base in (("vq", 3.0), ("ibq", 1.0)):
        for seed in (0, 1):
            results = {"stopped_by": None, "seconds": 2.5, "figures": [figure(RFID, base + seed)]}
            write(
                tmp_path / f"sweep/{part}/{seed}",
                [*common, f"quantizer/codebook={part}", f"seed={seed}"],
                results,
            )
    stopped = {"stopped_by": "SIGTERM", "figures": []}
    write(tmp_path / "sweep/c", [*common, "quantizer/codebook=vq", "seed=2"], stopped)
    write(tmp_path / "sweep/d", [*common, "quantizer/codebook=fsq", "+seed=0"], failure="levels do not fit")
    write(tmp_path / "sweep/e", [*common, "quantizer/codebook=vq", "seed=3"])
    return tmp_path / "sweep"


def test_collected_table(sweep, tmp_path, capsys):
    results = evaluate(tmp_path, "task=collect", f"task.folder={sweep}", "name=table", "task.sort=rFID")
    rows = results["runs"]
    columns = ["run", "quantizer/codebook", "seed", RFID, "seconds", "state"]  # not what all have, nor ckpt
    assert [list(row) for row in rows] == [columns] * 7
    assert [row["run"] for row in rows[:4]] == ["ibq/0", "ibq/1", "vq/0", "vq/1"]
    assert [row[RFID] for row in rows] == [1.0, 2.0, 3.0, 4.0, None, None, None]
    states = {row["run"]: row["state"] for row in rows}
    assert states["vq/0"] == "finished" and states["c"] == "stopped by SIGTERM"
    assert states["d"] == "failed: levels do not fit" and states["e"] == "unfinished"
    shown = capsys.readouterr().out
    assert RFID in shown and "ibq/1" in shown
    assert json.loads((tmp_path / "table/collected.json").read_text()) == rows
    with (tmp_path / "table/collected.csv").open() as file:
        written = list(csv.DictReader(file))
    assert [float(row[RFID]) for row in written[:4]] == [1.0, 2.0, 3.0, 4.0] and written[4][RFID] == ""


def test_averages_over_seeds(sweep):
    task = Collect(str(sweep), over="seed")
    rows = {row["quantizer/codebook"]: row for row in task.rows(task.read(sweep))}
    assert rows["ibq"][RFID] == 1.5 and rows["ibq"][f"{RFID} half range"] == 0.5
    assert rows["ibq"]["run"] == "2 of 2 finished" and rows["ibq"]["state"] == "finished"
    assert rows["vq"][RFID] == 3.5 and rows["vq"]["run"] == "2 of 4 finished"
    assert rows["fsq"][RFID] is None and "levels" in rows["fsq"]["state"]


def test_figures_before_and_after_post_training(tmp_path):
    figures = {"before": [figure(GFID, 3.0), figure(RFID, 1.0)], "after_ema": [figure(GFID, 2.0)]}
    write(tmp_path / "a", ["x=1"], {"stopped_by": None, "figures": figures})
    found = read_run(tmp_path / "a")
    assert found.figures == {f"before/{GFID}": 3.0, f"before/{RFID}": 1.0, f"after_ema/{GFID}": 2.0}
    task = Collect(str(tmp_path), figures=["gFID", f"after_ema/{GFID}"])
    assert task.labels([found]) == [f"before/{GFID}", f"after_ema/{GFID}"]


def test_a_finished_run_stays_finished(tmp_path):
    """Whatever a later attempt to start it anew has left."""
    write(tmp_path / "a", [], {"stopped_by": None, "figures": []}, failure="already holds a run")
    assert read_run(tmp_path / "a").finished


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"over": "seeds"}, r"task\.over=seeds: the runs don't differ in it, but in quantizer/codebook, seed"),
        ({"figures": ["gFID"]}, r"no run has a figure gFID; measured were: rFID\[x\]@N=4"),
        ({"sort": "PSNR"}, "no run has a figure PSNR"),
    ],
)
def test_refused_choices(sweep, arguments, message):
    task = Collect(str(sweep), **arguments)
    with pytest.raises(ConfigError, match=message):
        task.rows(task.read(sweep))


def test_refused_folders(tmp_path):
    with pytest.raises(MissingFileError, match=r"task\.folder=.*nowhere does not exist"):
        Collect(str(tmp_path / "nowhere")).read(tmp_path)
    with pytest.raises(ConfigError, match="has no run in it"):
        Collect(str(tmp_path)).read(tmp_path)
    write(tmp_path / "a", [])
    (tmp_path / "a/results.json").write_text("{")
    with pytest.raises(DataError, match=r"results\.json can't be read"):
        Collect([str(tmp_path)]).read(tmp_path)
