"""Steps in which re-routing failed, and that were served all the same.

While an engine starts, whatever fails stops it. Once it serves, a surprise of ours must not end
everybody's requests: vLLM's workers do not survive an exception in a step. The step is then left to
stock routing, counted, and what failed is logged once.
"""

from __future__ import annotations

import logging

_LOG = logging.getLogger("vllm.sere")


class Incidents:
    """What one worker survived.

    serving: start-up is over. steps: in which something failed, or in which a layer saw rows whose
    classes nobody knows.
    """

    def __init__(self) -> None:
        self.serving = False
        self.steps = 0
        self._counted = False
        self._said = set[str]()

    def begin_step(self) -> None:
        self._counted = False

    def survive(self, doing: str, error: Exception) -> None:
        """Count and log an error in the step under way; raise it while the engine starts.

        doing: what failed, logged once for each.
        """
        if not self.serving:
            raise error
        self.steps += not self._counted
        self._counted = True
        if doing not in self._said:
            self._said.add(doing)
            _LOG.error(
                "sere: %s failed. Stock routing serves where it does: such steps are counted on "
                "/metrics (sere_unclassified_steps_total), this is logged once. Please report it.",
                doing,
                exc_info=error,
            )
