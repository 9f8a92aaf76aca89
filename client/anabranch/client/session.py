"""One process's view of a task: the base loaded once, adapters swapped in and out."""

from __future__ import annotations

import copy
import json
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from torch import nn

from anabranch.client.lora import (
    attach,
    base_hash,
    keep_frozen,
    lower_rank,
    own_parameters,
    read_adapter,
    write_adapter,
)
from anabranch.client.task import LoraTask, load_task
from anabranch.vectors import Adapter
from anabranch.vectors.frozen import split
from anabranch.wire.plan import Scalar


@dataclass
class Session:
    """A loaded task.

    Attributes:
        task: The user's task.
        model: Base with the LoRA layers attached (a ``PeftModel``).
        template: An adapter with this task's modules, ranks and dense start values.
        start: Hash and values of the last round's start: the clients of a process share them.
        lower: The same at lower ranks, by rank, as far as anybody asked for one.
    """

    task: LoraTask
    model: nn.Module
    template: Adapter
    start: tuple[str, Adapter] | None = None
    lower: dict[int, Session] = field(default_factory=dict)

    @property
    def base_hash(self) -> str:
        """``weights_hash`` of the base as it was loaded."""
        assert self.template.base_hash is not None
        return self.template.base_hash

    def load(self, adapter: Adapter) -> Adapter:
        """Put an adapter into the model; ranks beyond the template's are frozen beside it.

        Returns:
            The part that is trained.

        Raises:
            ValueError: Names or scalings differ from the model's own, or it has too few ranks.
        """
        trained, frozen = split(adapter, self.template)
        write_adapter(self.model, trained)
        keep_frozen(self.model, frozen)
        return trained

    def beside(self) -> Session:
        """A session for another thread: an adapter of its own on the same task and frozen base."""
        mine = {id(tensor) for tensor in own_parameters(self.model)}
        frozen = [tensor for tensor in self.model.parameters() if id(tensor) not in mine]
        shared = {id(tensor): tensor for tensor in (*frozen, *self.model.buffers())}
        model = copy.deepcopy(self.model, shared)
        for parameter in own_parameters(model):
            parameter.requires_grad_(
                True
            )  # this thread's own may be at work with one factor frozen
        return replace(self, model=model, lower={})

    def at_rank(self, rank: int | None) -> Session:
        """This session, or one whose adapter has no module above a rank, on the same frozen base.

        Raises:
            ValueError: A rank above this task's own, which a coordinator has no business asking.
        """
        own = max((factors.rank for factors in self.template.lora.values()), default=0)
        if rank is None or rank == own:
            return self
        if rank > own:
            raise ValueError(f"the plan asks for rank {rank}, this task's adapter has {own}")
        if rank not in self.lower:
            lower = replace(self.beside(), template=self.template.leading(rank), start=None)
            lower_rank(lower.model, lower.template)
            self.lower[rank] = lower
        return self.lower[rank]


class _OfThread(threading.local):
    """What each thread has opened, by task and parameters."""

    def __init__(self) -> None:
        self.sessions: dict[tuple[str, str], Session] = {}


_mine = _OfThread()
_loaded: dict[tuple[str, str], Session] = {}
_loading = threading.Lock()


def open_session(task: str, params: str) -> Session:
    """The calling thread's session of a task.

    The base is loaded once per process for each pair of arguments, by the first thread that asks;
    every other thread gets an adapter of its own on it.

    Args:
        task: ``package.module:Class``.
        params: The class's keyword arguments as a JSON object.

    Raises:
        ValueError: The task cannot be imported or does not take these parameters.
    """
    key = (task, params)
    if key not in _mine.sessions:
        with _loading:
            if key in _loaded:
                _mine.sessions[key] = _loaded[key].beside()
            else:
                _mine.sessions[key] = _loaded[key] = _load(task, params)
    return _mine.sessions[key]


def _load(task: str, params: str) -> Session:
    """Load a task's base and attach its LoRA layers."""
    loaded = load_task(task, json.loads(params))
    base = loaded.load_base()
    digest = base_hash(base)
    model = attach(base, loaded.lora_config())
    return Session(loaded, model, read_adapter(model, digest))


def session_of(run_config: Mapping[str, Scalar], node_config: Mapping[str, Scalar]) -> Session:
    """The session a message belongs to. What the node sets wins over what the run asks for."""
    config = {**run_config, **node_config}
    if not config.get("task"):
        raise ValueError("no task: set task = 'package.module:Class' in the run or node config")
    return open_session(str(config["task"]), str(config.get("task-params") or "{}"))
