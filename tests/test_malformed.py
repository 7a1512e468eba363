"""Malformed images, captions and tars, one row each: taken as it is meant, passed over by name, or refused at once.

outcome   what a folder or shard with one such file among good ones gives
taken     its sample exists, and is what it should be
skipped   it is in `bad` by name and another takes its place; with max_bad=0 it is an error
ignored   as if it were not there
refused   UserError before there is a source, so before the first step
"""
import gzip
import io
import json
import os
import posixpath
import struct
import sys
import tarfile
import tracemalloc
import unicodedata
import zlib
from functools import lru_cache

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from PIL import Image

import data
from config import UserError
from sources import folders, images, shards
from test_images import encoded, smooth

GOOD = 3


def chunk(kind, body):
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png_of(w, h):
    """A PNG that says it has w x h grey pixels, all black, in a few bytes more than they compress to."""
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", w, h, 8, 0, 0, 0, 0))
    rows = zlib.compress(bytes(h * (w + 1))) if w * h < 10 ** 6 else zlib.compress(bytes(999))
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def garbled(jpeg):
    """The same with a stretch of its entropy-coded middle changed."""
    middle = len(jpeg) * 2 // 3
    changed = bytes(b if b in (0, 0xFE, 0xFF) else b ^ 1 for b in jpeg[middle:middle + 8])      # no marker arises
    return jpeg[:middle] + changed + jpeg[middle + 8:]


def oriented(n, cut=None):
    exif = Image.Exif()
    exif[0x0112] = n
    return encoded(smooth(), "JPEG", quality=95, exif=exif.tobytes()[:cut] + b"\xff" * 9 * (cut is not None))


TRUE, WHITE = "true", "white"           # what an image that is taken looks like: `smooth`, or white all over


