from __future__ import annotations

import json
from collections.abc import Callable

import pytest
import torch
from pydantic import ValidationError

from anabranch.aggregation import MergeReport, Recipe, merge, merge_one_factor, merge_task_vectors
from anabranch.aggregation.backdoor.config import SuspicionConfig
from anabranch.aggregation.backdoor.consequences import SuspicionError
from anabranch.aggregation.registry import methods
from anabranch.vectors import Adapter, LoraFactors, task_vector

MODULE = "layer.1.value"
CLIENT = "contribution 3"

Make = Callable[..., tuple[Adapter, list[Adapter]]]
Plant = Callable[..., Adapter]


def recipe(method: str = "mean", **config: object) -> Recipe:
    return Recipe(method=method, suspicion=SuspicionConfig.model_validate(config))


def found(report: MergeReport) -> set[tuple[str, str | None]]:
    assert report.suspicion is not None
    return {(one["client"], one["module"]) for one in report.suspicion["findings"]}


@pytest.mark.parametrize(("count", "tasks"), [(4, 1), (8, 1), (8, 4), (20, 1)])
def test_of_honest_cohorts_nobody_is_found(make_cohort: Make, count: int, tasks: int) -> None:
    """None of 6 cohorts of each kind; the largest score is far from the threshold."""
    for seed in range(6):
        start, ends = make_cohort(seed, count, tasks)
        report = merge(ends, recipe(), start=start).report
        assert report.suspicion is not None
        assert report.suspicion["findings"] == ()
        assert max(report.suspicion["scores"].values()) < 4.5


@pytest.mark.parametrize("keep_norm", [False, True])
def test_a_planted_direction_is_found_where_it_is(
    make_cohort: Make, plant: Plant, keep_norm: bool
) -> None:
    """In every one of 12 cohorts, nobody honest with it, large or as large as before."""
    for seed in range(12):
        start, ends = make_cohort(seed)
        ends[3] = plant(ends[3], MODULE, 5.0, keep_norm=keep_norm)
        report = merge(ends, recipe(action="note"), start=start).report
        assert (CLIENT, MODULE) in found(report)
        assert {client for client, _ in found(report)} == {CLIENT}
        assert report.suspicion is not None
        first = report.suspicion["findings"][0]
        assert first["signal"] == "spectrum"
        assert f"{MODULE}: its first singular direction holds" in first["why"]


def test_an_update_sent_larger_is_found_by_its_size(make_cohort: Make) -> None:
    start, ends = make_cohort(0)
    larger = {
        name: LoraFactors(one.a_rn, 10 * one.b_mr, one.alpha) for name, one in ends[2].lora.items()
    }
    ends[2] = Adapter(larger, base_hash=start.base_hash)
    report = merge(ends, recipe(signals=("energy",), action="note"), start=start).report
    assert ("contribution 2", None) in found(report)
    assert report.suspicion is not None
    whole = next(one for one in report.suspicion["findings"] if one["module"] is None)
    assert "its norm is" in whole["why"]


def test_of_copies_all_but_the_first_are_found(make_cohort: Make) -> None:
    start, ends = make_cohort(0)
    ends[5] = ends[6] = ends[1]
    report = merge(ends, recipe(action="exclude"), start=start).report
    assert found(report) == {("contribution 5", None), ("contribution 6", None)}
    assert report.suspicion is not None
    assert "it is a copy of contribution 1" in report.suspicion["findings"][0]["why"]
    alone = merge(
        ends, Recipe(method="mean"), start=start, without=["contribution 5", "contribution 6"]
    )
    assert merge(ends, recipe(action="exclude"), start=start).adapter.hash() == alone.adapter.hash()


def test_a_flipped_update_is_found_by_its_direction(make_cohort: Make) -> None:
    start, ends = make_cohort(0)
    mirrored = {
        name: LoraFactors(one.a_rn, -one.b_mr, one.alpha) for name, one in ends[0].lora.items()
    }
    ends[0] = Adapter(mirrored, base_hash=start.base_hash)
    report = merge(ends, recipe(signals=("cosine",), action="note"), start=start).report
    assert found(report) == {("contribution 0", None)}


def test_a_module_nobody_else_changes_is_found(make_cohort: Make) -> None:
    start, ends = make_cohort(0)
    ends = [Adapter({**end.lora, MODULE: start.lora[MODULE]}) for end in ends[:7]] + [ends[7]]
    report = merge(ends, recipe(signals=("energy",), action="note"), start=start).report
    assert ("contribution 7", MODULE) in found(report)


