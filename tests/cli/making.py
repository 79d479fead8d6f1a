"""What a saved file says of its making, for tests of the commands."""

from __future__ import annotations


def header(names, channels, normaliser=None):
    return {
        "recipe": {"recipe": {"name": "small", "row": "ours"}},
        "class_names": names,
        "normaliser": normaliser or {"kind": "channel", "mean": [0.5] * channels, "std": [0.25] * channels},
        "data": {"name": "toys", "split": "stratified", "note": "a note", "fingerprint": "f" * 64},
        "seed": 3, "protocol": "mtt", "objective": {"name": "dm", "lr": 0.01}, "chosen": "no GPU", "budget_off": True,
    }  # fmt: skip
