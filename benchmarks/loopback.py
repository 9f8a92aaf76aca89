"""A federation as it is deployed, on this machine: ``coordinator up``, and SuperNodes as processes.

For tests and measurements: TLS, registered node keys, a task of numbers whose round takes about as
long as Flower needs to carry it.
"""

from __future__ import annotations

import contextlib
import datetime
import ipaddress
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import tomli_w
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from anabranch.client.session import open_session
from anabranch.coordinator.federation import START_FOLDER, FederationConfig, write_federation
from anabranch.coordinator.flower import command, environment, free_port
from anabranch.coordinator.store import Store, open_store
from anabranch.coordinator.supervision import lease, processes
from anabranch.coordinator.supervision.config import CONFIG_FILE
from anabranch.vectors.peft_folder import write_adapter

LIGHT_APP = "benchmarks.light_client:app"
TASK = "anabranch.simulation.synthetic:SyntheticTask"
RESTART_S = 5.0
"""Fewest seconds between two starts of a node."""

PYTHON_PATH = os.pathsep.join([str(Path(__file__).parents[1]), *sys.path])
"""So that Flower's processes find this package."""


def certificates(folder: Path) -> None:
    """Write a certificate authority and a server certificate for loopback."""
    now = datetime.datetime.now(datetime.UTC)

    def name(text: str) -> x509.Name:
        return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)])

    def issue(
        subject: str, key: ec.EllipticCurvePrivateKey, signer: ec.EllipticCurvePrivateKey, ca: bool
    ) -> bytes:
        names: list[x509.GeneralName] = [
            x509.DNSName("localhost"),
            x509.IPAddress(ipaddress.ip_address("127.0.0.1")),
        ]
        builder = (
            x509.CertificateBuilder()
            .subject_name(name(subject))
            .issuer_name(name("test authority"))
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - datetime.timedelta(minutes=5))
            .not_valid_after(now + datetime.timedelta(days=1))
            .add_extension(x509.BasicConstraints(ca=ca, path_length=None), critical=True)
            .add_extension(x509.SubjectAlternativeName(names), critical=False)
        )
        return builder.sign(signer, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)

    authority, server = (ec.generate_private_key(ec.SECP384R1()) for _ in range(2))
    (folder / "ca.pem").write_bytes(issue("test authority", authority, authority, ca=True))
    (folder / "server.pem").write_bytes(issue("localhost", server, authority, ca=False))
    (folder / "server.key").write_bytes(
        server.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
    )


def node_key(folder: Path, name: str) -> tuple[Path, Path]:
    """Write a SuperNode's key pair as Flower reads it: private and public file."""
    key = ec.generate_private_key(ec.SECP384R1())
    private, public = folder / name, folder / f"{name}.pub"
    private.write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.OpenSSH,
            serialization.NoEncryption(),
        )
    )
    public.write_bytes(
        key.public_key().public_bytes(
            serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH
        )
    )
    return private, public


