"""The rival of benchmarks.federation: Flower's own FedAvg on dense fp32 adapters.

Written as Flower's documentation would have it, and kindly: the base is loaded once per process,
the arrays are the LoRA factors alone. Task, model, data, rounds and steps are those of our own run.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from pathlib import Path

from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from safetensors.torch import save_file

from anabranch.client.app import client_seed
from anabranch.client.lora import read_adapter, write_adapter
from anabranch.client.session import session_of
from anabranch.client.site import site_of
from anabranch.client.task import TrainPlan
from anabranch.simulation.scenario import load_scenario
from anabranch.vectors import seeded_start

client_app = ClientApp()
server_app = ServerApp()


@client_app.train()
def train(message: Message, context: Context) -> Message:
    """Train the arrays that came; send the trained arrays back."""
    session = session_of(context.run_config, context.node_config)
    site = site_of(context.node_config)
    arrays = message.content.array_records["arrays"]
    write_adapter(session.model, session.template.with_tensors(arrays.to_torch_state_dict()))
    config = message.content.config_records["config"]
    scenario = load_scenario(Path(str(context.run_config["scenario"])))
    plan = TrainPlan.model_validate(
        {
            **scenario.train,
            "seed": client_seed(scenario.seed, int(config["server-round"]), site.name),  # type: ignore[arg-type]
        }
    )
    started = time.perf_counter()
    metrics = dict(session.task.train(session.model, site.partition, plan))
    seconds = time.perf_counter() - started
    trained = read_adapter(session.model, session.base_hash).tensors()
    record = ArrayRecord(OrderedDict(trained))
    size = sum(len(array.data) for array in record.values())
    facts = MetricRecord({**metrics, "train-seconds": seconds, "bytes": size})
    return Message(RecordDict({"arrays": record, "metrics": facts}), reply_to=message)


@server_app.main()
def main(grid: Grid, context: Context) -> None:
    """FedAvg over all clients in every round."""
    config = context.run_config
    session = session_of(config, {})
    start = seeded_start(session.template, int(config["seed"]))
    strategy = FedAvg(fraction_evaluate=0.0, min_available_nodes=int(config["clients"]))
    began = time.perf_counter()
    result = strategy.start(
        grid=grid,
        initial_arrays=ArrayRecord(OrderedDict(start.tensors())),
        num_rounds=int(config["rounds"]),
    )
    seconds = time.perf_counter() - began
    folder = Path(str(config["federation"]))
    save_file(dict(result.arrays.to_torch_state_dict()), folder / "fedavg.safetensors")
    rounds = result.train_metrics_clientapp
    lines = [f"{row['train-seconds']} {row['bytes']}\n" for _, row in sorted(rounds.items())]
    (folder / "fedavg.txt").write_text(f"{seconds} 0\n" + "".join(lines))
