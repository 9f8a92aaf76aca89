"""``/healthz``, ``/readyz``, ``/metrics`` and ``/status`` of one federation.

It stands beside the coordinator and only reads, so it may run as another user, on another machine
with the same database, and live and die as it likes. It asks nobody who they are: bind it to
loopback, or put it behind what does.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import uvicorn
from fastapi import FastAPI, Response
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest

from anabranch.coordinator.federation import load_federation
from anabranch.coordinator.rounds.standing import standing
from anabranch.coordinator.store import open_store
from anabranch.coordinator.web.metrics import FederationCollector


def watching(folder: Path) -> FastAPI:
    """The application that watches a federation's folder.

    Raises:
        ValueError: The folder holds no sound federation, or its store cannot be opened.
    """
    config = load_federation(folder)
    store = open_store(config.store, folder, federation=config.name, run=config.run)

    @asynccontextmanager
    async def life(_: FastAPI) -> AsyncIterator[None]:
        yield
        store.close()

    app = FastAPI(title=f"anabranch: {config.name}", lifespan=life, docs_url=None, redoc_url=None)
    registry = CollectorRegistry()
    registry.register(FederationCollector(config, store))

    @app.get("/healthz")
    def healthz() -> dict[str, str]:
        """Whether this process answers."""
        return {"status": "ok"}

    @app.get("/readyz")
    def readyz(response: Response) -> dict[str, str]:
        """Whether the store answers too."""
        try:
            store.latest()
        # Databases fail in many ways; each means the same to who asks.
        except Exception as error:
            response.status_code = 503
            return {"status": "no store", "reason": type(error).__name__}
        return {"status": "ready"}

    @app.get("/metrics")
    def metrics() -> Response:
        """For Prometheus."""
        return Response(generate_latest(registry), media_type=CONTENT_TYPE_LATEST)

    @app.get("/status")
    def status() -> dict[str, Any]:
        """What ``anabranch federation status --json`` prints."""
        return asdict(standing(config, store))

    return app


def server(folder: Path, host: str = "127.0.0.1", port: int = 0) -> uvicorn.Server:
    """What serves it; its ``run`` returns when it is interrupted. It logs as ``logs`` was set up.

    Raises:
        ValueError: As ``watching``.
    """
    # Nothing here is a web socket, and uvicorn would load a library of them.
    return uvicorn.Server(
        uvicorn.Config(
            watching(folder), host=host, port=port, log_level="warning", log_config=None, ws="none"
        )
    )
