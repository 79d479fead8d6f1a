"""Files from a broken disk or a stranger: each is refused in one line, or decodes to what was saved."""

from __future__ import annotations

import copy
import json
import random
import struct

import pytest
import torch
from artifacts import METHODS, make

from speedk.distillation import artifact, tensorfile
from speedk.errors import ArtifactError


def layout(data: bytes) -> int:
    """Where the tensors begin."""
    return 8 + struct.unpack("<Q", data[:8])[0]


def content(data: bytes):
    """All that a file decodes to. Raises ArtifactError."""
    loaded = artifact.parse(data, "file")
    return loaded.header, loaded.class_names, loaded.images(), loaded.labels


def same(one, other) -> bool:
    return one[:2] == other[:2] and torch.equal(one[2], other[2]) and torch.equal(one[3], other[3])


def outcome(data: bytes, original, what: str) -> bool:
    """True where the damaged file is refused; fails where it decodes to something else, or to a traceback."""
    try:
        found = content(data)
    except ArtifactError as error:
        line = str(error)
        assert "\n" not in line and line.isprintable() and line.startswith("file ") and len(line) < 500, what
        return True
    except Exception as error:  # whatever it is, it is the finding
        raise AssertionError(f"{what}: {type(error).__name__}: {error}") from error
    assert same(found, original), f"{what}: decodes to something else"
    return False


def flips(data: bytes, rng: random.Random):
    """Bits flipped in the length, in the header, at its end, and in the tensors."""
    begin = layout(data)
    for low, high, count in ((0, 8, 40), (8, begin, 160), (begin - 8, begin, 10), (begin, len(data), 120)):
        for _ in range(count):
            damaged = bytearray(data)
            places = [rng.randrange(low, high) for _ in range(rng.choice((1, 1, 1, 2, 5)))]
            for place in places:
                damaged[place] ^= 1 << rng.randrange(8)
            yield f"flips at {places}", bytes(damaged)


def truncations(data: bytes, rng: random.Random):
    begin = layout(data)
    cuts = [0, 1, 7, 8, 9, begin - 1, begin, begin + 1, len(data) - 1]
    for cut in cuts + [rng.randrange(len(data)) for _ in range(60)]:
        yield f"cut at {cut}", data[:cut]
    for more in (b"\0", b" ", bytes(1000), data):
        yield f"{len(more)} bytes more", data + more


def splices(data: bytes, other: bytes, rng: random.Random):
    """Pieces lost, doubled, exchanged, overwritten, or taken from another file."""
    begin, other_begin = layout(data), layout(other)
    yield "the header of one, the tensors of another", data[:begin] + other[other_begin:]
    yield "the tensors of one, the header of another", other[:other_begin] + data[begin:]
    for _ in range(70):
        a, b = sorted(rng.sample(range(len(data)), 2))
        c = rng.randrange(len(data))
        size = min(b - a, 64)
        yield f"lost {a}:{a + size}", data[:a] + data[a + size:]
        yield f"doubled {a}:{a + size}", data[:a + size] + data[a:]
        yield f"moved {a}:{b} to {c}", data[:c] + data[a:b] + data[c + (b - a):]
        yield f"zeros {a}:{a + size}", data[:a] + bytes(size) + data[a + size:]
        yield f"noise {a}:{a + size}", data[:a] + rng.randbytes(size) + data[a + size:]
        yield f"other {a}:", data[:a] + other[a:]


@pytest.mark.parametrize("method", METHODS)
def test_a_thousand_accidents(method):
    """Over 800 a method, 3,000 in all: the checksum sees what the format does not."""
    data, other = artifact.dump(*make(method)), artifact.dump(*make("pixels", seed=1))
    original, rng = content(data), random.Random(method)
    results = [outcome(damaged, original, what)
               for what, damaged in (*flips(data, rng), *truncations(data, rng), *splices(data, other, rng))
               if damaged not in (data, other)]
    assert len(results) > 750 and sum(results) > 0.95 * len(results)


