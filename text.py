"""Captions to vectors with CLIP: a frozen text tower, through open_clip, that remembers what it has encoded.

encoder = CLIPText("clip/")                         a folder that open_clip wrote: weights and open_clip_config.json
encoder = CLIPText("openai")                        a tag of its hub for ViT-L-14, fetched once
tokens, lengths = encoder.encode(["a red ring", ""])

The activation of the tower is not in its weights, and with the wrong one the tokens are wrong without an error. It is
QuickGELU where open_clip's table says so of a tag, where the open_clip_config.json beside local weights says so, and
where the path is written openai:PATH; else GELU. Loading prints which. Local weights without a config are ViT-L-14's.
Dimensions: B batch, L token positions (77), n tokens of one caption, E width of a token (768), P of the pooled vector.
"""
import hashlib
import json
import pickle
import sys
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from threading import Lock
from types import ModuleType

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from tqdm import tqdm

from config import UserError
from outside import library
from tokens import padded

MODEL = "ViT-L-14"                      # [COND] sec. 2.1: the text encoder
LAYERS = ("last", "penultimate")
CACHE = 4096                            # captions that are remembered; a full one takes 0.24 MB
CHUNK = 64                              # captions a pass through the tower
CUTS = 20                               # captions whose cutting is reported
CONFIG = "open_clip_config.json"
WEIGHTS = ("open_clip_model.safetensors", "open_clip_pytorch_model.safetensors", "open_clip_pytorch_model.bin")
TOWER = {"context_length", "vocab_size", "width", "heads", "layers"}    # what the config says of a plain text tower
NOT_TEXT = ("visual.", "logit_scale", "logit_bias")


