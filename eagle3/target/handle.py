"""The target of a run: what it is, and the loaded model for as long as stages use it."""

import gc
import os
import socket
from contextlib import AbstractContextManager
from functools import cached_property
from typing import Any

import torch
from hydra.utils import get_class

from eagle3.config import instantiate
from eagle3.errors import RunError
from eagle3.target.spec import TargetSpec
from eagle3.target.weights import TargetWeights, load_weights


class TargetHandle(AbstractContextManager):
    """Loads the target when a stage first asks for it, and keeps it until its memory is needed.

    `section` is the config's `target`, whose `_target_` takes (spec, device) and may be an engine's
    client, `HFTarget`'s equal; `processes` of this machine will use it together.
    """

    def __init__(self, spec: TargetSpec, section: dict, device: torch.device, processes: int = 1):
        if section.get("dp_size", 1) is None:  # of an engine: as many copies as the GPUs hold
            gpus = min(torch.cuda.device_count(), processes)
            section = section | {"dp_size": max(1, gpus // section.get("tp_size", 1))}
        self.spec, self.section, self.device, self.loaded = spec, section, device, None
        self.said = False  # how documents go through it
        self.running: tuple[str, str] | None = None  # host and address of another process' engine
        # Whether the model is loaded into this process, and not into an engine's.
        self.in_process = get_class(section["_target_"]).in_process

    @cached_property
    def identity(self) -> dict[str, Any]:
        """What hidden states and answers depend on, for fingerprints."""
        spec = self.spec
        known = {"target": spec.identity, "dtype": spec.dtype, "aux_layer_ids": spec.aux_layer_ids}
        # An engine that quantises the target while loading it changes them too.
        name = self.section.get("quantization")
        return known if name is None else known | {"quantization": name}

    def __getstate__(self) -> dict[str, Any]:
        """For other processes, which load the target too, or use the engine that runs here."""
        state = vars(self) | {"loaded": None}  # weights are not sent, nor can a client be
        if self.loaded is not None and not self.in_process:
            state["running"] = (socket.gethostname(), self.loaded.url)
        return state

    def load(self) -> Any:
        """The loaded target. Raises ConfigError and RunError."""
        if self.loaded is None:
            section = self.section
            # An engine's address and its shared memory are those of one machine.
            if self.running and self.running[0] == socket.gethostname():
                section = section | {"url": self.running[1]}
            self.loaded = instantiate(section)(self.spec, self.device)
            # Once a run: other processes are sent what was said.
            if self.in_process and not self.said and os.environ.get("RANK", "0") == "0":
                name = type(self.loaded.model).__name__
                print(f"target: documents go {self.loaded.way} through {name}")
            self.said = True
        return self.loaded

    def __exit__(self, kind: type | None, error: BaseException | None, traceback: Any) -> None:
        """Close; of an engine that has ended, its own words say more than what ranks ran into."""
        try:
            if isinstance(error, RunError) and self.loaded is not None and not self.in_process:
                self.loaded.check_alive()
        finally:
            self.close()

    def load_weights(self) -> TargetWeights:
        """The embedding and the head alone; those of the loaded model, if it is here."""
        return (self.in_process and self.loaded) or load_weights(self.spec, self.device)

    def close(self) -> None:
        """Free the target's memory, end its engine; `load` makes it anew."""
        if self.loaded is not None and not self.in_process:
            self.loaded.close()
        self.loaded = None
        gc.collect()  # its hooks and it hold each other
        torch.cuda.empty_cache()  # for an engine on the same GPU
