"""The coordinator's API as a process: `python -m benchmarks.load.server CONFIG`.

It prints its port, and ends with its standard input.
"""

from __future__ import annotations

import sys
from pathlib import Path

from anabranch.coordinator.api.config import load_api
from anabranch.coordinator.api.server import serving


def main() -> None:
    """Serve."""
    with serving(load_api(Path(sys.argv[1]))) as server:
        print(server.port, flush=True)
        sys.stdin.read()


if __name__ == "__main__":
    main()
