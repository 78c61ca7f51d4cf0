"""Local tasks of lm-evaluation-harness, in a folder: `people` chooses, `write` generates."""

from __future__ import annotations

import json
from pathlib import Path

from tests.tools.tiny_model import NAMES, PLACES

_HEAD = """task: {task}
dataset_path: json
dataset_kwargs:
  data_files:
    test: people.jsonl
test_split: test
doc_to_text: "{{{{question}}}}"
"""
_CHOICE = """output_type: multiple_choice
doc_to_choice: "{{choices}}"
doc_to_target: answer
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
"""
_WRITE = """output_type: generate_until
doc_to_target: "{{choices[answer]}}"
generation_kwargs:
  until: ["."]
  max_gen_toks: 6
  do_sample: false
metric_list:
  - metric: exact_match
    aggregation: mean
    higher_is_better: true
"""


def write_tasks(folder: Path) -> Path:
    """Two tasks on the same twelve items, whose questions differ in length."""
    folder.mkdir(exist_ok=True)
    for task, rest in (("people", _CHOICE), ("write", _WRITE)):
        (folder / f"{task}.yaml").write_text(_HEAD.format(task=task) + rest)
    lines = []
    for index in range(12):
        name = NAMES[index % len(NAMES)]
        asked = f"{name} was born in {1800 + index}" * (1 + index % 3)
        choices = [PLACES[(index + step) % len(PLACES)] for step in range(3)]
        lines.append({"question": f"{asked} in", "choices": choices, "answer": index % 3})
    (folder / "people.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder
