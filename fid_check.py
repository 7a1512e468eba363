"""What fid.py can be asked without weights: is its arithmetic right on this machine, and how fast is it.

checks() yields (name, error, limit); speeds(o) measures. Nothing here gives a FID of pictures.
Dimensions: B batch, H x W pixels, D features.
"""
import time
from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from config import UserError
from distances import FeatureStats, InceptionScore, frechet_distance, kid
from inception import CLASSES, Inception, by_formula, fold_, precise, tf1_resize

# Features 0, 2 and 500, their mean, and logits 0 and 1000, of golden_image with formula weights in float64.
# pytorch-fid's and torch-fidelity's modules give the same: tests/test_inception.py.
GOLDEN = (1.13632566466, 0.883459228125, 0.638190932149, 0.503075674075, 0.727769898574, -0.10979272435)
TURNS = 3                               # in which speeds are compared
GOLDEN_SIDE = 107                       # pixels of a side there: any from 75 up go through the network


@dataclass(frozen=True)
class Check:
    """The options of `fid.py check`."""
    threads: int = 0                # CPU threads; 0 = all


@dataclass(frozen=True)
class Speed:
    """What to measure."""
    dim: int = 2048                 # D of the covariances; 0 = no distance
    images: int = 16                # pictures through the network at a time; 0 = none
    threads: int = 0                # CPU threads; 0 = all


def golden_image() -> Tensor:
    """A picture by formula, (1, 3, 32, 40) float64, whole numbers 0 to 255."""
    c, y, x = torch.meshgrid(torch.arange(3), torch.arange(32), torch.arange(40), indexing="ij")
    return ((x * x * (3 + c) + y * (17 + 5 * c) + x * y + 40 * c) % 256).double()[None]


def golden(net: Inception) -> tuple[float, ...]:
    """What GOLDEN lists, of a network in float64."""
    with torch.inference_mode():
        features, logits = net(tf1_resize(golden_image(), GOLDEN_SIDE))
    f, z = features[0], logits[0]
    return tuple(v.item() for v in (f[0], f[2], f[500], f.mean(), z[0], z[1000]))


def non_commuting(D: int, rank: int) -> tuple[Tensor, Tensor, Tensor, Tensor, float]:
    """mu1, C1, mu2, C2 = T C1 T for a positive T, and their exact distance |dmu|^2 + tr (1-T) C1 (1-T)."""
    g = torch.Generator().manual_seed(D)
    normal = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64)
    A, Q, mu1, mu2 = normal(D, rank), torch.linalg.qr(normal(D, D))[0], normal(D), normal(D)
    T = Q * torch.linspace(0.3, 2.0, D, dtype=torch.float64) @ Q.T
    C1, gap = A @ A.T / rank, torch.eye(D, dtype=torch.float64) - T
    return mu1, C1, mu2, T @ C1 @ T, ((mu1 - mu2).square().sum() + (gap @ C1 @ gap).trace()).item()


def checks() -> Iterator[tuple[str, float, float]]:
    """Name, error and the error that is allowed, of each test."""
    net = by_formula(torch.float64)
    yield "Inception by formula, against its recorded output", relative(golden(net), GOLDEN), 1e-9
    ramp = torch.arange(64.0).view(1, 1, 1, 64).expand(1, 3, 8, 64)
    exact = (torch.arange(299) * 64 / 299).clamp(max=63).view(1, 1, 1, 299)
    yield "TF1 resize of a ramp", (tf1_resize(ramp) - exact).abs().max().item(), 1e-4

    for D, rank, limit in ((192, 400, 1e-11), (192, 90, 1e-6)):
        *gaussians, distance = non_commuting(D, rank)
        name = f"distance of {D} dimensions, rank {min(D, rank)}, against T C T"
        yield name, relative([frechet_distance(*gaussians)], [distance]), limit
    features = torch.randn(500, 24, generator=torch.Generator().manual_seed(1)).relu()
    stats = FeatureStats(24)
    for part in features.split(67):
        stats.update(part)
    yield "streamed covariance", (stats.cov - features.double().T.cov()).abs().max().item(), 1e-13
    x, y, by_hand = kid_by_hand()
    yield "KID of two pairs, by hand", abs(kid(x, y)[0] - by_hand), 1e-12

    score = InceptionScore(20, CLASSES, splits=2)
    score.update(200.0 * torch.eye(CLASSES)[torch.arange(20) % 5], torch.arange(20))
    yield "Inception Score of five sure classes", abs(score.value()[0] - 5), 1e-9


