import json
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from peft import PeftModel

from anabranch.client.fisher import diagonal_fisher
from anabranch.client.lora import attach, read_adapter, write_adapter
from anabranch.client.models import load_encoder
from anabranch.client.task import Split, TrainPlan, load_task
from anabranch.client.text import Examples, TextClassification, TextConfig
from anabranch.client.text_files import TextFiles, TextFilesSource
from anabranch.vectors import Adapter, LowRank, seeded_start

ANIMALS = ("about cats", "about dogs")
TONES = ("an angry sentence", "a calm sentence", "a sad sentence")
PLAN = TrainPlan(steps=6, batch_size=4, learning_rate=5e-3, seed=1)


class TwoTasks:
    """Partition 0 tells cats from dogs, partition 1 tones."""

    tasks: Mapping[str, tuple[str, ...]] = {"animal": ANIMALS, "tone": TONES}

    def examples(self, partition: int, split: Split) -> Examples:
        if partition == 0:
            texts = ["the cat purrs", "a dog barks at the man", "kittens", "the puppy ran"]
            return Examples("animal", texts, [0, 1, 0, 1])
        return Examples("tone", ["I hate this!", "A quiet day.", "She wept and wept."], [0, 1, 2])


class OneTask(TwoTasks):
    tasks: Mapping[str, tuple[str, ...]] = {"animal": ANIMALS}


@pytest.fixture(scope="module")
def task() -> TextClassification:
    return TextClassification(TextConfig(max_length=16, rank=4), TwoTasks())


@pytest.fixture(scope="module")
def fresh_model(task: TextClassification) -> PeftModel:
    return attach(task.load_base(), task.lora_config())


@pytest.fixture(scope="module")
def start(fresh_model: PeftModel) -> Adapter:
    return seeded_start(read_adapter(fresh_model), 0)


@pytest.fixture
def model(fresh_model: PeftModel, start: Adapter) -> PeftModel:
    write_adapter(fresh_model, start)
    return fresh_model


def test_modules_are_named_as_the_base_names_them(start: Adapter) -> None:
    assert len(start.lora) == 12
    assert start.lora["encoder.layer.0.attention.self.query"].a_rn.shape == (4, 384)
    assert not start.dense


def test_training_lowers_the_loss_and_reports_it(
    task: TextClassification, model: PeftModel
) -> None:
    before = task.evaluate(model, 0, "test")
    metrics = task.train(model, 0, PLAN)
    after = task.evaluate(model, 0, "test")
    assert after["loss"] < before["loss"]
    assert metrics["num-examples"] == before["num-examples"] == 4
    assert after["accuracy"] == 1.0
    assert metrics["train-loss"] > after["loss"]


def test_equal_seeds_give_equal_bits(
    task: TextClassification, model: PeftModel, start: Adapter
) -> None:
    ends = []
    for seed in (1, 1, 2):
        write_adapter(model, start)
        task.train(model, 0, PLAN.model_copy(update={"seed": seed}))
        ends.append(read_adapter(model).hash())
    assert ends[0] == ends[1]
    assert ends[0] != ends[2]


def test_fixed_heads_are_the_base_embeddings_of_the_labels(
    task: TextClassification, model: PeftModel
) -> None:
    class Labels(TwoTasks):
        def examples(self, partition: int, split: Split) -> Examples:
            return Examples("tone", TONES, [0, 1, 2])

    labels = TextClassification(task.config, Labels())
    # A trained adapter must not move the heads.
    task.train(model, 0, PLAN)
    with model.disable_adapter():
        metrics = labels.evaluate(model, 0, "test")
    assert metrics["accuracy"] == 1.0
    tones = labels._heads(model)[2:].double()
    logits = 20.0 * tones @ tones.T
    expected = torch.nn.functional.cross_entropy(logits, torch.arange(3)).item()
    assert metrics["loss"] == pytest.approx(expected, abs=0.05)


def test_batching_and_padding_change_no_score(task: TextClassification, model: PeftModel) -> None:
    exact = task.config.model_copy(update={"precision": "fp32"})
    single = TextClassification(exact.model_copy(update={"evaluation_batch": 1}), TwoTasks())
    together = TextClassification(exact, TwoTasks())
    for partition in (0, 1):
        one = single.evaluate(model, partition, "test")
        assert one == pytest.approx(together.evaluate(model, partition, "test"), abs=1e-4)


def test_pooled_batches_score_each_text_among_its_own_labels(
    task: TextClassification, model: PeftModel
) -> None:
    plan = PLAN.model_copy(update={"batch_size": 7, "steps": 1})
    losses = [task.evaluate(model, partition, "test") for partition in (0, 1)]
    mean = (losses[0]["loss"] * 4 + losses[1]["loss"] * 3) / 7
    metrics = task.train_pooled(model, (0, 1), plan)
    assert metrics["num-examples"] == 7
    assert metrics["train-loss"] == pytest.approx(mean, abs=0.05)


def test_a_trained_head_is_part_of_adapter_and_base() -> None:
    config = TextConfig(max_length=16, rank=4, head="trained")
    task = TextClassification(config, OneTask())
    base = task.load_base()
    head = base.get_parameter("head.weight").detach().clone()
    model = attach(base, task.lora_config())
    adapter = read_adapter(model)
    assert "encoder.encoder.layer.0.attention.self.query" in adapter.lora
    assert torch.equal(adapter.dense["head.weight"], head)
    write_adapter(model, seeded_start(adapter, 0))
    task.train(model, 0, PLAN.model_copy(update={"head_learning_rate": 1e-2}))
    assert task.evaluate(model, 0, "validation")["accuracy"] == 1.0
    moved = (read_adapter(model).dense["head.weight"] - head).abs().max().item()
    # Adam's first steps are as long as the rate: the head took its own.
    assert 0.03 < moved < 0.07


