"""Text encoders: frozen word vectors for the shapes, CLIP through open_clip, and stored tokens beside cached latents.

encoder = make_encoder(cfg)                         by cfg.encoder, a row of ENCODERS
tokens, lengths = encoder.encode(["a red ring", ""])
CLIPText("clip/")                                   a folder that open_clip wrote: weights and open_clip_config.json
CLIPText("openai")                                  a hub tag of ViT-L-14, downloaded once

CLIP's weights do not say which activation they need, and the wrong one gives wrong tokens without an error. QuickGELU
is used if open_clip's table says so of the tag, if the open_clip_config.json beside local weights says so, or if the
path is written openai:PATH; otherwise GELU. Loading prints the choice. Weights without a config count as ViT-L-14.
Dimensions: B batch, L token positions, n tokens of one caption, E width of a token.
"""
import difflib
import hashlib
import json
import math
import sys
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from threading import Lock
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from config import Config, UserError
from rng import seed64
from runtime.optional import optional_import
from sources.shapes_grammar import WORDS, split

MODEL, LENGTH = "ViT-L-14", 77          # [COND] sec. 2.1: the text encoder, and its number of token positions
CACHE = 4096                            # captions to remember; a long one takes 0.24 MB
CHUNK, CUTS = 64, 20                    # captions in one pass through the tower; cut captions to report
CONFIG = "open_clip_config.json"
WEIGHTS = ("open_clip_model.safetensors", "open_clip_pytorch_model.safetensors", "open_clip_pytorch_model.bin")
TOWER = {"context_length", "vocab_size", "width", "heads", "layers"}    # text_cfg of a plain text transformer


# ---------------------------------------------------------------- choosing one

def make_encoder(cfg: Config, stored: dict | None = None, device: str | torch.device = "cpu") -> Any:
    """Return an encoder with `dim` E, `length` L and `encode(captions) -> (tokens, lengths)`; None without text.

    stored: the `encoder` of a source; the tower of that name is loaded only when it is needed. device: the tower runs
    on a CUDA device, otherwise on the CPU. UserError if the name, the stored encoder or the length does not fit."""
    name, _, path = cfg.encoder.partition(":")
    key = f"{name}:PATH" if path else cfg.encoder
    if key not in ENCODERS:
        raise UserError(f"unknown encoder={cfg.encoder!r}; there are {' and '.join(ENCODERS)}, where PATH is an "
                        "open_clip model folder or hub name")
    if cfg.model.semantics != "text":
        return None
    if stored and not path:
        raise UserError(f"encoder={cfg.encoder!r}, but the stored tokens are of {stored['name']!r}; say "
                        f"--encoder={stored['name']}")
    if path and cfg.model.text_length not in (0, LENGTH):
        raise UserError(f"model.text_length={cfg.model.text_length}, but encoder={cfg.encoder!r} has {LENGTH} tokens; "
                        f"leave it at 0")
    device = device if torch.device(device).type == "cuda" else "cpu"
    load = partial(ENCODERS[key], path, cfg.model.text_length, device)
    if stored and cfg.encoder == stored["name"]:
        return LazyTextEncoder(stored, load)
    encoder = load()
    if stored:
        check_same(encoder, stored)
    return encoder


# What --encoder takes, and what makes it of PATH, L and device. To add an encoder, add a row.
ENCODERS = {"words": lambda path, length, device: WordVectors(length or 20),
            "clip:PATH": lambda path, length, device: CLIPText(path, device=device)}


def pad_tokens(rows: Sequence[Tensor], length: int, dim: int) -> tuple[Tensor, Tensor]:
    """Pad captions of n tokens (n, E) with zeros to one tensor (B, L, E) float32; also return n (B,)."""
    out = torch.zeros(len(rows), length, dim)
    for whole, row in zip(out, rows):
        whole[:len(row)] = row
    return out, torch.tensor([len(row) for row in rows], dtype=torch.long)


# ---------------------------------------------------------------- stored tokens

