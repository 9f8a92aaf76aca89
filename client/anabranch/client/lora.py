"""Between a PEFT model and our Adapter: attach, read, write.

Shape legend: r the adapter's rank, m rows, n columns.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from anabranch.vectors import Adapter, LoraFactors, LowRank, weights_hash
from anabranch.vectors.adapter import A_SUFFIX, B_SUFFIX, Trained
from anabranch.vectors.peft_config import NOT_A_SUM

# PEFT brings transformers, which loads for longer than all else together. Flower starts a process
# for each message to a node, and most of them touch no model: so it is loaded where one is.
if TYPE_CHECKING:
    from peft import LoraConfig, PeftModel
    from peft.tuners.lora import Linear

ADAPTER_NAME = "default"
FROZEN = "anabranch_frozen"
"""Attribute of a LoRA layer: the factors that ``keep_frozen`` gave it."""
PEFT_KEYS = ("task_type", "target_modules", "modules_to_save", "lora_dropout", "fan_in_fan_out")


@dataclass(frozen=True)
class _Slots:
    """Where a model keeps its adapter: LoRA layers and live parameters, by our names."""

    layers: Mapping[str, Linear]
    lora: Mapping[str, tuple[nn.Parameter, nn.Parameter, float, bool]]
    dense: Mapping[str, nn.Parameter]
    peft: Mapping[str, Any]


_SLOTS: WeakKeyDictionary[nn.Module, _Slots] = WeakKeyDictionary()


def base_hash(base: nn.Module) -> str:
    """The name of a base: ``weights_hash`` of its state, before anything is attached to it."""
    return weights_hash(base.state_dict())


def attach(base: nn.Module, config: LoraConfig) -> PeftModel:
    """Put a fresh LoRA adapter on a base, in place.

    Raises:
        ValueError: The configuration asks for what an adapter cannot carry.
    """
    from peft import PeftModel, get_peft_model

    for field, reason in NOT_A_SUM.items():
        _refuse(field, bool(getattr(config, field, None)), reason)
    _refuse("bias", config.bias != "none", "set bias='none', or name the module in modules_to_save")
    _refuse(
        "init_lora_weights",
        config.init_lora_weights not in (True, False, "gaussian"),
        "set init_lora_weights=True: other starts change the base itself",
    )
    with warnings.catch_warnings():
        # PEFT asks every module for an attribute that transformers has renamed.
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
        model = get_peft_model(base, config, adapter_name=ADAPTER_NAME)
    assert isinstance(model, PeftModel)
    _slots(model)
    return model


def read_adapter(model: nn.Module, base_hash: str | None = None) -> Adapter:
    """Copy the adapter out of a model; tensors are on the CPU and share no memory with it.

    Args:
        model: What ``attach`` returned.
        base_hash: Hash of the base, as ``base_hash`` gave it before the adapter was attached.
    """
    slots = _slots(model)
    lora = {
        name: LoraFactors(_copy(a_rn), _copy(b_mr), alpha, rslora)
        for name, (a_rn, b_mr, alpha, rslora) in slots.lora.items()
    }
    dense = {name: _copy(parameter) for name, parameter in slots.dense.items()}
    return Adapter(lora, dense, base_hash, slots.peft)


def write_adapter(model: nn.Module, adapter: Adapter) -> None:
    """Copy an adapter's values into a model.

    Raises:
        ValueError: Names, shapes or scalings differ from the model's own adapter.
    """
    slots = _slots(model)
    _same_names("LoRA modules", adapter.lora, slots.lora)
    _same_names("dense parameters", adapter.dense, slots.dense)
    pairs: list[tuple[str, Tensor, nn.Parameter]] = []
    for name, (a_rn, b_mr, alpha, rslora) in slots.lora.items():
        factors = adapter.lora[name]
        if (factors.alpha, factors.rslora) != (alpha, rslora):
            raise ValueError(
                f"module {name}: the adapter has alpha {factors.alpha:g} and rslora "
                f"{factors.rslora}, the model {alpha:g} and {rslora}; use one LoRA configuration"
            )
        pairs += [(f"{name}.lora_A", factors.a_rn, a_rn), (f"{name}.lora_B", factors.b_mr, b_mr)]
    pairs += [(name, adapter.dense[name], parameter) for name, parameter in slots.dense.items()]
    for name, value, parameter in pairs:
        if value.shape != parameter.shape:
            raise ValueError(
                f"{name} has shape {tuple(value.shape)}, the model's is {tuple(parameter.shape)}; "
                "use the federation's rank and base"
            )
    with torch.no_grad():
        for _, value, parameter in pairs:
            parameter.copy_(value)


def keep_frozen(model: nn.Module, frozen: Mapping[str, LowRank]) -> None:
    """Have a model's modules add frozen factors to what they compute, in place of any before.

    The base is shared by every model on it, and stays as it is.

    Args:
        model: What ``attach`` returned.
        frozen: Factors by module, any LoRA scaling folded in; modules left out add nothing.
    """
    slots = _slots(model)
    for name, layer in slots.layers.items():
        part, like = frozen.get(name), slots.lora[name][0]
        if not hasattr(layer, FROZEN):
            if part is None:
                continue
            layer.register_forward_hook(_add_frozen)
        pair = None if part is None else (part.b_mk.to(like), part.a_kn.to(like))
        setattr(layer, FROZEN, pair)


def _add_frozen(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
    """The hook of ``keep_frozen``: a function of its module alone, so that copies have it too."""
    pair: tuple[Tensor, Tensor] | None = getattr(module, FROZEN)
    if pair is None:
        return output
    b_mk, a_kn = pair
    return output + (inputs[0].to(a_kn.dtype) @ a_kn.T @ b_mk.T).to(output.dtype)


def lower_rank(model: nn.Module, template: Adapter) -> None:
    """Give a model's adapter the ranks, alphas and values of another one, in place.

    Args:
        model: What ``attach`` returned.
        template: What ``Adapter.leading`` makes of this model's own adapter: scalings are the same.
    """
    for name, layer in _slots(model).layers.items():
        factors = template.lora[name]
        for of_adapter, value in ((layer.lora_A, factors.a_rn), (layer.lora_B, factors.b_mr)):
            linear: Any = of_adapter[ADAPTER_NAME]
            linear.weight = nn.Parameter(value.to(linear.weight))
            linear.out_features, linear.in_features = value.shape
        layer.r[ADAPTER_NAME] = factors.rank
        layer.lora_alpha[ADAPTER_NAME] = factors.alpha
    del _SLOTS[model]


def own_parameters(model: nn.Module) -> list[nn.Parameter]:
    """The live parameters of a model's adapter, whether or not they are being trained."""
    slots = _slots(model)
    pairs = [(a_rn, b_mr) for a_rn, b_mr, _, _ in slots.lora.values()]
    return [*(factor for pair in pairs for factor in pair), *slots.dense.values()]