def kid_by_hand() -> tuple[Tensor, Tensor, float]:
    """Two features of two dimensions each, and their KID: k(x1, x2) + k(y1, y2) - half the sum of the four others."""
    x, y = torch.tensor([[1.0, 0.0], [0.0, 2.0]]), torch.tensor([[2.0, 2.0], [0.0, 0.0]])
    return x, y, 1.0 + 1.0 - (2.0 ** 3 + 1.0 + 3.0 ** 3 + 1.0) / 2


def relative(found: tuple | list, wanted: tuple | list) -> float:
    """Largest difference as a share of what is wanted."""
    return max(abs(f - w) / abs(w) for f, w in zip(found, wanted))


# ---------------------------------------------------------------- how fast

def seconds(call: Callable, repeats: int = 3) -> float:
    """Least wall time of a few calls."""
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        call()
        times.append(time.perf_counter() - began)
    return min(times)


def speeds(o: Speed) -> dict[str, float]:
    """What `distance` and `extraction` measure, and the number of threads."""
    return {"threads": torch.get_num_threads(), **(distance(o.dim) if o.dim else {}),
            **(extraction(o.images) if o.images else {})}


def distance(D: int) -> dict[str, float]:
    """Seconds of the distance in D dimensions, ours and by scipy's sqrtm, and our error. UserError without scipy."""
    try:
        from scipy.linalg import sqrtm
    except ImportError as e:
        raise UserError("the comparison with sqrtm needs scipy: pip install scipy") from e
    *gaussians, exact = non_commuting(D, D + D // 2)
    product = (gaussians[1] @ gaussians[3]).numpy()
    line = {"dim": D, "relative_error": relative([frechet_distance(*gaussians)], [exact]),
            "eigvalsh_s": seconds(lambda: frechet_distance(*gaussians)),
            "sqrtm_s": seconds(lambda: np.trace(np.real(sqrtm(product))), repeats=1)}
    return line | {"sqrtm_over_eigvalsh": line["sqrtm_s"] / line["eigvalsh_s"]}


def extraction(images: int) -> dict[str, float]:
    """Images/s of the network in plain layout, in channels_last, and in that and folded, as the Extractor has it.

    In turns; and how far the features of the first and the last differ. The weights are random: of the network only
    its speed is told."""
    x = torch.rand(images, 3, 299, 299) * 255
    nets = {"plain": Inception().eval().requires_grad_(False)}
    nets["channels_last"] = deepcopy(nets["plain"]).to(memory_format=torch.channels_last)
    nets["folded"] = fold_(deepcopy(nets["channels_last"])).to(memory_format=torch.channels_last)
    best, features = dict.fromkeys(nets, 0.0), {}
    with torch.inference_mode(), precise(x.device):
        for _ in range(TURNS):
            for name, net in nets.items():
                y = x if name == "plain" else x.contiguous(memory_format=torch.channels_last)
                features[name] = net(y)[0]
                best[name] = max(best[name], images / seconds(lambda: net(y), repeats=1))
    gap = (features["plain"] - features["folded"]).norm() / features["plain"].norm()
    rates = {f"{name}_images_per_s": rate for name, rate in best.items()}
    over = {f"{name}_over_plain": best[name] / best["plain"] for name in nets if name != "plain"}
    return rates | over | {"features_differ_by": gap.item()}