def check_same(encoder: Any, stored: dict) -> None:
    """UserError unless the encoder is the one in `stored`, the "encoder" of a meta.json."""
    if (found := encoder.describe())["sha256"] != stored["sha256"]:
        raise UserError(f"encoder={found['name']!r} has sha256 {found['sha256'][:12]}, but the stored tokens are of "
                        f"{stored['name']!r}, {stored['sha256'][:12]}; say --encoder={stored['name']}, or encode the "
                        f"data again")


class LazyTextEncoder:
    """Text encoder with stored tokens; the tower is loaded only for captions that are not stored.

    stored: the "encoder" of a meta.json; load: makes the encoder. Several threads may call it."""
    def __init__(self, stored: dict, load: Callable[[], Any]) -> None:
        self.name, self.dim, self.length = stored["name"], stored["dim"], stored["length"]
        self.stored, self.load, self.lock, self.tower = stored, load, Lock(), None

    def encode(self, captions: list[str]) -> tuple[Tensor, Tensor]:
        """Encode captions that are not stored: (B, L, E) and (B,). UserError if the tower is not the stored one."""
        with self.lock:
            if self.tower is None:
                tower = self.load()
                check_same(tower, self.stored)
                self.tower = tower
        return self.tower.encode(captions)


# ---------------------------------------------------------------- words of the shapes

class WordVectors:
    """Frozen text encoder of the shapes: a token encodes its word, the two words before it and the one after it.

    Token j joins four vectors of +-1, of the words j-2, j-1, j and j+1 (zeros beyond the ends), and a sinusoidal
    position, so the token of "ring" in "a small red ring" knows "small", "red" and "ring". The vectors are rows of a
    Hadamard matrix: words are exactly orthogonal and every number has unit variance. Nothing is learned or loaded:
    the same words give the same tokens on every machine."""
    name = "words"
    position = 16                                           # numbers of a token that encode its position
    window = (-2, -1, 0, 1)

    def __init__(self, length: int = 20) -> None:
        self.length, self.words = length, list(WORDS)
        self.row = {word: k for k, word in enumerate(self.words)}

        table = torch.ones(1, 1)
        while len(table) < len(self.words):                 # Sylvester: [[H, H], [H, -H]]
            table = torch.cat([torch.cat([table, table], 1), torch.cat([table, -table], 1)], 0)
        sign = torch.tensor([1.0 - 2 * (seed64("word vectors", k) & 1) for k in range(len(table))])
        blank = torch.zeros(1, len(table))
        self.table = torch.cat([table[:len(self.words)] * sign, blank])                     # (words + 1, V)
        self.dim = len(self.window) * len(table) + self.position

        rate = 4.0 ** -torch.arange(0, 4, 8 / self.position)
        angle = torch.arange(length)[:, None] * rate                                    # (L, position / 2)
        self.where = math.sqrt(2) * torch.cat([angle.cos(), angle.sin()], dim=1)        # (L, position)

    def encode(self, captions: list[str]) -> tuple[Tensor, Tensor]:
        """Encode B captions as tokens (B, L, E) float32 and lengths (B,) int64, with zeros after a caption's end.

        The empty caption, the null condition, has length 0. UserError for an unknown word or more than L words."""
        rows = [self.rows(caption) for caption in captions]
        lengths = torch.tensor([len(row) for row in rows], dtype=torch.long)
        blank, before, after = len(self.words), -self.window[0], self.window[-1]
        full = [[blank] * before + row + [blank] * (self.length - len(row) + after) for row in rows]
        ids = torch.tensor(full, dtype=torch.long).reshape(len(rows), self.length + before + after)
        near = ids.unfold(1, len(self.window), 1)                               # (B, L, 4)
        tokens = torch.cat([self.table[near].flatten(2), self.where.expand(len(rows), -1, -1)], dim=2)
        return tokens * (torch.arange(self.length) < lengths[:, None])[..., None], lengths

    def rows(self, caption: str) -> list[int]:
        """Return the index of every word of a caption. UserError as in `encode`."""
        words = split(caption)
        for word in words:
            if word not in self.row:
                near = difflib.get_close_matches(word, self.words, n=3, cutoff=0.5)
                hint = f"did you mean {' or '.join(near)}? " if near else ""
                raise UserError(f"unknown word {word!r} in caption {caption!r}; {hint}known: {', '.join(self.words)}")
        if len(words) > self.length:
            raise UserError(f"caption {caption!r} has {len(words)} words; the encoder takes {self.length}")
        return [self.row[word] for word in words]


