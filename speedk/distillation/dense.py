"""The set behind a distilled file as it was trained, before it was made sparse."""

from __future__ import annotations

import copy
from pathlib import Path

import torch

from speedk.distillation import checkpoint, runfiles
from speedk.distillation.artifact import Distilled
from speedk.errors import ConfigError


def dense(distilled: Distilled) -> Distilled:
    """`distilled` with nothing left out, from the newest checkpoint of the run directory in which it lies.

    What it decodes to is "before" of the paper's Figure 4. Whether the checkpoint is the one that the file was made
    from is tested: made sparse, it must give the file's tensors, bit for bit. Raises ConfigError where it is not, where
    there is none, or where the method leaves nothing out; TrainingError for checkpoints that cannot be read.
    """
    stored = distilled.synthetic
    with torch.random.fork_rng(devices=[]):
        trained = stored.whole()
    if trained is None:
        raise ConfigError(f"{distilled.path} holds {distilled.method}, which stores all that it learns: nothing was "
                          "made sparse")
    folder = Path(distilled.path).parent / runfiles.CHECKPOINTS
    found = checkpoint.load_newest(folder, torch.device("cpu"))
    if found is None:
        raise ConfigError(f"there are no checkpoints in {folder}: the entries that the file leaves out are found in "
                          "its run directory alone")
    try:
        trained.load_state_dict(found[1]["synthetic"])
    except (RuntimeError, KeyError, TypeError):
        raise ConfigError(f"the checkpoints in {folder} are of another set than {distilled.path}") from None
    again = copy.deepcopy(trained)
    again.finalize()
    wanted = stored.storage()
    if any(not torch.equal(tensor, wanted[name]) for name, tensor in again.storage().items()):
        raise ConfigError(f"the newest checkpoint, of step {found[0]:,}, is not the one that {distilled.path} was made "
                          "from: let the run end with --resume")
    return Distilled(distilled.path, distilled.header, trained)
