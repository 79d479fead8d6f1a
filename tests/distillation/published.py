"""The published recipes, typed in from the table of them."""

from __future__ import annotations

from typing import NamedTuple

from speedk.geometry import Geometry


class Row(NamedTuple):
    """SPEED for one data set and number of images a class; `images`: of a class; `counted` and `budget` in numbers."""

    data: str
    ipc: int
    images: int
    D: int
    K: int
    H: int
    R: int
    k: int
    patch: int
    J: int
    L: int
    penalty: float
    batch: int
    inner_steps: int
    max_start: int
    counted: int
    budget: int

    @property
    def recipe(self) -> str:
        return f"{self.data}-ipc{self.ipc}-speed"

    @property
    def geometry(self) -> Geometry:
        classes, resolution = {"cifar10": (10, 32), "cifar100": (100, 32), "tinyimagenet": (200, 64)}.get(
            self.data, (10, 128))
        return Geometry(classes, 3, resolution)


def _row(text: str) -> Row:
    name, *numbers = text.replace(",", "").split()
    return Row(name, *(float(n) if "e" in n else int(n) for n in numbers))


ROWS = [_row(text) for text in """\
cifar10       1   17  32  16 2 1  48 4  64  48 3e-6  64 60 10     29,872     30,720
cifar10      10  124  96  64 3 1  48 4  64  48 3e-7 128 60 20    306,960    307,200
cifar10      50  272 192  64 6 3  48 4  64  48 7e-8 256 60 40  1,532,400  1,536,000
cifar100      1   11  96  64 3 2  48 4  64  48 3e-7 128 60 40    305,040    307,200
cifar100     10   62 192  64 6 3  48 4  64  48 7e-8 256 60 40  3,035,760  3,072,000
cifar100     50  100 192  64 6 3 166 4  64  48 3e-8 256 60 40 15,297,360 15,360,000
tinyimagenet  1   17 256 128 8 2  48 8  64 192 7e-8 340 20 40  2,437,312  2,457,600
tinyimagenet 10   78 256 128 8 2 128 8  64 192 7e-9 780 20 40 24,440,512 24,576,000
imagenette    1   15 192 256 4 2 192 8 256 192 7e-7  32 60 10    482,880    491,520
imagenette   10  111 384 256 6 2 384 8 256 192 7e-8  32 40 20  4,898,496  4,915,200
imagewoof     1   15 192 256 4 2 192 8 256 192 3e-7  32 60 10    482,880    491,520
imagewoof    10  111 384 256 6 2 384 8 256 192 3e-8  32 40 20  4,898,496  4,915,200
imagefruit    1   15 192 256 4 2 192 8 256 192 7e-7  32 60 10    482,880    491,520
imagefruit   10  111 384 256 6 2 384 8 256 192 7e-8  32 40 20  4,898,496  4,915,200
imagemeow     1   15 192 256 4 2 192 8 256 192 7e-7  32 60 10    482,880    491,520
imagemeow    10  111 384 256 6 2 384 8 256 192 7e-8  32 40 20  4,898,496  4,915,200
imagesquawk   1   15 192 256 4 2 192 8 256 192 3e-7  32 60 10    482,880    491,520
imagesquawk  10  111 384 256 6 2 384 8 256 192 3e-8  32 40 20  4,898,496  4,915,200
imageyellow   1   15 192 256 4 2 192 8 256 192 3e-7  32 60 10    482,880    491,520
imageyellow  10  111 384 256 6 2 384 8 256 192 3e-8  32 40 20  4,898,496  4,915,200
""".splitlines()]