def adapted_layers(model: nn.Module) -> dict[str, Linear]:
    """The layers that LoRA adapts, by module name."""
    from peft import PeftModel
    from peft.tuners.lora import Linear

    assert isinstance(model, PeftModel), "attach() an adapter first"
    named = model.get_base_model().named_modules()
    return {name: module for name, module in named if isinstance(module, Linear)}


def trained_in_full(model: nn.Module, trained: Trained) -> dict[str, nn.Parameter]:
    """Live parameters whose every entry is trained for itself: dense ones, and a lone factor."""
    slots = _slots(model)
    full = dict(slots.dense)
    for name, (a_rn, b_mr, _, _) in slots.lora.items():
        if trained == "a":
            full[name + A_SUFFIX] = a_rn
        elif trained == "b":
            full[name + B_SUFFIX] = b_mr
    return full


@contextmanager
def training(model: nn.Module, trained: Trained) -> Iterator[None]:
    """Freeze the LoRA factor that is not to be trained while the block runs.

    Args:
        model: What ``attach`` returned.
        trained: The factors that may move.

    Raises:
        ValueError: The frozen factor moved all the same, at the end of the block.
    """
    kept = {
        name: a_rn if trained == "b" else b_mr
        for name, (a_rn, b_mr, _, _) in _slots(model).lora.items()
        if trained != "both"
    }
    before = {name: _copy(factor) for name, factor in kept.items()}
    for factor in kept.values():
        factor.requires_grad_(False)
        factor.grad = None
    try:
        yield
        for name, factor in kept.items():
            if not torch.equal(_copy(factor), before[name]):
                raise ValueError(
                    f"the task changed the frozen factor of module {name}; "
                    "train the parameters whose requires_grad is set, and no others"
                )
    finally:
        for factor in kept.values():
            factor.requires_grad_(True)


