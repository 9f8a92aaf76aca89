"""Fisher merging beside a naive loop, in memory, from disk, and what it refuses."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from anabranch.aggregation import Recipe, merge, merge_checkpoints, merge_task_vectors, plan_merge
from anabranch.aggregation.engine.rows import ROW_BLOCK, WORKING_COPIES
from anabranch.aggregation.methods.fisher import FISHER, FisherConfig
from anabranch.aggregation.methods.mean import MEAN
from anabranch.vectors import Adapter, Delta, LowRank, TaskVector
from anabranch.vectors.fisher_file import FISHER_FILE, write_fisher

SHAPES = {"tall": (150, 33), "wide": (37, 130)}
COUNT = 3
WEIGHTS = [1.0, 2.0, 3.0]


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def of_factors(seed: int, m: int, n: int) -> LowRank:
    """Squares whose sizes differ widely, as those of a Fisher do."""
    column_m, row_n = draw(seed, m).square(), draw(seed + 50, n).square().mul(1e-4)
    return LowRank(column_m[:, None] ** 3, row_n[None, :])


def vectors(count: int = COUNT) -> list[TaskVector]:
    found = []
    for client in range(count):
        deltas: dict[str, Delta] = {"head": draw(client, 130)}
        importance: dict[str, Delta] = {"head": draw(client + 9, 130).square()}
        for name, (m, n) in SHAPES.items():
            deltas[name] = LowRank(draw(client, m, 3), draw(client + 20, 3, n))
            importance[name] = of_factors(client, m, n)
        found.append(TaskVector(deltas, importance=importance))
    return found


def dense(part: Delta) -> Tensor:
    return part if isinstance(part, Tensor) else part.dense()


def entries(changes: Mapping[str, Delta]) -> Tensor:
    return torch.cat([dense(changes[name]).flatten() for name in sorted(changes)])


def naive(
    deltas_CD: Tensor, importances_CD: Tensor, weights: list[float], epsilon: float = 1e-6
) -> Tensor:
    above = torch.zeros(deltas_CD.shape[1], dtype=torch.float64)
    below = torch.zeros_like(above)
    for c, weight in enumerate(weights):
        for d in range(deltas_CD.shape[1]):
            f = float(importances_CD[c, d]) + epsilon
            above[d] += weight * f * float(deltas_CD[c, d])
            below[d] += weight * f
    return (above / below).float()


@pytest.mark.parametrize("normalise", ["none", "model", "module"])
def test_the_engine_is_a_loop_over_entries(normalise: str) -> None:
    cohort = vectors()
    deltas_CD = torch.stack([entries(vector.deltas) for vector in cohort])
    modules = {name: dense(cohort[0].deltas[name]).numel() for name in ("head", "tall", "wide")}
    importances = []
    for vector in cohort:
        flat_D = entries(vector.importance).double()
        if normalise == "model":
            flat_D /= flat_D.mean()
        elif normalise == "module":
            flat_D = torch.cat([p / p.mean() for p in flat_D.split(list(modules.values()))])
        importances.append(flat_D)
    recipe = Recipe(method="fisher", params={"normalise": normalise}, scale=0.5)
    merged = merge_task_vectors(cohort, recipe, weights=WEIGHTS)
    wanted_D = naive(deltas_CD, torch.stack(importances), WEIGHTS)
    torch.testing.assert_close(entries(merged.deltas), 0.5 * wanted_D, atol=1e-5, rtol=1e-4)


def test_the_budget_changes_no_bit() -> None:
    recipe = Recipe(method="fisher")
    roomy = merge_task_vectors(vectors(), recipe)
    smallest = 2 * 2 * COUNT * 130 * 4 * WORKING_COPIES * ROW_BLOCK
    for budget_bytes in (smallest, 2 * smallest):
        tight = merge_task_vectors(vectors(), recipe, budget_bytes=budget_bytes)
        assert torch.equal(entries(roomy.deltas), entries(tight.deltas))
    with pytest.raises(ValueError, match=f"cannot hold 32 rows of wide .* at least {smallest}"):
        merge_task_vectors(vectors(), recipe, budget_bytes=smallest - 1)


@st.composite
def cohorts(draw: st.DrawFn) -> tuple[Tensor, Tensor, Tensor]:
    count, size = draw(st.integers(1, 5)), draw(st.integers(1, 12))
    number = st.floats(-(2.0**100), 2.0**100, width=32)
    squares = st.one_of(st.just(0.0), st.floats(0, 2.0**126, width=32), st.floats(0, 1, width=32))

    def rows(values: st.SearchStrategy[float]) -> Tensor:
        row = st.lists(values, min_size=size, max_size=size)
        return torch.tensor(draw(st.lists(row, min_size=count, max_size=count)))

    weights = draw(st.lists(st.floats(1e-30, 1e30), min_size=count, max_size=count))
    return rows(number), rows(squares), torch.tensor(weights, dtype=torch.float64)


@settings(max_examples=60, deadline=None)
@given(cohort=cohorts(), normalise=st.sampled_from(["none", "model"]))
def test_every_entry_lies_among_those_merged(
    cohort: tuple[Tensor, Tensor, Tensor], normalise: str
) -> None:
    deltas_CD, importances_CD, weights_C = cohort
    config = FisherConfig(normalise=normalise)  # type: ignore[arg-type]
    merged_D = FISHER(deltas_CD, weights_C, config, importances_CD=importances_CD)
    assert bool((merged_D >= deltas_CD.amin(dim=0) - 1e-6 * deltas_CD.abs().amax(dim=0)).all())
    assert bool((merged_D <= deltas_CD.amax(dim=0) + 1e-6 * deltas_CD.abs().amax(dim=0)).all())


@settings(max_examples=30, deadline=None)
@given(cohort=cohorts())
def test_equal_fishers_give_the_weighted_mean(cohort: tuple[Tensor, Tensor, Tensor]) -> None:
    deltas_CD, importances_CD, weights_C = cohort
    for same_CD in (importances_CD[:1].expand_as(deltas_CD), torch.zeros_like(deltas_CD), None):
        merged_D = FISHER(deltas_CD, weights_C, importances_CD=same_CD)
        # The mean is summed in fp32, where terms of opposite signs cancel.
        atol = 1e-6 * float(deltas_CD.abs().max())
        torch.testing.assert_close(merged_D, MEAN(deltas_CD, weights_C), atol=atol, rtol=1e-5)


def times(vector: TaskVector, factor: float) -> TaskVector:
    louder = {
        name: LowRank(part.b_mk * factor, part.a_kn) if isinstance(part, LowRank) else part * factor
        for name, part in vector.importance.items()
    }
    return replace(vector, importance=louder)


@pytest.mark.parametrize("factor", [1e25, 1e-25])
def test_a_fisher_has_no_say_by_its_scale(factor: float) -> None:
    cohort = vectors()
    loud = [*cohort[:2], times(cohort[2], factor)]
    for normalise in ("model", "module", "none"):
        recipe = Recipe(method="fisher", params={"normalise": normalise})
        one_D, other_D = (
            entries(merge_task_vectors(some, recipe).deltas) for some in (cohort, loud)
        )
        same = torch.allclose(one_D, other_D, atol=1e-5, rtol=1e-4)
        assert same == (normalise != "none")


Break = Callable[[dict[str, Any]], object]


@pytest.mark.parametrize(
    ("broken", "reason"),
    [
        (lambda f: f.clear(), r"fisher: clinic-b ships no Fisher; put fisher\.safetensors beside"),
        (lambda f: f.pop("tall"), "fisher: clinic-b ships no Fisher of module tall; put"),
        (
            lambda f: f.update(tall=of_factors(0, 33, 150)),
            r"clinic-b: the Fisher of module tall has shape \(33, 150\), the module \(150, 33\)",
        ),
        (lambda f: f.update(head=-f["head"]), "clinic-b: the importance of module head .* negat"),
        (lambda f: f.update(head=f["head"] * torch.nan), "clinic-b: the importance of module head"),
        (
            lambda f: f.update(wide=LowRank(torch.full((37, 1), 1e20), torch.full((1, 130), 1e20))),
            "clinic-b: the importance of module wide holds numbers that are negative or not finite",
        ),
    ],
)
def test_a_contribution_without_a_sound_fisher_is_refused(broken: Break, reason: str) -> None:
    cohort = vectors()
    fisher = dict(cohort[1].importance)
    broken(fisher)
    cohort[1] = replace(cohort[1], importance=fisher)
    names = ["clinic-a", "clinic-b", "clinic-c"]
    with pytest.raises(ValueError, match=reason):
        merge_task_vectors(cohort, Recipe(method="fisher"), names=names)


@pytest.fixture
def adapters(make_adapter: Callable[..., Adapter]) -> tuple[Adapter, list[Adapter]]:
    start = make_adapter(9, head=True)
    made = []
    for seed in range(COUNT):
        adapter = make_adapter(seed, head=True, near=start)
        importance: dict[str, LowRank | Tensor] = {
            name: of_factors(seed, len(factors.b_mr), factors.a_rn.shape[1])
            for name, factors in adapter.lora.items()
        }
        importance |= {name: draw(seed, *t.shape).square() for name, t in adapter.dense.items()}
        made.append(replace(adapter, importance=importance))
    return start, made


def test_adapters_merge_by_the_entries_of_their_products(
    adapters: tuple[Adapter, list[Adapter]],
) -> None:
    start, contributions = adapters
    recipe = Recipe.model_validate(
        {"method": "fisher", "params": {"normalise": "none"}, "refactor": {"rank": 24}}
    )
    result = merge(contributions, recipe, start=start, weights=WEIGHTS)
    for name, before in start.lora.items():
        changes = [a.lora[name].delta().dense() - before.delta().dense() for a in contributions]
        fishers = [dense(adapter.importance[name]) for adapter in contributions]
        wanted_D = naive(
            torch.stack(changes).flatten(1), torch.stack(fishers).flatten(1), WEIGHTS
        ) + before.delta().dense().view(-1)
        merged_D = result.adapter.lora[name].delta().dense().view(-1)
        torch.testing.assert_close(merged_D, wanted_D, atol=1e-4, rtol=1e-4)
    for name, tensor in start.dense.items():
        changes = [a.dense[name] - tensor for a in contributions]
        fishers = [dense(adapter.importance[name]) for adapter in contributions]
        wanted_D = naive(torch.stack(changes).flatten(1), torch.stack(fishers).flatten(1), WEIGHTS)
        torch.testing.assert_close(
            result.adapter.dense[name].view(-1), tensor.view(-1) + wanted_D, atol=1e-5, rtol=1e-4
        )
    names = ["a", "b", "c"]
    without = merge(contributions, recipe, start=start, names=names, without=["b"])
    never = merge(contributions[::2], recipe, start=start)
    assert without.adapter.hash() == never.adapter.hash()


@pytest.fixture
def checkpoints(save_model: Any) -> tuple[Path, list[Path], list[TaskVector]]:
    shapes = {"deep.a": (150, 33), "deep.b": (37, 130), "norm": (130,), "scalar": ()}
    base = {name: draw(77, *shape) for name, shape in shapes.items()}
    folders, wanted = [], []
    for client in range(COUNT):
        tuned = {name: base[name] + draw(client, *shape) for name, shape in shapes.items()}
        fisher = {name: draw(client + 5, *shape).square() for name, shape in shapes.items()}
        folders.append(save_model(f"m{client}", tuned))
        save_file(fisher, folders[-1] / FISHER_FILE)
        wanted.append(TaskVector({n: tuned[n] - base[n] for n in shapes}, importance=fisher))
    return save_model("base", base), folders, wanted


@pytest.mark.parametrize("normalise", ["none", "model", "module"])
def test_checkpoints_merge_from_disk_as_in_memory(
    normalise: str, checkpoints: tuple[Path, list[Path], list[TaskVector]], tmp_path: Path
) -> None:
    base, folders, cohort = checkpoints
    recipe = Recipe(method="fisher", params={"normalise": normalise})
    wanted = merge_task_vectors(cohort, recipe).deltas
    tight = 2 * 2 * COUNT * 130 * 4 * WORKING_COPIES
    for name, budget_bytes in (("roomy", 2 << 30), ("tight", tight)):
        merge_checkpoints(folders, recipe, tmp_path / name, base=base, budget_bytes=budget_bytes)
        found = load_file(tmp_path / name / "model.safetensors")
        begun = load_file(base / "model.safetensors")
        for module, tensor in found.items():
            assert torch.equal(tensor, begun[module] + wanted[module]), module
        assert not (tmp_path / name / FISHER_FILE).exists()


def test_a_stored_fisher_is_looked_at_as_it_is_read(
    checkpoints: tuple[Path, list[Path], list[TaskVector]], tmp_path: Path
) -> None:
    base, folders, cohort = checkpoints
    recipe = Recipe(method="fisher", params={"normalise": "none"})
    plan = plan_merge(folders, recipe, base=base)
    assert plan.passes == 1
    path = folders[1] / FISHER_FILE
    broken = {**cohort[1].importance, "norm": -torch.ones(130)}
    path.unlink()
    save_file(broken, path)
    with pytest.raises(ValueError, match=r"m1/fisher\.safetensors: norm holds numbers .* negative"):
        merge_checkpoints(folders, recipe, tmp_path / "out", base=base)
    assert not (tmp_path / "out").exists()
    path.unlink()
    for attempt in (plan_merge, lambda *a, **k: merge_checkpoints(*a, tmp_path / "out", **k)):
        with pytest.raises(ValueError, match=r"fisher: .*m1 ships no Fisher; put"):
            attempt(folders, recipe, base=base)


def test_write_fisher_replaces_nothing(tmp_path: Path) -> None:
    write_fisher({"tall": of_factors(0, 4, 3)}, tmp_path)
    with pytest.raises(ValueError, match="already exists"):
        write_fisher({}, tmp_path)
