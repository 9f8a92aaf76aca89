"""Two and three processes merge to what one merges to.

This file is also what those processes run: ``python test_shard.py FOLDER``.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from anabranch.aggregation import Recipe, merge, merge_checkpoints
from anabranch.aggregation.engine.shard import environment_of, joined, ranks_of, shared_folder
from anabranch.aggregation.methods import BUILT_IN
from anabranch.aggregation.ranks import ALONE, Ranks, deal
from anabranch.aggregation.registry import resolve
from anabranch.vectors import Adapter, LoraFactors, LowRank
from anabranch.vectors.checkpoint import open_checkpoint, write_checkpoint
from anabranch.vectors.fisher_file import write_fisher

COUNT = 5
SHAPES = {"0.q": (40, 24), "0.up": (96, 40), "1.q": (40, 24), "1.up": (70, 33), "2.q": (130, 40)}
LAYOUT = {**SHAPES, "norm": (130,), "conv": (8, 3, 5)}
TIGHT = 1 << 20
"""Several chunks a module, so that statistics are gathered from streams."""

NEEDS: dict[str, dict[str, Any]] = {"bulyan": {"f": 0}, "fltrust": {"root": "contribution 1"}}
RECIPES = {
    **{m.name: Recipe(method=m.name, params=NEEDS.get(m.name, {})) for m in BUILT_IN},
    "dnc that looks at few": Recipe(method="dnc", params={"size": 500, "iterations": 2}),
    "flame with noise": Recipe(method="flame", params={"noise": 0.1}),
    **{
        f"{name} over the model": Recipe(method=name, params={"scope": "model"})
        for name in ("breadcrumbs", "karcher", "model_stock", "multi_slerp", "slerp", "ties")
    },
    "pcb per tensor": Recipe(method="pcb", params={"scope": "tensor"}),
    "weighed": Recipe(method="mean", weights=(1, 2, 3, 4, 5), scale=0.5),
    # The group of one module is more ranks than modules.
    "by module": Recipe.model_validate(
        {
            "method": "ties",
            "params": {"scope": "model", "density": 0.3},
            "modules": [
                {"match": "0.q", "params": {"density": 0.6}},
                {"match": "1.*", "exclude": True},
            ],
        }
    ),
}
Merged = Mapping[str, Tensor]


def drawn(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def adapter(seed: int) -> Adapter:
    lora = {
        name: LoraFactors(drawn(seed + 10 * i, 4, n), drawn(seed + 10 * i + 5, m, 4), 8.0)
        for i, (name, (m, n)) in enumerate(SHAPES.items())
    }
    importance: dict[str, Any] = {
        name: LowRank(drawn(seed + i, m, 1).abs(), drawn(seed - i, 1, n).abs())
        for i, (name, (m, n)) in enumerate(SHAPES.items())
    }
    importance["head"] = drawn(seed, 3, 24).abs()
    return Adapter(lora, {"head": drawn(seed + 3, 3, 24)}, "ba5e" * 16, {}, importance)


def save(folder: Path) -> list[Path]:
    """A base and its fine-tunes; the base stands first."""
    made = []
    for number in range(COUNT + 1):
        tensors = {
            name: drawn(i, *shape) + 0.1 * number * drawn(100 * number + i, *shape)
            for i, (name, shape) in enumerate(LAYOUT.items())
        }
        tensors["ids"] = torch.arange(9)
        layout = {name: (tensor.dtype, tensor.shape) for name, tensor in tensors.items()}
        home = folder / f"model-{number}"
        home.mkdir()
        write_checkpoint(home, layout, lambda name, of=tensors: [of[name]], 20_000)  # type: ignore[misc]
        write_fisher({n: drawn(number, *s).abs() + number for n, s in LAYOUT.items()}, home)
        made.append(home)
    return made


def from_adapters(recipe: Recipe, models: list[Path], out: Path, ranks: Ranks) -> Merged:
    count = 2 if recipe.method == "slerp" else COUNT
    result = merge(
        [adapter(1000 * (i + 1)) for i in range(count)],
        recipe,
        start=adapter(7),
        budget_bytes=TIGHT * ranks.local_count,
        ranks=ranks,
    )
    report = result.report
    facts = torch.tensor([*(report.coefficients or ()), report.overall_truncation])
    return {**result.adapter.tensors(), "cosine": torch.tensor(report.cosine), "facts": facts}


def from_checkpoints(recipe: Recipe, models: list[Path], out: Path, ranks: Ranks) -> Merged:
    base, *tuned = models
    count = 2 if recipe.method == "slerp" else COUNT
    budget_bytes = (64 << 20 if resolve(recipe)[0].matrices else TIGHT) * ranks.local_count
    merge_checkpoints(
        tuned[:count],
        recipe,
        out,
        base=base,
        budget_bytes=budget_bytes,
        shard_bytes=20_000,
        ranks=ranks,
    )
    files = {path.name: torch.frombuffer(bytearray(path.read_bytes()), dtype=torch.uint8)
             for path in sorted(out.iterdir())}  # fmt: skip
    tensors = open_checkpoint(out).tensors
    return files | {n: t.entries(0, t.shape.numel()) for n, t in tensors.items()}


Way = Callable[[Recipe, list[Path], Path, Ranks], Merged]
WAYS: dict[str, Way] = {"adapters": from_adapters, "checkpoints": from_checkpoints}
CASES = [
    (way, name)
    for way in WAYS
    for name, recipe in RECIPES.items()
    # Checkpoints go by the names of their folders.
    if way == "adapters" or not (resolve(recipe)[0].factors or recipe.method == "fltrust")
]


def merged_by(ranks: Ranks, folder: Path) -> dict[str, Merged]:
    models = sorted(folder.glob("model-*"))
    found = {}
    for way, name in CASES:
        out = folder / f"{way}-{name}-{ranks.count}"
        found[f"{way} {name}"] = WAYS[way](RECIPES[name], models, out, ranks)
    return found


def main(folder: Path) -> None:
    ranks = ranks_of(os.environ)
    with joined(ranks):
        found = merged_by(ranks, folder)
        torch.save(found, folder / f"found-{ranks.rank}-of-{ranks.count}")


def start(ranks: Ranks, folder: Path, meeting: Path) -> subprocess.Popen[bytes]:
    environment = {**os.environ, **environment_of(ranks, meeting)}
    return subprocess.Popen([sys.executable, __file__, str(folder)], env=environment)


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[int, dict[str, Merged]]:
    """What 1, 2 and 3 ranks merge to, all methods in one set of processes each."""
    folder = tmp_path_factory.mktemp("shard")
    save(folder)
    found = {1: merged_by(ALONE, folder)}
    started = []
    for count in (2, 3):
        meeting = tmp_path_factory.mktemp("meeting")
        started += [start(Ranks(rank, count, count), folder, meeting) for rank in range(count)]
    assert [process.wait() for process in started] == [0] * 5
    for count in (2, 3):
        every = [torch.load(folder / f"found-{rank}-of-{count}") for rank in range(count)]
        for other in every[1:]:
            for case, tensors in every[0].items():
                if case.startswith("adapters"):
                    assert all(torch.equal(tensors[name], other[case][name]) for name in tensors)
        found[count] = every[0]
    assert not list(folder.glob(".*"))
    return found


@pytest.mark.parametrize("count", [2, 3])
@pytest.mark.parametrize(("way", "name"), CASES)
def test_ranks_merge_to_what_one_process_merges_to(
    way: str, name: str, count: int, results: dict[int, dict[str, Merged]]
) -> None:
    alone, together = results[1][f"{way} {name}"], results[count][f"{way} {name}"]
    assert alone.keys() == together.keys()
    for part, wanted in alone.items():
        assert torch.equal(wanted, together[part]), part


def test_modules_are_dealt_by_bytes() -> None:
    sizes = {"a": 5, "b": 9, "c": 4, "d": 4, "e": 0}
    assert deal(sizes, 2) == [("b", "d"), ("a", "c", "e")]
    assert deal(sizes, 1) == [("a", "b", "c", "d", "e")]
    assert deal({"a": 1}, 3) == [("a",), (), ()]


@pytest.mark.parametrize(
    "stated",
    [{"RANK": "2", "WORLD_SIZE": "2"}, {"RANK": "x", "WORLD_SIZE": "2"}, {}],
)
def test_an_environment_that_cannot_be_is_refused(stated: dict[str, str]) -> None:
    environment = {"MASTER_ADDR": "here", "LOCAL_WORLD_SIZE": "1", **stated}
    with pytest.raises(ValueError, match=r"RANK/WORLD_SIZE/LOCAL_WORLD_SIZE: .*torchrun"):
        ranks_of(environment)
    assert ranks_of({**stated}) == ALONE


def test_what_one_rank_tells_another_it_understands(tmp_path: Path) -> None:
    assert ranks_of(environment_of(Ranks(1, 3, 3), tmp_path)) == Ranks(1, 3, 3)


def test_one_rank_alone_writes_as_ever(tmp_path: Path) -> None:
    with pytest.raises(KeyError), shared_folder(tmp_path / "out", ALONE):
        raise KeyError
    assert not list(tmp_path.iterdir())


if __name__ == "__main__":
    main(Path(sys.argv[1]))
