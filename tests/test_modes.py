"""What modes ask of a target, and that they don't keep it."""

import weakref
from types import SimpleNamespace

import numpy as np
import torch

from eagle3.batch import Features
from eagle3.data.prepare import INDEX
from eagle3.hidden_states.store import Document
from eagle3.hidden_states.supply import Supply, hybrid
from eagle3.job import Run
from eagle3.parallel.ranks import Ranks


def test_a_process_whose_documents_are_all_kept_takes_part_in_what_others_ask():
    """Its share of a batch that ranks divide; else the others would wait for it."""
    asked = []
    target = SimpleNamespace(stand_by=asked.append)
    kept = SimpleNamespace(full=True, add=lambda documents: None, sync=None, close=None)
    prepared = SimpleNamespace(
        lengths=np.array([3]), supervised=np.array([1]), index=np.zeros(1, INDEX)
    )
    run = SimpleNamespace(
        growing_store=lambda: kept, shared_target=target, prepared=prepared, ranks=Ranks()
    )
    features = Features(
        torch.ones(3, 6), torch.ones(2, 2), torch.ones(2, dtype=torch.long), torch.ones(2)
    )
    document = Document(0, torch.arange(3), torch.ones(3, dtype=torch.bool), features)
    batch = SimpleNamespace(loaded=[document], input_ids=torch.arange(3))
    assert torch.equal(hybrid(run).features_of(batch).aux_hidden_states, features.aux_hidden_states)
    assert asked == [1]


def test_a_target_that_is_let_go_is_gone():
    """What training was supplied by held it, and an engine needs its memory."""

    class Target:
        def close(self):
            pass

    run, target = object.__new__(Run), Target()
    gone = weakref.ref(target)
    run.device = torch.device("cpu")
    run.__dict__ |= {"part": target, "supply": Supply(None, target)}
    del target
    run.let_go_of_target()
    assert gone() is None
