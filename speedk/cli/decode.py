"""speedk decode: a distilled file as ordinary images, for code that knows nothing of speedk."""

from __future__ import annotations

import argparse
import json
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from speedk.cli._files import distilled_file
from speedk.errors import ConfigError
from speedk.files import unwritable

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from speedk.distillation.artifact import Distilled

HELP = "Write the images of a distilled file as PNG files, a parquet file or a NumPy archive."
EPILOG = """formats:
  png      DIR/CLASS/0000.png: an ImageFolder, 8 bits a channel
  parquet  DIR/train.parquet: columns image (PNG) and label, as Hugging Face `datasets` reads them, 8 bits a channel
  npz      DIR/distilled.npz: arrays images, labels, class_names, space; float32, nothing is rounded

examples:
  speedk decode distilled.safetensors --out images
  speedk decode distilled.safetensors --out arrays --format npz --space unit
"""
LOWER = "npz holds all images at once; png and parquet do not"

_BATCH_BYTES = 16 << 20


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", metavar="FILE", help="a distilled file (.safetensors), or the run directory it is in")
    parser.add_argument("--out", metavar="DIR", type=Path, required=True, help="a folder that is new or empty")
    parser.add_argument("--format", choices=("png", "parquet", "npz"), default="png", help="default: png")
    parser.add_argument("--space", choices=("normalised", "unit"), help="npz: images as networks train on them "
                        "(normalised, the default), or as pictures clipped to 0 to 1 (unit)")


def run(args: argparse.Namespace) -> int:
    from speedk.distillation import artifact

    if args.space and args.format != "npz":
        raise ConfigError(f"--space is for npz: {args.format} files always hold pictures")
    _refuse_used(args.out)
    distilled = artifact.load(distilled_file(args.file))
    temporary = args.out.with_name(f".{args.out.name}.{secrets.token_hex(4)}.partial")
    try:
        try:
            temporary.mkdir(parents=True)
            said = _WRITERS[args.format](distilled, temporary, args.space or "normalised")
            temporary.rename(args.out)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
    except OSError as error:
        raise unwritable(args.out, error) from error
    print(f"{args.out}: {len(distilled):,} images in {distilled.geometry.classes} classes, {said}")
    return 0


def _refuse_used(folder: Path) -> None:
    if folder.name in ("", ".."):
        raise ConfigError(f"--out {folder} is not the name of a new folder")
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise ConfigError(f"{folder} exists and is not an empty folder: remove it, or choose another --out")


def _pictures(distilled: Distilled) -> Iterator[tuple[Tensor, np.ndarray]]:
    """Batches of (index [B], uint8 [B, H, W, C]), with a progress bar where it takes long and somebody watches."""
    import torch
    from tqdm import tqdm

    from speedk import pictures

    batch = max(1, _BATCH_BYTES // (4 * distilled.geometry.pixels))
    with tqdm(total=len(distilled), desc="decoding", unit="img", delay=2, leave=False, disable=None) as bar:
        for index in torch.arange(len(distilled)).split(batch):
            yield index, pictures.to_bytes(distilled.images("unit", index))
            bar.update(len(index))


def _png(distilled: Distilled, folder: Path, space: str) -> str:
    from speedk import pictures

    names, numbered = folder_names(distilled.class_names)
    for name in names:
        (folder / name).mkdir()
    seen = [0] * len(names)
    digits = max(4, len(str(max(distilled.header["images_per_class"]))))
    for index, batch in _pictures(distilled):
        for label, pixels in zip(distilled.classes[index].tolist(), batch, strict=True):
            path = folder / names[label] / f"{seen[label]:0{digits}d}.png"
            path.write_bytes(pictures.png(pictures.to_image(pixels)))
            seen[label] += 1
    said = "as PNG files of 8 bits a channel" + (", folders numbered in the order of the classes" if numbered else "")
    if distilled.header["label_numbers"]:
        said += "; its learned labels are not in them: parquet and npz hold those"
    return said


def folder_names(names: list[str]) -> tuple[list[str], bool]:
    """A folder for each class, in an order that sorts as the labels do, and whether that took numbers.

    The names themselves where they are in order already and no file system minds them; else numbered, with whatever is
    not a letter, a digit, or one of "-_. " replaced.
    """
    safe = ["".join(c if c.isalnum() or c in "-_ ." else "_" for c in name).strip(" .")[:60] for name in names]
    if safe == names and sorted(names) == names and len({name.casefold() for name in names}) == len(names):
        return names, False
    digits = len(str(len(names) - 1))
    return [f"{i:0{digits}d}_{name}" for i, name in enumerate(safe)], True


def _parquet(distilled: Distilled, folder: Path, space: str) -> str:
    import pyarrow as pa
    import pyarrow.parquet as pq

    from speedk import pictures

    features = {"image": {"_type": "Image"}, "label": {"names": distilled.class_names, "_type": "ClassLabel"}}
    image = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    fields = [pa.field("image", image), pa.field("label", pa.int64())]
    soft = bool(distilled.header["label_numbers"])
    if soft:
        features["soft_label"] = {"feature": {"dtype": "float32", "_type": "Value"}, "_type": "Sequence"}
        fields.append(pa.field("soft_label", pa.list_(pa.float32())))
    schema = pa.schema(fields, {"huggingface": json.dumps({"info": {"features": features}})})
    labels = distilled.labels
    with pq.ParquetWriter(folder / "train.parquet", schema) as writer:
        for index, batch in _pictures(distilled):
            images = [{"bytes": pictures.png(pictures.to_image(pixels)), "path": f"{i:06d}.png"}
                      for i, pixels in zip(index.tolist(), batch, strict=True)]
            columns = [images, distilled.classes[index].tolist(), *([labels[index].tolist()] if soft else [])]
            arrays = [pa.array(column, field.type) for column, field in zip(columns, schema, strict=True)]
            writer.write_batch(pa.record_batch(arrays, schema=schema))
    return "as train.parquet, PNG of 8 bits a channel" + (", learned labels as soft_label" if soft else "")


def _npz(distilled: Distilled, folder: Path, space: str) -> str:
    import numpy as np

    np.savez(folder / "distilled.npz", images=distilled.images(space).numpy(), labels=distilled.labels.numpy(),
             class_names=np.array(distilled.class_names), space=np.array(space))
    meaning = {"normalised": "normalised: what networks train on", "unit": "pictures, clipped to 0 to 1"}
    return f"as distilled.npz, float32, {meaning[space]}"


_WRITERS = {"png": _png, "parquet": _parquet, "npz": _npz}
