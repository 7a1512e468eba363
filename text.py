"""Text encoders: frozen word vectors for the shapes, CLIP through open_clip, and stored tokens beside cached latents.

encoder = make_encoder(cfg)                         by cfg.encoder, a row of ENCODERS
tokens, lengths = encoder.encode(["a red ring", ""])
CLIPText("clip/")                                   a folder that open_clip wrote: weights and open_clip_config.json
CLIPText("openai")                                  a hub tag of ViT-L-14, downloaded once

CLIP's weights do not say which activation they need, and the wrong one gives wrong tokens without an error. QuickGELU
is used if open_clip's table says so of the tag, if the open_clip_config.json beside local weights says so, or if the
path is written openai:PATH; otherwise GELU. Loading prints the choice. Weights without a config count as ViT-L-14.
Dimensions: B batch, L token positions, n tokens of one caption, E width of a token, V width of a word's vector.
"""
import difflib
import hashlib
import json
import math
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from threading import Lock
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from config import Config, UserError
from rng import seed64
from runtime import log
from runtime.optional import optional_import
from sources.cached_latents import pad_tokens
from sources.shapes_grammar import WORDS, split

MODEL, LENGTH = "ViT-L-14", 77          # [COND] sec. 2.1: the text encoder, and its number of token positions
CACHE = 4096                            # captions to remember before all are forgotten; a long one takes 0.24 MB
CHUNK = 64                              # captions in one pass through the tower
CONFIG = "open_clip_config.json"
WEIGHTS = ("open_clip_model.safetensors", "open_clip_pytorch_model.safetensors", "open_clip_pytorch_model.bin")
PLAIN = {"context_length", "vocab_size", "width", "heads", "layers"}    # text_cfg of the towers that CLIPText can run


# ---------------------------------------------------------------- choosing one

def make_encoder(cfg: Config, stored: dict | None = None, device: str | torch.device = "cpu") -> Any:
    """Return an encoder with `dim` E, `length` L and `encode(captions) -> (tokens, lengths)`; None without text.

    stored: the `encoder` of a source with tokens; its tower is loaded when needed, or to compare another path."""
    name, _, path = cfg.encoder.partition(":")
    key = f"{name}:PATH" if path else cfg.encoder
    if key not in ENCODERS:
        raise UserError(f"unknown encoder={cfg.encoder!r}; there are {' and '.join(ENCODERS)}, where PATH is an "
                        "open_clip model folder or hub name")
    if cfg.model.semantics != "text":
        return None
    if stored and not path:
        raise UserError(f"encoder={cfg.encoder!r}, but the stored tokens are of {stored['name']!r}; use "
                        f"--encoder={stored['name']}")
    if path and cfg.model.text_length not in (0, LENGTH):
        raise UserError(f"model.text_length={cfg.model.text_length}, but encoder={cfg.encoder!r} has {LENGTH} tokens; "
                        f"leave it at 0")
    load = partial(ENCODERS[key], path, cfg.model.text_length, device if torch.device(device).type == "cuda" else "cpu")
    encoder = LazyTextEncoder(stored, load) if stored else load()
    if stored and cfg.encoder != stored["name"]:
        encoder.tower()
    return encoder


# What --encoder takes, and what makes it of PATH, L and device. To add an encoder, add a row.
ENCODERS = {"words": lambda path, length, device: WordVectors(length or 20),
            "clip:PATH": lambda path, length, device: CLIPText(path, device=device)}


class LazyTextEncoder:
    """Text encoder with stored tokens: `load` makes it only for captions that are not stored. Threads may share it."""
    def __init__(self, stored: dict, load: Callable[[], Any]) -> None:
        self.dim, self.length, self.stored, self.load = stored["dim"], stored["length"], stored, load
        self.lock, self.loaded = Lock(), None

    def encode(self, captions: list[str]) -> tuple[Tensor, Tensor]:
        return self.tower().encode(captions)

    def tower(self) -> Any:
        """Return the encoder, loaded once. UserError if it is not the one that encoded the stored tokens."""
        with self.lock:
            if self.loaded is None:
                encoder, name, sha256 = self.load(), self.stored["name"], self.stored["sha256"]
                if (found := encoder.describe())["sha256"] != sha256:
                    raise UserError(f"encoder={found['name']!r} has sha256 {found['sha256'][:12]}, but the stored "
                                    f"tokens are of {name!r}, {sha256[:12]}; use --encoder={name}, or encode again")
                self.loaded = encoder
            return self.loaded


# ---------------------------------------------------------------- words of the shapes