class Loopback:
    """A federation of numbers with its coordinator and its nodes, each a process.

    Args:
        folder: A fresh one.
        nodes: SuperNodes, and clients of the task.
        tls: Whether they speak TLS and prove registered keys.
        client_app: What the nodes run.
        standby: Whether a process waits to be the next ServerApp.
        changes: Of the federation's configuration.
    """

    def __init__(
        self,
        folder: Path,
        nodes: int = 4,
        *,
        tls: bool = True,
        client_app: str = LIGHT_APP,
        standby: bool = True,
        **changes: Any,
    ) -> None:
        self.folder, self.nodes, self.tls = folder, nodes, tls
        self.federation = folder / "federation"
        self.port = free_port()
        self.config = FederationConfig.model_validate(
            {
                "name": "loopback", "run": "r", "rounds": 2, "clients": nodes, "quorum": nodes,
                "poll_s": 0.2, "durable": False, "evaluate_every": 0, "train": {"steps": 2},
                "deadline_s": 120, "recipe": {"method": "median"}, **changes,
            }
        )  # fmt: skip
        write_federation(self.config, self.federation)
        self.params = {"clients": nodes}
        template = open_session(TASK, json.dumps(self.params)).template
        write_adapter(template, self.federation / START_FOLDER)
        settings: dict[str, Any] = {
            "federation": "federation", "task": TASK, "task_params": self.params,
            "client_app": client_app, "standby": standby,
            "port": self.port, "restart": {"first_s": 0.2, "cap_s": 2.0},
        }  # fmt: skip
        self._private: list[Path] = []
        if tls:
            certificates(folder)
            keys = folder / "nodes"
            keys.mkdir()
            self._private = [node_key(keys, f"node-{index}")[0] for index in range(nodes)]
            settings["node_keys"] = "nodes"
            settings["tls"] = {
                "certificate": "server.pem", "key": "server.key", "authority": "ca.pem",
            }  # fmt: skip
        else:
            settings["insecure"] = True
        (folder / CONFIG_FILE).write_text(tomli_w.dumps(settings))
        self.up: subprocess.Popen[bytes] | None = None
        self.running: dict[int, subprocess.Popen[bytes]] = {}
        self._started_s: dict[int, float] = {}

    def start(self) -> None:
        """Start the coordinator, as an operator or systemd does."""
        env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": PYTHON_PATH}
        arguments = [sys.executable, "-m", "anabranch.cli", "coordinator", "up", str(self.folder)]
        with (self.folder / "changes.jsonl").open("ab") as out, self.log.open("ab") as log:
            self.up = subprocess.Popen(
                [*arguments, "--json", "--log-format", "json"], stdout=out, stderr=log, env=env
            )

    @property
    def log(self) -> Path:
        """The coordinator's log."""
        return self.folder / "up.log"

    def start_node(self, index: int) -> None:
        """Start one SuperNode."""
        home = self.folder / f"home-{index}"
        home.mkdir(exist_ok=True)
        settings = f'partition-id={index} num-partitions={self.nodes} client="site-{index}"'
        settings += f' state="{home}/state"'
        arguments = [
            command("flower-supernode"), "--superlink", f"127.0.0.1:{self.port}",
            "--port", str(free_port()), "--node-config", settings,
        ]  # fmt: skip
        if self.tls:
            arguments += ["--root-certificates", str(self.folder / "ca.pem")]
            arguments += ["--auth-supernode-private-key", str(self._private[index])]
        else:
            arguments.append("--insecure")
        env = environment(home, self.port)
        env |= {
            "PYTHONPATH": PYTHON_PATH,
            "OMP_NUM_THREADS": "1",
            "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.2",
        }
        env[processes.MARK] = f"{home}"
        self.running[index] = processes.start(arguments, self.folder / f"node-{index}.log", env)
        self._started_s[index] = time.monotonic()

    def tend(self) -> None:
        """Start nodes again that ended, as systemd does.

        SuperLink turns a node away for a minute after its death, as long as it takes it for alive,
        and the new one ends.
        """
        for index, node in list(self.running.items()):
            if node.poll() is not None and time.monotonic() - self._started_s[index] > RESTART_S:
                self.start_node(index)

    def kill_node(self, index: int) -> None:
        """Kill a SuperNode and what it started, as a machine that loses power does."""
        processes.kill_marked(str(self.folder / f"home-{index}"))
        self.running.pop(index).wait()

    def pid(self, who: str) -> int | None:
        """The process of ``up``, ``superlink`` or ``serverapp``; None where there is none now."""
        if who == "up":
            return self.up.pid if self.up is not None and self.up.poll() is None else None
        if who == "serverapp":
            current, alive = lease.look(self.federation)
            return current.pid if current is not None and alive else None
        for pid in processes.marked(str(self.federation.resolve())):
            with contextlib.suppress(OSError):
                if b"flower-superlink" in Path(f"/proc/{pid}/cmdline").read_bytes():
                    return pid
        return None

    def kill(self, who: str) -> bool:
        """``kill -9`` of one of them; False where there is none now."""
        pid = self.pid(who)
        if pid is None:
            return False
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
            if who == "up" and self.up is not None:
                self.up.wait()
            return True
        return False

    def store(self) -> Store:
        """The federation's store."""
        config = self.config
        return open_store(config.store, self.federation, federation=config.name, run=config.run)

    def changes(self) -> list[dict[str, Any]]:
        """Every change of state that the coordinator told so far."""
        path = self.folder / "changes.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        return [json.loads(line) for line in lines if line.endswith("}")]

    def wait(self, until: Callable[[], bool], timeout_s: float, what: str) -> None:
        """Wait for something; nodes that end meanwhile are started again.

        Raises:
            RuntimeError: It does not come; shows the ends of all logs.
        """
        end = time.monotonic() + timeout_s
        while not until():
            if time.monotonic() > end:
                raise RuntimeError(f"{what}: not within {timeout_s:g} s\n{self.logs()}")
            self.tend()
            time.sleep(0.1)

    def logs(self) -> str:
        """The ends of all logs."""
        homes = [self.folder, self.folder / "flower", self.federation / "flower"]
        paths = [path for home in homes for path in home.glob("*.log")]
        return "\n".join(
            f"== {path.name}\n{path.read_text(errors='replace')[-3000:]}" for path in sorted(paths)
        )

    def close(self) -> None:
        """End everything."""
        if self.up is not None and self.up.poll() is None:
            self.up.kill()
            self.up.wait()
        processes.kill_marked(str(self.federation.resolve()))
        for index in list(self.running):
            self.kill_node(index)
