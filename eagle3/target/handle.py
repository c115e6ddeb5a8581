"""The target of a run: what it is, and the loaded model for as long as stages use it."""

import gc
from functools import cached_property
from typing import Any

import torch
from hydra.utils import get_class, instantiate

from eagle3.errors import RunError
from eagle3.target.spec import TargetSpec
from eagle3.target.weights import TargetWeights, load_weights


class TargetHandle:
    """Loads the target when a stage first asks for it, and keeps it until its memory is needed.

    `section` is the config's `target`, whose `_target_` takes (spec, device) and may be an engine's
    client, `HFTarget`'s equal.
    """

    def __init__(
        self, spec: TargetSpec, section: dict[str, Any], device: torch.device, processes: int = 1
    ):
        """`processes` of this machine will use it together, where several do."""
        self.spec, self.device = spec, device
        self.section = get_class(section["_target_"]).for_processes(section, processes)
        self.loaded: Any = None

    @cached_property
    def identity(self) -> dict[str, Any]:
        """What hidden states and answers depend on, for fingerprints.

        An engine that quantises the target while loading it changes them too.
        """
        known = {
            "target": self.spec.identity,
            "dtype": self.spec.dtype,
            "aux_layer_ids": self.spec.aux_layer_ids,
        }
        name = self.section.get("quantization")
        return known if name is None else known | {"quantization": name}

    @property
    def in_process(self) -> bool:
        """Whether the model is loaded into this process, and not into an engine's."""
        return get_class(self.section["_target_"]).in_process

    def __getstate__(self) -> dict[str, Any]:
        """For other processes: they load the target themselves, or use the engine that runs here."""
        state = vars(self) | {"loaded": None}
        if self.loaded is not None and not self.in_process:
            state["section"] = self.section | {"url": self.loaded.url}
        return state

    def load(self) -> Any:
        """The loaded target. Raises ConfigError and RunError."""
        if self.loaded is None:
            self.loaded = instantiate(self.section)(self.spec, self.device)
        return self.loaded

    def __enter__(self) -> "TargetHandle":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, traceback: Any) -> None:
        """Close; of an engine that has ended, its own words say more than what ranks ran into."""
        try:
            if isinstance(error, RunError) and self.loaded is not None and not self.in_process:
                self.loaded.check_alive()
        finally:
            self.close()

    def load_weights(self) -> TargetWeights:
        """The embedding and the head alone; those of the loaded target, where it is loaded."""
        return self.loaded or load_weights(self.spec, self.device)

    def close(self) -> None:
        """Free the target's memory, end its engine; `load` makes it anew."""
        loaded, self.loaded = self.loaded, None
        if loaded is None:
            return
        loaded.close()
        del loaded
        gc.collect()  # its hooks and it hold each other
        if self.device.type == "cuda":
            torch.cuda.empty_cache()  # for an engine on the same GPU