def test_a_trained_head_takes_one_task() -> None:
    with pytest.raises(ValueError, match="head = 'trained' takes one task, not animal, tone"):
        TextClassification(TextConfig(head="trained"), TwoTasks())


def test_a_model_that_is_nowhere_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ValueError, match="cannot load model '/no/such': give minilm, a folder"):
        TextClassification(TextConfig(model="/no/such"), OneTask()).load_base()


def test_a_broken_model_is_one_line(tmp_path: Path) -> None:
    encoder = load_encoder("minilm")
    encoder.save_pretrained(tmp_path)
    broken = TextClassification(TextConfig(model=str(tmp_path)), OneTask())
    (tmp_path / "tokenizer.json").write_text("{")
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "BertTokenizer"}')
    with pytest.raises(ValueError, match=r"^cannot load model .*give minilm, a folder"):
        broken.load_base()
    (tmp_path / "model.safetensors").write_bytes(b"\xff" * 100)
    with pytest.raises(ValueError, match=r"^cannot load model .*give minilm, a folder"):
        load_encoder(str(tmp_path))


def test_texts_longer_than_the_model_reads_are_refused() -> None:
    task = TextClassification(TextConfig(max_length=513), OneTask())
    with pytest.raises(ValueError, match=r"max_length: 513 tokens are more than the 512 .* lower"):
        task.load_base()


@pytest.mark.parametrize("device", ["tpu9", "meta", "cuda:99"])
def test_a_device_that_is_not_here_is_refused(device: str) -> None:
    with pytest.raises(ValueError, match=f"device: '{device}' cannot be used here") as caught:
        TextClassification(TextConfig(device=device), OneTask())
    assert "\n" not in str(caught.value)


LABELS = {"neg": "a bad review", "pos": "a good review"}


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ANABRANCH_DATA", str(tmp_path))
    rows = [{"text": "awful", "label": "neg"}, {"text": "lovely", "label": "pos"}]
    lines = "\n".join(json.dumps(row) for row in rows)
    (tmp_path / "train-0.jsonl").write_text(lines + "\n\n", encoding="utf-8")
    (tmp_path / "test.csv").write_text('label,text\npos,"good, very"\n', encoding="utf-8")
    return tmp_path


def test_an_institution_trains_on_its_own_files(data: Path) -> None:
    params = {"data": {"labels": LABELS, "train": "train-{partition}.jsonl", "test": "test.csv"}}
    task = load_task("anabranch.client.text_files:TextFilesTask", params)
    model = attach(task.load_base(), task.lora_config())
    assert task.train(model, 0, PLAN)["num-examples"] == 2
    assert task.evaluate(model, 0, "test")["accuracy"] == 1.0


@pytest.mark.parametrize(
    ("name", "content"),
    [("a.csv", "text,label\ngood,pos\n"), ("a.jsonl", '{"text": "good", "label": "pos"}')],
)
def test_a_byte_order_mark_is_no_part_of_the_data(data: Path, name: str, content: str) -> None:
    (data / name).write_text(content, encoding="utf-8-sig")
    examples = TextFilesSource(TextFiles(labels=LABELS, test=name)).examples(0, "test")
    assert (examples.texts, examples.labels) == (["good"], [1])


def test_text_that_is_not_utf_8_names_the_file(data: Path) -> None:
    (data / "a.csv").write_bytes("text,label\nsehr schön,pos\n".encode("latin-1"))
    with pytest.raises(ValueError, match=r"^data file 'a.csv' is not UTF-8 text; convert it$"):
        TextFilesSource(TextFiles(labels=LABELS, test="a.csv")).examples(0, "test")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("/etc/passwd", None, "'/etc/passwd' must lie inside the data folder"),
        ("../a.csv", None, "'../a.csv' must lie inside the data folder"),
        ("absent.csv", None, "no data file 'absent.csv' in the data folder; set ANABRANCH_DATA"),
        ("a.txt", "x", "'a.txt' is neither .jsonl nor .csv"),
        ("a.jsonl", "{", "a.jsonl line 1: not JSON"),
        ("a.jsonl", "[]", "a.jsonl line 1: not a JSON object"),
        ("a.jsonl", '{"text": "secret"}', "a.jsonl line 1: wants the fields 'text' and 'label'"),
        ("a.csv", "text,label\nx,secret\n", "a.csv line 2: the label is none of neg, pos"),
    ],
)
def test_files_that_do_not_fit(data: Path, name: str, content: str | None, message: str) -> None:
    if content is not None:
        (data / name).write_text(content, encoding="utf-8")
    source = TextFilesSource(TextFiles(labels=LABELS, train=name))
    with pytest.raises(ValueError, match=message) as caught:
        source.examples(0, "train")
    assert "secret" not in str(caught.value)


def test_the_fisher_is_taken_of_the_task_s_own_labels(
    task: TextClassification, model: PeftModel
) -> None:
    task.train(model, 1, PLAN)
    logits = torch.stack(list(task.logits(model, 1, 64, seed=2)))
    assert logits.shape == (3, 5)
    # The other task's labels are never predicted, so never drawn.
    assert bool((logits[:, :2] == -torch.inf).all())
    importance = diagonal_fisher(model, task.logits(model, 1, 64, seed=2), seed=2)
    assert importance.keys() == read_adapter(model).lora.keys()
    for name, part in importance.items():
        assert isinstance(part, LowRank), name
        assert part.shape == (384, 384)
        assert bool(part.b_mk.isfinite().all() and part.b_mk.any() and part.a_kn.any())
