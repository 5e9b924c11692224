"""Blocks of the KV cache that re-routed rows wrote are found again by their own request only.

vLLM finds a block by a hash of its tokens and of all before them; how they were computed is not in
it. So the answer of a fast request, sent back as the prompt of the next turn, would serve one that
is promised stock routing. Here the hashes of every request that is not exact are keyed, from the
first block that it decodes into, by a random key of its own:

* a prompt's blocks, which stock routing always wrote, are shared by all tiers;
* an exact request, and any request after a switch to stock, finds only what stock routing wrote;
* a preempted request finds its own again;
* nothing has to be emptied when the policy changes.

The price: an answer that comes back in a prompt is computed once more, as a prompt (counted).
Under `"rows": "all"` prompts are re-routed, too: all that a request which is not exact writes is
keyed, by one key for all of these until a policy is set again.

All of it happens in the scheduler's process, which has the config and no `Session`.
"""

from __future__ import annotations

import functools
import secrets
import threading
from collections.abc import Callable, Iterable
from hashlib import blake2b
from types import SimpleNamespace
from typing import Any

from sere.policy import PolicyError
from sere.serving.asking import KEY, asked_by, given
from sere.serving.refusal import ServingError
from sere.serving.reuse import caches
from sere.serving.session import settings_of
from sere.serving.settings import Settings
from sere.serving.symbols import here, module_of, symbol, wrap
from sere.serving.tiers import EXACT, INDEPENDENT, Tier

Hashes = list[bytes]
Hasher = Callable[[Any], Hashes]
"""The hashes of those of a request's full blocks that have none yet, as vLLM makes them."""

_ATTRIBUTE = "_sere_prefixes"  # on the compilation config, as the worker's session is


class Prefixes:
    """What one engine's scheduler knows of tiers.

    again: tokens of answers that came back in a prompt and were not to be found, although vLLM
        alone would have found them (unless they were evicted).
    """

    def __init__(self, settings: Settings, size: int) -> None:
        """size: blocks that the cache has room for."""
        self.again = 0
        self.all_rows = settings.policy.rows == "all"
        self._default = settings.default
        # The shadow check falls back in a worker, of which the scheduler learns nothing.
        self._shares = self.all_rows and settings.shadow is None
        self._size = size
        self._answers: dict[bytes, None] = {}  # what keyed blocks would be found by; oldest first
        self._lock = threading.Lock()  # requests are admitted in a thread of their own
        self.renew()

    def renew(self) -> None:
        """A policy was set: what prompts wrote under the last one is not to be found any more."""
        self._shared_key = secrets.token_bytes(16)

    def is_exact(self, params: Any) -> bool:
        """Whether a request with these parameters is promised stock routing.

        One that names as many experts as there are counts as one that does not: how many there are
        is the worker's to know, and too many keys do no harm but their price.
        """
        return self._tier(params) == EXACT

    def is_independent(self, params: Any) -> bool:
        """Whether no other request may have a say in its answer: nor may blocks that one wrote."""
        return self._tier(params) == INDEPENDENT

    def _tier(self, params: Any) -> Tier | None:
        """None if what it asks for is no tier: it is refused elsewhere."""
        asked = asked_by(params)
        try:
            return self._default if asked is None else Tier.parse(asked)
        except PolicyError:
            return None

    def admit(self, request: Any, block_size: int) -> None:
        """A new request, its prompt hashed plainly."""
        if request._block_hasher is None:
            return  # nothing is cached
        if not self.all_rows:
            usable = (request.num_prompt_tokens - 1) // block_size
            self._meet(request.block_hashes[:usable], block_size)
        if not self.is_exact(request.sampling_params):
            alone = self.is_independent(request.sampling_params)
            self.key(request, 0 if self.all_rows else len(request.block_hashes), alone=alone)

    def key(self, request: Any, first: int, *, alone: bool = False) -> None:
        """Key the request's blocks from index `first` on, those to come included; alone: by a key
        that no other request has, whatever the policy."""
        key = self._shared_key if self._shares and not alone else secrets.token_bytes(16)
        request._block_hasher = Keyed(request, first, key, self._write)
        del request.block_hashes[first:]
        request.update_block_hashes()

    def _write(self, hashes: Iterable[bytes]) -> None:
        with self._lock:
            self._answers.update(dict.fromkeys(hashes))
            while len(self._answers) > self._size:
                del self._answers[next(iter(self._answers))]

    def _meet(self, hashes: Iterable[bytes], block_size: int) -> None:
        with self._lock:
            for known in self._answers.keys() & set(hashes):
                del self._answers[known]  # this time all will find it
                self.again += block_size


