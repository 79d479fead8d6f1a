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


def test_density_counts_the_entries_of_each_patch(file, capsys):
    from speedk.distillation import artifact

    loaded = artifact.load(file)
    counts = loaded.synthetic.density(torch.arange(6))
    rows, values = loaded.synthetic.stored[1].long(), loaded.synthetic.stored[0]
    by_hand = [[int(((rows[n] == j) & (values[n] != 0)).sum()) for j in range(4)] for n in range(6)]
    assert counts.shape == (6, 2, 2) and counts.flatten(1).tolist() == by_hand and int(counts.sum()) == 6 * 2 * 4
    assert main(["show", str(file), "--density"]) == 0
    said = capsys.readouterr().out
    flat = [count for image in by_hand for count in image]
    assert "two rows each" in said and f"2.00 entries on average, {min(flat)} to {max(flat)};" in said
    assert f"{flat.count(0) / 24:.1%} of the patches of all images have none" in said
    drawn = picture(file.with_name("distilled-density.png").read_bytes())
    left = drawn.shape[1] - 8 - 2 * 64 - 2
    grey = [bool((drawn[8 + 3 * 66 + 32 * (j // 2) + 5, left + 32 * (j % 2) + 5] == 158).all()) for j in range(4)]
    assert grey == [count == 0 for count in by_hand[0]]


def test_a_patch_of_the_density_is_where_its_entries_are_seen():
    """An entry that is taken away changes the pixels of its own patch alone."""
    from speedk.distillation.parameterizations import speed
    from speedk.geometry import Geometry

    made = speed.Speed(speed.Spec(images_per_class=1, D=8, K=8, H=1, R=1, k=1, patch=4), Geometry(1, 1, 12), 1)
    made.freenet.reset(torch.Generator().manual_seed(0))
    made.saet.data.normal_(generator=torch.Generator().manual_seed(1))
    made.scm.data[0, 0, 5, 3] = 1.0  # patch 5 of 3 x 3: second row, third column
    made.finalize()
    only = torch.zeros(1)
    assert made.density(torch.tensor([0]))[0].tolist() == [[0, 0, 0], [0, 0, 1], [0, 0, 0]]
    full = made.decode(torch.tensor([0]))[0]
    made.stored = made.stored[0] * only, *made.stored[1:]
    assert int(made.density(torch.tensor([0])).sum()) == 0
    changed = (made.decode(torch.tensor([0]))[0] != full).detach()[0, 0]
    assert bool(changed[4:8, 8:].any()) and int(changed.sum()) == int(changed[4:8, 8:].sum())


def test_heat_is_grey_at_zero_and_ends_at_both_ends_of_its_scale():
    drawn = pictures.heat(torch.tensor([[[0, 1], [3, 6]]]), 6, 4)
    assert drawn.shape == (1, 3, 4, 4)
    colours = [tuple(round(float(v), 3) for v in drawn[0, :, y, x]) for y in (0, 2) for x in (0, 2)]
    assert colours[0] == (0.62, 0.62, 0.62) and colours[3] == (1.0, 0.98, 0.8)
    assert colours[1] == (0.44, 0.135, 0.375)  # 1 of 6 with three stretches: midway between the first two stops
    assert torch.equal(drawn[0, :, 0, 2], drawn[0, :, 1, 3]) and drawn[0, :, 2, 0].sum() > drawn[0, :, 0, 2].sum()


@pytest.fixture
def trained(folder, recipe, tmp_path, capsys):
    """A finished run of two steps, with `sparse` as asked for."""

    def distil(*fields):
        assert main(["distill", "--data", str(folder), "--recipe", str(recipe), "--ipc", "2", "--objective", "dm",
                     "--out", str(tmp_path / "run"), *fields]) == 0
        capsys.readouterr()
        return tmp_path / "run"

    return distil


@pytest.mark.parametrize("sparse", ["end", "always"])
def test_before_and_after_sparsification(trained, capsys, sparse):
    from speedk.distillation import artifact
    from speedk.distillation import dense as before

    out = trained(f"sparse={sparse}")
    assert main(["show", str(out), "--sparsification", "--columns", "2"]) == 0
    said = capsys.readouterr().out
    assert "two rows each" in said and "kept: 6 of 128 entries" in said
    assert ("sparse=always" in said) == (sparse == "always")
    drawn = picture((out / "distilled-sparsification.png").read_bytes())
    assert drawn.shape[0] == 6 * 66 - 2 + 16
    stored = artifact.load(out / "distilled.safetensors")
    whole = before.dense(stored)
    index = torch.arange(9)
    exact = whole.synthetic.freenet(whole.synthetic.scm, whole.synthetic.saet)  # no top-k anywhere
    assert torch.equal(whole.images(index=index), exact) and not torch.equal(exact, stored.images())
    kept = whole.synthetic.scm.flatten(2).abs().sort(-1).values[..., -6:].sum() / whole.synthetic.scm.abs().sum()
    assert f"{float(kept):.1%} of the sum" in said
    assert stored.synthetic.stored is not None and whole.synthetic.stored is None


def test_another_method_may_have_a_picture_of_before(folder, tmp_path, capsys, monkeypatch):
    from speedk.distillation.parameterizations.pixels import Pixels

    monkeypatch.setattr(Pixels, "whole", lambda self: Pixels(self.spec, self.geometry, self.ipc))
    out = tmp_path / "run"
    assert main(["distill", "--data", str(folder), "--method", "pixels", "--steps", "1", "--out", str(out),
                 "--objective", "dm", "batch=4", "--device", "cpu"]) == 0
    assert main(["show", str(out), "--sparsification"]) == 0
    assert "kept: 2,304 of 2,304 learned numbers; brightness changes by 0.0000" in capsys.readouterr().out


def test_codes_of_another_set_are_not_drawn(trained, save_pixels, capsys):
    out = trained("sparse=end")
    newest = sorted((out / "checkpoints").iterdir())[-1]
    newest.rename(out / "moved")
    assert main(["show", str(out), "--sparsification"]) == 1
    assert "step 0, is not the one that" in capsys.readouterr().err
    for path in (out / "checkpoints").iterdir():
        path.unlink()
    assert main(["show", str(out), "--sparsification"]) == 1
    assert "there are no checkpoints in" in capsys.readouterr().err
    plain = str(save_pixels(["a", "b"]))
    for flag, reason in (("--density", "whose images have no codes"), ("--sparsification", "nothing was made sparse")):
        assert main(["show", plain, flag]) == 1
        said = capsys.readouterr().err
        assert reason in said and said.count("\n") == 1


def test_values_outside_are_clipped():
    values = torch.tensor([-3.0, 0.0, 0.5, 1.0, 7.0]).reshape(1, 1, 1, 5)
    assert pictures.to_bytes(values).ravel().tolist() == [0, 0, 128, 255, 255]


def test_equal_pictures_are_equal_bytes():
    rows = [torch.rand(2, 3, 8, 8)]
    assert pictures.grid(rows, ["a"]) == pictures.grid(rows, ["a"])