class CLIPText:
    """[COND] sec. 2.1: frozen CLIP tokens of captions, in fp32 on the CPU wherever the tower runs.

    path: a file or folder of open_clip weights, openai:PATH, or a tag of open_clip's hub; the file's docstring says how
    they differ. layer: last, or penultimate, the output of the block before; the tower's final LayerNorm is applied to
    either. UserError for a path, file or layer that will not do. May be called from several threads."""
    def __init__(self, path: str, layer: str = "last", device: str = "cpu") -> None:
        if layer not in LAYERS:
            raise UserError(f"unknown CLIP layer {layer!r}; there are {', '.join(LAYERS)}")
        open_clip = library("open_clip", "CLIP", "open_clip_torch")
        file, cfg, why = find(path, open_clip)
        self.tower = fill(build_tower(cfg, open_clip), read(file), file).to(device)
        self.words = open_clip.tokenizer.SimpleTokenizer()
        self.name, self.layer, self.device = f"clip:{path}", layer, device
        self.length, self.dim = self.tower.context_length, self.tower.width
        self.cache: OrderedDict[str, tuple[Tensor, Tensor]] = OrderedDict()     # caption -> (n, E), (P,)
        self.cut: set[str] = set()
        self.lock = Lock()
        self.activation = "QuickGELU" if cfg.get("quick_gelu") else "GELU"
        say(f"CLIP text tower from {file}: {len(self.tower.transformer.resblocks)} layers of width {self.dim}, "
            f"{self.activation} ({why})")

    def encode(self, captions: list[str]) -> tuple[Tensor, Tensor]:
        """B captions to tokens (B, L, E) float32 and lengths (B,) int64; zeros after a caption's end.

        A length counts the marks of beginning and end. The empty caption is all zeros and of length 0: the null
        condition. What is past L tokens is cut, with a warning. The last bits of a token may depend on what else was
        encoded in the same call."""
        return padded([tokens for tokens, _ in self.look_up(captions)], self.length, self.dim)

    def pooled(self, captions: list[str]) -> Tensor:
        """The vector at the end mark, last layer, projected to the space shared with images. (B, P); "" is zeros."""
        found = [vector for _, vector in self.look_up(captions)]
        return torch.stack(found) if found else torch.zeros(0, self.tower.output_dim)

    def look_up(self, captions: list[str]) -> list[tuple[Tensor, Tensor]]:
        """Tokens (n, E) and vector (P,) of every caption; the tower runs on those that are new, each once."""
        with self.lock:
            new = list(dict.fromkeys(c for c in captions if c not in self.cache))
            self.cache.update(zip(new, self.each(new)))
            for caption in captions:
                self.cache.move_to_end(caption)
            found = [self.cache[caption] for caption in captions]
            while len(self.cache) > CACHE:
                self.cache.popitem(last=False)
        return found

    def each(self, captions: list[str]) -> Iterator[tuple[Tensor, Tensor]]:
        """Tokens (n, E) and vector (P,) of every caption in turn, all computed now; one thread at a time.

        CHUNK of them pass the tower together, so every bit is a function of this list."""
        for k in range(0, len(captions), CHUNK):
            rows = [self.tokenize(caption) for caption in captions[k:k + CHUNK]]
            found = iter(self.run([row for row in rows if row]) if any(rows) else ())
            for row in rows:
                yield next(found) if row else (torch.zeros(0, self.dim), torch.zeros(self.tower.output_dim))

    def describe(self) -> dict[str, str | int]:
        """What identifies it: the sha256 is of its weights, its activation, its layer and its vocabulary."""
        digest = hashlib.sha256(f"{self.activation} {self.layer} {json.dumps(self.words.encoder)}".encode())
        for name, v in sorted(self.tower.state_dict().items()):
            digest.update(f"{name} {tuple(v.shape)}".encode())
            digest.update(v.cpu().contiguous().numpy())
        return {"name": self.name, "layer": self.layer, "dim": self.dim, "length": self.length,
                "sha256": digest.hexdigest()}

    def tokenize(self, caption: str) -> list[int]:
        """Its numbers between those of the two marks, at most L; none at all for a caption without words."""
        marks = self.words.sot_token_id, self.words.eot_token_id
        ids = [k for k in self.words.encode(caption) if k not in marks]
        room = self.length - len(marks)
        if len(ids) > room and caption not in self.cut and len(self.cut) < CUTS:
            self.cut.add(caption)
            last = "; no more of these are reported" if len(self.cut) == CUTS else ""
            say(f"warning: {len(ids) - room} of {len(ids)} tokens cut from the end of {caption[:60]!r}...{last}")
        return [marks[0], *ids[:room], marks[1]] if ids else []

    @torch.no_grad()
    def run(self, rows: list[list[int]]) -> list[tuple[Tensor, Tensor]]:
        """The tower on captions of n numbers each: tokens (n, E) and vector (P,).

        A token sees only those before it, so a batch is as long as its longest caption, not L."""
        tower, most = self.tower, max(map(len, rows))
        ids = torch.tensor([row + [0] * (most - len(row)) for row in rows], device=self.device)
        mask = tower.attn_mask[:most, :most]
        x = tower.token_embedding(ids) + tower.positional_embedding[:most]      # (B, n, E)
        for block in tower.transformer.resblocks:
            before, x = x, block(x, attn_mask=mask)
        last = tower.ln_final(x)
        tokens = (last if self.layer == "last" else tower.ln_final(before)).cpu()
        ends = torch.tensor([len(row) - 1 for row in rows], device=self.device)
        vectors = (last[torch.arange(len(rows), device=self.device), ends] @ tower.text_projection).cpu()
        return [(t[:len(row)].clone(), v.clone()) for t, v, row in zip(tokens, vectors, rows)]


# ---------------------------------------------------------------- loading

def say(line: str) -> None:
    """One line to stderr that leaves a progress bar whole."""
    tqdm.write(line, file=sys.stderr)


def find(path: str, open_clip: ModuleType) -> tuple[Path, dict, str]:
    """The file of weights, the model's config, and where its activation is from. UserError if there is no such path."""
    local = Path(path.removeprefix("openai:"))
    ours, tags = open_clip.get_model_config(MODEL), open_clip.list_pretrained_tags_by_model(MODEL)
    if not local.exists():
        if path not in tags:
            raise UserError(f"no CLIP weights at {path!r}: neither a file or folder nor one of the tags of {MODEL}, "
                            f"{', '.join(tags)}")
        known = open_clip.get_pretrained_cfg(MODEL, path)
        quick = known.get("quick_gelu", False)
        return download(path, known, open_clip), ours | {"quick_gelu": quick}, f"tag {path}"
    file = local
    if local.is_dir():
        there = [local / name for name in WEIGHTS if (local / name).is_file()]
        if not there:
            raise UserError(f"no CLIP weights in the folder {str(local)!r}; one of {', '.join(WEIGHTS)} must be there")
        file = there[0]
    beside = file.parent / CONFIG
    if beside.is_file():
        cfg, why = read_config(beside), f"by {CONFIG}"
    else:
        cfg, why = ours, f"no {CONFIG}: if these weights are OpenAI's, write openai:{path}"
    if path.startswith("openai:"):
        cfg, why = cfg | {"quick_gelu": True}, "as openai:PATH asks"
    return file, cfg, why


