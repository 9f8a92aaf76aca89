"""What importing costs, and that the generated code is that of the .proto files."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import anabranch.wire
from anabranch.wire import generate


def _python(code: str) -> None:
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_configuration_and_manifests_need_no_torch() -> None:
    _python(
        "import sys, anabranch.wire, anabranch.wire.config\n"
        "from anabranch.wire import CodecConfig, Limits, UpdateMeta, WireError, read_manifest\n"
        "assert 'anabranch.wire' in sys.modules and 'torch' not in sys.modules\n"
        "assert 'numpy' not in sys.modules\n"
    )


def test_the_generated_code_imports_without_a_warning() -> None:
    _python("from anabranch.wire.v1 import update_pb2; update_pb2.Manifest()")


def test_every_public_name_resolves() -> None:
    for name, home in anabranch.wire._HOMES.items():
        assert getattr(anabranch.wire, name).__module__ == f"anabranch.wire.{home}"
        assert name in dir(anabranch.wire)
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        _ = anabranch.wire.nothing


def test_the_committed_code_is_what_the_protos_generate() -> None:
    assert generate.stale() == []


def test_a_changed_proto_is_noticed_and_regenerated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(generate.PROTOS / "anabranch" / "wire" / "v1", tmp_path / "anabranch/wire/v1")
    monkeypatch.setattr(generate, "PROTOS", tmp_path)
    assert generate.main(["--check"]) == 0
    proto = tmp_path / "anabranch/wire/v1/update.proto"
    proto.write_text(proto.read_text().replace("uint64 examples", "uint64 samples"))
    assert generate.main(["--check"]) == 1
    complaint = capsys.readouterr().err
    assert "update_pb2.py " in complaint
    assert "update_pb2.pyi " in complaint
    assert "run `python -m anabranch.wire.generate`" in complaint
    assert generate.main([]) == 0
    assert generate.main(["--check"]) == 0
    proto.write_text("syntax = 'proto9';")
    with pytest.raises(RuntimeError, match="protoc failed"):
        generate.main(["--check"])
