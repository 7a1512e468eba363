"""Distances between two sets of pictures, seen as features: Fréchet's (FID) and the kernel's (KID); Inception Score.

stats = FeatureStats(2048); stats.update(features); stats.all_reduce(place)
frechet_distance(stats.mean, stats.cov, mu, sigma)

Nothing here knows where features come from. All sums are float64, on the device, or for MPS, which has none, the CPU.
Dimensions: B batch, D features, K classes, S splits, n and m pictures.
"""
import torch
from torch import Tensor

import machine

BLOCK = 1024                            # rows of a kernel matrix that are there at a time
NEGATIVE = 1e-6                         # a distance may come out so far below zero, as a share of the traces


def _exact(device: torch.device | str) -> torch.device:
    """Where float64 sums of what is on `device` can be kept."""
    return torch.device("cpu" if torch.device(device).type == "mps" else device)


class FeatureStats:
    """Number, sum and sum of outer products of features: mean and covariance of any number of them in O(D^2) memory.

    Any split into batches and processes gives the same to rounding. A variance is exact to about 1e-16 (mean/std)^2
    relative, so features far from zero must be shifted first."""
    def __init__(self, dim: int, device: torch.device | str = "cpu") -> None:
        self.count = torch.zeros(1, dtype=torch.float64, device=_exact(device))
        self.sum = self.count.new_zeros(dim)                                        # (D,)
        self.outer = self.count.new_zeros(dim, dim)                                 # (D, D)

    def update(self, features: Tensor) -> None:
        """Add features (B, D). ValueError for another shape, inf or nan."""
        if features.ndim != 2 or features.shape[1] != len(self.sum):
            raise ValueError(f"features of shape {tuple(features.shape)}, wanted (B, {len(self.sum)})")
        f = features.detach().to(self.sum.device).double()
        if not f.isfinite().all():
            raise ValueError("features hold inf or nan")
        self.count += len(f)
        self.sum += f.sum(0)
        self.outer.addmm_(f.T, f)

    def all_reduce(self, place: machine.Place) -> None:
        """Add up over the processes, once, at the end: they may have had unequal numbers of pictures, or none."""
        whole = machine.add_up(torch.cat([self.count, self.sum, self.outer.flatten()]), place)
        self.count, self.sum, outer = whole.split([1, len(self.sum), self.outer.numel()])
        self.outer = outer.view_as(self.outer)

    @property
    def n(self) -> int:
        """How many features there were."""
        return int(self.count.item())

    @property
    def mean(self) -> Tensor:
        """(D,) float64"""
        return self.sum / self.count

    @property
    def cov(self) -> Tensor:
        """(D, D) float64, over n - 1. ValueError below two features."""
        if self.n < 2:
            raise ValueError(f"a covariance needs two features, got {self.n}")
        return (self.outer - self.count * torch.outer(self.mean, self.mean)) / (self.count - 1)


def frechet_distance(mu1: Tensor, cov1: Tensor, mu2: Tensor, cov2: Tensor) -> float:
    """[FID] sec. 3: |mu1 - mu2|^2 + tr C1 + tr C2 - 2 tr (C1^1/2 C2 C1^1/2)^1/2, of two Gaussians; squared, no root.

    With any R R^T = C1 the last trace is the sum of the roots of the eigenvalues of R^T C2 R: real, no iteration.
    R is Cholesky's, or of a singular C1 that of eigh. mu (D,), cov (D, D), tensors or arrays. ValueError for other
    shapes, inf, nan, or C < 0."""
    mu1, cov1, mu2, cov2 = (torch.as_tensor(x).detach().cpu().double() for x in (mu1, cov1, mu2, cov2))
    D = len(mu1)
    if mu1.shape != (D,) or mu2.shape != (D,) or cov1.shape != (D, D) or cov2.shape != (D, D):
        raise ValueError(f"means {tuple(mu1.shape)}, {tuple(mu2.shape)} and covariances {tuple(cov1.shape)}, "
                         f"{tuple(cov2.shape)} do not belong together")
    if not all(x.isfinite().all() for x in (mu1, cov1, mu2, cov2)):
        raise ValueError("means or covariances hold inf or nan")
    R, singular = torch.linalg.cholesky_ex(cov1)
    if singular:
        values, vectors = torch.linalg.eigh(cov1)
        R = vectors * values.clamp(min=0).sqrt()
    root = torch.linalg.eigvalsh(R.T @ cov2 @ R).clamp(min=0).sqrt().sum()
    traces = cov1.trace() + cov2.trace()
    distance = ((mu1 - mu2).square().sum() + traces - 2 * root).item()
    if distance < -NEGATIVE * max(1.0, traces.item()):
        raise ValueError(f"distance {distance:.3g} is negative: one of the covariances is not positive")
    return max(0.0, distance)


