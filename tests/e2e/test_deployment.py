"""A deployed federation: SuperLink and three SuperNodes as processes; TLS, signed and sealed."""

from __future__ import annotations

import json
from contextlib import ExitStack
from pathlib import Path

import pytest
import tomli_w
import torch
from benchmarks.loopback import certificates, node_key
from peft import PeftModel

from anabranch.client.lora import base_hash
from anabranch.coordinator.app import ADAPTER_FOLDER
from anabranch.coordinator.federation import START_FOLDER, FederationConfig, write_federation
from anabranch.coordinator.flower import (
    FlowerError,
    command,
    environment,
    flwr,
    free_port,
    process,
    wait_for_port,
    wait_for_run,
    write_bundle,
)
from anabranch.coordinator.registry import KEYS_FOLDER, client_keys, enrol
from anabranch.coordinator.store import open_store
from anabranch.simulation.partitioned_text import PartitionedText
from anabranch.vectors import seeded_start
from anabranch.vectors.peft_folder import read_adapter, write_adapter
from anabranch.wire import read_manifest
from anabranch.wire.keys import new_key, read_public, write_key
from anabranch.wire.signing import check_message

NODES = 3
TASK = "anabranch.simulation.partitioned_text:PartitionedText"
PARAMS = {
    "datasets": ["bbc", "sentiment", "text-kind"],
    "clients_per_dataset": 1,
    "test_examples": 120,
    "validation_examples": 40,
}


@pytest.mark.e2e
def test_a_deployed_federation_beats_the_base(tmp_path: Path) -> None:
    task = PartitionedText(**PARAMS)
    base = task.load_base()
    digest = base_hash(base)
    from anabranch.client.session import open_session

    session = open_session(TASK, json.dumps(PARAMS, sort_keys=True))
    federation = tmp_path / "federation"
    config = FederationConfig(
        name="deployed",
        run="run-1",
        rounds=2,
        clients=NODES,
        quorum=NODES,
        deadline_s=600,
        join_timeout_s=300,
        evaluate_every=2,
        signed=True,
        sealed=True,
        train={"steps": 8, "batch_size": 16, "learning_rate": 2e-3},
        recipe={"method": "ties", "params": {"density": 0.3}, "scale": 1.5},
    )
    write_federation(config, federation)
    write_adapter(seeded_start(session.template, config.seed), federation / START_FOLDER)

    _, coordinator = write_key(new_key("coordinator"), federation / KEYS_FOLDER)
    for index in range(NODES):
        # What a hospital does at home; only the .pub travels to the coordinator, and back.
        _, public = write_key(new_key(f"site-{index}"), tmp_path / f"keys-{index}")
        enrol(federation, read_public(public))
        (tmp_path / f"keys-{index}" / "coordinator.pub").write_bytes(coordinator.read_bytes())

    home = tmp_path / "flower"
    home.mkdir()
    certificates(tmp_path)
    port = free_port()
    env = environment(home, port)
    address = f"127.0.0.1:{port}"
    link = {"address": address, "root-certificates": str(tmp_path / "ca.pem")}
    (home / "config.toml").write_text(tomli_w.dumps({"superlink": {"link": link}}))
    tls = [
        "--ssl-certfile", str(tmp_path / "server.pem"),
        "--ssl-keyfile", str(tmp_path / "server.key"),
        "--ssl-ca-certfile", str(tmp_path / "ca.pem"),
    ]  # fmt: skip

    with ExitStack() as running:
        log = tmp_path / "superlink.log"
        superlink = running.enter_context(
            process(
                [
                    command("flower-superlink"), *tls, "--enable-supernode-auth",
                    "--disable-runtime-dependency-installation",
                    "--database", str(tmp_path / "state.db"), "--port", str(port),
                ],
                log,
                env,
            )
        )  # fmt: skip
        wait_for_port(port, superlink, log)

        def start_node(index: int, private: Path) -> Path:
            node_log = tmp_path / f"node-{index}.log"
            settings = f'partition-id={index} num-partitions={NODES} client="site-{index}"'
            settings += f' keys="{tmp_path}/keys-{index}"'
            running.enter_context(
                process(
                    [
                        command("flower-supernode"),
                        "--root-certificates", str(tmp_path / "ca.pem"),
                        "--superlink", address, "--port", str(free_port()),
                        "--auth-supernode-private-key", str(private),
                        "--node-config", settings,
                    ],
                    node_log,
                    {**env, "FLWR_HOME": str(tmp_path / f"home-{index}"), "OMP_NUM_THREADS": "1"},
                )
            )  # fmt: skip
            return node_log

        for index in range(NODES):
            private, public = node_key(tmp_path, f"node-{index}")
            flwr(["supernode", "register", str(public), "link"], env)
            start_node(index, private)
        # A node whose key nobody registered must not take part.
        stranger, _ = node_key(tmp_path, "stranger")
        stranger_log = start_node(NODES, stranger)

        bundle = write_bundle(
            tmp_path / "bundle",
            {"federation": str(federation), "task": TASK, "task-params": json.dumps(PARAMS)},
        )
        answer = flwr(["run", str(bundle), "link"], env)
        try:
            row = wait_for_run(str(answer["run-id"]), "link", env, tmp_path / "run.log", 1200)
        except FlowerError as error:
            logs = "\n".join(
                f"== {path.name}\n{path.read_text(errors='replace')[-3000:]}"
                for path in sorted(tmp_path.glob("*.log"))
            )
            raise AssertionError(f"{error}\n{logs}") from error
        assert row["status"] == "finished:completed"
        assert "Failed to activate SuperNode" in stranger_log.read_text()

    store = open_store(config.store, federation, federation=config.name, run=config.run)
    for server_round in (1, 2):
        rows = store.contributions(server_round)
        assert [row.client for row in rows] == ["site-0", "site-1", "site-2"]
        for row in rows:
            manifest = read_manifest(store.get(row.digest))
            check_message(manifest, client_keys(federation), row.client)
    assert store.refusals() == []

    adapter = read_adapter(federation / ADAPTER_FOLDER)
    assert adapter.base_hash == digest
    latest = store.latest()
    store.close()
    assert latest is not None
    assert adapter.hash() == latest.adapter_hash

    model = PeftModel.from_pretrained(base, str(federation / ADAPTER_FOLDER))
    gains = []
    with torch.inference_mode():
        for partition in range(NODES):
            merged = task.evaluate(model, partition, "test")["accuracy"]
            with model.disable_adapter():
                before = task.evaluate(model, partition, "test")["accuracy"]
            gains.append(merged - before)
    assert sum(gains) / NODES > 0.03, gains