# ---------------------------------------------------------------- CLIP

class CLIPText:
    """[COND] sec. 2.1: CLIP's frozen text tower, with a cache. Tokens are fp32 on the CPU, wherever the tower runs.

    path: a file or folder of open_clip weights, openai:PATH, or a hub tag; the file's docstring explains them.
    UserError if they do not fit. Several threads may call it."""
    def __init__(self, path: str, device: str | torch.device = "cpu") -> None:
        self.tower, file, self.activation, why = load_clip(path)
        del self.tower.visual, self.tower.logit_scale
        self.tower.to(device)
        self.words = optional_import("open_clip", "CLIP", "open_clip_torch").SimpleTokenizer()
        self.name, self.device = f"clip:{path}", device
        self.length, self.dim = self.tower.positional_embedding.shape
        self.cache: OrderedDict[str, Tensor] = OrderedDict()                    # caption -> tokens (n, E)
        self.cut: set[str] = set()
        self.lock = Lock()
        say(f"CLIP text tower from {file}: {len(self.tower.transformer.resblocks)} layers of width {self.dim}, "
            f"{self.activation} ({why})")

    def encode(self, captions: list[str]) -> tuple[Tensor, Tensor]:
        """Encode B captions as tokens (B, L, E) float32 and lengths (B,) int64, with zeros after a caption's end.

        A length counts the marks of beginning and end. The empty caption, the null condition, is all zeros with
        length 0. A caption of more than L tokens is cut, with a warning. The tower runs once on each new caption; the
        last bits of a token may depend on the other captions of the call."""
        with self.lock:
            new = list(dict.fromkeys(c for c in captions if c not in self.cache))
            self.cache.update(zip(new, self.each(new)))
            for caption in captions:
                self.cache.move_to_end(caption)
            found = [self.cache[caption] for caption in captions]
            while len(self.cache) > CACHE:
                self.cache.popitem(last=False)
        return pad_tokens(found, self.length, self.dim)

    def each(self, captions: list[str]) -> Iterator[Tensor]:
        """Compute the tokens (n, E) of every caption in turn, past the cache, for one thread at a time.

        CHUNK captions pass the tower together, so every bit is a function of this list."""
        for k in range(0, len(captions), CHUNK):
            rows = [self.tokenize(caption) for caption in captions[k:k + CHUNK]]
            found = iter(self.run([row for row in rows if row]) if any(rows) else ())
            for row in rows:
                yield next(found) if row else torch.zeros(0, self.dim)

    def describe(self) -> dict[str, str | int]:
        """Identify the encoder: sha256 covers its weights, activation, layer and vocabulary."""
        digest = hashlib.sha256(f"{self.activation} last {json.dumps(self.words.encoder)}".encode())
        for name, v in sorted(self.tower.state_dict().items()):
            digest.update(f"{name} {tuple(v.shape)}".encode())
            digest.update(v.cpu().contiguous().numpy())
        return {"name": self.name, "layer": "last", "dim": self.dim, "length": self.length,
                "sha256": digest.hexdigest()}

    def tokenize(self, caption: str) -> list[int]:
        """Return a caption's token ids between the two marks, at most L; [] for a caption without words."""
        marks = self.words.sot_token_id, self.words.eot_token_id
        ids = [k for k in self.words.encode(caption) if k not in marks]
        room = self.length - len(marks)
        if len(ids) > room and caption not in self.cut and len(self.cut) < CUTS:
            self.cut.add(caption)
            last = "; no more of these are reported" if len(self.cut) == CUTS else ""
            say(f"warning: {len(ids) - room} of {len(ids)} tokens cut from the end of {caption[:60]!r}...{last}")
        return [marks[0], *ids[:room], marks[1]] if ids else []

    @torch.no_grad()
    def run(self, rows: list[list[int]]) -> list[Tensor]:
        """Run the tower on captions of n token ids each: tokens (n, E).

        A token attends only to those before it, so a batch is as long as its longest caption, not L."""
        tower, most = self.tower, max(map(len, rows))
        ids = torch.tensor([row + [0] * (most - len(row)) for row in rows], device=self.device)
        x = tower.token_embedding(ids) + tower.positional_embedding[:most]      # (B, n, E)
        tokens = tower.ln_final(tower.transformer(x, attn_mask=tower.attn_mask[:most, :most])).cpu()
        return [t[:len(row)].clone() for t, row in zip(tokens, rows)]


