"""Generate the protobuf code from the .proto files: ``python -m anabranch.wire.generate``.

The generated modules and their stubs are committed, so that an install needs no compiler. With
``--check`` nothing is written: the code is generated aside and compared, and a difference fails.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

PROTOS = Path(__file__).resolve().parents[2]
"""Root of the proto paths, which are the import paths: ``anabranch/wire/v1/update.proto``."""

_FIX = "run `python -m anabranch.wire.generate` and commit what it writes"


def generate(target: Path) -> list[Path]:
    """Run protoc over every .proto file, writing ``*_pb2.py`` and ``*_pb2.pyi`` under a folder.

    Args:
        target: Where the tree ``anabranch/wire/...`` goes; ``PROTOS`` for in place.

    Returns:
        The files written, relative to ``target``.

    Raises:
        RuntimeError: protoc failed, or grpcio-tools or mypy-protobuf is not installed.
    """
    sources = sorted(path.relative_to(PROTOS) for path in PROTOS.glob("anabranch/wire/v*/*.proto"))
    plugin = Path(sysconfig.get_path("scripts")) / "protoc-gen-mypy"
    command = [sys.executable, "-m", "grpc_tools.protoc", f"--proto_path={PROTOS}"]
    # Named by path: the environment's scripts need not be on PATH.
    command += [f"--plugin=protoc-gen-mypy={plugin}"]
    command += [f"--python_out={target}", f"--mypy_out={target}"]
    command += [source.as_posix() for source in sources]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(
            f"protoc failed; is `pip install -e .[dev]` done?\n{done.stderr.strip()}"
        )
    return [
        source.with_name(source.stem + suffix)
        for source in sources
        for suffix in ("_pb2.py", "_pb2.pyi")
    ]


def stale() -> list[str]:
    """Committed files that differ from what the .proto files generate now, missing ones too."""
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder)
        return [
            path.as_posix()
            for path in generate(target)
            if not (PROTOS / path).is_file()
            or (PROTOS / path).read_bytes() != (target / path).read_bytes()
        ]


def main(arguments: list[str] | None = None) -> int:
    """Generate in place, or check; the exit status is 1 where a committed file is out of date."""
    parser = argparse.ArgumentParser(prog="python -m anabranch.wire.generate", description=__doc__)
    parser.add_argument("--check", action="store_true", help="compare, write nothing")
    if not parser.parse_args(arguments).check:
        for path in generate(PROTOS):
            print(f"wrote {PROTOS / path}")
        return 0
    differing = stale()
    for name in differing:
        print(f"{PROTOS / name} is not what its .proto file generates: {_FIX}", file=sys.stderr)
    return 1 if differing else 0


if __name__ == "__main__":
    sys.exit(main())
