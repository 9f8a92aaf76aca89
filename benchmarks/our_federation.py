"""Our side of benchmarks.federation: what ``anabranch simulate`` does, less scores and report.

``python -m benchmarks.our_federation SCENARIO FOLDER``
"""

from __future__ import annotations

import sys
from pathlib import Path

from anabranch.simulation.loading import collector_paused
from anabranch.simulation.scenario import load_scenario

if __name__ == "__main__":
    scenario, folder = load_scenario(Path(sys.argv[1])), Path(sys.argv[2])
    with collector_paused():
        from anabranch.simulation.federation import run_federation
        from anabranch.simulation.folder import open_folder
        from anabranch.simulation.prepare import prepare

        session = prepare(scenario)
    open_folder(scenario, folder, resume=False, overwrite=False)
    run_federation(scenario, folder, session)
