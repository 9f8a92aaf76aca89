"""Secure aggregation deployed: SuperLink and four SuperNodes, one of them killed in training.

Flower starts a process for each message, two dozen here: a minute of two cores that have nothing
else to do, so ``make chaos`` runs it and ``make test`` does not.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
from contextlib import ExitStack
from pathlib import Path

import pytest
import tomli_w
from flwr.app import Context, RecordDict

from anabranch.client.app import app as client_app
from anabranch.client.session import open_session
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
from anabranch.coordinator.registry import KEYS_FOLDER, enrol
from anabranch.coordinator.store import FolderStore, open_store
from anabranch.coordinator.strategy import MergeStrategy
from anabranch.simulation.engine.identity import server_identity
from anabranch.simulation.engine.inprocess import InProcessGrid
from anabranch.vectors import Adapter, seeded_start
from anabranch.vectors.peft_folder import read_adapter, write_adapter
from anabranch.wire.keys import new_key, read_public, write_key

NODES, KILLED = 4, 3
TASK = "anabranch.simulation.synthetic:SyntheticTask"
PARAMS = json.dumps({"clients": NODES})

# A node's own task, as its operator may name one: it says when it trains, and does not come back.
ENDLESS = """
import time
from pathlib import Path
from anabranch.simulation.synthetic import SyntheticTask

class Endless(SyntheticTask):
    def train(self, model, partition, plan):
        here = Path(__file__).parent
        (here / "training").touch()
        end = time.monotonic() + 300
        while not (here / "killed").exists() and time.monotonic() < end:
            time.sleep(0.2)
        raise RuntimeError("this node was killed")
"""


def federation() -> FederationConfig:
    """One round, which closes as soon as all that are left have answered."""
    return FederationConfig.model_validate(
        {
            "name": "hidden", "run": "run-1", "rounds": 1, "clients": NODES, "quorum": NODES - 1,
            "deadline_s": 240, "join_timeout_s": 300, "evaluate_every": 0, "signed": True,
            "secure": {"phase_s": 150}, "collect": {"close_at": NODES - 1},
            "codec": {"name": "dense"}, "recipe": {"method": "fedit"}, "train": {"steps": 3},
        }
    )  # fmt: skip


def without_secrets(folder: Path) -> Adapter:
    """What the same clients come to that were not killed, in this process and in the open."""
    open_config = federation().model_copy(
        update={"signed": False, "secure": None, "clients": NODES - 1}
    )
    contexts = {
        10 + site: Context(
            1, 10 + site, {"partition-id": site, "client": f"site-{site}"}, RecordDict(),
            {"task": TASK, "task-params": PARAMS},
        )
        for site in range(NODES)
        if site != KILLED
    }  # fmt: skip
    folder.mkdir()
    with server_identity():
        strategy = MergeStrategy(
            open_config, open_session(TASK, PARAMS).template, FolderStore(folder)
        )
        strategy.start(InProcessGrid(client_app, contexts))
    return strategy.adapter


@pytest.mark.e2e
@pytest.mark.skipif("CHAOS_KILLS" not in os.environ, reason="a minute; make chaos runs it")
def test_a_sum_is_opened_without_the_node_that_was_killed(tmp_path: Path) -> None:
    config, folder = federation(), tmp_path / "federation"
    write_federation(config, folder)
    template = open_session(TASK, PARAMS).template
    write_adapter(seeded_start(template, config.seed), folder / START_FOLDER)
    _, coordinator = write_key(new_key("coordinator"), folder / KEYS_FOLDER)
    publics = [
        write_key(new_key(f"site-{site}"), tmp_path / f"keys-{site}")[1] for site in range(NODES)
    ]
    for site, public in enumerate(publics):
        enrol(folder, read_public(public))
        keys = tmp_path / f"keys-{site}"
        (keys / "coordinator.pub").write_bytes(coordinator.read_bytes())
        (keys / "members.pub").write_text("".join(path.read_text() for path in publics))
    (tmp_path / "endless.py").write_text(ENDLESS)

    home = tmp_path / "flower"
    home.mkdir()
    port = free_port()
    address = f"127.0.0.1:{port}"
    env = {**environment(home, port), "OMP_NUM_THREADS": "1"}
    env["PYTHONPATH"] = os.pathsep.join([str(tmp_path), env.get("PYTHONPATH", "")])
    link = {"superlink": {"link": {"address": address, "insecure": True}}}
    (home / "config.toml").write_text(tomli_w.dumps(link))

    with ExitStack() as running:
        log = tmp_path / "superlink.log"
        superlink = running.enter_context(
            process(
                [
                    command("flower-superlink"), "--insecure",
                    "--disable-runtime-dependency-installation",
                    "--database", str(tmp_path / "state.db"), "--port", str(port),
                ],
                log,
                env,
            )
        )  # fmt: skip
        wait_for_port(port, superlink, log)
        nodes: list[subprocess.Popen[bytes]] = []
        for site in range(NODES):
            settings = f'partition-id={site} client="site-{site}" keys="{tmp_path}/keys-{site}"'
            if site == KILLED:
                settings += ' task="endless:Endless"'
            arguments = [
                command("flower-supernode"), "--insecure", "--superlink", address,
                "--port", str(free_port()), "--node-config", settings,
            ]  # fmt: skip
            node_env = {**env, "FLWR_HOME": str(tmp_path / f"home-{site}")}
            started = process(arguments, tmp_path / f"node-{site}.log", node_env)
            nodes.append(running.enter_context(started))

        def kill() -> None:
            if (tmp_path / "training").exists() and not (tmp_path / "killed").exists():
                os.killpg(nodes[KILLED].pid, signal.SIGKILL)
                (tmp_path / "killed").touch()

        bundle = write_bundle(
            tmp_path / "bundle", {"federation": str(folder), "task": TASK, "task-params": PARAMS}
        )
        answer = flwr(["run", str(bundle), "link"], env)
        try:
            wait_for_run(str(answer["run-id"]), "link", env, tmp_path / "run.log", 600, kill)
        except FlowerError as error:
            logs = "\n".join(
                f"== {path.name}\n{path.read_text(errors='replace')[-3000:]}"
                for path in sorted(tmp_path.glob("*.log"))
            )
            raise AssertionError(f"{error}\n{logs}") from error
    assert (tmp_path / "killed").exists()

    store = open_store(config.store, folder, federation=config.name, run=config.run)
    (told,) = store.notes("secure")
    assert sorted(told["summed"]) == ["site-0", "site-1", "site-2"], told
    assert [row["status"] for row in store.notes("round")] == ["published"]
    # Nobody's own update ever came to the store.
    assert [row.client for row in store.contributions(1)] == ["group-0"]
    store.close()

    # A mask that was not taken off would leave whole numbers of 32 bits.
    found = read_adapter(folder / ADAPTER_FOLDER).tensors()
    expected = without_secrets(tmp_path / "open").tensors()
    assert max(float((found[name] - x).abs().max()) for name, x in expected.items()) < 1e-6