WRONG = (None, True, False, 0, 1, -1, 2, 7, 255, 65536, 65537, 1 << 31, 1 << 40, 1 << 62, 10**30, 0.5, 1.0, -1e308,
         "", "x", "../../etc/passwd", "\x1b[2J", "e\u0301" * 50, "a" * 5000, [], [1], [[]], [0] * 3, ["a"] * 3, {},
         {"a": 1}, {"__class__": "os"}, [1 << 40] * 3, "speed", "pixels", "base", "_fit", "os.system")


def places(node, path=()):
    """Every place of a JSON document."""
    yield path
    items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    for key, value in items:
        yield from places(value, (*path, key))


def at(node, path):
    for key in path:
        node = node[key]
    return node


def signed(document, tensors) -> bytes:
    """A file with a right checksum, as a stranger would make it."""
    if isinstance(document, dict):
        document["checksum"] = artifact.checksum(document, tensors)
    return tensorfile.pack(document, tensors)


def consistent(data: bytes, what: str) -> bool:
    """True where a signed lie is refused; what is let through must decode to finite images of the stated shape."""
    try:
        header, names, images, labels = content(data)
    except ArtifactError as error:
        assert "\n" not in str(error) and str(error).isprintable() and len(str(error)) < 500, what
        return True
    except Exception as error:
        raise AssertionError(f"{what}: {type(error).__name__}: {error}") from error
    g = header["geometry"]
    assert images.shape == (sum(header["images_per_class"]), g["channels"], g["resolution"], g["resolution"]), what
    assert torch.isfinite(images).all() and len(labels) == len(images) and len(names) == g["classes"], what
    return False


@pytest.mark.parametrize("method", METHODS)
def test_signed_lies_in_the_header(method):
    data = artifact.dump(*make(method))
    header, tensors = tensorfile.unpack(data)
    original, rng = content(data), random.Random(method)
    free = {"recipe", "normaliser", "data", "objective", "chosen", "protocol", "seed", "class_names"}
    refused = 0
    for path in list(places(header))[1:]:
        for wrong in rng.sample(WRONG, 4 if path[0] in free else 10):
            changed = copy.deepcopy(header)
            old = at(changed, path)
            at(changed, path[:-1])[path[-1]] = wrong
            what = f"{'.'.join(map(str, path))} = {str(wrong)[:60]!r}"
            refused += consistent(signed(changed, tensors), what)
            if path[0] in ("geometry", "images_per_class", "numbers", "label_numbers", "budget", "format",
                           "protocol") and (
                    type(wrong) is not type(old) or wrong != old):
                with pytest.raises(ArtifactError):
                    content(signed(changed, tensors))
        changed = copy.deepcopy(header)
        del at(changed, path[:-1])[path[-1]]
        refused += consistent(signed(changed, tensors), f"without {path}")
    assert refused > 100
    assert same(content(signed(copy.deepcopy(header), tensors)), original)


@pytest.mark.parametrize("method", METHODS)
def test_signed_lies_in_the_tensors(method):
    """Another name, number, order, shape, dtype or value: never read as something else."""
    header, tensors = tensorfile.unpack(artifact.dump(*make(method)))
    for name, tensor in tensors.items():
        lies = {
            "gone": {n: t for n, t in tensors.items() if n != name},
            "renamed": {("x" if n == name else n): t for n, t in tensors.items()},
            "doubled": tensors | {"x": tensor},
            "longer": tensors | {name: torch.cat([tensor, tensor[:1]])},
            "shorter": tensors | {name: tensor[1:]},
            "flat": tensors | {name: tensor.reshape(1, -1)},
            "empty": tensors | {name: tensor[:0]},
            "scalar": tensors | {name: tensor.reshape(-1)[0]},
            "bytes": tensors | {name: tensor.reshape(-1).view(torch.uint8)},
        }
        if tensor.ndim > 1 and tensor.shape[0] != tensor.shape[1]:
            lies["turned"] = tensors | {name: tensor.transpose(0, 1).contiguous()}
        if tensor.dtype == torch.float32:
            for value in (float("nan"), float("inf"), -float("inf")):
                bad = tensor.clone()
                bad.view(-1)[-1] = value
                lies[str(value)] = tensors | {name: bad}
        for what, lie in lies.items():
            document = copy.deepcopy(header)
            for learned, key in ((False, "numbers"), (True, "label_numbers")):
                size = sum(t.numel() * t.element_size() for n, t in lie.items() if (n == "labels") is learned)
                document[key] = size / 4 if size % 4 else size // 4
            with pytest.raises(ArtifactError):
                content(signed(document, lie))
                pytest.fail(f"{name} {what}: not refused")


