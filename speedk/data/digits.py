"""The embedded data set: the 1,797 handwritten digits that scikit-learn's package holds."""

from __future__ import annotations

import numpy as np
from PIL import Image

from speedk.data.decode import to_array
from speedk.errors import DataError

SIDE = 8
"""Of the originals, pixels; their values are 0 to 16."""
TEST_SHARE = 0.2
SEED = 0


def load_digits(resolution: int) -> tuple[tuple[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]:
    """(images uint8 [M, 1, resolution, resolution], labels int64 [M]) of the training and of the test part.

    Taken from scikit-learn, whose package carries the file: no network, and no copy of it here. The split takes a
    fifth of each class, drawn with a fixed seed from a stream that NumPy keeps unchanged between versions.
    """
    try:
        from sklearn.datasets import load_digits as from_sklearn
    except ImportError:
        raise DataError("the data set 'digits' comes with scikit-learn, which is not installed: "
                        "pip install scikit-learn") from None
    found = from_sklearn()
    pixels = np.rint(found.images * (255 / 16)).astype(np.uint8)
    images = np.stack([to_array(Image.fromarray(image), resolution) for image in pixels])
    labels = found.target.astype(np.int64)
    stream = np.random.RandomState(SEED)
    test = np.zeros(len(labels), bool)
    for label in range(labels.max() + 1):
        members = np.flatnonzero(labels == label)
        test[stream.permutation(members)[:round(TEST_SHARE * len(members))]] = True
    return (images[~test], labels[~test]), (images[test], labels[test])
