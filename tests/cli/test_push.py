"""Adapters pushed from the command line are read back from where they lie, and checked there."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from peft import PeftConfig

from anabranch.coordinator.published import check_folder
from anabranch.vectors.peft_folder import read_adapter
from anabranch.wire.keys import by_id, read_public
from anabranch.wire.receipt import decode_receipt, receipt_hash
from anabranch.wire.signing import KeyRing

FILES = {
    "README.md", "adapter_config.json", "adapter_model.safetensors", "receipt.json",
    "signature.json",
}  # fmt: skip


@pytest.fixture(scope="module")
def original() -> dict[str, Path]:
    """Where the federation that ran once is kept, to be copied."""
    return {}


@pytest.fixture
def folder(
    original: dict[str, Path],
    run_federation: Callable[..., Path],
    tmp_path: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    if not original:
        place = tmp_path_factory.mktemp("once") / "f"
        original["f"] = run_federation(place, signed=True, rounds=2)
    shutil.copytree(original["f"], tmp_path / "f")
    return tmp_path / "f"


def blob(layout: Path, descriptor: dict[str, Any]) -> bytes:
    """What a descriptor names, read as a tool of registries would."""
    kind, _, digest = descriptor["digest"].partition(":")
    data = (layout / "blobs" / kind / digest).read_bytes()
    assert hashlib.sha256(data).hexdigest() == digest
    assert len(data) == descriptor["size"]
    return data


def manifests(layout: Path) -> dict[str, dict[str, Any]]:
    """Every manifest of a layout, by tag; each is checked against the index."""
    assert json.loads((layout / "oci-layout").read_text()) == {"imageLayoutVersion": "1.0.0"}
    index = json.loads((layout / "index.json").read_text())
    assert (index["schemaVersion"], index["mediaType"]) == (
        2, "application/vnd.oci.image.index.v1+json",
    )  # fmt: skip
    found = {}
    for one in index["manifests"]:
        manifest = json.loads(blob(layout, one))
        assert one["mediaType"] == manifest["mediaType"]
        assert one["artifactType"] == manifest["artifactType"]
        found[one["annotations"]["org.opencontainers.image.ref.name"]] = manifest
    return found


def test_a_layout_holds_what_registries_take(run: Any, folder: Path, tmp_path: Path) -> None:
    layout = tmp_path / "layout"
    assert run("adapters", "tag", folder, "champion", "1")[0] == 0
    for which, target in (("champion", ""), ("1", ":v1"), ("latest", ""), ("2", ":v1")):
        code, out, _ = run("adapters", "push", folder, which, f"oci:{layout}{target}")
        assert code == 0
        assert "sha256:" in out
    found = manifests(layout)
    # The second push under a tag takes it over.
    assert sorted(found) == ["champion", "round-2", "v1"]
    assert found["v1"] == found["round-2"] != found["champion"]
    rows = json.loads(run("adapters", "list", folder, "--json")[1])
    for tag, row in (("champion", rows[0]), ("v1", rows[1])):
        manifest = found[tag]
        assert manifest["artifactType"] == "application/vnd.anabranch.peft-adapter.v1"
        assert blob(layout, manifest["config"]) == b"{}"
        layers = {
            one["annotations"]["org.opencontainers.image.title"]: blob(layout, one)
            for one in manifest["layers"]
        }
        assert set(layers) == FILES
        assert manifest["annotations"]["anabranch.adapter-hash"] == row["adapter_hash"]
        assert manifest["annotations"]["anabranch.receipt"] == row["receipt"]
        assert receipt_hash(layers["receipt.json"]) == row["receipt"]
        ring = KeyRing(by_id(read_public(folder / "keys" / "coordinator.pub")))
        assert decode_receipt(layers["receipt.json"], ring).round == row["round"]
        pulled = tmp_path / tag
        code, out, _ = run("adapters", "pull", f"oci:{layout}:{tag}", "-o", pulled)
        assert code == 0
        assert f"f, round {row['round']}" in out
        assert {path.name: path.read_bytes() for path in pulled.iterdir()} == layers
        assert check_folder(pulled, ring)["adapter_hash"] == row["adapter_hash"]
    # The same adapter is the same bytes, whenever it is pushed.
    before = {path: path.read_bytes() for path in layout.rglob("*") if path.is_file()}
    assert run("adapters", "push", folder, "latest", f"oci:{layout}:round-2")[0] == 0
    after = {path: path.read_bytes() for path in layout.rglob("*") if path.is_file()}
    index = layout / "index.json"
    assert before.keys() == after.keys()
    assert {path for path in after if before[path] != after[path]} <= {index}


def test_a_layout_that_was_touched_is_not_believed(run: Any, folder: Path, tmp_path: Path) -> None:
    layout = tmp_path / "layout"
    assert run("adapters", "push", folder, "1", f"oci:{layout}:v1")[0] == 0
    manifest = manifests(layout)["v1"]
    weights = next(one for one in manifest["layers"] if "safetensors" in one["mediaType"])
    path = layout / "blobs" / "sha256" / weights["digest"].partition(":")[2]
    whole = path.read_bytes()

    def refused(tag: str = "v1") -> str:
        code, _, err = run("adapters", "pull", f"oci:{layout}:{tag}", "-o", tmp_path / "out")
        assert (code, err.count("\n")) == (2, 1)
        assert not (tmp_path / "out").exists()
        return str(err)

    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    assert "its bytes are not those of its name" in refused()
    path.write_bytes(whole[:-1])
    assert f"has {len(whole) - 1} bytes, not {len(whole)}" in refused()
    path.unlink()
    assert "is missing" in refused()
    path.write_bytes(whole)
    assert "is none of its tags (v1)" in refused("v2")

    def forge(**changes: Any) -> None:
        data = json.dumps({**manifest, **changes}).encode()
        digest = hashlib.sha256(data).hexdigest()
        (layout / "blobs" / "sha256" / digest).write_bytes(data)
        index = json.loads((layout / "index.json").read_text())
        index["manifests"][0] |= {"digest": f"sha256:{digest}", "size": len(data)}
        (layout / "index.json").write_text(json.dumps(index))

    outside = {**weights, "annotations": {"org.opencontainers.image.title": "../../evil"}}
    forge(layers=[outside])
    assert "'../../evil', no file's name" in refused()
    assert not (tmp_path.parent / "evil").exists()
    forge(layers=[{**weights, "digest": "sha256:../../../index.json"}])
    assert "no sha256 digest and size" in refused()
    forge(artifactType="application/vnd.other")
    assert "no adapter that was pushed here" in refused()
    for name in ("index.json", "oci-layout"):
        (layout / name).write_text("[")
        assert "damaged: no JSON" in refused()


def test_a_hub_folder_is_renewed_and_keeps_what_others_put_there(
    run: Any, folder: Path, tmp_path: Path
) -> None:
    place = tmp_path / "models" / "demo"
    rows = json.loads(run("adapters", "list", folder, "--json")[1])
    assert run("adapters", "push", folder, "1", f"hub:{place}")[0] == 0
    assert {path.name for path in place.iterdir()} == FILES | {".gitattributes"}
    (place / ".git").mkdir()
    (place / "LICENSE").write_text("theirs")
    assert run("adapters", "push", folder, "2", f"hub:{place}")[0] == 0
    assert {path.name for path in place.iterdir()} == FILES | {".gitattributes", ".git", "LICENSE"}
    assert read_adapter(place).hash() == rows[1]["adapter_hash"]
    assert PeftConfig.from_pretrained(place).peft_type == "LORA"
    text = (place / "README.md").read_text()
    front = yaml.safe_load(text.split("---\n")[1])
    assert front["library_name"] == "peft"
    assert "# f, round 2" in text


@pytest.mark.parametrize(
    ("target", "reason"),
    [
        ("s3:x", "is no target: give oci:FOLDER"),
        ("oci:", "is no target"),
        ("oci:{0}/new:-x", "is no tag of a registry"),
        ("oci:{0}/full", "holds files and is no OCI image layout"),
        ("hub:{0}/full", "holds files and no adapter"),
    ],
)
def test_targets_that_cannot_be(
    run: Any, folder: Path, tmp_path: Path, target: str, reason: str
) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("years")
    code, _, err = run("adapters", "push", folder, "1", target.format(tmp_path))
    assert (code, err.count("\n")) == (2, 1)
    assert reason in err
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["thesis.txt"]