def kid(x: Tensor, y: Tensor) -> tuple[float, float]:
    """[KID] eq. 4: the unbiased squared MMD of the kernel (x.y/D + 1)^3, over all pairs, and its standard error.

    x (n, D), y (m, D), in memory of (BLOCK, max(n, m)) float64. May come out negative. The error is first order
    (Hoeffding's projection): right where the sets differ, too small where they do not. ValueError below two rows."""
    if min(len(x), len(y)) < 2:
        raise ValueError(f"KID needs two features of each set, got {len(x)} and {len(y)}")
    x, y = (z.to(_exact(z.device)).double() for z in (x, y))

    def kernel(a: Tensor, b: Tensor) -> Tensor:
        return (a @ b.T / a.shape[1] + 1) ** 3

    def within(z: Tensor) -> Tensor:
        """Mean kernel of each row with the others. (n,)"""
        own = (z.square().mean(1) + 1) ** 3
        return (torch.cat([kernel(part, z).sum(1) for part in z.split(BLOCK)]) - own) / (len(z) - 1)

    xy, yx = [], torch.zeros(len(y), dtype=torch.float64, device=y.device)
    for part in x.split(BLOCK):
        across = kernel(part, y)                                                    # (BLOCK, m)
        xy.append(across.mean(1))
        yx += across.sum(0) / len(x)
    h_x, h_y = within(x) - torch.cat(xy), within(y) - yx                            # (n,), (m,)
    error = 2 * (h_x.var() / len(x) + h_y.var() / len(y)).sqrt()
    return (h_x.mean() + h_y.mean()).item(), error.item()


class InceptionScore:
    """[IS] exp(E KL(p(y|x) || p(y))) of pictures in S splits by their number, as sums: memory does not grow with n.

    Picture k of n is in split ((k + 1) S - 1) // n: S runs of the pictures in their order, as equal as n allows."""
    def __init__(self, n: int, classes: int, device: torch.device | str = "cpu", splits: int = 10) -> None:
        if n < splits:
            raise ValueError(f"{n} pictures do not fill {splits} splits")
        self.n, self.splits = n, splits
        self.sums = torch.zeros(splits, classes + 2, dtype=torch.float64, device=_exact(device))    # (S, K + 2)

    def update(self, logits: Tensor, indices: Tensor) -> None:
        """Add logits (B, K) of pictures number `indices` (B,) int64."""
        log_p = logits.to(self.sums.device).double().log_softmax(1)
        p = log_p.exp()
        negative_entropy = (p * log_p).sum(1, keepdim=True)
        split = ((indices.to(p.device) + 1) * self.splits - 1) // self.n
        self.sums.index_add_(0, split, torch.cat([p, negative_entropy, torch.ones_like(negative_entropy)], 1))

    def all_reduce(self, place: machine.Place) -> None:
        """Add up over the processes."""
        self.sums = machine.add_up(self.sums, place)

    def value(self) -> tuple[float, float]:
        """Mean over the splits, and its standard error."""
        p, negative_entropy = self.sums[:, :-2] / self.sums[:, -1:], self.sums[:, -2] / self.sums[:, -1]
        scores = (negative_entropy - torch.special.xlogy(p, p).sum(1)).exp()        # (S,)
        return scores.mean().item(), (scores.std() / self.splits ** 0.5).item()
