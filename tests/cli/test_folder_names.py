"""Names of folders that are made of what a user said."""

from __future__ import annotations

import pytest

from speedk.cli._files import LONGEST, flat


def test_a_name_has_no_folders_in_it():
    assert flat("a/b=../c") == "a_b=.._c"
    assert flat("x" * LONGEST) == "x" * LONGEST
    assert flat("\udcff/b") == "\udcff_b" and len(flat("\udcff" * 300)) == 17  # bytes that are no text


@pytest.mark.parametrize("letter", ["x", "\u00e9", "\U0001f600"])  # of one, two and four bytes
def test_a_long_name_is_cut_and_still_its_own(letter, tmp_path):
    names = [flat(letter * 300 + end) for end in ("", "1", "2")]
    assert len(set(names)) == 3 and names[0] == flat(letter * 300)
    for name in names:
        assert len(name.encode()) <= LONGEST and name.startswith(letter * 40)
        (tmp_path / name).mkdir()
