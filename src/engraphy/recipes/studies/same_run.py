"""Runs that several studies ask for. One has measured it, the others take its result."""

from __future__ import annotations

from pathlib import Path

from .comparison_config import Job
from .queue import Result, read_json


def same_run(job: Job, recipe: str, out: Path) -> tuple[Path, Result] | None:
    """Finds the result of the same training in the folders beside `out`.

    Args:
        job: A run without a result.
        recipe: What it trains, as `ArmRecipe.key` says it.
        out: Folder of the study's results.

    Returns:
        The file and the result; None if there is none.

    Raises:
        ConfigError: A file beside it is damaged.
    """
    for path in sorted(out.absolute().parent.glob(f"*/*-seed{job.seed}-lr{job.lr:g}.json")):
        result = read_json(path)
        settings = ("seed", "lr", "tokens", "data", "backbone")
        same = all(result["job"].get(name) == job.fields[name] for name in settings)
        if same and result.get("recipe") == recipe:
            return path, result
    return None
