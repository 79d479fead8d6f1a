"""Small data sets written to disk, in the layouts that are read."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

NAMES = ("ant", "bee", "cow")


def picture(seed: int, side: int | tuple[int, int] = 8, mode: str = "RGB") -> Image.Image:
    """A random image; `side` is a side or (width, height)."""
    width, height = (side, side) if isinstance(side, int) else side
    channels = {"L": (), "RGB": (3,), "RGBA": (4,), "CMYK": (4,), "LA": (2,)}[mode]
    values = np.random.default_rng(seed).integers(0, 256, (height, width, *channels), np.uint8)
    return Image.frombytes(mode, (width, height), values.tobytes())


def encode(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def write_tree(root: Path, names=NAMES, train: int = 4, test: int = 2, side=8, mode: str = "RGB",
               test_folder: str = "test") -> Path:
    """An ImageFolder tree of random PNGs: `train` and `test` images for each class."""
    seed = 0
    for part, count in (("train", train), (test_folder, test)):
        for name in names:
            folder = root / part / name
            folder.mkdir(parents=True)
            for i in range(count):
                picture(seed, side, mode).save(folder / f"{i:03d}.png")
                seed += 1
    return root


def write_parquet(path: Path, labels, images=None, *, names=NAMES, image_column="image", label_column="label",
                  plain=False, group=3, label_type=None) -> Path:
    """A parquet file as `datasets` writes it; `names` None leaves the metadata out, `plain` stores bare bytes."""
    images = [encode(picture(i)) for i in range(len(labels))] if images is None else images
    cells = images if plain else [{"bytes": data, "path": f"{i}.png"} for i, data in enumerate(images)]
    kind = pa.binary() if plain else pa.struct({"bytes": pa.binary(), "path": pa.string()})
    table = pa.table({image_column: pa.array(cells, kind), label_column: pa.array(labels, label_type)})
    if names is not None:
        features = {image_column: {"_type": "Image"}, label_column: {"names": list(names), "_type": "ClassLabel"}}
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path, row_group_size=group)
    return path
