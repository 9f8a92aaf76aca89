"""The command, as a user types it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from anabranch.cli.main import main
from anabranch.vectors import Adapter, LoraFactors
from anabranch.vectors.peft_folder import read_adapter, write_adapter
from anabranch.wire import CodecConfig, UpdateMeta, encode_update


def adapter(seed: int, rank: int = 4) -> Adapter:
    generator = torch.Generator().manual_seed(seed)
    factors = {
        name: LoraFactors(
            torch.randn(rank, 24, generator=generator),
            torch.randn(16, rank, generator=generator),
            2.0 * rank,
        )
        for name in ("layer.query", "layer.value")
    }
    return Adapter(factors, base_hash="ab" * 32)


def folders(tmp_path: Path, count: int = 3) -> list[str]:
    names = []
    for seed in range(count):
        folder = tmp_path / f"adapter-{seed}"
        write_adapter(adapter(seed), folder)
        names.append(str(folder))
    return names


def recipe(tmp_path: Path, text: str = 'method = "mean"\n') -> str:
    path = tmp_path / "recipe.toml"
    path.write_text(text)
    return str(path)


def call(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> tuple[int, str, str]:
    monkeypatch.setattr(sys, "argv", ["anabranch", *arguments])
    monkeypatch.delenv("ANABRANCH_DEBUG", raising=False)
    with pytest.raises(SystemExit) as ended:
        main()
    captured = capsys.readouterr()
    return int(ended.value.code or 0), captured.out, captured.err


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    return lambda *arguments: call([str(word) for word in arguments], monkeypatch, capsys)


def test_help_is_quick_and_loads_no_torch() -> None:
    script = (
        "import sys\n"
        "sys.argv = ['anabranch', '--help']\n"
        "from anabranch.cli.main import main\n"
        "try:\n    main()\n"
        "except SystemExit:\n    pass\n"
        "print('torch' in sys.modules, file=sys.stderr)\n"
    )
    seconds = []
    for _ in range(3):
        began = time.perf_counter()
        done = subprocess.run(
            [sys.executable, "-c", script], capture_output=True, text=True, check=True
        )
        seconds.append(time.perf_counter() - began)
    assert done.stderr.strip() == "False"
    assert "simulate" in done.stdout
    assert min(seconds) < 1.0


def test_methods_are_listed_with_their_parameters(run: Any) -> None:
    code, out, _ = run("methods", "--json")
    rows = {row["name"]: row for row in json.loads(out)}
    assert code == 0
    assert {"mean", "ties", "dare_ties", "multi_krum", "geometric_median", "fedit"} <= set(rows)
    assert rows["ties"]["parameters"]["density"]["default"] == 0.2
    assert "agnitude" in rows["ties"]["parameters"]["density"]["about"]
    code, out, _ = run("methods")
    assert code == 0
    assert "geometric_median" in out


def test_merge_writes_the_mean_of_the_adapters(run: Any, tmp_path: Path) -> None:
    out_folder = tmp_path / "out"
    names = folders(tmp_path)
    text = 'method = "mean"\nrefactor = { kind = "stack" }\n'
    code, out, _ = run("merge", recipe(tmp_path, text), *names, "-o", out_folder, "--json")
    assert code == 0
    assert json.loads(out)["report"]["overall_truncation"] == 0
    merged = read_adapter(out_folder)
    for name, factors in merged.lora.items():
        wanted = sum(adapter(seed).lora[name].delta().dense() for seed in range(3)) / 3
        torch.testing.assert_close(factors.delta().dense(), wanted, rtol=1e-5, atol=1e-5)
    code, out, _ = run("merge", recipe(tmp_path), *names, "-o", tmp_path / "again")
    assert code == 0
    assert "3 adapters by mean, 2 modules, rank 4" in out


def test_inspect_shows_a_folder_and_an_update(run: Any, tmp_path: Path) -> None:
    (name,) = folders(tmp_path, 1)
    code, out, _ = run("inspect", name, "--json")
    assert code == 0
    facts = json.loads(out)
    assert facts["base_hash"] == "ab" * 32
    assert [row["name"] for row in facts["tensors"]] == ["layer.query", "layer.value"]
    assert facts["tensors"][0]["shape"] == "16x24"
    meta = UpdateMeta("update", "ab" * 32, "cd" * 32, "f", "r", 4, "site-a", b"n", 1, 99)
    blob = encode_update(adapter(0).tensors(), meta, CodecConfig()).blob
    file = tmp_path / "update"
    file.write_bytes(blob)
    code, out, _ = run("inspect", file, "--json")
    facts = json.loads(out)
    assert code == 0
    assert (facts["client"], facts["round"], facts["examples"]) == ("site-a", 4, 99)
    assert facts["entries"] == 2 * (4 * 24 + 16 * 4)
    assert facts["size_bytes"] == len(blob)
    code, out, _ = run("inspect", file)
    assert code == 0
    assert "site-a" in out
    assert "layer.query.lora_A" in out


def bad_inputs(tmp_path: Path) -> dict[str, tuple[list[str], str]]:
    names = folders(tmp_path)
    out = ["-o", str(tmp_path / "out")]
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "adapter_config.json").write_text("{")
    junk = tmp_path / "junk.bin"
    junk.write_bytes(os.urandom(64))
    other = tmp_path / "other"
    foreign = adapter(9)
    write_adapter(Adapter(foreign.lora, base_hash="cd" * 32), other)
    typo = tmp_path / "typo.toml"
    typo.write_text('method = "tiess"\n')
    value = tmp_path / "value.yaml"
    value.write_text("method: ties\nparams: {density: 7}\n")
    scenario = tmp_path / "scenario.toml"
    scenario.write_text('name = "x"\nrounds = 0\n')
    fine = tmp_path / "fine.toml"
    fine.write_text('name = "x"\n[task]\nkind = "anabranch.simulation.synthetic:SyntheticTask"\n')
    task = tmp_path / "task.toml"
    task.write_text('name = "x"\n[task]\nkind = "nowhere:Task"\n')
    unknown = tmp_path / "unknown.toml"
    unknown.write_text('name = "x"\n[task]\ndatasets = ["imdb"]\n')
    good = recipe(tmp_path)
    return {
        "no recipe": (["merge", "none.toml", *names, *out], "none.toml: cannot be read"),
        "unknown method": (["merge", str(typo), *names, *out], "'tiess' is not a merge method"),
        "bad parameter": (["merge", str(value), *names, *out], "params.density"),
        "no adapter": (["merge", good, str(tmp_path / "none"), *out], "none"),
        "broken adapter": (["merge", good, str(broken), *out], "broken"),
        "another base": (["merge", good, *names, str(other), *out], "base"),
        "out exists": (["merge", good, *names, "-o", names[0]], "already exists"),
        "inspect nothing": (["inspect", str(tmp_path / "none")], "no such file"),
        "inspect junk": (["inspect", str(junk)], "is no Anabranch update"),
        "bad scenario": (["simulate", str(scenario)], "rounds"),
        "bad engine": (["simulate", str(fine), "--engine", "x"], "--engine: engine: Input"),
        "no task": (["simulate", str(task), "--out", str(tmp_path / "r")], "nowhere"),
        "unknown option": (["methods", "--frobnicate"], "No such option"),
        "no argument": (["inspect"], "Missing argument"),
        "out is a file": (["simulate", str(fine), "--out", str(junk)], "is a file"),
        "bracketed name": (["inspect", str(tmp_path / "[/x]")], "[/x]"),
        "no data set": (["simulate", str(unknown), "--out", str(tmp_path / "r")], "imdb"),
    }


CASES = (
    "no recipe", "unknown method", "bad parameter", "no adapter", "broken adapter", "another base",
    "out exists", "inspect nothing", "inspect junk", "bad scenario", "bad engine", "no task",
    "no data set",
    "unknown option",
    "no argument",
    "out is a file",
    "bracketed name",
)  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_bad_input_is_one_line_and_exit_code_2(case: str, run: Any, tmp_path: Path) -> None:
    arguments, expected = bad_inputs(tmp_path)[case]
    code, out, err = run(*arguments)
    assert code == 2, err
    lines = [line for line in err.splitlines() if line.strip()]
    assert len(lines) == 1, err
    assert lines[0].startswith("error: ")
    assert expected in lines[0]
    assert out == ""
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "r").exists()


def test_simulate_prints_a_table_and_leaves_a_report(run: Any, tmp_path: Path) -> None:
    scenario = tmp_path / "s.toml"
    scenario.write_text(
        'name = "s"\nrounds = 2\n[task]\n'
        'kind = "anabranch.simulation.synthetic:SyntheticTask"\nclients = 3\n'
        "[train]\nsteps = 3\nbatch_size = 16\nlearning_rate = 0.01\n"
    )
    out_folder = tmp_path / "run"
    code, out, err = run("simulate", scenario, "--out", out_folder)
    assert code == 0
    assert "group-0-3" in out
    assert "of the oracle's mean" in out
    assert "federation" in err
    assert (out_folder / "report.html").exists()
    code, out, _ = run("simulate", scenario, "--out", out_folder, "--overwrite", "--json")
    assert code == 0
    assert json.loads(out)["name"] == "s"
    code, _, err = run("simulate", scenario, "--out", out_folder)
    assert code == 2
    assert "--resume" in err


def test_names_from_strangers_are_shown_as_they_are(run: Any, tmp_path: Path) -> None:
    meta = UpdateMeta("update", "ab" * 32, "cd" * 32, "f", "r", 4, "[/bold]x", b"n", 1, 99)
    file = tmp_path / "update"
    file.write_bytes(encode_update({"[/a]": torch.ones(3)}, meta, CodecConfig()).blob)
    code, out, _ = run("inspect", file)
    assert code == 0
    assert "[/bold]x" in out
    assert "[/a]" in out