def coordinates(header, tensors, change):
    changed = {name: tensor.clone() for name, tensor in tensors.items()}
    change(changed)
    with pytest.raises(ArtifactError) as caught:
        content(signed(copy.deepcopy(header), changed))
    return str(caught.value)


@pytest.mark.parametrize("method", ["speed", "speed16"])
def test_signed_coordinates_out_of_range_or_doubled(method):
    header, tensors = tensorfile.unpack(artifact.dump(*make(method)))
    top = {"speed": (4, 8), "speed16": (4, 300)}[method]

    def beyond(name, limit):
        kind = torch.uint8 if method == "speed" else torch.int16
        return lambda t: t[name].view(kind)[-1, -1].fill_(limit)

    assert "out of range" in coordinates(header, tensors, beyond("scm.rows", top[0]))
    assert "out of range" in coordinates(header, tensors, beyond("scm.cols", top[1]))

    def doubled(t):
        for name in ("scm.rows", "scm.cols"):
            values = t[name].to(torch.int32)
            values[0, 0, 1] = values[0, 0, 0]
            t[name] = values.to(t[name].dtype)

    def swapped(t):
        for name in ("scm.rows", "scm.cols", "scm.values"):
            order = [1, 0, *range(2, t[name].shape[-1])]
            t[name] = torch.stack([t[name][..., i] for i in order], -1)

    assert "twice" in coordinates(header, tensors, doubled)
    assert "not in order" in coordinates(header, tensors, swapped)


def outer(header, tensors, change) -> str:
    """Change the table that safetensors itself reads, and say why that is refused."""
    data = signed(copy.deepcopy(header), tensors)
    begin = layout(data)
    table = json.loads(data[8:begin])
    text = change(table)
    raw = (json.dumps(table) if text is None else text).encode()
    with pytest.raises(ArtifactError) as caught:
        content(struct.pack("<Q", len(raw)) + raw + data[begin:])
    line = str(caught.value)
    assert line.isprintable() and len(line) < 500
    return line


def test_lies_in_the_table_of_tensors():
    header, tensors = tensorfile.unpack(artifact.dump(*make("speed")))

    def entry(**fields):
        return lambda table: table["saet"].update(fields)

    size = 4 * tensors["saet"].numel()
    assert "natural numbers" in outer(header, tensors, entry(shape=[-8, -8]))
    assert "natural numbers" in outer(header, tensors, entry(shape=[True, 64]))
    assert "natural numbers" in outer(header, tensors, entry(shape=[8.0, 8]))
    assert "natural numbers" in outer(header, tensors, entry(shape=[1 << 62, 4]))
    assert "natural numbers" in outer(header, tensors, entry(shape=[1] * 9))
    assert "natural numbers" in outer(header, tensors, entry(data_offsets=[0]))
    assert "but has" in outer(header, tensors, entry(shape=[1 << 40, 1 << 40]))
    assert "but has" in outer(header, tensors, entry(data_offsets=[size, 0]))
    assert "but has" in outer(header, tensors, entry(dtype="U8"))
    for dtype in ("F64", "I64", "BOOL", 3, ["F32"], "F32" * 100):
        assert "has dtype" in outer(header, tensors, entry(dtype=dtype))
    assert "dtype, shape and data_offsets" in outer(header, tensors, entry(code="import os"))
    assert "dtype, shape and data_offsets" in outer(header, tensors, lambda table: table.update(saet=[1]))
    assert "does not begin where" in outer(header, tensors, lambda t: t["saet"].update(t["scm.values"]))
    assert "is cut off" in outer(header, tensors, lambda table: table.update(
        zzz={"dtype": "U8", "shape": [1 << 40], "data_offsets": [tensors_end(table), tensors_end(table) + (1 << 40)]}))
    assert "too many" in outer(header, tensors, lambda table: table.pop(
        max((n for n in table if n != "__metadata__"), key=lambda n: table[n]["data_offsets"][1])) and None)
    assert "no name of a tensor" in outer(header, tensors, lambda t: t.update({"\x1b[2J": t.pop("saet")}))
    assert "metadata holds more" in outer(header, tensors, lambda t: t["__metadata__"].update(x="y"))
    assert "speedk wrote" in outer(header, tensors, lambda t: t.update(__metadata__=[]))


