"""mergekit's YAML as a recipe: what it becomes, and what is refused in one line."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from anabranch.aggregation import Recipe
from anabranch.aggregation.mergekit import MergekitJob, from_mergekit, is_mergekit
from anabranch.aggregation.mergekit.methods import METHODS
from anabranch.aggregation.registry import resolve


@pytest.fixture(autouse=True)
def _models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("base", "a", "b"):
        (tmp_path / name).mkdir()


def read(text: str) -> MergekitJob:
    data = yaml.safe_load(text)
    assert is_mergekit(data)
    return from_mergekit(data, "m.yml")


AB = "models: [{model: a, parameters: {weight: 1}}, {model: b, parameters: {weight: 3}}]\n"
PLAIN = "models: [{model: a}, {model: b}]\n"
TWO_DENSITIES = (
    "models: [{model: a, parameters: {weight: 1, density: 0.1}},"
    " {model: b, parameters: {weight: 1, density: 0.2}}]\n"
)
FILTERED_SWITCH = "{rescale: [{filter: mlp, value: false}, {value: true}]}"
ONLY_FILTERED = "{t: [{filter: mlp, value: 1}]}"
BASE = "base_model: base\n"


def of(method: str, text: str = "", models: str = AB, base: str = BASE) -> MergekitJob:
    return read(f"merge_method: {method}\n{models}{base}{text}")


@pytest.mark.parametrize(
    ("job", "recipe"),
    [
        (("ties", "parameters: {density: 0.3, lambda: 0.5}"),
         {"method": "ties", "params": {"density": 0.3}, "scale": 0.5}),
        (("ties", "parameters: {density: '5e-1', int8_mask: true}"),
         {"method": "ties", "params": {"density": 0.5}}),
        (("task_arithmetic",), {"method": "task_arithmetic"}),
        (("task_arithmetic", "parameters: {normalize: true}"), {"method": "mean"}),
        (("dare_linear",), {"method": "dare_linear", "params": {"density": 1.0}, "scale": 4.0}),
        (("breadcrumbs", "parameters: {density: 0.5, lambda: 0.5}"),
         {"method": "breadcrumbs", "params": {"density": 0.5, "gamma": 0.01}, "scale": 2.0}),
        (("breadcrumbs", "parameters: {density: [{value: 0.5}], normalize: true}"),
         {"method": "breadcrumbs", "params": {"density": 0.5, "gamma": 0.01}}),
        (("della",), {"method": "della", "params": {"density": 1.0, "epsilon": 0.15}}),
    ],
)  # fmt: skip
def test_methods_on_task_vectors(job: tuple[str, ...], recipe: dict[str, Any]) -> None:
    found = of(*job)
    assert found.recipe == Recipe(weights=(1, 3), **recipe)
    assert (found.base, found.models) == (Path("base"), (Path("a"), Path("b")))


def test_methods_without_a_base_merge_the_weights_themselves() -> None:
    linear = of("linear", base="")
    assert linear.recipe == Recipe(method="mean", weights=(1, 3))
    assert (linear.base, linear.models) == (None, (Path("a"), Path("b")))
    summed = of("linear", "parameters: {normalize: false}", base="")
    assert summed.recipe.method == "task_arithmetic"
    added = of("linear", "parameters: {weight: 7}")
    assert added.recipe.weights == (1, 3, 7)
    assert added.models == (Path("a"), Path("b"), Path("base"))
    slerp = of("slerp", "parameters: {t: 0.2}", "models: [{model: a}, {model: base}]\n")
    assert slerp.recipe == Recipe(method="slerp", params={"t": 0.2})
    assert (slerp.base, slerp.models) == (None, (Path("base"), Path("a")))
    karcher = of("karcher", "parameters: {max_iter: 5}", "models: [{model: a}, {model: b}]\n", "")
    assert karcher.recipe.params == {"iterations": 5, "tolerance": 1e-5}


def test_a_base_among_the_models_is_no_contribution() -> None:
    job = of("ties", "", "models: [{model: base}, {model: a, parameters: {weight: 2}}]\n")
    assert (job.models, job.recipe.weights) == ((Path("a"),), (2,))


def test_filters_and_gradients_are_rules_of_which_the_last_counts() -> None:
    job = of(
        "ties",
        "parameters:\n"
        "  density: [{filter: mlp, value: [0.2, 0.4]}, {filter: 'q[0]', value: 0.9}, 0.5]\n"
        "  weight: [{filter: attn, value: 7}]\n"
        "  lambda: [1, '5e-1']\n".replace(", 0.5]", ", {value: 0.5}]"),
        "models: [{model: a, parameters: {weight: [{filter: mlp, value: 2}, {value: 1}]}},"
        " {model: b, parameters: {weight: 3}}]\n",
    )
    assert job.recipe == Recipe.model_validate(
        {
            "method": "ties",
            "params": {"density": 0.5},
            "weights": [1, 3],
            "scale": [1, 0.5],
            "modules": [
                {"match": "*q[[]0]*", "params": {"density": 0.9}},
                {"match": "*mlp*", "params": {"density": [0.2, 0.4]}},
                {"match": "*mlp*", "weights": [2, None]},
            ],
        }
    )
    summed = of("breadcrumbs", "parameters: {lambda: [{filter: mlp, value: 2}, {value: [1, 2]}]}")
    assert summed.recipe.scale == (4, 8)
    assert summed.recipe.modules[0].scale == 8


def test_what_differs_is_said() -> None:
    assert of("ties", "dtype: bfloat16").dtype == "bfloat16"
    assert (
        of("ties", "dtype: float32\nout_dtype: float16\ntokenizer_source: base").dtype == "float16"
    )
    (masks,) = of("dare_linear").warnings
    assert masks.startswith("dare_linear: masks are drawn by our own seed")
    (ignored,) = of("ties", "parameters: {int8_mask: true}").warnings
    assert ignored.startswith("int8_mask: is ignored")


def test_every_method_resolves() -> None:
    for name, method in METHODS.items():
        given = ["t: 0.5"] if name == "slerp" else []
        given += ["density: 0.5"] if "density" in method.parameters else []
        given += ["normalize: true"] if method.normalize is False else []
        extra = f"parameters: {{{', '.join(given)}}}" if given else ""
        models = AB if method.weighted else "models: [{model: a}, {model: base}]\n"
        job = of(name, extra, models, "" if name == "linear" else BASE)
        resolved, _ = resolve(job.recipe)
        assert resolved.name == method.name


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (f"merge_method: passthrough\n{AB}", "merge_method: 'passthrough' has no like"),
        ("merge_method: ties\nslices: []", "slices: layers of different models"),
        (f"merge_method: ties\n{AB}{BASE}chat_template: auto", "chat_template: the base's is kept"),
        (f"merge_method: ties\n{AB}{BASE}tokenizer_source: union", "tokenizer_source: is not supp"),
        (f"merge_method: ties\n{AB}{BASE}speed: 9", "speed: is not supported"),
        (f"merge_method: ties\n{AB}", "base_model: ties needs one"),
        ("merge_method: ties\nmodels: 3", "models: must be a list"),
        ("merge_method: ties\nmodels: [3]", "models.0: give model, and parameters"),
        ("merge_method: ties\nmodels: [{model: org/x}]", "models.0: there is no 'org/x' on this"),
        ("merge_method: ties\nmodels: [{model: a+b}]", r"an adapter is merged as one, not baked"),
        ("merge_method: ties\nmodels: [{model: {path: a}}]", "models.0: must be the path"),
        (f"merge_method: ties\nmodels: [{{model: base}}]\n{BASE}", "models: names only the base"),
        (f"merge_method: ties\nmodels: [{{model: a}}]\n{BASE}", "weight: is missing"),
        (f"merge_method: ties\n{AB}{BASE}parameters: [1]", "parameters: must be a table"),
        (f"merge_method: ties\n{AB}{BASE}parameters: {{gamma: 1}}", "gamma: is no param"),
        (f"merge_method: ties\n{AB}{BASE}parameters: {{density: [true, 0.9]}}", "is no gradient"),
        (f"merge_method: ties\n{AB}{BASE}parameters: {{density: [{{filter: mlp}}]}}",
         "density: .* give value, and filter"),
        (f"merge_method: ties\n{AB}{BASE}parameters: {{rescale: [true, true]}}", "is no gradient"),
        (f"merge_method: ties\n{AB}{BASE}parameters: {FILTERED_SWITCH}",
         "rescale: is by filter or a gradient over layers; give one value"),
        (f"merge_method: slerp\nmodels: [{{model: a}}]\n{BASE}parameters: {ONLY_FILTERED}",
         "t: has values by filter only"),
        (f"merge_method: breadcrumbs\n{PLAIN}{BASE}parameters: {{weight: [1, 2]}}",
         "sums by a factor of all weights together, which cannot go by filter or layer"),
        (f"merge_method: ties\n{AB}{BASE}parameters: {{density: much}}", "'much' is no number"),
        (f"merge_method: ties\n{AB}{BASE}parameters: {{normalize: false}}", "set normalize: true"),
        (f"merge_method: ties\n{AB}{BASE}parameters: {{rescale: false}}", "rescale: ties has it"),
        (f"merge_method: ties\n{AB}{BASE}parameters: {{lambda: -1}}", "scale: Input should"),
        (f"merge_method: ties\n{AB}{BASE}dtype: int8", "dtype: 'int8' cannot be written"),
        (f"merge_method: dare_ties\n{AB}{BASE}", "normalize: dare_ties divides by the weights"),
        (f"merge_method: sce\nmodels: [{{model: a}}]\n{BASE}parameters: {{weight: 1}}",
         "weight: is no parameter of sce"),
        (f"merge_method: model_stock\n{PLAIN}{BASE}parameters: {{filter_wise: true}}",
         "filter_wise: model_stock has it false"),
        (f"merge_method: ties\n{TWO_DENSITIES}{BASE}", r"density: is \[0.1, 0.2\] for the models"),
    ],
)  # fmt: skip
def test_what_has_no_like_here_is_one_line(text: str, reason: str) -> None:
    with pytest.raises(ValueError, match=rf"m\.yml: .*{reason}") as caught:
        read(text)
    assert "\n" not in str(caught.value)


def test_reading_mergekits_yaml_loads_no_torch() -> None:
    code = "import sys, anabranch.aggregation.mergekit; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