def _slots(model: nn.Module) -> _Slots:
    """The model's slots, found once: walking the module tree costs more than the copies."""
    from peft import PeftModel

    if model not in _SLOTS:
        if not isinstance(model, PeftModel):
            raise ValueError(f"{type(model).__name__} holds no adapter; call attach() on it first")
        _SLOTS[model] = _find_slots(model)
    return _SLOTS[model]


def _find_slots(model: PeftModel) -> _Slots:
    from peft import LoraConfig
    from peft.tuners.lora import Linear, LoraLayer
    from peft.utils import ModulesToSaveWrapper

    config = model.peft_config[ADAPTER_NAME]
    assert isinstance(config, LoraConfig)
    layers: dict[str, Linear] = {}
    lora: dict[str, tuple[nn.Parameter, nn.Parameter, float, bool]] = {}
    dense: dict[str, nn.Parameter] = {}
    for name, module in model.get_base_model().named_modules():
        if isinstance(module, ModulesToSaveWrapper):
            dense.update(_dense_parameters(name, module.modules_to_save[ADAPTER_NAME]))
        elif isinstance(module, Linear):
            a_rn: Any = module.lora_A[ADAPTER_NAME].weight
            b_mr: Any = module.lora_B[ADAPTER_NAME].weight
            alpha = float(module.lora_alpha[ADAPTER_NAME])
            layers[name] = module
            lora[name] = (a_rn, b_mr, alpha, bool(config.use_rslora))
        elif isinstance(module, LoraLayer):
            raise ValueError(
                f"module {name} is a {type(module).__name__} LoRA layer; "
                "only linear layers merge: leave it out of target_modules"
            )
    peft = {key: _plain(getattr(config, key, None)) for key in PEFT_KEYS}
    peft = {key: value for key, value in peft.items() if value is not None}
    return _Slots(layers, lora, dense, peft)


def _dense_parameters(name: str, module: nn.Module) -> dict[str, nn.Parameter]:
    parameters = dict(module.named_parameters(prefix=name))
    buffers = sorted({f"{name}.{key}" for key in module.state_dict()} - set(parameters))
    if buffers:
        raise ValueError(
            f"module {name} keeps state that is no parameter ({', '.join(buffers)}); "
            "an adapter carries parameters only: use a layer without running statistics"
        )
    return parameters


def _copy(parameter: nn.Parameter) -> Tensor:
    return parameter.detach().to("cpu", copy=True)


def _plain(value: Any) -> Any:
    """Sets, as PEFT keeps its module names, in an order of their own."""
    return sorted(value) if isinstance(value, (set, frozenset)) else value


def _refuse(field: str, asked: bool, reason: str) -> None:
    if asked:
        raise ValueError(f"LoraConfig.{field}: {reason}")


def _same_names(what: str, got: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    if got.keys() != wanted.keys():
        odd = sorted(got.keys() ^ wanted.keys())[:3]
        raise ValueError(f"{what} of the adapter are not the model's; they differ in {odd}")
