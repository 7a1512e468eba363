"""What a run shows of itself now and then: a page of the same pictures each time, and FID where it is asked for."""
import io
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import nn

import cached
import checkpoint
import data
import latents
import log
import machine
import model
import sample
import wishes
from autoencoder import decoder_of
from conditioning import from_batch
from config import Config, to_json

PREVIEWS = 16                           # pictures on a page
PREVIEW_STEPS = 20                      # their sampling steps
CONTROL_ROWS = 1000                     # control values kept with the weights, for sampling from their distribution
READ = 50                               # pictures read at a time for them


def about_weights(cfg: Config, source: data.Source) -> dict[str, str]:
    """What sample.py needs beside the weights: config, class names, null class, distribution of controls, decoder."""
    about = {"config": to_json(cfg), "classes": json.dumps(source.classes), "null_class": str(len(source.classes)),
             "ema": f"{cfg.ema:g}"}
    if controls := model.control_names(cfg.model):
        rows = data.index_and_epoch(np.arange(min(CONTROL_ROWS, len(source))), len(source), cfg.seed)[0]
        parts = [data.records(source, part, [0] * len(part)) for part in np.array_split(rows, -(-len(rows) // READ))]
        about["controls"] = json.dumps({k: torch.cat([part[k] for part in parts]).tolist() for k in controls})
    if isinstance(source, data.Latents):
        about["latents"] = json.dumps(cached.header(source.meta))
        about |= {"encoder": json.dumps(source.encoder)} if source.encoder else {}
    return about


class Show:
    """Called with the averaged network at every step; draws or measures when it is time to.

    Made by every process before the first step, so that what is missing (a decoder, the weights of a metric) stops
    the run there. Pages are rank 0's, FID is measured by all."""
    def __init__(self, cfg: Config, source: data.Source, encoder: data.TextEncoder | None, about: dict[str, str],
                 place: machine.Place) -> None:
        self.cfg, self.names, self.place, self.monitor = cfg, source.classes, place, None
        if cfg.sample_every and place.rank == 0:
            self.decode = decoder_of(about, "", cfg.model.channels, place.device)[0]
            self.batch = data.fetch(source, encoder, cfg.seed, PREVIEWS, PREVIEWS, 0, 0)
            if isinstance(source, data.Latents):
                latents.write_panel(source, self.decode, place.device, Path(cfg.out) / "samples/round-trip.png")
        if cfg.fid_every:
            import fid                                      # and all that it measures with, which few runs need
            asked = fid.Options(out=cfg.out, ref=cfg.fid_ref, n=cfg.fid_n, batch=cfg.micro)
            self.monitor = fid.Monitor(asked, cfg, about, place)
            lines = log.read(Path(cfg.out)) if place.rank == 0 else []
            self.measured = machine.agree(max((line["step"] for line in lines if "evaluation_s" in line), default=0),
                                          place)            # a run that goes on has these in its log

    def __call__(self, net: nn.Module, step: int) -> None:
        last = step == self.cfg.steps
        if self.place.rank == 0 and self.cfg.sample_every and (step % self.cfg.sample_every == 0 or last):
            self.page(net, Path(self.cfg.out) / f"samples/step-{step:08d}.png")
        if self.monitor and step > self.measured and (step % self.cfg.fid_every == 0 or last):
            self.monitor(net, step)

    def page(self, net: nn.Module, path: Path) -> None:
        """Draw the same pictures as at every other time into one PNG, if it is not there yet."""
        if path.exists():
            return
        batch, cfg = self.batch, self.cfg
        cond = from_batch(batch, cfg.model.semantics, model.control_names(cfg.model))
        if cond.text is not None:
            cond = replace(cond, text=wishes.pad(cond.text, batch["lengths"], cfg, range(PREVIEWS), 0))
        asked = sample.Options(steps=min(PREVIEW_STEPS, cfg.model.noise_steps))
        images = sample.draw(net, cfg, cond, range(PREVIEWS), asked, self.place.device)
        png = io.BytesIO()
        data.grid(self.decode(images).cpu(), 4, data.titles(batch, self.names)).save(png, "png")
        with checkpoint.tolerate(str(path)):
            path.parent.mkdir(exist_ok=True)
            checkpoint.write_bytes(path, png.getvalue())
