from pathlib import Path

import pytest
from benchmarks.quality import compare
from benchmarks.quality_adapters import Setting, open_seed, trained
from benchmarks.quality_grid import SKIPPED, UNSCALED, params_tried
from benchmarks.quality_page import write_page

from anabranch.aggregation.registry import methods

TOY = Setting(
    name="toy",
    task="anabranch.simulation.synthetic:SyntheticTask",
    params={"clients": 5, "group_count": 5},
    steps=40,
    batch_size=32,
    learning_rate=0.01,
    seeds=(1,),
)


def test_every_method_of_the_registry_is_tried_or_skipped_with_a_reason() -> None:
    assert sorted([*params_tried(4), *SKIPPED]) == sorted(methods())


def test_all_methods_on_a_toy_and_a_run_that_goes_on(tmp_path: Path) -> None:
    rows = {row.what: row for row in compare(TOY, tmp_path, None)}
    assert sorted(rows) == sorted(["individual", "zero-shot", UNSCALED, *params_tried(4)])
    assert rows["individual"].ours == 1
    # The teachers share most of what they add: every merge keeps much of it, the base has none.
    for method in (UNSCALED, *params_tried(4)):
        assert rows[method].ours > rows["zero-shot"].ours + 0.1, method
    files = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}
    assert sum(path.suffix == ".safetensors" for path in files) == 5
    again = {row.what: row for row in compare(TOY, tmp_path, None)}
    assert again == rows
    assert {path: path.stat().st_mtime_ns for path in files} == files


def test_a_lost_adapter_is_trained_again_to_the_same_bits(tmp_path: Path) -> None:
    session = open_seed(TOY, 1)
    first = trained(TOY, session, 1, tmp_path)
    lost = next(tmp_path.rglob("group-3.safetensors"))
    lost.unlink()
    again = trained(TOY, session, 1, tmp_path)
    assert {g: a.hash() for g, a in again.items()} == {g: a.hash() for g, a in first.items()}
    assert len({adapter.hash() for adapter in first.values()}) == 5


def test_a_setting_has_a_folder_of_its_own(tmp_path: Path) -> None:
    longer = Setting(**{**TOY.__dict__, "steps": 41})
    assert longer.folder(tmp_path, 1).parent != TOY.folder(tmp_path, 1).parent
    more = Setting(**{**TOY.__dict__, "seeds": (1, 2, 3)})
    assert more.folder(tmp_path, 1) == TOY.folder(tmp_path, 1)


@pytest.fixture
def result() -> dict[str, object]:
    """A made-up result of three seeds."""

    def row(what: str, *seeds: float) -> dict[str, object]:
        chosen = [{"params": {"density": 0.2}, "size": 1.4, "scale": 0.5}] * 3
        detail = {
            "seeds": seeds,
            "standard_error": 0.01,
            "accuracy": {"bbc": 0.5},
            "chosen": chosen,
        }
        return {"what": what, "ours": sum(seeds) / 3, "detail": detail}

    return {
        "rows": [
            row("individual", 1, 1, 1),
            row("zero-shot", 0.5, 0.5, 0.5),
            row("ties", 0.81, 0.80, 0.82),
            row("tsv_m", 0.80, 0.84, 0.81),
            row("knots_ties", 0.70, 0.72, 0.71),
        ]
    }


def test_the_page_ranks_and_says_what_does_not_separate(
    result: dict[str, object], tmp_path: Path
) -> None:
    write_page(result, tmp_path / "page.md")
    page = (tmp_path / "page.md").read_text()
    assert page.index("| tsv_m | 81.7 ± 1.0 |") < page.index("| ties | 81.0 ± 1.0 |")
    assert "The top does not separate: ties lie within one standard error of tsv_m" in page
    assert "The other 1 methods lie further below" in page
    assert "| ties < tsv_m | 0.7 ± 1.7 | not separated |" in page
    assert "| ties < knots_ties | -10.0 ± 1.0 | **the other way round** |" in page