def tensors_end(table) -> int:
    return max(entry["data_offsets"][1] for name, entry in table.items() if name != "__metadata__")


@pytest.mark.parametrize("text, words", [
    ('{"__metadata__":{"speedk":"{}"},"__metadata__":{"speedk":"{}"}}', "a key is there twice"),
    ('{"__metadata__":{"speedk":"{\\"format\\":1,\\"format\\":2}"}}', "a key is there twice"),
    ('{"__metadata__":{"speedk":"{\\"format\\":NaN}"}}', "not a finite number"),
    ('{"__metadata__":{"speedk":"{\\"format\\":-Infinity}"}}', "not a finite number"),
    ('{"__metadata__":{"speedk":"{\\"format\\":1e999}"}}', "not a finite number"),
    ('{"__metadata__":{"speedk":"{\\"format\\":' + "9" * 5000 + '}"}}', "over 40 digits"),
    ('{"__metadata__":{"speedk":"' + "[" * 100_000 + '"}}', "nested too deeply"),
    ('{"__metadata__":{"speedk":"' + "[" * 20 + "]" * 20 + '"}}', "nested more than"),
    ('{"a":' + "[" * 1_000_000, "nested too deeply"),
    ('{"__metadata__":{"speedk":"\\"\\\\ud800\\""}}', "half a character"),
    ('{"__metadata__":{"speedk":"\\ud800"}}', "half a character"),
    ('{"__metadata__":{"speedk":"[]"}}', "does not say which format"),
    ('{"__metadata__":{"speedk":"{\\"format\\":true}"}}', "does not say which format"),
    ('{"__metadata__":{"speedk":"{\\"format\\":1}"}}', "checksum"),
    ('{"__metadata__":{"speedk":"{"}}', "not JSON"),
    ("{} trailing", "not JSON"),
], ids=range(16))
def test_hostile_json(text, words):
    raw = text.encode("utf-8", "surrogatepass")
    with pytest.raises(ArtifactError, match=words):
        artifact.parse(struct.pack("<Q", len(raw)) + raw, "file")


def test_a_small_file_whose_one_code_is_huge_is_refused():
    """65,536 tokens of one number in 260 kB, and as many patches: 17 GB for the dense code of one image."""
    from speedk.distillation.parameterizations import speed
    from speedk.errors import ConfigError
    from speedk.geometry import Geometry

    spec = speed.Spec(images_per_class=1, D=1, K=65536, H=1, R=1, k=1, patch=1)
    with pytest.raises(ConfigError, match="512 MB"):
        spec.check(Geometry(2, 1, 256))


def test_broken_utf8():
    raw = b'{"\xff\xfe": 1}'
    with pytest.raises(ArtifactError, match="not JSON"):
        artifact.parse(struct.pack("<Q", len(raw)) + raw, "file")


def test_sizes_are_bounded_by_the_file(tmp_path):
    """A header of a kilobyte that asks for terabytes is refused before anything of that size is made."""
    import resource

    header, tensors = tensorfile.unpack(artifact.dump(*make("speed")))
    pixel_header, pixel_tensors = tensorfile.unpack(artifact.dump(*make("pixels")))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    sizes = {("spec", name): 1 << 30 for name in ("R", "D", "H", "K", "k", "images_per_class")} | {
        ("ipc",): 1 << 24, ("spec", "patch"): 1, ("images_per_class",): [1 << 40] * 3,
        ("geometry", "classes"): 1 << 20, ("geometry", "resolution"): 4096,
    }
    for path, value in sizes.items():
        for kept, stored in ((header, tensors), (pixel_header, pixel_tensors)):
            if path[0] == "spec" and path[1] not in kept["spec"]:
                continue
            document = copy.deepcopy(kept)
            at(document, path[:-1])[path[-1]] = value
            g = document["geometry"]
            document["budget"] = g["classes"] * document["ipc"] * g["channels"] * g["resolution"] ** 2
            consistent(signed(document, stored), f"{path} = {value}")
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown < 100_000, f"{grown:,} kB"
