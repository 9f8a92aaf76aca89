"""Attackers for simulated federations: each file one idea, listed here and nowhere else.

An attack on vectors is a pure function from what colluders see to what they send.
"""

from anabranch.simulation.attacks.adaptive import ADAPTIVE
from anabranch.simulation.attacks.alie import ALIE
from anabranch.simulation.attacks.attack import Attack
from anabranch.simulation.attacks.free_rider import FREE_RIDER
from anabranch.simulation.attacks.gaussian import GAUSSIAN
from anabranch.simulation.attacks.ipm import IPM
from anabranch.simulation.attacks.mimic import MIMIC
from anabranch.simulation.attacks.min_max import MIN_MAX
from anabranch.simulation.attacks.min_sum import MIN_SUM
from anabranch.simulation.attacks.sign_flip import SIGN_FLIP
from anabranch.simulation.attacks.sybil import SYBIL
from anabranch.simulation.attacks.vem import VEM

BUILT_IN: tuple[Attack, ...] = (
    SIGN_FLIP,
    GAUSSIAN,
    ALIE,
    IPM,
    MIN_MAX,
    MIN_SUM,
    MIMIC,
    FREE_RIDER,
    SYBIL,
    VEM,
    ADAPTIVE,
)
