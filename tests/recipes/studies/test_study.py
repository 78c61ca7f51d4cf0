"""The engine: a study of a few lines runs in processes, resumes, and keeps other settings out."""

from __future__ import annotations

import dataclasses
import inspect
import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from engraphy.errors import ConfigError, EngraphyError
from engraphy.recipes.studies import STUDIES
from engraphy.recipes.studies.queue import Job
from engraphy.recipes.studies.rates import Rates, RateSearch
from engraphy.recipes.studies.study import Study, check_seeds, run_study, study_table
from engraphy.recipes.studies.tables import markdown, missing, rate_table

# A whole study.

ARMS = {"flat": "Flat", "steep": "Steep"}


@dataclass(frozen=True)
class Parabola(Job):
    power: int


@dataclass(frozen=True)
class ParabolaConfig:
    seeds: tuple[int, ...] = (0, 1)
    power: int = 2

    def search(self) -> RateSearch:
        rates = dict.fromkeys(ARMS, Rates.around((0.1, 0.2, 0.3, 0.4, 0.5), 0.3, beyond=1))
        return RateSearch(rates, self.seeds, self.job, lambda result: result["loss"])

    def job(self, arm: str, seed: int, lr: float) -> Parabola:
        return Parabola(arm, seed, lr, self.power)


def jobs(config, found):
    return config.search().jobs(found)


def run(job, config, work):
    if job.power < 0:
        raise ConfigError("power: expected 0 or more")
    assert (work / "ready").exists()
    slope = 3 if job.arm == "steep" else 1
    return {"loss": job.seed + slope * abs(job.lr - 0.2) ** job.power}


def line(result):
    return f"loss {result['loss']:.3f}"


def table(config, jobs, found, out):
    search = config.search()
    losses = {arm: search.losses(arm, found) for arm in ARMS}
    names = [job.name for job in jobs if job not in found]
    return markdown([rate_table("loss", ARMS, losses, (0.1, 0.2, 0.3)), [missing(names)]])


def prepare(config, jobs, work):
    work.mkdir(exist_ok=True)
    (work / "ready").touch()


STUDY = Study("parabola", ParabolaConfig, jobs, run, line, table, prepare)


@pytest.mark.slow
def test_a_study_of_one_file_runs_its_search_in_processes_and_resumes(tmp_path):
    lines: list[str] = []
    out, work = tmp_path / "out", tmp_path / "work"
    run_study(STUDY, ParabolaConfig(), out, 2, lines.append, work)
    names = {f"{arm}-seed0-lr{lr}.json" for arm in ARMS for lr in (0.1, 0.2, 0.3, 0.4)}
    names |= {f"{arm}-seed1-lr0.2.json" for arm in ARMS}
    assert {path.name for path in out.iterdir()} == names
    assert len(lines) == len(names) and "steep-seed1-lr0.2.json: loss 1.000" in lines
    result = json.loads((out / "steep-seed0-lr0.3.json").read_text())
    assert result["job"] == {"arm": "steep", "seed": 0, "lr": 0.3, "power": 2}
    assert list(result) == ["job", "loss", "version", "commit", "machine"]
    text = study_table(STUDY, ParabolaConfig(), out)
    assert "| Steep | 0.0300 | 0.0000 | 0.0300 |" in text and "Missing: nothing." in text
    # What is lost is run again, and nothing else.
    (out / "flat-seed1-lr0.2.json").unlink()
    assert "Missing: flat-seed1-lr0.2.json." in study_table(STUDY, ParabolaConfig(), out)
    del lines[:]
    run_study(STUDY, ParabolaConfig(), out, 2, lines.append, work)
    assert lines == ["flat-seed1-lr0.2.json: loss 1.000"]
    with pytest.raises(ConfigError, match="'power': 3"):
        run_study(STUDY, ParabolaConfig(power=3), out, 2, lines.append, work)


@pytest.mark.slow
def test_a_run_that_fails_is_named(tmp_path):
    config = ParabolaConfig(power=-1)
    with pytest.raises(EngraphyError, match="flat-seed0-lr0.3.json: ConfigError: power: expected"):
        run_study(STUDY, config, tmp_path / "out", 1, print, tmp_path / "work")
    assert not list((tmp_path / "out").iterdir())


def test_results_of_another_dtype_are_refused(tmp_path):
    job = ParabolaConfig().job("flat", 0, 0.3)
    result = {"job": dataclasses.asdict(job), "loss": 1.0, "machine": "a CPU, one thread, float32"}
    (tmp_path / job.name).write_text(json.dumps(result))
    assert "| Flat | – | – | 1.0000 |" in study_table(STUDY, ParabolaConfig(), tmp_path)
    other = dataclasses.replace(STUDY, dtype="bfloat16")
    with pytest.raises(ConfigError, match="expected a result in bfloat16, found one of float32"):
        study_table(other, ParabolaConfig(), tmp_path)


@pytest.mark.parametrize("seeds", [(), (1, 1), (0, -1)])
def test_seeds_are_different_and_none_is_negative(seeds):
    with pytest.raises(ConfigError, match="seeds: expected one or more"):
        check_seeds(seeds)


@pytest.mark.parametrize("name", STUDIES)
def test_a_listed_study_is_there_with_its_options(name):
    entry = STUDIES[name]
    study = entry.load()
    assert study.name == entry.name == name and entry.sentence.endswith(".")
    fields = {field.name: field for field in dataclasses.fields(study.config)}
    assert set(entry.options) <= set(fields)
    required = [name for name, field in fields.items() if field.default is dataclasses.MISSING]
    assert set(required) <= set(entry.options)
    assert inspect.getmodule(study.run).__name__.startswith("engraphy.recipes.studies")


def test_the_list_of_studies_needs_no_torch():
    code = "import sys; from engraphy.recipes.studies import STUDIES; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_the_folder_of_what_can_be_made_again_has_a_default(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    used: list[Path] = []
    empty = dataclasses.replace(
        STUDY, jobs=lambda config, found: [], prepare=lambda *_: used.append(_[2])
    )
    run_study(empty, ParabolaConfig(), tmp_path / "out", 1, print)
    assert used == [] and [path.name for path in tmp_path.iterdir()] == ["out"]
