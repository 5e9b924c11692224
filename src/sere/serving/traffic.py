"""An engine that measures its experts on what it serves, until that makes a table.

Some prompts are chosen, by a hash of their request's name, and some of their rows; in steps alone
that replay no graph, as a graph calls no Python. Every rank chooses alike, and runs its part of all
experts on those rows. The first adds up, and judges a layer's sums in a thread beside, so that no
step waits. Before each step that it could observe next, it tells the others how far it is.

Of a row nothing is kept but sums [E, E]: no text, no token, no hidden state, no name of a request.
"""

from __future__ import annotations

import copy
import logging
import time
import zlib
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch

from sere.checkpoint import Fingerprint
from sere.serving.auto import Traffic
from sere.serving.incidents import Incidents
from sere.serving.no_table import NoTable
from sere.serving.observing import Observation
from sere.serving.reading import obstacles_to_measuring, written_out
from sere.serving.symbols import symbol
from sere.serving.table_cache import CacheTrouble, Entry, file_of, table_in
from sere.similarity.agreement import stability
from sere.similarity.sums import FOLDS
from sere.table import Table

_LOG = logging.getLogger("vllm.sere")
_FIRST = 16  # at this part of the largest number of rows the first layer is judged
_MORE = 1.25  # ... and anew at so many times the rows
_PATIENCE = 60  # seconds from one line of progress to the next


@dataclass(frozen=True)
class Watched:
    """What workers are to make of their traffic.

    asked: by the user. entry: where the table is kept, None where it is not. fingerprint: of the
    model. about: what the table says of itself, beside what was observed.
    """

    asked: Traffic
    method: str
    entry: Entry | None
    fingerprint: Fingerprint
    about: Mapping[str, Any]

    @property
    def in_words(self) -> str:
        """Why there is no table yet."""
        return (
            "the engine measures its experts on the prompts that it serves, and routes as stock "
            f"does until {self.asked.stable:.0%} of each layer's replacements are stable, or "
            f"{self.asked.tokens:,} rows are seen (sere_observed_rows_total)"
        )


def obstacle_to_watching(config: Any) -> str | None:
    """Why an engine of such a config cannot measure its experts on what it serves, or None."""
    largest = config.scheduler_config.max_num_batched_tokens
    captured = config.compilation_config.max_cudagraph_capture_size or 0
    obstacles = {
        **obstacles_to_measuring(config),
        "rows of drafts are no rows of prompts (speculative decoding)": (
            config.speculative_config is not None
        ),
        f"every step replays a graph, which calls no Python (steps of {largest} tokens at most, "
        f"graphs up to {captured}); raise max_num_batched_tokens, lower "
        "max_cudagraph_capture_size, or add enforce_eager=True (--enforce-eager)": (
            _mixed_steps_replay(config) and largest <= captured
        ),
    }
    return next((reason for reason, there in obstacles.items() if there), None)


def _mixed_steps_replay(config: Any) -> bool:
    """Whether steps that read prompts replay graphs, where these are large enough."""
    mode = config.compilation_config.cudagraph_mode
    graphs = not config.model_config.enforce_eager and mode is not None
    return graphs and mode.mixed_mode().name != "NONE"


class _Session(Protocol):
    """As much of a worker's session as is needed."""

    observer: Any

    @property
    def incidents(self) -> Incidents: ...

    def take(self, table: Table | NoTable) -> None: ...