class Keyed:
    """Stands in for a request's block hasher: blocks from a certain one on are keyed.

    plain: what it stands in for. key: 16 bytes. start: tokens of the request as it took over.
    """

    def __init__(
        self, request: Any, first: int, key: bytes, write: Callable[[Iterable[bytes]], None]
    ) -> None:
        """first: index of the first block that is keyed. write: is told what hashes the keyed
        blocks would have had."""
        self.plain: Hasher = request._block_hasher
        self.key = key
        self.start = request.num_prompt_tokens if first else 0
        self._first = first
        self._hashes: Hashes = request.block_hashes[:first]  # of all blocks, none keyed
        self._write = write

    def __call__(self, request: Any) -> Hashes:
        """As a `Hasher`."""
        found: Hashes = request.block_hashes
        del self._hashes[len(found) :]  # a session takes back its last token
        unkeyed = max(self._first - len(found), 0)
        try:
            request.block_hashes = self._hashes
            fresh = self.plain(request)
        finally:
            request.block_hashes = found
        self._hashes += fresh
        self._write(fresh[unkeyed:])
        return fresh[:unkeyed] + [self._mix(one) for one in fresh[unkeyed:]]

    def _mix(self, plain: bytes) -> bytes:
        return blake2b(plain, key=self.key, digest_size=len(plain)).digest()


def prefixes_of(config: Any) -> Prefixes | None:
    """Those of the engine with this vLLM config, in its scheduler's process."""
    return getattr(config.compilation_config, _ATTRIBUTE, None)


# --- what is wrapped ------------------------------------------------------------------------------


def opening(original: Callable[..., None]) -> Callable[..., None]:
    """Wraps `Executor.initialize_from_config`, which runs in the scheduler's process before there
    is a scheduler, and as soon as it is known how many blocks there are."""

    def initialize_from_config(executor: Any, *args: Any, **kwargs: Any) -> None:
        original(executor, *args, **kwargs)
        config = executor.vllm_config
        if given(config) is None or not caches(config):
            return
        _install()
        events = config.kv_events_config
        if events and events.enable_kv_cache_events:
            _install_in_events()
        self_check(config, _open(config))
        _open(config)  # without the traces of the check

    return initialize_from_config


def _open(config: Any) -> Prefixes:
    prefixes = Prefixes(settings_of(config), config.cache_config.num_gpu_blocks)
    object.__setattr__(config.compilation_config, _ATTRIBUTE, prefixes)
    return prefixes


@functools.cache
def _install() -> None:
    wrap(symbol("EngineCore"), "preprocess_add_request", _admitting)
    wrap(symbol("EngineCore"), "collective_rpc", _overhearing)
    wrap(symbol("Scheduler"), "_update_request_as_session", _continuing)


@functools.cache
def _install_in_events() -> None:
    """Who reads KV events finds blocks by tokens and extra keys: a key is one."""
    wrap(module_of("generate_block_hash_extra_keys"), "generate_block_hash_extra_keys", _telling)
    if here("offload_event_keys"):
        wrap(module_of("offload_event_keys"), "generate_block_hash_extra_keys", _telling)


def _admitting(original: Callable[..., Any]) -> Callable[..., Any]:
    def preprocess_add_request(core: Any, request: Any) -> Any:
        admitted, wave = original(core, request)
        if (prefixes := prefixes_of(core.vllm_config)) is not None:
            prefixes.admit(admitted, core.scheduler.hash_block_size)
        return admitted, wave

    return preprocess_add_request


def _overhearing(original: Callable[..., Any]) -> Callable[..., Any]:
    """The workers' answers pass by here, and so does what they are told."""

    def collective_rpc(core: Any, method: Any, *args: Any, **kwargs: Any) -> Any:
        answers = original(core, method, *args, **kwargs)
        if (prefixes := prefixes_of(core.vllm_config)) is not None:
            if method == "sere_policy":
                prefixes.renew()  # not before: its prompts would be found under the new key
            if method == "sere_telemetry":
                own = {"prefix_tokens_prefilled_again": prefixes.again}
                answers = [{**answers[0], **own}, *answers[1:]]
        return answers

    return collective_rpc