def say(line: str) -> None:
    """Print one line to stderr without breaking a progress bar."""
    tqdm.write(line, file=sys.stderr)


# ---------------------------------------------------------------- loading CLIP

def load_clip(path: str, name: str = MODEL) -> tuple[nn.Module, Path, str, str]:
    """Load a CLIP with both towers, frozen and in fp32; also return its file, its activation and the reason for that.

    path: as for CLIPText; name: the model if no config is beside the weights. Runs no code from the file. UserError
    if the weights do not fit or the text tower is not a plain transformer."""
    open_clip = optional_import("open_clip", "CLIP", "open_clip_torch")
    file, cfg, why = find_clip(path, name, open_clip)
    if other := set(cfg["text_cfg"]) ^ TOWER:
        raise UserError(f"this CLIP's text_cfg is not that of a plain text tower, {', '.join(sorted(TOWER))}; "
                        f"it differs in {', '.join(sorted(other))}")
    try:
        with torch.random.fork_rng(devices=[]):             # random weights, all replaced below
            net = open_clip.CLIP(cfg["embed_dim"], cfg["vision_cfg"], cfg["text_cfg"], bool(cfg.get("quick_gelu")))
        open_clip.load_checkpoint(net, str(file))
    except Exception as e:              # whatever open_clip, torch or safetensors raise for a foreign file
        reason = " ".join(str(e).split())[:300] or type(e).__name__
        raise UserError(f"{file} is not the state dict of an open_clip model and nothing else, .safetensors, .bin or "
                        f".pt: {reason}") from e
    return net.eval().requires_grad_(False), file, "QuickGELU" if cfg.get("quick_gelu") else "GELU", why


def find_clip(path: str, name: str, open_clip: ModuleType) -> tuple[Path, dict, str]:
    """Return the file of weights, the model's config, and the reason for its activation. UserError for no such path."""
    local, cfg = Path(path.removeprefix("openai:")), open_clip.get_model_config(name)
    if not local.exists():
        if not (known := open_clip.get_pretrained_cfg(name, path)):
            raise UserError(f"no CLIP weights at {path!r}: neither a file or folder nor one of the tags of {name}, "
                            f"{', '.join(open_clip.list_pretrained_tags_by_model(name))}")
        try:
            file = Path(open_clip.download_pretrained(known))
        except Exception as e:          # whatever the hub, the network or the disk raises
            raise UserError(f"cannot get the CLIP weights {path!r}: {e}. With network: `hf download "
                            f"{known['hf_hub'].rstrip('/')} --include 'open_clip*' --local-dir clip`; then name the "
                            f"folder, clip, instead of {path}") from e
        return file, cfg | {"quick_gelu": known.get("quick_gelu", False)}, f"tag {path}"
    file = next((local / w for w in WEIGHTS if (local / w).is_file()), None) if local.is_dir() else local
    if file is None:
        raise UserError(f"no CLIP weights in the folder {str(local)!r}; one of {', '.join(WEIGHTS)} must be there")
    why = f"no {CONFIG}: if these weights are OpenAI's, write openai:{path}"
    if (beside := file.parent / CONFIG).is_file():
        try:
            cfg, why = json.loads(beside.read_text(encoding="utf-8"))["model_cfg"], f"by {CONFIG}"
            cfg["embed_dim"], cfg["vision_cfg"], cfg["text_cfg"]["width"]
        except (ValueError, KeyError, TypeError) as e:
            raise UserError(f"{beside} is not a config that open_clip wrote: {e!r}") from e
    if path.startswith("openai:"):
        cfg, why = cfg | {"quick_gelu": True}, "as openai:PATH asks"
    return file, cfg, why
