"""What suspicion looks for and what it does. Loads no torch."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

Signal = Literal["spectrum", "energy", "factors", "cosine"]
"""``spectrum``: one singular direction holds most of a module's change. ``energy``: the change is
larger than the others'. ``factors``: it sits in few rows or columns, or in B more (or less) than in
A. ``cosine``: it is another's copy, or points against the others."""

SIGNALS: tuple[Signal, ...] = ("spectrum", "energy", "factors", "cosine")

Action = Literal["note", "weigh_down", "mask_module", "exclude", "ask"]
"""``note``: only the report says so. ``weigh_down``: the change is scaled by threshold / score.
``mask_module``: the module is merged without it. ``exclude``: all modules are. ``ask``: the merge
stops and names it, until somebody decides (``allow``, or leaving it out)."""

FEWEST = 4
"""Contributions of which one can be told from the others."""


class SuspicionConfig(BaseModel):
    """Which contributions stand out from the cohort, before the method sees them."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    action: Action = "mask_module"
    """What becomes of who is found; of a whole task vector, ``mask_module`` is ``exclude``."""
    actions: dict[Signal, Action] = Field(default_factory=dict)
    """What else becomes of it at some signals."""
    signals: tuple[Signal, ...] = Field(SIGNALS, min_length=1)
    """What is looked for."""
    threshold: float = Field(6.0, gt=0)
    """Robust z-score (distance from the median in median absolute deviations, as standard
    deviations) from which a contribution is found."""
    alike: float = Field(0.95, gt=0, le=1)
    """Cosine from which two task vectors are copies, where most pairs are far from it."""
    allow: tuple[str, ...] = ()
    """Contributions that somebody has looked at and let through: they are only noted."""


DataRule = Literal["adamerging", "concrete", "dam", "dam_two_masks"]
"""``adamerging``: a coefficient per contribution and module, by entropy (2310.02575). ``concrete``:
a mask that all contributions share, too (2312.06173). ``dam``: one mask, learned beside a search
for perturbations, as the code of DAM (2410.13910) that was released has it. ``dam_two_masks``: the
paper's two masks, one for the task and one that finds the backdoor, in our reading."""

Data = Literal["own", "public", "none"]
"""Whose unlabelled inputs a coordinator calibrates on: its own, public ones, or none."""

NEED_DATA: tuple[DataRule, ...] = ("adamerging", "concrete", "dam", "dam_two_masks")


class MaskingConfig(BaseModel):
    """A merge that learns on unlabelled inputs. Defaults are those of DAM's released code."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    rule: DataRule = "dam"
    """What is learned."""
    data: Data = "none"
    """Whose inputs; with ``none`` no rule here can be chosen."""
    split: Literal["train", "validation"] = "validation"
    """Which part of them. A test split is for judging what comes out, and cannot be named."""
    mask_steps: int = Field(1000, ge=0, le=100_000)
    """Steps of the mask."""
    coefficient_steps: int = Field(1000, ge=0, le=100_000)
    """Steps of the coefficients after it."""
    batch_size: int = Field(16, ge=1)
    """Inputs of each task in a step."""
    coefficient: float = Field(0.3, gt=0)
    """Where every coefficient begins."""
    inner_lr: float = Field(1.0, ge=0)
    """Adam's step of the coefficients for each mask that is drawn, from the beginning each time."""
    mask_lr: float = Field(1e-3, gt=0)
    """Adam's step of the masks' logits."""
    coefficient_lr: float = Field(1e-3, gt=0)
    """Adam's step of the coefficients once the mask stands."""
    clamp: bool = True
    """Whether coefficients stay within 0 and 1."""
    temperature: float = Field(0.5, gt=0)
    """Of the relaxed Bernoulli draws: lower ones are nearer to 0 and 1."""
    perturbation_lr: float = Field(1e-4, gt=0)
    """Adam's step of the perturbations, in the units of the inputs (pixels, or embeddings)."""
    perturbation_norm: float | None = Field(None, gt=0)
    """Largest L2 norm of a perturbation; None sets none."""
    perturbation_weight: float = Field(0.1, ge=0)
    """What perturbed inputs count for beside clean ones."""
    wanted: Literal["entropy", "consistency"] = "entropy"
    """What is wanted of inputs: low entropy, as released, whatever the class; or the class that the
    plain average gives to the clean input, perturbed or not (ours)."""
    seed: int = Field(0, ge=0)
    """Of everything that is drawn."""


def check_contract(config: MaskingConfig) -> None:
    """Refuse a rule that needs data where there is none.

    Raises:
        ValueError: It is so.
    """
    if config.data == "none" and config.rule in NEED_DATA:
        raise ValueError(
            f"masking: {config.rule} learns on unlabelled inputs, and data is none; set data to "
            "own or public, or merge by a rule that needs none, such as ties beside suspicion"
        )
