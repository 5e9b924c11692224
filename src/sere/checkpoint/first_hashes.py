"""Hashes as tables of format 2 hold them: of names and bytes, in every file of the folder."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from sere.checkpoint.names import LAYER
from sere.checkpoint.stored import Stored, document, tensors_in

_SAMPLE_BYTES = 65536
_EXPERT_TENSORS_PER_LAYER = 4
_NOT_A_ROUTER = re.compile(r"attn|attention|_proj\b")


def first_hashes(
    folder: str | Path, layers: Iterable[int], E: int
) -> tuple[str | None, str | None]:
    """(router hash, experts hash); (None, None) where there is nothing to read."""
    folder, routers, experts = Path(folder), hashlib.sha256(), hashlib.sha256()
    wanted, sampled = set(layers), dict.fromkeys(layers, 0)
    found = False
    every = [
        item for path in sorted(folder.glob("*.safetensors")) for item in tensors_in(path).items()
    ]
    for name, tensor in sorted(every, key=lambda item: item[0]):
        match = LAYER.search(name)
        if match is None or int(match.group(1)) not in wanted:
            continue
        layer = int(match.group(1))
        if "expert" in name and "shared" not in name:
            if sampled[layer] < _EXPERT_TENSORS_PER_LAYER:
                sampled[layer] += 1
                _update(experts, name, tensor, _SAMPLE_BYTES)
                found = True
        elif len(tensor.shape) == 2 and tensor.shape[0] == E and not _NOT_A_ROUTER.search(name):
            _update(routers, name, tensor, tensor.size)
            found = True
    if not found:
        return None, None
    config = folder / "config.json"
    quantised = config.is_file() and "quantization_config" in document(config)
    return routers.hexdigest(), None if quantised else experts.hexdigest()


def _update(digest: Any, name: str, tensor: Stored, limit: int) -> None:
    digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
    digest.update(tensor.read(0, min(tensor.size, limit)))