class Watch:
    """One worker's part: which rows are observed, and when that is enough.

    seen: rows observed so far, the same on every rank.
    """

    def __init__(
        self, worker: Any, observation: Observation, watched: Watched, session: _Session
    ) -> None:
        self._worker, self._config, self._session = worker, worker.vllm_config, session
        self._observation, self._watched = observation, watched
        self._ranks = self._config.parallel_config.tensor_parallel_size
        self._is_traced = self._config.device_config.device.type == "cpu"
        self._step = ExitStack()  # what the step under way is observed by
        self._steps = self.seen = 0
        self._judge = _Judge(observation, watched) if worker.rank == 0 else None

    def observed(self) -> dict[int, int]:
        """Rows by decoder layer index; 0 on ranks that add nothing up."""
        return {index: sums.tokens for index, sums in self._observation.sums.items()}

    def begin(
        self,
        requests: Sequence[str],
        lengths: npt.NDArray[np.integer] | None,
        prefilling: npt.NDArray[np.bool_],
    ) -> None:
        """A step follows over these requests and so many rows of each, in batch order."""
        self.rest()
        if lengths is None or not self._session.incidents.serving:
            return  # warm-up has requests that look real
        rows, folds = self._chosen(requests, lengths, prefilling)
        if not len(rows) or self._is_told():
            return
        left = self._watched.asked.tokens - self.seen
        rows, folds = rows[:left], folds[:left]
        if not len(rows):
            return
        self._steps += 1
        self.seen += len(rows)
        device = self._config.device_config.device
        parts = [(torch.from_numpy(rows[folds == fold]), fold) for fold in set(folds.tolist())]
        self._observation.follow([(part.to(device), fold) for part, fold in parts])
        if self._is_traced:  # elsewhere vLLM's MoE operator is opaque, and asks the layer
            self._step.enter_context(written_out(self._worker))
        self._step.enter_context(self._observation.watching())

    def rest(self) -> None:
        """The pass under way is through, or none of ours follows."""
        self._step.close()

    def _chosen(
        self,
        requests: Sequence[str],
        lengths: npt.NDArray[np.integer],
        prefilling: npt.NDArray[np.bool_],
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Rows of the step that are to be observed, and the part of the text that each belongs to;
        no more than `Traffic.rows`, evenly from all chosen prompts."""
        asked, nothing = self._watched.asked, np.zeros(0, np.int64)
        if not self._can_be_observed(lengths):
            return nothing, nothing
        starts = np.cumsum(lengths) - lengths
        rows, folds = [nothing], [nothing]
        for i in np.flatnonzero(prefilling):
            number = zlib.crc32(requests[i].encode())
            if number // FOLDS < asked.share * (2**32 // FOLDS):
                rows.append(np.arange(starts[i], starts[i] + lengths[i], dtype=np.int64))
                folds.append(np.full(lengths[i], number % FOLDS, np.int64))
        whole, parts = np.concatenate(rows), np.concatenate(folds)
        every = max(1, -(-len(whole) // asked.rows))
        return whole[self._steps % every :: every], parts[self._steps % every :: every]

    def _can_be_observed(self, lengths: npt.NDArray[np.integer]) -> bool:
        """Whether a step with so many rows of each request replays no graph."""
        config = self._config
        mode = config.compilation_config.cudagraph_mode
        if config.model_config.enforce_eager or mode is None or mode.name == "NONE":
            return True
        if lengths.sum() > (config.compilation_config.max_cudagraph_capture_size or 0):
            return True
        longer = lengths.max() > config.uniform_decode_query_len
        return bool(longer and not _mixed_steps_replay(config))

    def _is_told(self) -> bool:
        """Whether it is over; asked on every rank before the same step."""
        told = None
        if self._judge is not None:
            try:
                told = self._judge.verdict(self.seen)
            except Exception as error:  # the other ranks wait for a word
                told = f"{type(error).__name__}: {error}"
        if self._ranks > 1:
            told = symbol("get_tp_group")().broadcast_object(told, src=0)
        if told is None:
            return False
        with torch.inference_mode(False):  # of what is kept, as when a policy is switched
            self._end(told)
        return True

    def _end(self, told: bytes | str) -> None:
        """Go live with a table's file, or say why there is none."""
        self._session.observer = None
        if isinstance(told, str) or self._refused(told):
            reason = told if isinstance(told, str) else "a rank could not take the table, see above"
            self._session.take(NoTable(self._watched.fingerprint, f"no table: {reason}"))
            if self._judge:
                _LOG.warning("sere: NOTHING IS RE-ROUTED: no table from the traffic: %s", reason)
        elif self._judge:
            _LOG.info("sere: LIVE from now on with the table of %d rows of traffic", self.seen)

    def _refused(self, data: bytes) -> bool:
        """Go live; whether any rank failed to."""
        failed = False
        try:
            self._session.take(table_in(data))
        except Exception:
            _LOG.exception("sere: the table of the traffic cannot be taken")
            failed = True
        if self._ranks > 1:
            device = self._config.device_config.device
            mine = torch.tensor([float(failed)], device=device)
            failed = bool(symbol("get_tp_group")().all_reduce(mine))
        return failed


class _Judge:
    """The first rank's: is it enough, and what comes of it? Works beside the steps."""

    def __init__(self, observation: Observation, watched: Watched) -> None:
        self._observation, self._watched = observation, watched
        self._aside = ThreadPoolExecutor(1, thread_name_prefix="sere")
        self._layers = sorted(observation.sums)
        self._stable = 0  # how many of the layers are, in order
        self._next = watched.asked.tokens / _FIRST
        self._share: Future[float | None] | None = None  # of the layer that is being judged
        self._made: Future[bytes | str] | None = None
        self._said = time.monotonic()

    def verdict(self, seen: int) -> bytes | str | None:
        """A table's file, why there will be none, or None to go on."""
        if self._made is not None:
            return self._made.result() if self._made.done() else None
        if reason := self._observation.broken or self._observation.short_of(seen):
            return reason
        if seen >= self._watched.asked.tokens or self._all_stable(seen):
            self._observation.closed = True
            for sums in self._observation.sums.values():
                sums.rest()
            self._made = self._aside.submit(self._make, seen)
        elif time.monotonic() - self._said > _PATIENCE:
            self._said = time.monotonic()
            _LOG.info(
                "sere: measured on %d of at most %d rows of traffic, %d of %d layers are stable",
                *(seen, self._watched.asked.tokens, self._stable, len(self._layers)),
            )
        return None

    def _all_stable(self, seen: int) -> bool:
        """One layer is judged at a time; one that was stable on less text is not asked again."""
        if self._share is not None:
            if not self._share.done():
                return False
            if (self._share.result() or 0) >= self._watched.asked.stable:
                self._stable += 1
            else:
                self._next = seen * _MORE
            self._share = None
        if self._stable == len(self._layers):
            return True
        if seen >= self._next:
            folds = self._observation.sums[self._layers[self._stable]].folds
            copies = [copy.copy(fold) for fold in folds]
            for fold in copies:
                fold.total = fold.total.to("cpu", copy=True)
            self._share = self._aside.submit(stability, copies)
        return False

    def _make(self, seen: int) -> bytes | str:
        watched = self._watched
        try:
            if watched.entry and (kept := _by_another(watched.entry)):
                return kept
            found = self._observation.finished(seen)
            assert found is not None
            least = min(layer.stability or 0 for layer in found.values())
            _LOG.info("sere: measured on %d rows of traffic, stable to %.0f%%", seen, 100 * least)
            table = Table(
                watched.fingerprint, found, watched.method, {**watched.about, "tokens": seen}
            )
            data = file_of(table)
            if watched.entry:
                self._keep(watched.entry, data)
            return data
        except Exception as error:
            return str(error)

    def _keep(self, entry: Entry, data: bytes) -> None:
        try:
            entry.write(data)
            _LOG.info("sere: kept for later starts: %s", entry.path)
        except CacheTrouble as trouble:
            _LOG.warning("sere: %s; the next start watches its traffic anew", trouble)


def _by_another(entry: Entry) -> bytes | None:
    """What an engine beside this one has made meanwhile."""
    try:
        kept = entry.read()
    except CacheTrouble:
        return None  # said when the engine started; it is replaced
    if kept is None:
        return None
    _LOG.info("sere: made by an engine beside this one: %s", entry.path)
    return kept[0]
