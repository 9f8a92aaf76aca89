from __future__ import annotations

from pathlib import Path

import pytest

from anabranch.simulation.scenario import Scenario, load_scenario, write_scenario

EXAMPLES = sorted((Path(__file__).parents[2] / "examples").glob("*.toml"))


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_the_examples_load_and_survive_being_written_out(path: Path, tmp_path: Path) -> None:
    scenario = load_scenario(path)
    write_scenario(scenario, tmp_path / "config.toml")
    assert load_scenario(tmp_path / "config.toml") == scenario


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('name = "x"\nround = 3\n', "round: Extra inputs are not permitted, got 3"),
        ('name = "x"\nrounds = "many"\n', "rounds: Input should be a valid integer"),
        ('name = "a b"\n', "name: String should match pattern"),
        ('name = "x"\n[codec]\ndensity = 2\n', "codec.density: Input should be less than"),
        ('name = "x"\nengine = "spark"\n', "engine: Input should be 'inprocess' or 'flower'"),
        ('name = "x"\n[codec\n', "broken toml"),
        ("", "name: Field required"),
        ('name = ".."\n', "name: String should match pattern"),
        ('name = "x"\nseed = -1\n', "seed: Input should be greater than or equal to 0"),
        ('name = "x"\n[train]\nsteps = 1\nlr = 1\n', "train.lr: Extra inputs are not permitted"),
        ('name = "x"\n[train]\nbatch_size = 4\n', "train.steps: Field required"),
        ('name = "x"\n[train]\nsteps = 1\nlearning_rate = inf\n', "finite number"),
        (
            'name = "x"\n[recipe]\nmethod = "mean"\nweights = [1]\n',
            "recipe.weights: clients come and go",
        ),
        (
            'name = "x"\n[recipe]\nmethod = "mean"\nrefactor = { rank = 2 }\n',
            "recipe.refactor.rank: a federation's adapter keeps its rank",
        ),
        ('name = "x"\n[train]\nsteps = "5"\n', "train.steps: Input should be a valid integer"),
        ('name = "x"\n[train]\nsteps = 5\nseed = 1\n', "train.seed: drawn for each client"),
        ('name = "x"\nseed = 18446744073709551616\n', "seed: Input should be less than"),
        ('name = "x"\ntrains = "a"\n', "trains: Input should be 'both', 'b' or 'alternate'"),
        ('name = "x"\n[ranks]\nclient-0000 = 0\n', "ranks.client-0000: Input should be greater"),
        ('name = "x"\ntrains = "b"\nranks = { a = 1 }\n', 'ranks: set trains = "both"'),
        ('name = "x"\nrest = "keep"\n', "rest: Input should be 'drop', 'fedex' or 'flora'"),
        ('name = "x"\nrest = "flora"\n', "rest: set codec.feedback = 0: clients begin afresh"),
        ('name = "x"\nrest = "fedex"\ntrains = "b"\n', "rest: leave it out: with trains"),
        ('name = "x"\nrest = "fedex"\nranks = { a = 1 }\n', "rest: the means of A and B need"),
        ('name = "x"\n[codec]\nname = "ranks"\n', "codec.name: ties reads sizes, which ranks have"),
        (
            'name = "x"\n[codec]\nname = "ranks"\n[recipe]\nmethod = "rank_vote"\n',
            'codec.name: ranks are of entries that mean the same at every client; set trains = "b"',
        ),
        (
            'name = "x"\ntrains = "b"\ncodec.name = "ranks"\n'  # noqa: ISC004
            'recipe = { method = "rank_vote", pre = [{ name = "clip" }] }\n',
            "codec.name: recipe.pre mixes sizes",
        ),
        ('name = "x"\n[down_codec]\nname = "ranks"\n', "down_codec.name: ranks are clients' votes"),
        ('name = "x"\nsealed = true\n', "sealed: set signed = true: without, a relay could"),
        ('name = "x"\ndeadline_s = inf\n', "deadline_s: Input should be a finite number"),
        ('name = "x"\n[task]\nfrom = 2024-01-01\n', "task.from: not text, number, list or table"),
    ],
)
def test_a_mistake_is_one_line_with_file_key_and_reason(
    text: str, expected: str, tmp_path: Path
) -> None:
    path = tmp_path / "s.toml"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"s\.toml") as caught:
        load_scenario(path)
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_quorum_is_more_than_half_of_those_asked_unless_said() -> None:
    assert Scenario(name="x").federation(8).quorum == 5
    assert Scenario(name="x", fraction=0.5).federation(8).quorum == 3
    assert Scenario(name="x", quorum=7).federation(8).quorum == 7
    with pytest.raises(ValueError, match=r"quorum: 5 .* 4 clients that are asked .of 8.; lower it"):
        Scenario(name="x", fraction=0.5, quorum=5).federation(8)
