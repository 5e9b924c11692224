"""How alike are the experts of a layer? Streaming estimators over chunks of real tokens.

Each measure sees `outputs` [E, n, H] of one chunk, keeps a statistic of size [E, E] in float64 and
never the outputs. Section 3.2 of arXiv 2602.07616 names the measures; what its code leaves open is
decided here:

* frobenius: 1 - d / max d with d[u,v] = ||E_u(X) - E_v(X)||_F. The layer's most distant pair sets
  the scale, so one outlier expert pushes all others towards 1 and rho cannot be compared between
  layers (`sere inspect` warns).
* cosine: mean over tokens of cos(E_u(x), E_v(x)), mapped to [0, 1] by (c + 1) / 2.
* directed: 1 / (1 + e[u,v]), e the relative error when v answers for the tokens that the router
  sends to u: e^2 = E|E_u(x) - E_v(x)|^2 / E|E_u(x)|^2. Not symmetric. 1 is a perfect stand-in, 0.5
  one whose error is as large as the output itself.
* cka-*: centred kernel alignment. The plain estimator of linear CKA is biased towards
  H / (n + H) for *independent* outputs; the unbiased HSIC of Song et al. (2012), averaged over
  chunks as in Nguyen et al. (2021), is not, and streams. Blind to sign and scale by construction.
  The rbf kernel takes the median squared distance as bandwidth: with the variance, as in the
  paper's code, real outputs give matrices of all ones or all zeros.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from copy import copy
from typing import TypeVar

import torch
from torch import Tensor

# Tokens per CKA chunk: the kernels of one chunk are [E, n, n].
CKA_CHUNK = 128
_CKA_MIN = 8
# Tokens whose outputs are held in float64 at a time; on a GPU as many as fit these bytes.
_PIECE = 16
_PIECE_BYTES = 2**27


class Measure(ABC):
    """A similarity that accumulates: a sum `total` in float64 over `tokens` tokens.

    Sums of parts add up to the sum of the whole (see `pooled`).
    """

    def __init__(self, E: int) -> None:
        self.total = torch.zeros(E, E, dtype=torch.float64)
        self.tokens = 0

    def _add(self, sums: Tensor) -> None:
        """Sums stay on their own device, which nobody waits for until the result is asked for."""
        self.total = self.total.to(sums.device).add_(sums)

    @abstractmethod
    def update(self, outputs: Tensor, chosen: Tensor) -> None:
        """Take in one chunk of n tokens.

        outputs: [E, n, H] float32, of all experts on the same tokens.
        chosen: [n, E] bool, the experts that the router sent each token to.
        """

    @abstractmethod
    def result(self) -> Tensor:
        """Similarity [E, E] float32 in [0, 1], diagonal 1; row u: who can stand in for u."""


_M = TypeVar("_M", bound=Measure)


def pooled(measures: Sequence[_M]) -> _M:
    """One measure of everything that `measures` took in, on the CPU; one that is listed twice
    counts twice."""
    whole = copy(measures[0])
    whole.total = torch.stack([measure.total.cpu() for measure in measures]).sum(0)
    whole.tokens = sum(measure.tokens for measure in measures)
    return whole


class Frobenius(Measure):
    """1 - distance / largest distance of the layer, the paper's default.

    `total` is the flat Gram matrix: the sum over tokens of <E_u(x), E_v(x)>.
    """

    def update(self, outputs: Tensor, chosen: Tensor) -> None:
        for piece in torch.split(outputs, _piece(outputs), dim=1):
            flat = piece.flatten(1).double()  # in float32, near experts' distances cancel out
            self._add(flat @ flat.T)
        self.tokens += outputs.shape[1]

    def result(self) -> Tensor:
        square = self.total.diagonal()
        distance = (square[:, None] + square[None, :] - 2 * self.total).clamp(min=0).sqrt()
        largest = distance.max()
        scaled = distance / largest if largest > 0 else distance
        return _symmetric(1 - scaled)

    def gram(self) -> Tensor:
        """[E, E] float32: mean over tokens of <E_u(x), E_v(x)>; its diagonal is output energy."""
        return (self.total / max(self.tokens, 1)).float()


class Cosine(Measure):
    """Mean cosine of a token's two outputs, mapped to [0, 1].

    `total` is the normalised Gram matrix: the sum over tokens of cos(E_u(x), E_v(x)).
    """

    def update(self, outputs: Tensor, chosen: Tensor) -> None:
        for piece in torch.split(outputs, _piece(outputs), dim=1):
            flat = torch.nn.functional.normalize(piece, dim=-1).flatten(1)
            self._add(flat @ flat.T)  # of unit vectors: float32 is exact to 1e-6
        self.tokens += outputs.shape[1]

    def result(self) -> Tensor:
        return _symmetric((self.cosine().double() + 1) / 2)

    def cosine(self) -> Tensor:
        """[E, E] float32 in [-1, 1]: mean over tokens."""
        return (self.total / max(self.tokens, 1)).float().clamp(-1, 1)


class Directed(Measure):
    """How wrong is v for the tokens that the router sends to u? Not symmetric.

    `total` [2, E, E], both summed over the tokens of u only: <E_u(x), E_v(x)>, and |E_v(x)|^2.
    An expert that no token chose has no stand-in.
    """

    def __init__(self, E: int) -> None:
        super().__init__(E)
        self.total = torch.zeros(2, E, E, dtype=torch.float64)

    def update(self, outputs: Tensor, chosen: Tensor) -> None:
        size = _piece(outputs)
        pieces = zip(torch.split(outputs, size, dim=1), torch.split(chosen, size), strict=True)
        for piece, mine in pieces:
            double, sent = piece.double(), mine.T.double()
            routed = (double * sent[:, :, None]).flatten(1)
            cross, energy = routed @ double.flatten(1).T, sent @ double.square().sum(-1).T
            self._add(torch.stack([cross, energy]))
        self.tokens += outputs.shape[1]

    def result(self) -> Tensor:
        cross, energy = self.total
        own = cross.diagonal()[:, None]
        square = (own - 2 * cross + energy).clamp(min=0) / own
        similarity = torch.where(own > 0, 1 / (1 + square.sqrt()), 0.0)
        return similarity.clamp(0, 1).fill_diagonal_(1).float()

    def per_token(self, load: Tensor) -> tuple[Tensor, Tensor]:
        """Both totals as means over the tokens of u; load: [E], how many each expert got."""
        cross, energy = self.total / load.double().clamp(min=1)[:, None]
        return cross.float(), energy.float()


class Cka(Measure):
    """Centred kernel alignment from unbiased HSIC, averaged over chunks of `CKA_CHUNK` tokens."""

    def __init__(self, E: int, kernel: Callable[[Tensor], Tensor]) -> None:
        super().__init__(E)
        self.kernel = kernel

    def update(self, outputs: Tensor, chosen: Tensor) -> None:
        for chunk in torch.split(outputs, CKA_CHUNK, dim=1):
            n = chunk.shape[1]
            if n >= _CKA_MIN:  # the unbiased estimator needs n > 3 and is noise just above it
                kernels = chunk.new_empty(len(chunk), n, n, dtype=torch.float64)
                for kernel, expert in zip(kernels, chunk, strict=True):
                    kernel.copy_(self.kernel(expert.double()))
                self._add(n * _unbiased_hsic(kernels))
                self.tokens += n

    def result(self) -> Tensor:
        scale = self.total.diagonal().clamp(min=0).sqrt()
        product = scale[:, None] * scale[None, :]
        return _symmetric(torch.where(product > 0, self.total / product, 0.0))


def _unbiased_hsic(kernels: Tensor) -> Tensor:
    """[E, E] HSIC_1 (Song et al. 2012, eq. 5) of all pairs of kernels [E, n, n], in place."""
    n = kernels.shape[1]
    kernels.diagonal(dim1=1, dim2=2).zero_()
    sums = kernels.sum(2)  # [E, n]
    totals = sums.sum(1)
    flat = kernels.flatten(1)
    trace = flat @ flat.T
    return (
        trace
        + totals[:, None] * totals[None, :] / ((n - 1) * (n - 2))
        - 2 / (n - 2) * (sums @ sums.T)
    ) / (n * (n - 3))


def _linear(x: Tensor) -> Tensor:
    return x @ x.T


def _rbf(x: Tensor) -> Tensor:
    square = torch.cdist(x, x).square()
    bandwidth = square.median().clamp(min=torch.finfo(x.dtype).tiny)
    return torch.exp(-square / (2 * bandwidth))


def _polynomial(x: Tensor) -> Tensor:
    """(1 + <x, y> / mean |x|^2)^3: the scale of the outputs drops out."""
    scale = x.square().sum(-1).mean().clamp(min=torch.finfo(x.dtype).tiny)
    return (1 + x @ x.T / scale) ** 3


METHODS: dict[str, Callable[[int], Measure]] = {
    "frobenius": Frobenius,
    "cosine": Cosine,
    "directed": Directed,
    "cka-linear": lambda E: Cka(E, _linear),
    "cka-rbf": lambda E: Cka(E, _rbf),
    "cka-polynomial": lambda E: Cka(E, _polynomial),
}


def _piece(outputs: Tensor) -> int:
    """Tokens of outputs [E, n, H] to be taken at a time."""
    if outputs.device.type == "cpu":
        return _PIECE
    return max(1, _PIECE_BYTES // (8 * outputs.shape[0] * outputs.shape[2]))


def _symmetric(similarity: Tensor) -> Tensor:
    """Symmetric, in [0, 1], diagonal 1, float32."""
    symmetric = (similarity + similarity.T) / 2
    return symmetric.clamp(0, 1).fill_diagonal_(1).float()
