"""What must be equal for a table to belong to a model."""

from __future__ import annotations

from dataclasses import dataclass

HASHING = 2
"""How hashes are computed today; 1: as tables of format 2 have them."""


@dataclass(frozen=True)
class Fingerprint:
    """Which model a table was made for.

    architecture: as in config.json, e.g. "Qwen3MoeForCausalLM".
    E, K: experts per layer and per token.
    layers: decoder layer indices that hold routed experts, ascending.
    router_hash, experts_hash: SHA-256 over the routers and over a sample of the expert weights;
        None where no checkpoint was there to read (random weights).
    hashing: how they were computed (see `HASHING`).
    """

    architecture: str
    E: int
    K: int
    layers: tuple[int, ...]
    router_hash: str | None = None
    experts_hash: str | None = None
    hashing: int = HASHING

    def differences(self, model: Fingerprint) -> list[str]:
        """What keeps a table with this fingerprint from serving `model`, in plain words. Hashes
        that were computed otherwise say nothing of each other."""
        found = [
            f"{what}: the table has {mine}, the model has {other}"
            for what, mine, other in [
                ("architecture", self.architecture, model.architecture),
                ("experts per layer", self.E, model.E),
                ("experts per token", self.K, model.K),
            ]
            if mine != other
        ]
        missing = sorted(set(model.layers) - set(self.layers))
        if missing:
            found.append(f"MoE layers of the model that the table lacks: {missing}")
        if found:  # hashes of other sizes' weights tell nothing more
            return found
        for what, mine, other in [
            ("router weights", self.router_hash, model.router_hash),
            ("expert weights", self.experts_hash, model.experts_hash),
        ]:
            if mine and other and mine != other and self.hashing == model.hashing:
                found.append(f"{what}: hash {mine[:12]} in the table, {other[:12]} in the model")
        return found
