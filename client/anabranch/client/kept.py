"""What a node keeps on its own disk: the last update it made, and what that update left out.

A coordinator that was killed asks again for what it had not received; the same bytes are the answer
then, and nobody trains twice. A SuperNode that restarts, or a new run, would also lose
``context.state``, and error feedback with it. One file of each kind per federation, run and client;
the folder is the node's own choice (``state`` in its configuration, or ``ANABRANCH_STATE``).
Loads torch for residuals only.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from anabranch.client.site import site_of
from anabranch.wire.plan import RoundPlan, Scalar

if TYPE_CHECKING:
    from torch import Tensor

STATE_VARIABLE = "ANABRANCH_STATE"


@dataclass(frozen=True)
class Kept:
    """An update as it was encoded and signed, not yet sealed.

    Attributes:
        blob: Its bytes.
        metrics: What was said of its training.
    """

    blob: bytes
    metrics: dict[str, int | float]


def plan_digest(plan: RoundPlan) -> str:
    """What one order has in common with its repetition: all but the key to seal to."""
    same = plan.model_copy(update={"seal_to": None})
    words = json.dumps(same.model_dump(mode="json"), sort_keys=True)
    return hashlib.sha256(words.encode()).hexdigest()


class NodeState:
    """A node's folder.

    Args:
        folder: Where it is; made when missing.
        client: The node's name.
    """

    def __init__(self, folder: Path, client: str) -> None:
        self._folder, self._client = folder, client

    def keep(self, plan: RoundPlan, kept: Kept) -> None:
        """Keep an update in place of the last one."""
        about = {"plan": plan_digest(plan), "metrics": kept.metrics}
        head = json.dumps(about).encode()
        self._write(self._path(plan, "update"), head + b"\n" + kept.blob)

    def answer(self, plan: RoundPlan) -> Kept | None:
        """The update that was made for this very plan; None where there is none."""
        try:
            head, _, blob = self._path(plan, "update").read_bytes().partition(b"\n")
            about = json.loads(head)
            if about["plan"] != plan_digest(plan):
                return None
            return Kept(blob, dict(about["metrics"]))
        except FileNotFoundError:
            return None
        except (ValueError, KeyError, TypeError):  # a damaged file costs a training, and no more
            return None

    def keep_residual(
        self, plan: RoundPlan, tensors: Mapping[str, Tensor], about: Mapping[str, str]
    ) -> None:
        """Keep what the update of a plan left out, in place of the last one's.

        Args:
            plan: The plan.
            tensors: By any names.
            about: What it belongs to.
        """
        from safetensors.torch import save

        self._write(self._path(plan, "residual"), save(dict(tensors), dict(about)))

    def residual(self, plan: RoundPlan) -> tuple[dict[str, Tensor], dict[str, str]] | None:
        """What ``keep_residual`` kept last in this federation and run; None where it is gone."""
        from safetensors import SafetensorError, safe_open

        path = self._path(plan, "residual")
        try:
            with safe_open(path, "pt") as file:
                return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
        except (FileNotFoundError, SafetensorError):
            return None

    def _path(self, plan: RoundPlan, kind: str) -> Path:
        words = "\0".join((plan.federation, plan.run, self._client))
        return self._folder / f"{hashlib.sha256(words.encode()).hexdigest()[:32]}.{kind}"

    def _write(self, path: Path, data: bytes) -> None:
        self._folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        partial = path.with_name(f"{path.name}.partial")
        with partial.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)


def state_of(node_config: Mapping[str, Scalar]) -> NodeState | None:
    """The node's folder; None where it keeps nothing."""
    folder = node_config.get("state") or os.environ.get(STATE_VARIABLE)
    return NodeState(Path(str(folder)), site_of(node_config).name) if folder else None
