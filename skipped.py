"""skipped.jsonl: the files that a run passed over, each named once with the reason.

skipped.note({"b/7.jpg": "not a JPEG"})         one more line, {"name": "b/7.jpg", "reason": "not a JPEG"}

All processes and threads of a run share the file, and a run that goes on adds to it. It is not there until something
is bad.
"""
import json
from pathlib import Path
from typing import Any, BinaryIO

import checkpoint

FILE = "skipped.jsonl"


class Skipped:
    """The list in a folder. `note` may be called by several processes, and in each by one thread at a time."""
    def __init__(self, out: Path) -> None:
        self.path, self.names, self.end = out / FILE, set(), 0          # what the file says up to byte `end`

    def note(self, bad: dict[str, str]) -> None:
        """Adds those of {name: reason} that the file does not have. A disk that refuses is a warning."""
        if bad.keys() <= self.names:
            return
        with checkpoint.tolerate(FILE), open(self.path, "a+b", buffering=0) as file:
            checkpoint.wait_for(file)
            self.catch_up(file)
            new = [{"name": name, "reason": reason} for name, reason in bad.items() if name not in self.names]
            file.write("".join(json.dumps(line) + "\n" for line in new).encode())
            self.catch_up(file)

    def catch_up(self, file: BinaryIO) -> None:
        """Reads what is new, whoever wrote it; half a line, of a kill or a full disk, is taken away."""
        file.seek(self.end)
        content = file.read()
        whole = content[:content.rfind(b"\n") + 1]
        if len(whole) < len(content):
            file.truncate(self.end + len(whole))
        self.end += len(whole)
        for line in whole.splitlines():
            try:
                self.names.add(json.loads(line)["name"])
            except (ValueError, TypeError, KeyError):       # of another hand
                continue


def follow(source: Any, out: Path) -> None:
    """What the source has passed over, and will pass over from now on, is named in this folder."""
    source.skipped = Skipped(out)
    source.skipped.note(source.bad)