def _keyed(request: Any) -> Keyed | None:
    """What keys a request's blocks, if they are keyed."""
    hasher = request._block_hasher
    return hasher if isinstance(hasher, Keyed) else None


def _continuing(original: Callable[..., None]) -> Callable[..., None]:
    """A session goes on: its next turn may ask for another tier."""

    def _update_request_as_session(scheduler: Any, session: Any, update: Any) -> None:
        prefixes, keyed = prefixes_of(scheduler.vllm_config), _keyed(session)
        if prefixes is None or session._block_hasher is None:
            original(scheduler, session, update)
            return
        exact = prefixes.is_exact(update.sampling_params)
        alone = prefixes.is_independent(update.sampling_params)
        plain = keyed.plain if keyed else session._block_hasher
        if not (exact or alone or keyed):
            prefixes.key(session, session.num_computed_tokens // scheduler.hash_block_size)
        original(scheduler, session, update)
        # All that was said is a prompt by now, and is computed as one: what another tier decoded
        # depends on that tier's company, and a preemption would compute it as a prompt, too.
        if (exact and keyed) or (alone and (keyed or prefixes.all_rows)):
            _start_over(scheduler, session, plain)
        if alone:
            first = 0 if prefixes.all_rows else len(session.block_hashes)
            prefixes.key(session, first, alone=True)

    return _update_request_as_session


def _start_over(scheduler: Any, session: Any, plain: Hasher) -> None:
    """Compute all of a session again that is to depend on its company no more, as a preemption
    would."""
    if scheduler.aux_output_connector is not None:
        scheduler.aux_output_connector.request_finished(session)
    scheduler._free_request_blocks(session)
    scheduler.encoder_cache_manager.free(session)
    session.num_computed_tokens = 0
    session._block_hasher = plain
    del session.block_hashes[:]
    session.update_block_hashes()


def _telling(original: Callable[..., Any]) -> Callable[..., Any]:
    def generate_block_hash_extra_keys(
        request: Any, start: int, end: int, *args: Any
    ) -> tuple[Any, Any]:
        keys, rest = original(request, start, end, *args)
        keyed = _keyed(request)
        if keyed and end > keyed.start:
            keys = (*(keys or ()), (KEY, keyed.key.hex()))
        return keys, rest

    return generate_block_hash_extra_keys


# --- whether it is in force -----------------------------------------------------------------------


def self_check(config: Any, prefixes: Prefixes) -> None:
    """Raise `ServingError` unless vLLM's own way of admitting a request, in this process, keys what
    a fast one writes, and no more."""
    plain = [_hash([1, 2, 3][:n]) for n in (1, 2, 3)]
    found = _admitted_hashes(config)
    if (found[0] == plain[0]) is prefixes.all_rows:
        reason = "prompts"
    elif set(found[1:]) & set(plain):
        reason = "answers"
    else:
        return
    raise ServingError(
        f"sere cannot keep the KV blocks of fast and exact requests apart: the {reason} of a fast "
        "one do not get the hashes that they should, so something else admits requests to this "
        "scheduler; start with --no-enable-prefix-caching"
    )


def _admitted_hashes(config: Any) -> Hashes:
    """Of three blocks of a token each, one of prompt and two of answer, of a fast request that this
    engine would admit."""
    from vllm import SamplingParams

    core = object.__new__(symbol("EngineCore"))
    core.vllm_config, core.mm_receiver_cache = config, None
    core.scheduler = SimpleNamespace(hash_block_size=1)
    core.request_block_hasher = lambda request: [
        _hash(request.all_token_ids[: n + 1])
        for n in range(len(request.block_hashes), request.num_tokens)
    ]
    new = symbol("EngineCoreRequest")(
        request_id=KEY,
        prompt_token_ids=[1],
        mm_features=None,
        sampling_params=SamplingParams(extra_args={KEY: "fast"}),
        pooling_params=None,
        arrival_time=0.0,
        lora_request=None,
        cache_salt=None,
        data_parallel_rank=None,
    )
    request, _ = core.preprocess_add_request(new)
    request.append_output_token_ids([2, 3])
    hashes: Hashes = request.block_hashes
    return hashes


def _hash(tokens: list[int]) -> bytes:
    return blake2b(bytes(tokens)).digest()
