import re
import subprocess
import sys
from typing import Any

import pytest
from pydantic import BaseModel, ConfigDict

from anabranch.client.task import LoraTask, TrainPlan, load_task


class _Config(BaseModel):
    model_config = ConfigDict(extra="forbid")
    rank: int = 8


class Toy:
    def __init__(self, **params: Any) -> None:
        self.config = _Config(**params)

    def load_base(self) -> None: ...
    def lora_config(self) -> None: ...
    def train(self) -> None: ...
    def evaluate(self) -> None: ...


class Plain:
    def load_base(self) -> None: ...
    def lora_config(self) -> None: ...
    def train(self) -> None: ...
    def evaluate(self) -> None: ...


class Unfinished:
    def load_base(self) -> None: ...
    def train(self) -> None: ...


@pytest.fixture(autouse=True)
def importable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "toy_tasks", sys.modules[__name__])


def test_builds_the_named_class() -> None:
    task = load_task("toy_tasks:Toy", {"rank": 4})
    assert isinstance(task, LoraTask)
    assert isinstance(task, Toy)
    assert task.config.rank == 4


@pytest.mark.parametrize(
    ("path", "params", "message"),
    [
        ("toy_tasks.Toy", {}, "task 'toy_tasks.Toy' is not of the form 'package.module:Class'"),
        ("absent_module:Toy", {}, "there is no module 'absent_module'; install the package"),
        ("toy_tasks:Absent", {}, "module toy_tasks has no class 'Absent'"),
        ("toy_tasks:Toy", {"rang": 1}, "rang: Extra inputs are not permitted (got 1)"),
        ("toy_tasks:Toy", {"rank": "x"}, "rank: Input should be a valid integer"),
        ("toy_tasks:Plain", {"rank": 1}, "does not take these parameters"),
        ("os:system", {"command": "false"}, "no class"),
        (".toy_tasks:Toy", {}, "not of the form"),
        ("toy_tasks:Unfinished", {}, "lacks lora_config, evaluate"),
    ],
)
def test_says_in_one_line_what_is_wrong(path: str, params: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        load_task(path, params)
    assert "\n" not in str(caught.value)


def test_what_is_no_task_is_never_called(monkeypatch: pytest.MonkeyPatch) -> None:
    class Trap:
        load_base = lora_config = train = None

        def __init__(self) -> None:
            pytest.fail("called")

    for trap in (Trap, lambda: pytest.fail("called")):
        monkeypatch.setattr(sys.modules["toy_tasks"], "Trap", trap, raising=False)
        with pytest.raises(ValueError, match="toy_tasks:Trap"):
            load_task("toy_tasks:Trap")


def test_a_plan_is_strict() -> None:
    with pytest.raises(ValueError, match="greater than 0"):
        TrainPlan(steps=0)
    with pytest.raises(ValueError, match="finite"):
        TrainPlan(steps=1, learning_rate=float("inf"))


def test_importing_the_protocol_loads_no_torch() -> None:
    code = "import sys, anabranch.client.task; assert not {'torch', 'peft'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