@lru_cache
def image_files():
    """name: (content of a file, outcome, what its message says or what it looks like; None = anything)."""
    image, grey = smooth(), smooth().convert("L")
    jpeg, png = encoded(image, "JPEG", quality=95), encoded(image, "PNG")
    idat = png.index(b"IDAT") + 30
    frames = dict(save_all=True, append_images=[Image.new("RGB", (52, 40))])
    ramp = np.linspace(0, 65535, 40 * 52).reshape(40, 52)
    palette = Image.new("P", (52, 40), 1)
    palette.putpalette([0, 0, 0, 255, 9, 9])
    huge = png[:33] + chunk(b"zTXt", b"k\0\0" + zlib.compress(bytes(5_000_000))) + png[33:]
    svg = b"<svg xmlns='http://www.w3.org/2000/svg' width='52' height='40'/>"
    return {
        "zero bytes": (b"", "skipped", "empty file"), "html": (b"<html>404</html>", "skipped", "not a JPEG"),
        "jpeg cut in half": (jpeg[:len(jpeg) // 2], "skipped", None), "jpeg less 2": (jpeg[:-2], "skipped", None),
        "jpeg header": (jpeg[:20], "skipped", None), "png cut": (png[:len(png) // 2], "skipped", None),
        "png without IEND": (png[:-12], "taken", TRUE), "garbled jpeg": (garbled(jpeg), "taken", None),
        "png with a flipped bit": (png[:idat] + bytes([png[idat] ^ 4]) + png[idat + 1:], "skipped", None),
        "gif": (encoded(image, "GIF"), "skipped", "not a JPEG"),
        "animated gif": (encoded(image, "GIF", **frames), "skipped", None),
        "animated webp": (encoded(image, "WEBP", **frames), "skipped", "2 frames"),
        "animated png": (encoded(image, "PNG", **frames), "skipped", "2 frames"),
        "grey": (encoded(grey, "PNG"), "taken", grey),
        "grey jpeg": (encoded(grey, "JPEG", quality=95), "taken", grey),
        "grey with alpha 0": (encoded(Image.new("LA", (52, 40), (10, 0)), "PNG"), "taken", WHITE),
        "opaque rgba": (encoded(image.convert("RGBA"), "PNG"), "taken", TRUE),
        "rgba, alpha 0": (encoded(Image.new("RGBA", (52, 40), (200, 0, 0, 0)), "PNG"), "taken", WHITE),
        "palette": (encoded(palette, "PNG"), "taken", Image.new("RGB", (52, 40), (255, 9, 9))),
        "palette, transparent": (encoded(palette, "PNG", transparency=1), "taken", WHITE),
        "1 bit": (encoded(grey.convert("1"), "PNG"), "taken", grey.convert("1")),
        "cmyk, inverted as Adobe has it": (encoded(image.convert("CMYK"), "JPEG", quality=95), "taken", TRUE),
        "16 bit": (encoded(Image.fromarray(ramp.astype(np.uint16)), "PNG"), "taken",
                   Image.fromarray((ramp / 256).astype(np.uint8))),
        "16 bit tiff": (encoded(Image.fromarray(ramp.astype(">u2")), "TIFF"), "skipped", "not a JPEG"),
        "float tiff": (encoded(Image.fromarray((ramp / 65535).astype(np.float32)), "TIFF"), "skipped", "not a JPEG"),
        "100 MP": (png_of(10_000, 10_000), "skipped", "64,000,000"),
        "196 MP": (png_of(14_000, 14_000), "skipped", None),
        "2^62 pixels": (png_of(2 ** 31 - 1, 2 ** 31 - 1), "skipped", None),
        "1 x 1": (png_of(1, 1), "skipped", "sides start at 8"),
        "1 x 10000": (png_of(1, 10_000), "skipped", "sides start at 8"),
        "turned by exif": (oriented(6), "taken", image.transpose(Image.Transpose.ROTATE_270)),
        "damaged exif": (oriented(6, cut=11), "taken", TRUE), "5 MB of zTXt": (huge, "skipped", None),
        "jpeg called png": (jpeg, "taken", TRUE), "svg": (svg, "skipped", "not a JPEG")}


def folder(root):
    (root / "c").mkdir(parents=True)
    for k in range(GOOD):
        Image.new("RGB", (20, 16), (k, 0, 0)).save(root / "c" / f"a{k}.png")
    return root


def passed_over(root, name, match, make=data.ImageFolder):
    """Is it named, counted, replaced, and an error where none may be bad?"""
    source = make(root, 16, max_bad=0.5)
    seen = [source.record(k, 0)["index"] for k in range(len(source))]
    assert list(source.bad) == [name] and (match is None or match in source.bad[name])
    assert name not in [source.name(k) for k in seen]
    with pytest.raises(UserError, match="1 of 4 .*--max_bad_fraction=0.0"):
        strict = make(root, 16, max_bad=0.0)
        [strict.record(k, 0) for k in range(len(strict))]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", image_files())
def test_an_image_file(tmp_path, name):
    content, outcome, look = image_files()[name]
    root = folder(tmp_path / "set")
    (root / "c" / "x.png").write_bytes(content)
    tracemalloc.start()
    if outcome == "skipped":
        passed_over(root, "c/x.png", look)
    else:
        source = data.ImageFolder(root, 40, side=None, flip=False)
        row = source.record(3, 0)
        assert row["index"] == 3 and not source.bad and row["image"].shape == (3, 40, 40)
        if look is not None:
            known = {TRUE: smooth(), WHITE: Image.new("RGB", (52, 40), "white")}
            want = known[look] if isinstance(look, str) else look
            left, top = ((want.width - 40) / 2, (want.height - 40) / 2)
            want = want.convert("RGB").resize((40, 40), Image.Resampling.BICUBIC, (left, top, left + 40, top + 40))
            off = (row["image"].numpy() * 127.5 + 127.5 - np.asarray(want).transpose(2, 0, 1)).__abs__()
            assert off.mean() < 6 and row["size"] == ((52, 40) if "turned" in name else (40, 52))
    assert tracemalloc.get_traced_memory()[1] < 8e6
    tracemalloc.stop()


@pytest.mark.parametrize("what", ["folder", "broken link", "pipe", "unreadable"])
def test_what_is_called_like_an_image(tmp_path, what):
    root = folder(tmp_path / "set")
    path = root / "c" / "x.jpg"
    if what == "folder":
        path.mkdir()
    elif sys.platform == "win32":
        pytest.skip("wants links, pipes and rights as Unix has them")
    elif what == "pipe":
        os.mkfifo(path)
    elif what == "broken link":
        path.symlink_to(tmp_path / "nowhere")
        return passed_over(root, "c/x.jpg", "link to nothing")
    else:
        path.write_bytes(encoded(smooth(), "JPEG"))
        path.chmod(0)
        if os.access(path, os.R_OK):
            pytest.skip("this user may read everything")
        return passed_over(root, "c/x.jpg", "PermissionError")
    assert len(data.ImageFolder(root, 16)) == GOOD


# ---------------------------------------------------------------- captions

ZWJ, BIDI = "\U0001F468\u200d\U0001F469\u200d\U0001F467 walking", "left \u202eright\u202c"
TEXTS = {           # content of a .txt: the caption, or None where the sample is passed over
    "missing": (None, None), "empty": (b"", ""), "blanks": (b" \t\n  ", ""),
    "byte order mark": (b"\xef\xbb\xbfa cat", "a cat"),
    "latin-1": ("café".encode("latin-1"), None), "utf-16": ("a cat".encode("utf-16"), None),
    "zeros": (b"a\0 c\0at\0", "a cat"), "a megabyte": (b"cat " * 262_144, ("cat " * 500)[:-1]),
    "78 words": (b"x " * 78, " ".join("x" * 78)), "77 words": (b"x " * 77, " ".join("x" * 77)),
    "76 words": (b"x " * 76, " ".join("x" * 76)), "joined emoji": (ZWJ.encode(), ZWJ), "bidi": (BIDI.encode(), BIDI),
    "decomposed": (unicodedata.normalize("NFD", "café").encode(), "café"),
    "many lines": (b"a cat\r\non a mat\r\n\r\n", "a cat on a mat")}
VALUES = {"null": (None, None), "number": (7, None), "list": (["a cat"], "a cat"), "empty list": ([], None),
          "list of numbers": ([7], None), "object": ({"a": 1}, None), "half a character": ("a\ud83d cat", "a cat")}


def captioned(root):
    for k in range(GOOD):
        (folder(root) if k == 0 else root) and (root / "c" / f"a{k}.txt").write_bytes(b"fine")
    Image.new("RGB", (20, 16)).save(root / "c" / "x.png")
    return root


def check_caption(root, want):
    if want is None:
        return passed_over(root, "c/x.png", None, folders.CaptionFolder)
    source = folders.CaptionFolder(root, 16)
    assert source.record(3, 0)["caption"] == want and not source.bad


@pytest.mark.parametrize("name", TEXTS)
def test_a_caption_in_a_txt(tmp_path, name):
    content, want = TEXTS[name]
    root = captioned(tmp_path / "set")
    if content is not None:
        (root / "c" / "x.txt").write_bytes(content)
    check_caption(root, want)


@pytest.mark.parametrize("name", VALUES)
def test_a_caption_in_metadata(tmp_path, name):
    value, want = VALUES[name]
    root = captioned(tmp_path / "set")
    line = json.dumps({"file_name": "x.png", "text": value}).encode()
    (root / "c" / "metadata.jsonl").write_bytes(b"\xef\xbb\xbf" + line + b"\r\n\r\n")
    check_caption(root, want)


@pytest.mark.parametrize("line, match", [
    (b"{", "not JSON"), (b"[" * 100_000, "not JSON"), (b"7", "not a JSON object"),
    (b'{"text": "x"}', "lacks file_name or text"),
    (b'{"file_name": "a9.png", "txt": "x"}', "lacks file_name or text"), (b'{"file_name": 7, "text": "x"}', "lacks"),
    ('{"file_name": "a9.png", "text": "é"}'.encode("latin-1"), "not JSON: UnicodeDecodeError"),
    (b'{"file_name": "../../x.png", "text": "x"}', "outside"),
    (b'{"file_name": "/etc/x.png", "text": "x"}', "outside"), (b'{"file_name": "gone.png", "text": "x"}', "no such"),
    (b'{"file_name": "a0.png", "text": "a"}\n{"file_name": "a0.png", "text": "b"}', "second time"),
    (b'{"file_name": "a0.png", "text": "a"}\n{"file_name": "./a0.png", "text": "b"}', "second time"),
    (b'{"file_name": "a0.png", "text": ' + b"9" * 9999 + b"}", "not JSON")])
def test_a_line_of_metadata(tmp_path, line, match):
    root = captioned(tmp_path / "set")
    (root / "c" / "x.png").unlink()
    (root / "c" / "metadata.jsonl").write_bytes(line)
    source = folders.CaptionFolder(root, 16, max_bad=0.5)
    assert len(source) == GOOD and len(source.bad) == 1 and match in str(source.bad)
    with pytest.raises(UserError, match="1 of 4"):
        folders.CaptionFolder(root, 16, max_bad=0.0)


@settings(max_examples=40, deadline=None)
@given(st.binary(max_size=200))
def test_any_metadata_is_captions_or_named_lines(content):
    texts, bad = images.parse_metadata(content)
    assert all(isinstance(name, str) for name in texts) and all(line.startswith("line ") for line in bad)


NAMES = st.text(min_size=1, max_size=9).filter(
    lambda name: posixpath.normpath(name) == name and not name.startswith(("/", "..")))


@settings(max_examples=40, deadline=None)
@given(st.dictionaries(NAMES, st.text(max_size=30), max_size=5), st.booleans())
def test_metadata_is_read_back(rows, ascii_only):
    lines = [json.dumps({"text": text, "file_name": name}, ensure_ascii=ascii_only) for name, text in rows.items()]
    content = "\n".join(lines).encode("utf-8", "surrogatepass")
    texts, bad = images.parse_metadata(content)
    halves = any("\ud800" <= c <= "\udfff" for c in content.decode("utf-8", "surrogatepass"))
    assert (texts, bad) == (rows, {}) or halves


@settings(max_examples=60, deadline=None)
@given(st.text(max_size=300))
def test_a_clean_caption_is_one_line_and_stays_as_it_is(text):
    out = images.clean_caption(text)
    assert out == images.clean_caption(out) == images.clean_caption(unicodedata.normalize("NFD", text))
    assert len(out) <= images.MAX_CHARACTERS
    assert out == " ".join(out.split()) and all(unicodedata.category(c) not in ("Cc", "Cs") for c in out)
    out.encode()


# ---------------------------------------------------------------- tars

def member(name, content=b"", kind=tarfile.REGTYPE, **fields):
    info = tarfile.TarInfo(name)
    info.size, info.type = len(content) if kind == tarfile.REGTYPE else 0, kind
    for key, value in fields.items():
        setattr(info, key, value)
    return info, content


def tar_of(members, format=tarfile.PAX_FORMAT):
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=format) as tar:
        for info, content in members:
            tar.addfile(info, io.BytesIO(content) if info.isreg() else None)
    return file.getvalue()


def pair(key, folder=""):
    png = encoded(Image.new("RGB", (20, 16), (9, 9, 9)), "PNG")
    return [member(f"{folder}{key}.png", png), member(f"{folder}{key}.txt", f"text {key}".encode())]


@lru_cache
def tars():
    """name: (bytes of a tar, outcome, captions of its samples or what the message says)."""
    three = [*pair("a"), *pair("b"), *pair("c")]
    whole = tar_of(three)
    end = len(whole.rstrip(b"\0")) // 512 * 512 + 512           # where the end mark begins
    fine = ["text a", "text b", "text c"]
    jpg, evil = three[0][1], dict(linkname="/etc/passwd")
    pax = tar_of([member("d.png", jpg, pax_headers={"size": str(2 ** 60)})])
    damaged = bytearray(whole)
    damaged[1024 + 124] ^= 1
    flipped = whole[:1024] + bytes([whole[1024] ^ 1]) + whole[1025:]
    odd = [member("caf\udce9.png", jpg), member("caf\udce9.txt", b"text d")]
    cuts = {f"cut at {at}": (whole[:at], "refused", "cut, damaged or compressed after byte")
            for at in (100, 512, 1024, 1100, end - 512, end - 1)}
    links = {kind: (tar_of([*three, member("x.jpg", kind=code, **evil)]), "taken", fine)
             for kind, code in (("symlink", tarfile.SYMTYPE), ("hard link", tarfile.LNKTYPE),
                                ("device", tarfile.CHRTYPE), ("pipe", tarfile.FIFOTYPE), ("folder", tarfile.DIRTYPE))}
    return cuts | links | {
        "no end mark": (whole[:end], "refused", "no end mark"),
        "half an end mark": (whole[:end + 512], "refused", "end mark"),
        "content after the end": (whole + whole, "refused", "content after it"),
        "a flipped bit of a header": (flipped, "refused", "after byte 1,024 of"),
        "a flipped bit of a size": (bytes(damaged), "refused", "after byte 1,024 of"),
        "a way up": (tar_of([*three, member("../../x.jpg", jpg)]), "taken", fine),
        "a way up inside": (tar_of([*three, member("a/../../x.jpg", jpg)]), "taken", fine),
        "from the root": (tar_of([*three, member("/abs.jpg", jpg)]), "taken", fine),
        "twice": (tar_of([*three, *pair("a")]), "refused", "comes twice"),
        "twice in a row": (tar_of([*three[:2], *three[:2]]), "refused", "comes twice"),
        "two images": (tar_of([*pair("a"), member("a.jpg", jpg)]), "refused", "second image"),
        "mixed": (tar_of([three[0], three[2], three[1], three[3]]), "refused", "lies apart"),
        "image without text": (tar_of([*three, member("d.png", jpg)]), "skipped", "d.png: no caption"),
        "text without image": (tar_of([*three, member("d.txt", b"x")]), "skipped", "d.txt: no image"),
        "json that is none": (tar_of([*three, *pair("d"), member("d.json", b"{")]), "skipped", "d.png: not JSON"),
        "json of a wrong size": (tar_of([*three, *pair("d"), member("d.json", b'{"original_width": -3}')]), "skipped",
                                 "d.png: original_height"),
        "image of 0 bytes": (tar_of([*three, member("d.png"), member("d.txt", b"x")]), "skipped", "d.png: "),
        "no members": (tar_of([]), "refused", "no samples"),
        "no samples": (tar_of([member("x.pkl", b"x")]), "refused", "no samples"),
        "0 bytes": (b"", "refused", "after byte 0 of"),
        "not a tar": (b"<html>" * 999, "refused", "damaged"),
        "gzip": (gzip.compress(whole), "refused", "compressed after byte 0 "),
        "size of 2^60": (pax, "refused", "damaged"),
        "size below zero": (tar_of([member("d.png", jpg, pax_headers={"size": "-1024"})]), "refused", "damaged"),
        "upper case": (tar_of([member("a.PNG", jpg), member("a.TXT", b"text a")]), "taken", ["text a"]),
        "two folders": (tar_of([*pair("a", "x/"), *pair("a", "y/")]), "taken", ["text a", "text a"]),
        "a name that is no UTF-8": (tar_of([*three, *odd], tarfile.GNU_FORMAT), "taken", [*fine, "text d"]),
        "long names": (tar_of(pair("a", "x" * 150 + "/")), "taken", ["text a"])}


@pytest.mark.parametrize("name", tars())
def test_a_tar(tmp_path, name):
    content, outcome, what = tars()[name]
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "0.tar").write_bytes(content)
    if outcome == "refused":
        with pytest.raises(UserError, match=what) as error:
            data.TarShards(tmp_path / "set", 16, max_bad=1.0)
        assert "0.tar" in str(error.value)
        return
    source = data.TarShards(tmp_path / "set", 16, max_bad=0.5)
    rows = data.records(source, range(len(source)), [0] * len(source))
    if outcome == "skipped":
        assert len(source.bad) == 1 and what in next(f"{k}: {v}" for k, v in source.bad.items())
        assert len(rows["image"]) in (3, 4) and set(rows["caption"]) <= {"text a", "text b", "text c"}
        with pytest.raises(UserError, match="1 of 4"):
            strict = data.TarShards(tmp_path / "set", 16, max_bad=0.0)
            [strict.record(k, 0) for k in range(len(strict))]
    else:
        assert rows["caption"] == what and not source.bad
        assert [source.name(k)[:6] for k in range(len(source))] == ["0.tar/"] * len(source)


@settings(max_examples=40, deadline=None)
@given(st.binary(max_size=3000), st.integers(0, 9), st.integers(0, 6000))
def test_any_bytes_are_an_index_or_an_error(tmp_path_factory, noise, piece, at):
    base = tars()["symlink"][0]
    at %= len(base)                                             # put between, or in place of some
    content = noise if piece == 0 else base[:at] + noise + base[at + len(noise) * (piece % 2):]
    path = tmp_path_factory.mktemp("t") / "x.tar"
    path.write_bytes(content)
    try:
        table = shards.index(path).astype(np.int64)
        assert (table[:, 1::2] + 512 * table[:, ::2] <= len(content)).all()
    except UserError:
        pass
