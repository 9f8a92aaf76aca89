"""Fuzz the decoders, guided by coverage: ``python -m fuzz CORPUS... -max_total_time=600``.

Arguments are libFuzzer's. What it finds new goes into the first corpus folder.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["anabranch.wire"]):
    from fuzz.target import consume, seeds


def main() -> None:
    """Run libFuzzer on the seeds and the corpus given."""
    with tempfile.TemporaryDirectory() as folder:
        for number, seed in enumerate(seeds()):
            (Path(folder) / f"seed-{number}").write_bytes(seed)
        atheris.Setup([*sys.argv, folder], consume)
        atheris.Fuzz()


if __name__ == "__main__":
    main()