class WordVectors:
    """Frozen text encoder of the shapes: a token encodes its word, the two words before it and the one after it.

    Token j joins four vectors of +-1, of the words j-2, j-1, j and j+1 (zeros beyond the ends), and a sinusoidal
    position, so the token of "ring" in "a small red ring" knows "small", "red" and "ring". The vectors are rows of a
    Hadamard matrix: words are exactly orthogonal and every number has unit variance. Nothing is learned or loaded."""
    def __init__(self, length: int = 20) -> None:
        self.length, self.words = length, list(WORDS)
        self.index = {word: k for k, word in enumerate(self.words)}
        hadamard, double = torch.ones(1, 1), torch.tensor([[1.0, 1], [1, -1]])
        while len(hadamard) < len(self.words):
            hadamard = torch.kron(double, hadamard)         # Sylvester: [[H, H], [H, -H]]
        V = len(hadamard)
        sign = torch.tensor([1.0 - 2 * (seed64("word vectors", k) & 1) for k in range(V)])
        self.table = torch.cat([hadamard[:len(self.words)] * sign, torch.zeros(1, V)])      # (words + 1, V)
        angle = torch.arange(length)[:, None] * 4.0 ** -torch.arange(0, 4, 0.5)             # (L, 8)
        self.positions = math.sqrt(2) * torch.cat([angle.cos(), angle.sin()], dim=1)        # (L, 16)
        self.dim = 4 * V + 16

    def encode(self, captions: list[str]) -> tuple[Tensor, Tensor]:
        """Encode B captions as tokens (B, L, E) float32 and lengths (B,) int64, with zeros after a caption's end.

        The empty caption, the null condition, has length 0. UserError for an unknown word or more than L words."""
        L, blank, rows = self.length, len(self.words), [self.word_ids(caption) for caption in captions]
        lengths = torch.tensor([len(row) for row in rows], dtype=torch.long)
        ids = [[blank, blank, *row, *[blank] * (L + 1 - len(row))] for row in rows]
        windows = self.table[torch.tensor(ids, dtype=torch.long).view(-1, L + 3).unfold(1, 4, 1)]   # (B, L, 4, V)
        tokens = torch.cat([windows.flatten(2), self.positions.expand(len(rows), -1, -1)], dim=2)
        return tokens * (torch.arange(L) < lengths[:, None])[..., None], lengths

    def word_ids(self, caption: str) -> list[int]:
        words = split(caption)
        for word in words:
            if word not in self.index:
                near = difflib.get_close_matches(word, self.words, n=3, cutoff=0.5)
                hint = f"did you mean {' or '.join(near)}? " if near else ""
                raise UserError(f"unknown word {word!r} in caption {caption!r}; {hint}known: {', '.join(self.words)}")
        if len(words) > self.length:
            raise UserError(f"caption {caption!r} has {len(words)} words; the encoder takes {self.length}")
        return [self.index[word] for word in words]


# ---------------------------------------------------------------- CLIP

class CLIPText:
    """[COND] sec. 2.1: CLIP's frozen text tower, with a cache. Tokens are fp32 on the CPU, wherever the tower runs.

    path: a file or folder of weights, openai:PATH or a hub tag. UserError if they do not fit. Threads may share it."""
    def __init__(self, path: str, device: str | torch.device = "cpu") -> None:
        self.tower, file, self.activation, why = load_clip(path)
        del self.tower.visual, self.tower.logit_scale
        self.tower.to(device)
        self.tokenizer = optional_import("open_clip", "CLIP", "open_clip_torch").SimpleTokenizer()
        self.name, self.device, self.lock, self.warned = f"clip:{path}", device, Lock(), False
        self.length, self.dim = self.tower.positional_embedding.shape
        self.cache: dict[str, Tensor] = {}                   # caption -> tokens (n, E)
        log.info(f"CLIP text tower from {file}: {len(self.tower.transformer.resblocks)} layers of width {self.dim}, "
                 f"{self.activation} ({why})")

    def encode(self, captions: list[str]) -> tuple[Tensor, Tensor]:
        """Encode B captions as tokens (B, L, E) float32 and lengths (B,) int64, with zeros after a caption's end.

        A length counts the marks of beginning and end; that of the empty caption, the null condition, is 0. A longer
        caption is cut, with a warning. The last bits of a token may depend on the other captions of the call."""
        with self.lock:
            if len(self.cache) >= CACHE:
                self.cache.clear()
            new = list(dict.fromkeys(c for c in captions if c not in self.cache))
            self.cache.update(zip(new, self.encode_each(new)))
            rows = [self.cache[caption] for caption in captions]
        return pad_tokens(rows, self.length, self.dim)

    def encode_each(self, captions: list[str]) -> Iterator[Tensor]:
        """Compute the tokens (n, E) of every caption, past the cache; each bit is a function of the whole list."""
        for k in range(0, len(captions), CHUNK):
            rows = [self.tokenize(caption) for caption in captions[k:k + CHUNK]]
            found = iter(self.run_tower([row for row in rows if row]) if any(rows) else ())
            for row in rows:
                yield next(found) if row else torch.zeros(0, self.dim)

    def describe(self) -> dict[str, str | int]:
        """Identify the encoder: sha256 covers its weights, activation, layer and vocabulary."""
        return {"name": self.name, "layer": "last", "dim": self.dim, "length": self.length,
                "sha256": weights_sha256(self.tower, f"{self.activation} last {json.dumps(self.tokenizer.encoder)}")}

    def tokenize(self, caption: str) -> list[int]:
        """Return a caption's token ids between the two marks, at most L; [] for a caption without words."""
        start, end, limit = self.tokenizer.sot_token_id, self.tokenizer.eot_token_id, self.length - 2
        ids = [k for k in self.tokenizer.encode(caption) if k not in (start, end)]
        if len(ids) > limit and not self.warned:
            self.warned = True
            log.info(f"warning: {len(ids) - limit} of {len(ids)} tokens cut from the end of "
                     f"{caption[:60]!r}...; later captions are cut without a warning")
        return [start, *ids[:limit], end] if ids else []

    @torch.no_grad()
    def run_tower(self, rows: list[list[int]]) -> list[Tensor]:
        """Run the tower on captions of n token ids each: tokens (n, E).

        A token attends only to those before it, so a batch is as long as its longest caption, not L."""
        tower, longest = self.tower, max(map(len, rows))
        ids = torch.tensor([row + [0] * (longest - len(row)) for row in rows], device=self.device)
        x = tower.token_embedding(ids) + tower.positional_embedding[:longest]   # (B, n, E)
        tokens = tower.ln_final(tower.transformer(x, attn_mask=tower.attn_mask[:longest, :longest])).cpu()
        return [t[:len(row)].clone() for t, row in zip(tokens, rows)]


