"""A ClientApp that sends a real update without training: no model is loaded, whatever the task.

Changes are drawn by client and round, so that whoever is asked twice would make the same ones;
everything else (who it is, the check of the plan, the encoding, the node's disk) is as deployed.
"""

from __future__ import annotations

import secrets
import time
from pathlib import Path

from flwr.app import (
    ArrayRecord,
    ConfigRecord,
    Context,
    Message,
    MessageType,
    MetricRecord,
    RecordDict,
)

from anabranch.client.deployed import DeployedApp
from anabranch.client.kept import Kept, state_of
from anabranch.client.order import plan_of
from anabranch.client.records import as_array
from anabranch.client.site import site_of
from anabranch.wire.plan import CLIENT_KEY, METRICS_KEY, UPDATE_KEY, UPDATE_STYPE


class LightApp(DeployedApp):
    """Answers an order to train with an update of noise."""

    def __call__(self, message: Message, context: Context) -> Message:
        """Answer a message."""
        kept = None
        if message.metadata.message_type == MessageType.TRAIN:
            state = state_of(context.node_config)
            plan = plan_of(message)
            if state is None or state.answer(plan) is None:
                kept = made(message, context)
                if state is not None:
                    state.keep(plan, kept)
        if kept is None:
            return super().__call__(message, context)
        content = RecordDict(
            {
                UPDATE_KEY: ArrayRecord({UPDATE_KEY: as_array(kept.blob, UPDATE_STYPE, plan)}),
                METRICS_KEY: MetricRecord({**kept.metrics}),
                CLIENT_KEY: ConfigRecord({CLIENT_KEY: site_of(context.node_config).name}),
            }
        )
        return Message(content, reply_to=message)


def made(message: Message, context: Context) -> Kept:
    """An update of noise for a plan."""
    import torch

    from anabranch.coordinator.federation import START_FOLDER
    from anabranch.vectors import seeded_start
    from anabranch.vectors.peft_folder import read_adapter
    from anabranch.wire import UpdateMeta, encode_update

    plan, name = plan_of(message), site_of(context.node_config).name
    template = read_adapter(Path(str(context.run_config["federation"])) / START_FOLDER)
    generator = torch.Generator().manual_seed(plan.round * 1000 + sum(name.encode()))
    changes = {
        key: 0.01 * torch.randn(tensor.shape, generator=generator)
        for key, tensor in seeded_start(template, plan.seed).tensors(plan.trained).items()
    }
    meta = UpdateMeta(
        kind="update", base_hash=plan.base_hash, start_hash=plan.start_hash,
        federation=plan.federation, run=plan.run, round=plan.round, client=name,
        nonce=secrets.token_bytes(16), seed=plan.seed, examples=1, issued_s=int(time.time()),
    )  # fmt: skip
    encoded = encode_update(changes, meta, plan.codec)
    return Kept(encoded.blob, {"num-examples": 1, "train-loss": 0.0})


app = LightApp()
