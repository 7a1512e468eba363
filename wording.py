"""Captions as people store them, bytes, lines of JSON or lists of them, to one clean line, or a reason why not.

clean(decode(content))                                  the bytes of a .txt file
choose(["a cat", "a tabby"], 7)                         one of several, cleaned
metadata(b'{"file_name": "x.jpg", "text": "a cat"}')    {"x.jpg": "a cat"}, and what is wrong with which line
"""
import json
import unicodedata
from typing import Any

LONGEST = 2000                          # characters of a caption that are kept; a text tower reads some 400
SHOWN = 60                              # characters of a wrong value that a message quotes


class BadCaption(ValueError):
    """Something that is not a usable caption; the message says why. It is counted and replaced."""


def decode(content: bytes) -> str:
    """Bytes of a text file as text: UTF-8, with a byte order mark or without. BadCaption for any other encoding."""
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as e:
        raise BadCaption(f"caption is not UTF-8: {e.reason} at byte {e.start}") from e


def clean(text: str) -> str:
    """One line: composed characters (NFC), no control characters, single blanks, at most LONGEST characters."""
    text = " ".join(text[:8 * LONGEST].split())
    text = "".join(c for c in text if unicodedata.category(c) not in ("Cc", "Cs"))         # Cs: half a character
    return " ".join(unicodedata.normalize("NFC", text).split())[:LONGEST].rstrip()


def choose(value: Any, draw: int) -> str:
    """A caption, or of a list of captions the one that `draw` (any whole number) names. BadCaption for all else."""
    if isinstance(value, list) and value:
        value = value[draw % len(value)]
    if not isinstance(value, str):
        raise BadCaption(f"a caption is text or a list of texts, got {json.dumps(value)[:SHOWN]}")
    return clean(value)


def parse_object(content: bytes) -> dict[str, Any]:
    """The JSON object in these bytes. BadCaption if there is none."""
    try:
        found = json.loads(decode(content))
    except (ValueError, RecursionError) as e:           # BadCaption is a ValueError, and says more
        raise e if isinstance(e, BadCaption) else BadCaption(f"not JSON: {type(e).__name__}: {e}") from e
    if not isinstance(found, dict):
        raise BadCaption(f"JSON, but not an object: {json.dumps(found)[:SHOWN]}")
    return found


def metadata(content: bytes) -> tuple[dict[str, Any], dict[str, str]]:
    """A metadata.jsonl: {file_name: text}, text as it stands there, and {"line 3": reason} of lines of no use."""
    texts, bad = {}, {}
    for number, line in enumerate(content.removeprefix(b"\xef\xbb\xbf").split(b"\n"), 1):
        if not line.strip():
            continue
        try:
            row = parse_object(line)
            name = row.get("file_name")
            if not isinstance(name, str) or "text" not in row:
                raise BadCaption(f"wants file_name and text, has {', '.join(map(repr, row))[:SHOWN] or 'nothing'}")
            if name in texts:
                raise BadCaption(f"{name[:SHOWN]!r} is named a second time")
            texts[name] = row["text"]
        except BadCaption as e:
            bad[f"line {number}"] = str(e)
    return texts, bad
