"""The data sets that have a name: what they are, how they are normalised, and where they come from."""

from __future__ import annotations

from dataclasses import dataclass

from speedk.errors import ConfigError
from speedk.geometry import Geometry
from speedk.registry import nearest

_CIFAR_STATISTICS = ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010))
_IMAGENET_STATISTICS = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


@dataclass(frozen=True)
class Hub:
    """Where a data set lies on the Hugging Face hub: `train` and `test` are split names, or, where `files` says so,
    patterns of parquet files at `revision`; `{size}` in a pattern is the release that suits the resolution."""

    repository: str
    image: str = "image"
    label: str = "label"
    train: str = "train"
    test: str = "test"
    files: bool = False
    revision: str | None = None
    warning: str = ""
    """Said before the download begins."""


@dataclass(frozen=True)
class Entry:
    """One named data set."""

    name: str
    geometry: Geometry
    normaliser: str
    """"channel" or "zca", unless the caller says otherwise."""
    statistics: tuple[tuple[float, ...], tuple[float, ...]] | None
    """Channel means and standard deviations of the published protocol, or None: computed from the training images."""
    hub: Hub | None
    split: str
    """The split that `hub` holds: "official", "fastai", "ilsvrc"; of `digits`, how it is made."""
    counts: tuple[int, int] | None = None
    """Training and test images of that split."""
    ilsvrc: tuple[int, ...] = ()
    """ILSVRC indices of the classes, in class order, where the set is a subset of ImageNet."""
    ilsvrc_names: tuple[str, ...] = ()
    wnids: tuple[str, ...] = ()
    """The classes' folder names in the downloads that use WordNet numbers."""
    download: str = ""
    """What to fetch by hand, and what the folder then holds."""


ILSVRC_CLASSES = 1000
ILSVRC_TEST_PER_CLASS = 50
ILSVRC_HUB = Hub("ILSVRC/imagenet-1k", train="data/train-*", test="data/validation-*", files=True,
                 warning=" (150 GB; its terms must be accepted on its page, and `hf auth login` run)")
ILSVRC_DOWNLOAD = (
    "download ImageNet (ILSVRC 2012, https://image-net.org, or the parquet files of "
    "https://huggingface.co/datasets/ILSVRC/imagenet-1k) into a folder with train/ and val/, one folder per class"
)


def _fetch(repository: str) -> str:
    return f"run `hf download {repository} --repo-type dataset --local-dir DIR` where there is a network"


def _cifar(classes: int, hub: Hub) -> Entry:
    return Entry(f"cifar{classes}", Geometry(classes, 3, 32), "zca", _CIFAR_STATISTICS, hub, "official",
                 (50_000, 10_000), download=_fetch(hub.repository))


def _subset(name: str, classes: dict[int, str], fastai: tuple[int, int] | None = None,
            wnids: tuple[str, ...] = ()) -> Entry:
    if fastai is None:
        hub, split, download = ILSVRC_HUB, "ilsvrc", ILSVRC_DOWNLOAD
    else:
        # The repository itself holds a loading script, which current versions of `datasets` refuse; its parquet
        # export is the same data.
        hub = Hub(f"frgfm/{name}", train="{size}/train/*.parquet", test="{size}/validation/*.parquet", files=True,
                  revision="refs/convert/parquet")
        split = "fastai"
        download = (f"download https://s3.amazonaws.com/fast-ai-imageclas/{name}2-160.tgz and unpack it: "
                    "its folder holds train/ and val/")
    return Entry(name, Geometry(len(classes), 3, 128), "channel", _IMAGENET_STATISTICS, hub, split, fastai,
                 tuple(classes), tuple(classes.values()), wnids, download)


_ENTRIES = (
    Entry("digits", Geometry(10, 1, 32), "channel", None, None, "stratified 80/20, seed 0"),
    _cifar(10, Hub("uoft-cs/cifar10", image="img")),
    _cifar(100, Hub("uoft-cs/cifar100", image="img", label="fine_label")),
    Entry("tinyimagenet", Geometry(200, 3, 64), "channel", _IMAGENET_STATISTICS,
          Hub("zh-plus/tiny-imagenet", test="valid"), "official", (100_000, 10_000),
          download=_fetch("zh-plus/tiny-imagenet") + ", or unpack http://cs231n.stanford.edu/tiny-imagenet-200.zip"),
    _subset("imagenette", {
        0: "tench", 217: "English springer", 482: "cassette player", 491: "chain saw", 497: "church",
        566: "French horn", 569: "garbage truck", 571: "gas pump", 574: "golf ball", 701: "parachute",
    }, (9_469, 3_925), (
        "n01440764", "n02102040", "n02979186", "n03000684", "n03028079", "n03394916", "n03417042", "n03425413",
        "n03445777", "n03888257")),
    _subset("imagewoof", {
        193: "Australian terrier", 182: "Border terrier", 258: "Samoyed", 162: "beagle", 155: "Shih-Tzu",
        167: "English foxhound", 159: "Rhodesian ridgeback", 273: "dingo", 207: "golden retriever",
        229: "Old English sheepdog",
    }, (9_025, 3_929), (
        "n02096294", "n02093754", "n02111889", "n02088364", "n02086240", "n02089973", "n02087394", "n02115641",
        "n02099601", "n02105641")),
    _subset("imagefruit", {
        953: "pineapple", 954: "banana", 949: "strawberry", 950: "orange", 951: "lemon", 957: "pomegranate",
        952: "fig", 945: "bell pepper", 943: "cucumber", 948: "Granny Smith",
    }),
    _subset("imagemeow", {
        281: "tabby", 282: "tiger cat", 283: "Persian cat", 284: "Siamese cat", 285: "Egyptian cat", 291: "lion",
        292: "tiger", 290: "jaguar", 289: "snow leopard", 287: "lynx",
    }),
    _subset("imagesquawk", {
        84: "peacock", 130: "flamingo", 88: "macaw", 144: "pelican", 145: "king penguin", 22: "bald eagle",
        96: "toucan", 9: "ostrich", 100: "black swan", 89: "sulphur-crested cockatoo",
    }),
    _subset("imageyellow", {
        309: "bee", 986: "yellow lady's slipper", 954: "banana", 951: "lemon", 987: "corn", 779: "school bus",
        599: "honeycomb", 291: "lion", 72: "black and gold garden spider", 11: "goldfinch",
    }),
)

CATALOGUE: dict[str, Entry] = {entry.name: entry for entry in _ENTRIES}


def names() -> list[str]:
    """The data sets that have a name, in the order they are documented in."""
    return list(CATALOGUE)


def entry(name: str) -> Entry:
    """The catalogue's entry for `name`. Raises ConfigError naming the nearest name where there is none."""
    if name not in CATALOGUE:
        raise ConfigError(f"{name!r} is not one of {', '.join(CATALOGUE)}{nearest(name, names())}")
    return CATALOGUE[name]
