"""speedk info."""

from __future__ import annotations

import json

from speedk.cli import main


def test_page(file, capsys):
    assert main(["info", str(file)]) == 0
    page = capsys.readouterr().out
    for words in ("speed: D 8", "6 of ", "x8x8 in 3 classes, 2 a class", "ant, bee, cat", "toys, split ",
                  "a note", "f" * 64, "kind channel", "dm", "lr 0.01", "no GPU", "mtt", "small", "saet", "scm",
                  f"{file.stat().st_size:,}"):
        assert words in page, words
    rows = {row.split()[0]: row.split()[1:] for row in page.partition("\n\n")[2].splitlines()}
    count = sum(float(rows[part][0].replace(",", "")) for part in ("saet", "scm", "freenet"))
    assert float(rows["counted"][0].replace(",", "")) == count
    assert count == 64 + 1.5 * 6 * 2 * 4 + (3 * 64 + 7 * 8) + (16 if "1x8x8" in page else 48) * 9
    assert "% full" in page and "switched off" in page


def test_json(file, capsys):
    assert main(["info", str(file), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["method"] == "speed" and found["class_names"] == ["ant", "bee", "cat"] and found["images"] == 6
    assert sum(part["bytes"] for part in found["storage"]) == found["tensor_bytes"] == 4 * found["numbers"]
    assert found["file_bytes"] == file.stat().st_size
    assert found["bytes_per_class"] == found["tensor_bytes"] / 3
    assert found["budget_used"] == found["numbers"] / found["budget"]


def test_a_run_directory_is_the_file_in_it(file, tmp_path, capsys):
    for words in (["info"], ["decode", "--out", str(tmp_path / "images")], ["show"]):
        assert main([words[0], str(file.parent), *words[1:]]) == 0
    assert f"{file}" in capsys.readouterr().out and (tmp_path / "images/ant").is_dir()


def test_damaged(file, capsys):
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    assert main(["info", str(file)]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err == f"speedk: {file} is damaged: its checksum is not that of its content\n"
