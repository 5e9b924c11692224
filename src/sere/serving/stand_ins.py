"""One layer's linear maps, which answer for experts that are not loaded.

What the operator freed waits in buffers from routing until the experts run; around these, what is
asked of the maps is worked out from their input, and added to their output.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from sere.kernels import implementation_for
from sere.kernels.answers import NOTHING
from sere.kernels.implementations import load_answers
from sere.maps import LayerMaps
from sere.serving import second_engine
from sere.serving.rows import RowClasses


class StandIns(nn.Module):
    """One layer's maps, and what is asked of them in the pass under way.

    Buffers, non-persistent, for the reasons that `ReroutedLayer` has. The rank in force is one of
    them, so that a policy can be switched under captured graphs: `NOTHING` where none answers.
    """

    down: Tensor
    up: Tensor
    centre: Tensor
    constant: Tensor
    rank: Tensor
    ids: Tensor
    weights: Tensor

    def __init__(
        self,
        maps: LayerMaps,
        ids: Tensor,
        weights: Tensor,
        rows: RowClasses,
        adds: Callable[[], bool],
    ) -> None:
        """ids, weights: [max_tokens, K] int32 and float32, one pair for all layers, on the device.
        adds: a function that says whether this rank adds what maps answer."""
        super().__init__()
        device = rows.buffer.device
        own = {name: getattr(maps, name) for name in ("down", "up", "centre", "constant")}
        rank = torch.tensor([NOTHING], dtype=torch.int32)
        for name, tensor in {**own, "rank": rank, "ids": ids, "weights": weights}.items():
            self.register_buffer(name, tensor.to(device).contiguous(), persistent=False)
        if (name := implementation_for(device)) == "numba":
            second_engine.allow()
        self._kernels = load_answers(name)
        self._rows = rows
        self._adds = adds
        self._off = True  # known on the host, and heeded on CPUs alone: graphs hold what may be on
        self._given = 0  # rows of the pass whose freed slots are in the buffers
        self._asking = False

    @property
    def R(self) -> int:
        """The rank that is loaded."""
        return self.down.shape[1]

    @property
    def size(self) -> int:
        """Bytes of the maps."""
        own = (self.down, self.up, self.centre, self.constant)
        return sum(tensor.numel() * tensor.element_size() for tensor in own)

    def follow(self, rank: int) -> None:
        """Answer with maps cut to this rank from now on, or not at all (`NOTHING`)."""
        self.rank.fill_(rank)
        self._off = rank == NOTHING and self.rank.device.type == "cpu"

    def learn(self, maps: LayerMaps) -> None:
        """Take other maps of the same shapes into the buffers. Raises `ValueError`."""
        for name in ("down", "up", "centre", "constant"):
            own, new = getattr(self, name), getattr(maps, name)
            if own.shape != new.shape:
                raise ValueError(
                    f"maps of another shape than was reserved: {name} is {list(new.shape)}, "
                    f"expected {list(own.shape)}"
                )
            own.copy_(new)

    def compile_for(self, ids: torch.dtype) -> None:
        """Run all kernels on a row that asks for nothing: see `ReroutedLayer`."""
        own, weights = self.ids[:1].zero_(), self.weights[:1].zero_()
        self._kernels.keep_freed_(weights, own, own.to(ids), self._rows.of(1), self.rank)
        row = torch.zeros(1, self.down.shape[-1])
        self._kernels.answer_(row, own, weights, self._asked(row), self.up, self.constant)

    def forget(self) -> None:
        """A pass begins: nothing is asked yet."""
        self._given = 0

    def noting(
        self, run: Callable[[Tensor, Tensor, int], Tensor], ids: Tensor, weights: Tensor, T: int
    ) -> Tensor:
        """Run the operator, and keep what it frees; arguments and result are the operator's."""
        if self._off:
            return run(ids, weights, T)
        own_ids, own_weights = self.ids[:T].copy_(ids), self.weights[:T].copy_(weights)
        new = run(ids, weights, T)
        self._kernels.keep_freed_(own_weights, own_ids, new, self._rows.of(T), self.rank)
        self._given = T
        return new

    def ask(self, hidden: Tensor) -> Tensor:
        """[T, K, R] float32 for `answer_`; hidden: [T, H or more], the experts' input.

        Once the engine serves nothing is raised: what fails leaves the experts' output as it is.
        """
        T = len(hidden)
        self._asking = bool(self._given) and self._adds()
        if self._asking and self._given != T:
            self._asking = False
            self._rows.surprise(T)
        if self._asking:
            try:
                return self._asked(hidden)
            except Exception as error:
                self._asking = False
                self._rows.incidents.survive("asking linear maps", error)
        return hidden.new_empty(T, self.ids.shape[1], self.R, dtype=torch.float32)

    def _asked(self, hidden: Tensor) -> Tensor:
        asking = (self.ids[: len(hidden)], self.weights[: len(hidden)])
        inner: Tensor = self._kernels.ask(hidden, *asking, self.down, self.centre, self.rank)
        return inner

    def answer_(self, output: Tensor, inner: Tensor) -> None:
        """Add what the maps answer to the experts' output [T, H or more], in place."""
        if not self._asking:
            return
        asking = (self.ids[: len(inner)], self.weights[: len(inner)])
        try:
            self._kernels.answer_(output, *asking, inner, self.up, self.constant)
        except Exception as error:
            self._rows.incidents.survive("answering by linear maps", error)
