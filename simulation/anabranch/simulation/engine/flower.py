"""Run a federation through Flower's own simulation: SuperLink, Ray actors, ``flwr run``."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import tomli_w

from anabranch.client.trust import KEYS_VARIABLE
from anabranch.coordinator.flower import (
    CLIENT_APP,
    SERVER_APP,
    command,
    environment,
    flwr,
    free_port,
    process,
    wait_for_port,
    wait_for_run,
    write_bundle,
)
from anabranch.wire.plan import Scalar


def run_in_flower(
    folder: Path,
    clients: int,
    run_config: dict[str, Scalar],
    *,
    server_app: str = SERVER_APP,
    client_app: str = CLIENT_APP,
    cpus_per_client: int = 1,
    timeout_s: float = 7 * 24 * 3600,
    keys: Path | None = None,
    on_poll: Callable[[], None] = lambda: None,
) -> float:
    """Run a prepared federation folder under Flower's Ray simulation.

    Args:
        folder: Federation folder; Flower's logs and home go to ``flower/`` in it.
        clients: Number of simulated SuperNodes.
        run_config: Run configuration of both apps.
        server_app: ``module:attribute`` of the ServerApp.
        client_app: ``module:attribute`` of the ClientApp.
        cpus_per_client: Processors Ray reserves for a client. Clients side by side on a core each
            are faster than one after the other on all cores (Flower's default is 2).
        timeout_s: Seconds after which the run is given up; each round has its own deadline.
        keys: Folder of every client's keys; None where nobody signs.
        on_poll: Called about five times a second.

    Returns:
        Seconds from the submission of the run to its end; the SuperLink's start is not in it.

    Raises:
        FlowerError: A process or the run failed; the message names the log.
    """
    home = (folder / "flower").resolve()
    home.mkdir(parents=True, exist_ok=True)
    port = free_port()
    env = environment(home, port)
    if keys is not None:
        # Ray's nodes take no configuration of their own; they inherit this.
        env[KEYS_VARIABLE] = str(keys.resolve())
    config = {**run_config, "federation": str(folder.resolve())}
    bundle = write_bundle(home / "bundle", config, server_app, client_app)
    link = {"superlink": {"link": {"address": f"127.0.0.1:{port}", "insecure": True}}}
    (home / "config.toml").write_text(tomli_w.dumps(link))
    log = home / "superlink.log"
    arguments = [command("flower-superlink"), "--simulation", "--insecure", "--port", str(port)]
    backend = (
        f"num-supernodes={clients} client-resources-num-cpus={cpus_per_client} "
        "client-resources-num-gpus=0.0"
    )
    with process(arguments, log, env) as child:
        wait_for_port(port, child, log)
        began = time.perf_counter()
        answer = flwr(["run", str(bundle), "link", "--federation-config", backend], env)
        run_log = home / "run.log"
        wait_for_run(str(answer["run-id"]), "link", env, run_log, timeout_s, on_poll)
        return time.perf_counter() - began
