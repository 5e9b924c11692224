"""lm-evaluation-harness's vLLM model with re-routing loaded; the policy is switched in place."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from importlib import import_module, metadata
from typing import Any

from sere.policy import Policy
from sere.serving.asking import KEY
from sere.serving.engine import prepare, to_follow


class Vllm:
    """lm: the harness's model. Batches are the engine's own, of at most `batch` requests. policies:
    those that will be set."""

    def __init__(
        self,
        folder: str,
        table: str,
        batch: int,
        dtype: str,
        seed: int,
        policies: Iterable[Policy | None],
    ) -> None:
        prepare()
        from lm_eval.api.registry import get_model

        _name_vllm()
        self.lm: Any = get_model("vllm")(
            pretrained=folder,
            dtype=dtype,
            seed=seed,
            batch_size="auto",  # all requests at once: the engine makes the batches
            max_num_seqs=batch,
            enable_prefix_caching=False,
            additional_config={KEY: to_follow(table, policies)},
        )

    @contextmanager
    def policy(self, policy: Policy | None) -> Iterator[None]:
        """Serve under a policy; None is stock routing."""
        settings = policy.to_dict() if policy else None
        self.lm.model.collective_rpc("sere_policy", args=(settings,))
        self.lm.model.collective_rpc("sere_reset")
        yield

    def rerouted(self) -> int:
        """Slots that were re-routed since the policy was set."""
        stats = self.lm.model.collective_rpc("sere_stats")[0]
        return sum(layer["slots_rerouted"] for layer in stats.values())


def _name_vllm() -> None:
    """vLLM's CPU build is installed under another name than the harness asks for."""
    known = metadata.version

    def version(distribution_name: str) -> str:
        try:
            return known(distribution_name)
        except metadata.PackageNotFoundError:
            return known(f"{distribution_name}-cpu") + "+cpu"

    metadata.version = version
    try:
        import_module("lm_eval.models.vllm_causallms")  # keeps the function that it finds
    finally:
        metadata.version = known
