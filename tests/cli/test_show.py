"""speedk show and the grids that it draws."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from PIL import Image

from speedk import pictures
from speedk.cli import main


def picture(data):
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB")).astype(int)


def ink(part):
    """Pixels that are not paper."""
    return int((part < 200).all(-1).sum())


def test_a_row_per_class(file, capsys):
    assert main(["show", str(file)]) == 0
    out = file.with_suffix(".png")
    assert capsys.readouterr().out == f"{out}: 6 of 6 images, 3 of 3 classes, a row each\n"
    drawn = picture(out.read_bytes())
    assert drawn.shape[0] > 3 * 64 and drawn.shape[1] > 2 * 64


def test_choices(file, tmp_path, capsys):
    out = tmp_path / "a.png"
    assert main(["show", str(file), "--out", str(out), "--classes", "cat", "--columns", "1"]) == 0
    assert "1 of 6 images, 1 of 3 classes" in capsys.readouterr().out
    for words, said in ((["--classes", "cta"], "did you mean 'cat'"), (["--columns", "0"], "at least 1"),
                        (["--classes", "zebra"], "there are ant, bee, cat")):
        assert main(["show", str(file), "--out", str(tmp_path / "b.png"), *words]) == 1
        assert said in capsys.readouterr().err
    assert main(["show", str(file), "--out", str(out)]) == 1
    assert "say --overwrite" in capsys.readouterr().err
    assert main(["show", str(file), "--out", str(out), "--overwrite"]) == 0
    assert main(["show", str(file), "--out", str(tmp_path / "none" / "a.png")]) == 1
    assert "create the folder first" in capsys.readouterr().err


def test_a_grid_too_large_for_a_viewer(save_pixels, capsys, monkeypatch):
    monkeypatch.setattr("speedk.cli.show._MAX_PIXELS", 1000)
    assert main(["show", str(save_pixels(["a", "b"]))]) == 1
    assert "draw fewer --classes or --columns" in capsys.readouterr().err


@pytest.mark.parametrize("side, scale", [(8, 8), (32, 2), (64, 1), (128, 1)])
@pytest.mark.parametrize("channels", [1, 3])
def test_every_pixel_is_where_it_belongs(side, scale, channels):
    rows = [torch.rand(2, channels, side, side), torch.rand(3, channels, side, side)]
    drawn = picture(pictures.grid(rows, ["one", "another"]))
    cell = side * scale
    left = drawn.shape[1] - 8 - 3 * cell - 2 * 2
    for i, row in enumerate(rows):
        for j, image in enumerate(row):
            top, start = 8 + i * (cell + 2), left + j * (cell + 2)
            tile = drawn[top:top + cell, start:start + cell]
            exact = (image.expand(3, -1, -1) * 255).round().numpy().transpose(1, 2, 0)
            assert np.array_equal(tile[::scale, ::scale], exact)
            assert np.array_equal(tile, exact.repeat(scale, 0).repeat(scale, 1))
    assert (drawn[8:8 + cell, left + 2 * (cell + 2):] == 255).all()  # the place of an image that is not there


def test_names_are_drawn():
    rows = [torch.ones(1, 1, 32, 32)] * 3
    drawn = picture(pictures.grid(rows, ["W", "WWWWWW", "."]))
    left = drawn[:, :drawn.shape[1] - 64 - 8]
    counts = [ink(left[8 + i * 66:8 + i * 66 + 64]) for i in range(3)]
    assert counts[1] > 4 * counts[0] > counts[2] > 0


def test_names_that_the_font_lacks():
    rows = [torch.zeros(1, 1, 8, 8)]
    assert pictures.grid(rows, ["großé"]) == pictures.grid(rows, ["gro?e"])
    assert pictures.grid(rows, ["x" * 100]) == pictures.grid(rows, ["x" * 25 + "..."])


def test_values_outside_are_clipped():
    values = torch.tensor([-3.0, 0.0, 0.5, 1.0, 7.0]).reshape(1, 1, 1, 5)
    assert pictures.to_bytes(values).ravel().tolist() == [0, 0, 128, 255, 255]


def test_equal_pictures_are_equal_bytes():
    rows = [torch.rand(2, 3, 8, 8)]
    assert pictures.grid(rows, ["a"]) == pictures.grid(rows, ["a"])
