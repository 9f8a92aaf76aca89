import pytest

from anabranch.client.lora import attach, read_adapter
from anabranch.client.task import LoraTask, TrainPlan, load_task
from anabranch.simulation.partitioned_text import PartitionedText

PATH = "anabranch.simulation.partitioned_text:PartitionedText"
FOUR = ["bbc", "sentiment", "text-kind", "health"]
DOMAINS = ["tweets", "amazon", "movie", "nyt"]


def test_each_client_has_a_part_of_its_own_and_its_groups_test_set() -> None:
    task = PartitionedText(datasets=["bbc", "sentiment"], test_examples=50, train_examples=60)
    assert task.num_partitions == 4
    assert task.groups == ("bbc", "bbc", "sentiment", "sentiment")
    assert task.scored_partitions == {"bbc": 0, "sentiment": 2}
    train = [task.source.examples(client, "train") for client in range(4)]
    test = [task.source.examples(client, "test") for client in range(4)]
    assert [len(part.texts) for part in train] == [60] * 4
    assert [len(part.texts) for part in test] == [50] * 4
    assert not set(train[0].texts) & set(train[1].texts)
    assert test[0] == test[1]
    assert not set(train[0].texts) & set(test[0].texts)
    assert [part.task for part in train] == ["bbc", "bbc", "sentiment", "sentiment"]


def test_by_domain_every_client_and_every_test_set_has_one() -> None:
    task = PartitionedText(
        datasets=["sentiment"],
        clients_per_dataset=8,
        partition={"kind": "domain"},
        head="trained",
        test_examples=40,
    )
    assert task.groups == tuple(f"sentiment/{d}" for d in DOMAINS for _ in range(2))
    tests = [task.source.examples(client, "test").texts for client in range(8)]
    assert tests[0] == tests[1]
    assert not set(tests[0]) & set(tests[2])


def test_dirichlet_reaches_the_clients() -> None:
    task = PartitionedText(datasets=["bbc"], partition={"kind": "dirichlet", "alpha": 0.1})
    counts = [len(set(task.source.examples(client, "train").labels)) for client in range(2)]
    sizes = [len(task.source.examples(client, "train").texts) for client in range(2)]
    assert min(counts) < 5 or max(sizes) > 2 * min(sizes)


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"datasets": ["bcb"]}, "unknown data set 'bcb'"),
        ({"datasets": ["bbc", "bbc"]}, "a data set is named twice"),
        ({"datasets": ["bbc"], "partition": {"kind": "domain"}}, "0 domains of 'bbc'"),
        ({"partition": {"kind": "random"}}, "partition.kind: Input should be 'iid'"),
        ({"clients": 3}, "clients: Extra inputs"),
        ({"partition": {"alpha": float("inf")}}, "partition.alpha: Input should be a finite"),
    ],
)
def test_parameters_that_do_not_fit(params: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_task(PATH, params)


@pytest.mark.parametrize("kind", ["iid", "dirichlet", "domain"])
def test_no_part_is_smaller_than_asked(kind: str) -> None:
    params = {"datasets": ["sentiment"], "clients_per_dataset": 4}
    cut = {"kind": kind, "alpha": 100.0}
    PartitionedText(**params, partition={**cut, "min_examples": 500}).check_data()
    with pytest.raises(ValueError, match=r"fewer than 9000[ :;].*lower"):
        PartitionedText(**params, partition={**cut, "min_examples": 9000}).check_data()


def test_an_unknown_partition_is_refused() -> None:
    task = PartitionedText(datasets=["bbc"])
    with pytest.raises(ValueError, match="no partition 2: the data make 2, from 0"):
        task.source.examples(2, "train")


def test_it_trains_and_scores_like_any_task() -> None:
    params = {"datasets": FOUR, "train_examples": 64, "test_examples": 20, "max_length": 24}
    task = load_task(PATH, params)
    assert isinstance(task, LoraTask)
    assert isinstance(task, PartitionedText)
    model = attach(task.load_base(), task.lora_config())

    def losses() -> list[float]:
        scores = [task.evaluate(model, one, "test") for one in task.scored_partitions.values()]
        assert [score["num-examples"] for score in scores] == [20] * 4
        return [score["loss"] for score in scores]

    before, start = losses(), read_adapter(model).hash()
    assert task.train(model, 7, TrainPlan(steps=1, batch_size=8))["num-examples"] == 64
    assert read_adapter(model).hash() != start
    plan = TrainPlan(steps=8, batch_size=32, learning_rate=5e-3)
    assert task.train_all(model, plan)["num-examples"] == 8 * 64
    # Every group learns from the union, by more than a fifth on average.
    assert sum(losses()) < 0.8 * sum(before)
