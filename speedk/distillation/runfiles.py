"""The names of what lies in a run directory. Nothing is imported here: `--help` answers at once."""

from __future__ import annotations

RECIPE = "recipe.toml"  # resolved
DATA = "data.json"  # what was distilled
LOG = "log.jsonl"
PREVIEW = "preview.png"
CHECKPOINTS = "checkpoints"
EVENTS = "tensorboard"
DISTILLED = "distilled.safetensors"
EVALUATION = "evaluation.json"  # the report, beside the distilled file
CELL = "cell.json"  # what a sweep or a table has measured
