"""The command, as a user types it."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

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
        # The processor's time: another worker's tests must not count.
        began = resource.getrusage(resource.RUSAGE_CHILDREN)
        done = subprocess.run(
            [sys.executable, "-c", script], capture_output=True, text=True, check=True
        )
        ended = resource.getrusage(resource.RUSAGE_CHILDREN)
        seconds.append(ended.ru_utime + ended.ru_stime - began.ru_utime - began.ru_stime)
    assert done.stderr.strip() == "False"
    assert "simulate" in done.stdout
    assert min(seconds) < 1.5  # torch alone takes twice as long


def test_methods_are_listed_with_their_parameters(run: Any) -> None:
    code, out, _ = run("methods", "--json")
    rows = {row["name"]: row for row in json.loads(out)}
    assert code == 0
    assert {"mean", "ties", "dare_ties", "multi_krum", "geometric_median", "fedit"} <= set(rows)
    assert rows["ties"]["parameters"]["density"]["default"] == 0.2
    assert "agnitude" in rows["ties"]["parameters"]["density"]["about"]
    assert rows["breadcrumbs_ties"]["about"].startswith("Breadcrumbs in place of TIES's trim")
    assert all(row["about"].endswith(".") for row in rows.values())
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
    dense = adapter(0).lora["layer.query"].delta().dense()
    assert facts["tensors"][0]["norm"] == pytest.approx(float(dense.norm()), rel=1e-5)
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
    fisher = {"layer.query.importance_rows": torch.ones(100)}
    weighed = encode_update(adapter(0).tensors(), meta, CodecConfig(), importance=fisher).blob
    (tmp_path / "weighed").write_bytes(weighed)
    more = json.loads(run("inspect", tmp_path / "weighed", "--json")[1])
    assert (facts["importance_bytes"], more["importance_bytes"]) == (0, 100 + 2 * 4)
    assert more["payload_bytes"] == facts["payload_bytes"] + 108
    code, out, _ = run("inspect", file)
    assert code == 0
    assert "site-a" in out
    assert "layer.query.lora_A" in out


SYNTHETIC = '[task]\nkind = "anabranch.simulation.synthetic:SyntheticTask"\n'
FILES = {
    "good.toml": 'method = "mean"\n',
    "typo.toml": 'method = "tiess"\n',
    "value.yaml": "method: ties\nparams: {density: 7}\n",
    "weights.toml": 'method = "mean"\nweights = [1, 2]\n',
    "stack.toml": 'method = "ties"\nrefactor = { kind = "stack" }\n',
    "rank.toml": 'method = "mean"\nrefactor = { rank = 1000000000 }\n',
    "rounds.toml": 'name = "x"\nrounds = 0\n',
    "fine.toml": 'name = "x"\n' + SYNTHETIC,
    "task.toml": 'name = "x"\n[task]\nkind = "nowhere:Task"\n',
    "date.toml": f'name = "x"\n{SYNTHETIC}start = 2024-01-01\n',
    "data.toml": 'name = "x"\n[task]\ndatasets = ["imdb"]\n',
    "cut.toml": 'name = "x"\n[task]\ndatasets = ["bbc"]\n'
    'partition = { kind = "dirichlet", min_examples = 100000 }\n',
    "long.toml": 'name = "x"\n[task]\ndatasets = ["bbc"]\nmax_length = 4096\n',
    "device.toml": 'name = "x"\n[task]\ndatasets = ["bbc"]\ndevice = "tpu9"\n',
    "train.toml": f'name = "x"\n{SYNTHETIC}[train]\nsteps = -1\n',
    "krum.toml": f'name = "x"\n{SYNTHETIC}[recipe]\nmethod = "multi_krum"\n',
    "density.toml": f'name = "x"\n{SYNTHETIC}[recipe]\nmethod = "ties"\nparams = {{density = 7}}\n',
    "rank-kept.toml": f'name = "x"\n{SYNTHETIC}[recipe]\nmethod = "mean"\n'
    'refactor = { kind = "stack" }\n',
    "broken/adapter_config.json": "{",
    "junk.bin": "junk",
}
BAD_INPUT = {
    "no recipe": ("merge {tmp}/none.toml {adapters} -o {out}", "none.toml: cannot be read"),
    "unknown method": (
        "merge {tmp}/typo.toml {adapters} -o {out}",
        "'tiess' is not a merge method",
    ),
    "bad parameter": ("merge {tmp}/value.yaml {adapters} -o {out}", "value.yaml: params.density"),
    "odd weights": ("merge {tmp}/weights.toml {adapters} -o {out}", "weights.toml: weights: 2"),
    "odd stack": ("merge {tmp}/stack.toml {adapters} -o {out}", "stack.toml: refactor.kind: stack"),
    "huge rank": (
        "merge {tmp}/rank.toml {adapters} -o {out}",
        "rank.toml: refactor.rank: 1000000000 is above 16",
    ),
    "no adapter": ("merge {tmp}/good.toml {tmp}/none -o {out}", "{tmp}/none"),
    "broken adapter": ("merge {tmp}/good.toml {tmp}/broken -o {out}", "{tmp}/broken"),
    "another base": ("merge {tmp}/good.toml {adapters} {tmp}/other -o {out}", "base"),
    "no start": ("merge {tmp}/good.toml {tmp}/headed -o {out}", "started from with --start"),
    "out exists": ("merge {tmp}/good.toml {adapters} -o {tmp}/other", "already exists"),
    "out in a file": ("merge {tmp}/good.toml {tmp}/none -o {tmp}/junk.bin/x", "junk.bin is no"),
    "inspect nothing": ("inspect {tmp}/none", "no such file"),
    "inspect junk": ("inspect {tmp}/junk.bin", "is no Anabranch update"),
    "bracketed name": ("inspect {tmp}/[/x]", "[/x]"),
    "bad scenario": ("simulate {tmp}/rounds.toml", "rounds"),
    "bad engine": ("simulate {tmp}/fine.toml --engine x", "--engine: engine: Input"),
    "bad plan": ("simulate {tmp}/train.toml --out {out}", "train.toml: train.steps: Input"),
    "date": ("simulate {tmp}/date.toml --out {out}", "date.toml: task.start: not text"),
    "no task": ("simulate {tmp}/task.toml --out {out}", "task.toml: task 'nowhere:Task'"),
    "no data set": ("simulate {tmp}/data.toml --out {out}", "imdb"),
    "no such cut": ("simulate {tmp}/cut.toml --out {out}", "cut.toml: Dirichlet"),
    "too long": ("simulate {tmp}/long.toml --out {out}", "max_length: 4096 tokens are more"),
    "no device": ("simulate {tmp}/device.toml --out {out}", "device: 'tpu9' cannot be used"),
    "too few": (
        "simulate {tmp}/krum.toml --out {out}",
        "krum.toml: recipe: a round merges 3 (quor",
    ),
    "recipe's key": ("simulate {tmp}/density.toml --out {out}", "density.toml: recipe.params.dens"),
    "rank kept": ("simulate {tmp}/rank-kept.toml --out {out}", "recipe.refactor.kind: a fed"),
    "simulate into a file": ("simulate {tmp}/fine.toml --out {tmp}/junk.bin", "junk.bin is no"),
    "simulate under a file": ("simulate {tmp}/fine.toml --out {tmp}/junk.bin/x", "junk.bin is no"),
    "both": ("simulate {tmp}/fine.toml --out {out} --resume --overwrite", "give one of them"),
    "unknown option": ("methods --frobnicate", "'--frobnicate'; see anabranch methods --help"),
    "no argument": ("inspect", "Missing argument 'FILE'; see anabranch inspect --help"),
    "unknown command": ("bogus", "No such command 'bogus'"),
}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    tmp = tmp_path_factory.mktemp("inputs")
    for name, text in FILES.items():
        (tmp / name).parent.mkdir(exist_ok=True)
        (tmp / name).write_text(text)
    factors = adapter(9).lora
    write_adapter(Adapter(factors, base_hash="cd" * 32), tmp / "other")
    write_adapter(Adapter(factors, {"head": torch.ones(3)}, "ab" * 32), tmp / "headed")
    return {"tmp": str(tmp), "out": str(tmp / "out"), "adapters": " ".join(folders(tmp))}


@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input_is_one_line_and_exit_code_2(case: str, run: Any, inputs: dict[str, str]) -> None:
    line, expected = BAD_INPUT[case]
    code, out, err = run(*line.format(**inputs).split())
    assert code == 2, err
    # The first on a machine to need a data set is told that it is fetched.
    lines = [one for one in err.splitlines() if one.strip() and not one.startswith("fetching ")]
    assert len(lines) == 1, err
    assert lines[0].startswith("error: ")
    assert expected.format(**inputs) in lines[0]
    assert out == ""
    assert not Path(inputs["out"]).exists()


@pytest.mark.parametrize(
    ("command", "goes_on"), [("simulate s.toml", True), ("inspect file", False)]
)
def test_an_interruption_is_one_line(
    command: str, goes_on: bool, run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("anabranch.simulation.scenario.load_scenario", interrupt)
    monkeypatch.setattr("pathlib.Path.exists", interrupt)
    code, _, err = run(*command.split())
    assert code == 130
    assert err.startswith("error: interrupted")
    assert ("--resume" in err) == goes_on


def test_merge_of_trained_heads_goes_by_their_start(run: Any, tmp_path: Path) -> None:
    for name, head in (("start", 1.0), ("a", 2.0), ("b", 4.0)):
        dense = {"head.weight": torch.full((2, 3), head)}
        write_adapter(Adapter(adapter(0).lora, dense, "ab" * 32), tmp_path / name)
    adapters = [tmp_path / "a", tmp_path / "b"]
    out = tmp_path / "out"
    code, _, err = run(
        "merge", recipe(tmp_path), *adapters, "--start", tmp_path / "start", "-o", out
    )
    assert code == 0, err
    torch.testing.assert_close(read_adapter(out).dense["head.weight"], torch.full((2, 3), 3.0))


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


def test_simulate_says_what_privacy_is_spent(run: Any, tmp_path: Path) -> None:
    scenario = tmp_path / "s.toml"
    scenario.write_text(
        'name = "s"\nrounds = 1\nrecipe = { method = "fedit" }\n'
        "privacy = { clip = 0.5, epsilon = 8.0, delta = 1e-3 }\n"
        "baselines = { local_only = false, fedavg = false, oracle = false }\n[task]\n"
        'kind = "anabranch.simulation.synthetic:SyntheticTask"\nclients = 3\n'
        "[train]\nsteps = 1\nbatch_size = 4\nlearning_rate = 0.01\n"
    )
    code, out, _ = run("simulate", scenario, "--out", tmp_path / "run")
    assert code == 0
    assert "an epsilon of 8 of 8 at a delta of 0.001 for each client" in out
    assert "clipped to 0.5; rounds left: 0" in out


def test_names_from_strangers_are_shown_as_they_are(run: Any, tmp_path: Path) -> None:
    meta = UpdateMeta("update", "ab" * 32, "cd" * 32, "f", "r", 4, "[/bold]x", b"n", 1, 99)
    file = tmp_path / "update"
    file.write_bytes(encode_update({"[/a]": torch.ones(3)}, meta, CodecConfig()).blob)
    code, out, _ = run("inspect", file)
    assert code == 0
    assert "[/bold]x" in out
    assert "[/a]" in out