def test_a_masked_module_is_merged_without_it_and_the_others_with(
    make_cohort: Make, plant: Plant
) -> None:
    for method in ("mean", "ties", "tsv_m", "multi_krum", "fedit"):
        start, ends = make_cohort(1)
        ends[3] = plant(ends[3], MODULE, 8.0, keep_norm=True)
        result = merge(ends, recipe(method, action="mask_module"), start=start)
        assert found(result.report) == {(CLIENT, MODULE)}
        plain = Recipe(method=method)
        there = merge(ends, plain, start=start, without=[CLIENT]).adapter
        everyone = merge(ends, plain, start=start).adapter
        if method == "mean":
            for module, factors in result.adapter.lora.items():
                wanted = (there if module == MODULE else everyone).lora[module]
                torch.testing.assert_close(factors.delta().dense(), wanted.delta().dense())
        else:
            # Alone, as a model of their own: methods that look at the whole model may differ.
            difference = result.adapter.lora[MODULE].delta().dense()
            difference = difference - everyone.lora[MODULE].delta().dense()
            assert float(difference.norm()) > 0


def test_excluded_is_as_if_never_there(make_cohort: Make, plant: Plant) -> None:
    for method in ("mean", "ties", "dare_ties", "multi_krum", "iso_c"):
        start, ends = make_cohort(2)
        ends[0] = plant(ends[0], MODULE, 8.0)
        result = merge(ends, recipe(method, action="exclude"), start=start)
        alone = merge(ends[1:], Recipe(method=method), start=start)
        assert result.adapter.hash() == alone.adapter.hash(), method
        if alone.report.coefficients is not None:
            assert result.report.coefficients == (0.0, *alone.report.coefficients)


@pytest.mark.parametrize("method", ["mean", "median", "knots_ties"])
@pytest.mark.parametrize("with_start", [True, False])
def test_weighed_down_is_a_smaller_change(
    make_cohort: Make, plant: Plant, method: str, with_start: bool
) -> None:
    start, ends = make_cohort(3)
    ends[3] = plant(ends[3], MODULE, 8.0)
    origin = start if with_start else None
    config = {"action": "weigh_down", "signals": ("spectrum",)}
    result = merge(ends, recipe(method, **config), start=origin)
    assert result.report.suspicion is not None
    (finding,) = result.report.suspicion["findings"]
    factor = 6.0 / finding["score"]
    deltas = [task_vector(end, origin) for end in ends]
    wanted = [vector.deltas[MODULE] for vector in deltas]
    smaller = [
        one.dense() * (factor if row == 3 else 1)
        for row, one in enumerate(wanted)  # type: ignore[union-attr]
    ]
    merged = methods()[method](torch.stack(smaller))
    if origin is not None:
        merged = merged + start.lora[MODULE].delta().dense()
    u, s, v = torch.linalg.svd(merged, full_matrices=False)
    best = (u[:, :8] * s[:8]) @ v[:8]
    torch.testing.assert_close(
        result.adapter.lora[MODULE].delta().dense(), best, atol=2e-4, rtol=1e-3
    )


def test_asking_stops_the_merge_until_somebody_decides(make_cohort: Make, plant: Plant) -> None:
    start, ends = make_cohort(4)
    ends[3] = plant(ends[3], MODULE, 8.0)
    with pytest.raises(SuspicionError, match=r"contribution 3: .*name it in suspicion.allow"):
        merge(ends, recipe(action="ask"), start=start)
    let = merge(ends, recipe(action="ask", allow=(CLIENT,)), start=start)
    assert let.adapter.hash() == merge(ends, Recipe(method="mean"), start=start).adapter.hash()
    assert found(let.report)
    merge(ends, recipe(action="ask"), start=start, without=[CLIENT])


def test_fewer_than_half_are_acted_on(make_cohort: Make, plant: Plant) -> None:
    start, ends = make_cohort(5, 5)
    for row in range(3):
        ends[row] = plant(ends[row], f"layer.{row}.query", 8.0)
    report = merge(ends, recipe(action="exclude"), start=start).report
    assert report.suspicion is not None
    acts = {one["client"]: one["action"] for one in report.suspicion["findings"]}
    assert sorted(acts.values()) == ["exclude", "exclude", "note"]


