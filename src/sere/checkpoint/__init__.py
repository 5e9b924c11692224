"""A model's files on disk: are they whole, which model are they, how are its experts stored?

Knows safetensors' headers and the names that weights have, and loads no model.
For everyone; imports torch alone.
"""

from __future__ import annotations

from sere.checkpoint.configured import configured as configured
from sere.checkpoint.fingerprint import HASHING as HASHING
from sere.checkpoint.fingerprint import Fingerprint as Fingerprint
from sere.checkpoint.hashes import weight_hashes as weight_hashes
from sere.checkpoint.names import expert_layers as expert_layers
from sere.checkpoint.names import layer_index as layer_index
from sere.checkpoint.stored import CheckpointError as CheckpointError