def read_config(file: Path) -> dict:
    """The model's part of an open_clip_config.json. UserError if it has none."""
    try:
        cfg = json.loads(file.read_text(encoding="utf-8"))["model_cfg"]
        cfg["embed_dim"], cfg["text_cfg"]["width"]
    except (ValueError, KeyError, TypeError) as e:
        raise UserError(f"{file} is not a config that open_clip wrote: {e!r}") from e
    return cfg


def download(tag: str, known: dict, open_clip: ModuleType) -> Path:
    """The file of a hub tag, from the cache if it is there. UserError that says how to get it by hand."""
    try:
        return Path(open_clip.download_pretrained(known))
    except Exception as e:              # whatever the hub, the network or the disk raises
        repo = known["hf_hub"].rstrip("/")
        raise UserError(f"cannot get the CLIP weights {tag!r}: {e}. With network: `hf download {repo} --include "
                        f"'open_clip*' --local-dir clip`; then name the folder, clip, in place of {tag}") from e


def build_tower(cfg: dict, open_clip: ModuleType) -> nn.Module:
    """The text half of a CLIP, without memory for its weights. UserError if it is not a plain text transformer."""
    text = cfg["text_cfg"]
    if other := set(text) ^ TOWER:
        raise UserError(f"this CLIP's text_cfg is not that of a plain text tower, {', '.join(sorted(TOWER))}; "
                        f"it differs in {', '.join(sorted(other))}")
    act = open_clip.transformer.QuickGELU if cfg.get("quick_gelu") else nn.GELU
    with torch.device("meta"):          # nothing is drawn, nothing is allocated
        return open_clip.transformer.TextTransformer(**text, output_dim=cfg["embed_dim"], act_layer=act)


def read(file: Path) -> dict[str, Tensor]:
    """The tensors of the text half; runs no code from the file. UserError if it cannot be read."""
    try:
        if file.suffix == ".safetensors":
            with safe_open(file, framework="pt") as f:
                return {k: f.get_tensor(k) for k in f.keys() if not k.startswith(NOT_TEXT)}
        state = torch.load(file, map_location="cpu", weights_only=True)
        state = state.get("state_dict", state)                          # as open_clip's training loop saves it
        state = {k.removeprefix("module."): v for k, v in state.items()}
    except (OSError, EOFError, RuntimeError, AttributeError, SafetensorError, pickle.UnpicklingError) as e:
        reason = next(iter(str(e).splitlines()), type(e).__name__)
        raise UserError(f"{file} is not a file of weights and nothing else, .safetensors, .bin or .pt: {reason}") from e
    return {k: v for k, v in state.items() if not k.startswith(NOT_TEXT)}


def fill(tower: nn.Module, tensors: dict[str, Tensor], file: Path) -> nn.Module:
    """The tower with these weights in fp32, frozen. UserError unless every name and shape is as it should be."""
    want = {k: v.shape for k, v in tower.state_dict().items()}
    wrong = {"missing": want.keys() - tensors.keys(), "not of a text tower": tensors.keys() - want.keys(),
             "of another shape": {k for k in want.keys() & tensors.keys() if want[k] != tensors[k].shape}}
    for what, names in wrong.items():
        if names:
            some = ", ".join(sorted(names)[:3]) + (", ..." if len(names) > 3 else "")
            raise UserError(f"{file} does not fit the CLIP text tower: {len(names)} tensors {what}: {some}; "
                            "it must hold the state dict of an open_clip model")
    tower.load_state_dict({k: v.float() for k, v in tensors.items()}, assign=True)
    tower.attn_mask = tower.build_causal_mask()                         # no weight, so it was left without memory
    return tower.eval().requires_grad_(False)