def test_of_two_updates_of_one_client_the_one_that_stands_out_is_acted_on(
    make_cohort: Make, plant: Plant
) -> None:
    start, ends = make_cohort(8)
    ends[3] = plant(ends[3], MODULE, 8.0)
    names = [f"client-{index % 5}" for index in range(8)]
    names[3] = names[0]
    config = {"action": "exclude", "signals": ("spectrum",)}
    result = merge(ends, recipe(**config), start=start, names=names)
    alone = merge(ends[:3] + ends[4:], Recipe(method="mean"), start=start)
    assert result.adapter.hash() == alone.adapter.hash()
    assert found(result.report) == {("client-0", MODULE)}


def test_the_report_is_plain(make_cohort: Make, plant: Plant) -> None:
    start, ends = make_cohort(6)
    ends[3] = plant(ends[3], MODULE, 8.0)
    kept = merge(ends, recipe(), start=start).report.suspicion
    assert json.loads(json.dumps(kept))["findings"][0]["client"] == CLIENT
    assert merge(ends, Recipe(method="mean"), start=start).report.suspicion is None


def test_one_trained_factor_is_judged_too(make_cohort: Make) -> None:
    start, ends = make_cohort(7)
    ends = [
        Adapter(
            {m: LoraFactors(start.lora[m].a_rn, one.b_mr, one.alpha) for m, one in end.lora.items()}
        )
        for end in ends
    ]
    b_mr = ends[3].lora[MODULE].b_mr
    spike = b_mr + 40 * b_mr.norm() / 10 * torch.outer(torch.ones(48) / 7, torch.ones(8) / 3)
    lora = {**ends[3].lora, MODULE: LoraFactors(start.lora[MODULE].a_rn, spike, 16.0)}
    ends[3] = Adapter(lora)
    report = merge_one_factor(ends, recipe(action="note"), "b", start=start).report
    assert (CLIENT, f"{MODULE}.lora_B") in found(report)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"threshold": 0}, "threshold"),
        ({"signals": ()}, "signals"),
        ({"signals": ("smell",)}, "signals"),
        ({"actions": {"energy": "ban"}}, "actions"),
    ],
)
def test_bad_settings_are_refused(change: dict[str, object], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        SuspicionConfig.model_validate(change)


def test_what_cannot_be_judged_is_refused(make_cohort: Make) -> None:
    start, ends = make_cohort(0)
    with pytest.raises(ValueError, match="suspicion: of 3 contributions none can be told"):
        merge(ends[:3], recipe(), start=start)
    with pytest.raises(ValueError, match="weigh_down scales changes, and fedit merges factors"):
        merge(ends, recipe("fedit", action="weigh_down"), start=start)
    with pytest.raises(ValueError, match="suspicion: judges the factors of adapters"):
        merge_task_vectors([task_vector(end, start) for end in ends], recipe())


def test_every_signal_has_a_score_and_a_reason_for_who_it_speaks_against(
    make_cohort: Make, plant: Plant
) -> None:
    """Found or not: one contribution for each signal, each in words of its own."""
    start, ends = make_cohort(0)
    ends[3] = plant(ends[3], MODULE, 8.0, keep_norm=True)
    ends[5] = ends[6] = ends[1]
    enlarged = {
        name: LoraFactors(one.a_rn, 10 * one.b_mr, one.alpha) for name, one in ends[2].lora.items()
    }
    ends[2] = Adapter(enlarged, base_hash=start.base_hash)
    report = merge(ends, recipe(action="note"), start=start).report.suspicion
    assert report is not None
    strongest = report["strongest"]
    words = {
        ("contribution 3", "spectrum"): f"{MODULE}: its first singular direction holds",
        ("contribution 2", "energy"): "times the cohort's median",
        ("contribution 2", "factors"): "B changed",
        ("contribution 6", "cosine"): "one of 3 that lie together",
    }
    for (client, signal), said in words.items():
        one = strongest[client][signal]  # type: ignore[index]
        assert said in one["why"], one
        assert one["score"] >= 6.0
    assert strongest["contribution 3"]["spectrum"]["module"] == MODULE
    for client, signals in strongest.items():
        largest = max((one["score"] for one in signals.values()), default=0.0)
        assert report["scores"][client] == largest
    for one in report["findings"]:
        assert strongest[one["client"]][one["signal"]]["score"] >= one["score"]
    json.dumps(report)
