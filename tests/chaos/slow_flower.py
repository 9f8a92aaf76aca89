"""One of Flower's servers with more patience: ``slow_flower.py SECONDS flower-supernode WORDS...``.

From the claim of a task Flower gives a process thirty seconds to ask for its input, then starts
another one. Where loading Python takes longer than that, as on a machine that is busy, none ever
gets to work.
"""

from __future__ import annotations

import sys
from importlib.metadata import entry_points

from flwr.supercore.corestate import in_memory_corestate, sql_corestate

if __name__ == "__main__":
    for module in (in_memory_corestate, sql_corestate):
        module.HEARTBEAT_DEFAULT_INTERVAL = float(sys.argv[1])  # type: ignore[attr-defined]
    sys.argv = sys.argv[2:]
    (script,) = entry_points(group="console_scripts", name=sys.argv[0])
    sys.exit(script.load()())
