"""``anabranch merge`` over several processes: started by it, by torchrun, and killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from anabranch.cli.main import main
from anabranch.vectors import Adapter, LoraFactors
from anabranch.vectors.peft_folder import write_adapter

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Any:
    """The command, and what it and the processes that it starts say."""

    def call(*words: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["anabranch", *map(str, words)])
        with pytest.raises(SystemExit) as ended:
            main()
        heard = capfd.readouterr()
        return int(ended.value.code or 0), heard.out, heard.err

    return call


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "recipe.toml"
    path.write_text('method = "ties"\n[params]\nscope = "model"\n')
    return path


@pytest.fixture
def models(save_model: Any) -> list[Path]:
    """A base and two fine-tunes; small files."""
    generator = torch.Generator().manual_seed(0)
    shapes = {"a": (30, 20), "b": (20, 40), "c": (7,)}
    return [
        save_model(name, {n: torch.randn(s, generator=generator) for n, s in shapes.items()})
        for name in ("base", "north", "south")
    ]


def same(one: Path, other: Path) -> bool:
    files = sorted(path.name for path in one.iterdir())
    assert files == sorted(path.name for path in other.iterdir())
    return all((one / file).read_bytes() == (other / file).read_bytes() for file in files)


def test_checkpoints_are_merged_by_two_processes(
    run: Any, models: list[Path], recipe: Path, tmp_path: Path
) -> None:
    base, *tuned = models
    words = ["merge", recipe, *tuned, "--base", base, "-o"]
    assert run(*words, tmp_path / "one")[0] == 0
    code, said, err = run(*words, tmp_path / "two", "--ranks", 2)
    assert (code, err) == (0, "")
    assert said.count("2 checkpoints by ties, 3 tensors merged") == 1
    assert same(tmp_path / "one", tmp_path / "two")


def test_adapters_are_merged_by_processes_of_torchrun(
    run: Any, recipe: Path, tmp_path: Path
) -> None:
    inputs = []
    for seed in range(3):
        drawn = torch.Generator().manual_seed(seed)
        lora = {
            name: LoraFactors(
                torch.randn(2, 24, generator=drawn), torch.randn(16, 2, generator=drawn), 4.0
            )
            for name in ("q", "v", "o")
        }
        inputs.append(tmp_path / f"adapter-{seed}")
        write_adapter(Adapter(lora, {}, "ab" * 32), inputs[-1])
    assert run("merge", recipe, *inputs, "-o", tmp_path / "one")[0] == 0
    words = ["-m", "anabranch.cli", "merge", recipe, *inputs, "-o", tmp_path / "two"]
    ended = subprocess.run([*TORCHRUN, *map(str, words)], capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.count("3 adapters by ties, 3 modules") == 1
    assert same(tmp_path / "one", tmp_path / "two")


def test_what_one_rank_finds_wrong_is_said_once(
    run: Any, models: list[Path], save_model: Any, recipe: Path, tmp_path: Path
) -> None:
    # The second largest tensor is rank 1's, and only who reads it knows.
    bad = save_model(
        "bad", {"a": torch.full((30, 20), torch.nan), "b": torch.zeros(20, 40), "c": torch.ones(7)}
    )
    words = ["merge", recipe, models[1], bad, "--base", models[0], "-o", tmp_path / "out"]
    code, said, err = run(*words, "--ranks", 2)
    assert (code, said) == (2, "")
    assert len(err.splitlines()) == 1
    assert "a holds numbers that are not finite" in err
    assert not [path for path in tmp_path.iterdir() if path.name.strip(".").startswith("out")]


def test_inputs_are_refused_before_ranks_start(run: Any, recipe: Path, tmp_path: Path) -> None:
    code, _, err = run("merge", recipe, tmp_path / "none", "-o", tmp_path / "out", "--ranks", 2)
    assert code == 2
    assert err.count("error:") == 1
    assert "is not there" in err


def test_torchrun_and_ranks_must_agree(
    run: Any, recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stated = {"MASTER_ADDR": "here", "RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    for key, value in stated.items():
        monkeypatch.setenv(key, value)
    code, _, err = run("merge", recipe, tmp_path, "-o", tmp_path / "out", "--ranks", 3)
    assert code == 2
    assert "--ranks: is 3, and 2 were started" in err


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Models that take seconds to merge."""
    from anabranch.vectors.checkpoint import write_checkpoint

    folder = tmp_path_factory.mktemp("large")
    layout = {f"{i}.w": (torch.float32, torch.Size((1000, 1000))) for i in range(8)}
    made = []
    for number in range(3):
        made.append(folder / str(number))
        made[-1].mkdir()
        (made[-1] / "config.json").write_text('{"model_type": "toy"}')
        entries = torch.randn(1000, 1000, generator=torch.Generator().manual_seed(number))
        write_checkpoint(made[-1], layout, lambda _, of=entries: [of], 1 << 30)  # type: ignore[misc]
    return made


def kill(victim: int, out: Path, starter: int, ranks: dict[int, int]) -> None:
    """Kill a rank once the merge has begun to write; notes the pids of all."""
    until = time.monotonic() + 60
    while not list(out.parent.glob(f".{out.name}.*")):
        assert time.monotonic() < until
        time.sleep(0.01)
    for child in psutil.Process(starter).children():
        if "RANK" in child.environ():
            ranks[int(child.environ()["RANK"])] = child.pid
    os.kill(ranks[victim], signal.SIGKILL)


@pytest.mark.parametrize("victim", [0, 1])
def test_a_rank_that_is_killed_is_named_and_leaves_nothing(
    victim: int, large: list[Path], recipe: Path, tmp_path: Path, run: Any
) -> None:
    base, *tuned = large
    out = tmp_path / "out" / "model"
    ranks: dict[int, int] = {}
    killer = threading.Thread(target=kill, args=(victim, out, os.getpid(), ranks), daemon=True)
    killer.start()
    words = ["merge", recipe, *tuned, "--base", base, "-o", out, "--budget-mb", 20]
    code, said, err = run(*words, "--ranks", 2)
    assert (code, said) == (1, "")
    assert err == (
        f"error: rank {victim} died (signal 9, SIGKILL), and nothing was written; "
        "the machine may be out of memory: lower --budget-mb\n"
    )
    assert list(out.parent.iterdir()) == []
    assert sorted(ranks) == [0, 1]
    assert not any(psutil.pid_exists(pid) for pid in ranks.values())


def test_who_is_left_of_torchrun_removes_what_rank_0_began(
    large: list[Path], recipe: Path, tmp_path: Path
) -> None:
    base, *tuned = large
    out = tmp_path / "out" / "model"
    words = ["-m", "anabranch.cli", "merge", recipe, *tuned, "--base", base, "-o", out]
    command = [*TORCHRUN, *map(str, words), "--budget-mb", "20"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as torchrun:
        kill(0, out, torchrun.pid, {})
        _, err = torchrun.communicate(timeout=60)
    assert torchrun.returncode == 1
    assert "Signal 9 (SIGKILL) received" in err
    assert list(out.parent.iterdir()) == []