def weights_sha256(net: nn.Module, text: str) -> str:
    """Return the sha256 of a text and of the names, shapes and fp32 values of a network's state."""
    digest = hashlib.sha256(text.encode())
    for name, v in sorted(net.state_dict().items()):
        digest.update(f"{name} {tuple(v.shape)}".encode())
        digest.update(v.float().cpu().contiguous().numpy())
    return digest.hexdigest()


def load_clip(path: str, name: str = MODEL) -> tuple[nn.Module, Path, str, str]:
    """Load a CLIP with both towers, frozen and in fp32; also return its file, its activation and the reason for that.

    name: the model if no config is beside the weights. Runs no code from the file. UserError if they do not fit."""
    open_clip = optional_import("open_clip", "CLIP", "open_clip_torch")
    try:
        file, cfg, why = find_clip(path, name, open_clip)
        if odd := set(cfg["text_cfg"]) ^ PLAIN:
            raise ValueError(f"text_cfg differs from that of a plain text tower in {', '.join(sorted(odd))}")
        with torch.random.fork_rng(devices=[]):             # random weights, all replaced below
            net = open_clip.CLIP(**cfg)
        open_clip.load_checkpoint(net, str(file))
    except Exception as e:              # the hub, open_clip, torch and safetensors raise anything
        reason = " ".join(str(e).split())[:300] or type(e).__name__
        raise UserError(f"cannot load CLIP from {path!r}: {reason}. Give a file of weights, a folder with {WEIGHTS[0]} "
                        f"and {CONFIG} (docs/control.md has the download), or a tag of {name}: "
                        f"{', '.join(open_clip.list_pretrained_tags_by_model(name))}") from e
    return net.eval().requires_grad_(False), file, "QuickGELU" if cfg.get("quick_gelu") else "GELU", why


def find_clip(path: str, name: str, open_clip: ModuleType) -> tuple[Path, dict, str]:
    """Return the file of weights, downloaded for a tag, the model's config, and the reason for its activation."""
    local, cfg = Path(path.removeprefix("openai:")), open_clip.get_model_config(name)
    if known := not local.exists() and open_clip.get_pretrained_cfg(name, path):
        quick = known.get("quick_gelu", False)
        return Path(open_clip.download_pretrained(known)), cfg | {"quick_gelu": quick}, f"tag {path}"
    file = next((local / w for w in WEIGHTS if (local / w).is_file()), local)
    if not file.is_file():
        raise ValueError("it is neither a file, nor a folder with weights, nor a tag")
    why = f"no {CONFIG}; if these weights are OpenAI's, write openai:{path}"
    if (file.parent / CONFIG).is_file():
        cfg, why = json.loads((file.parent / CONFIG).read_text(encoding="utf-8"))["model_cfg"], f"by {CONFIG}"
    return (file, cfg | {"quick_gelu": True}, "by openai:PATH") if path.startswith("openai:") else (file, cfg, why)
