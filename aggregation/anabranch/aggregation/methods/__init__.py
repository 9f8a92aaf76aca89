"""Built-in merge methods, one file each, listed here and nowhere else."""

from anabranch.aggregation.method import MergeMethod
from anabranch.aggregation.methods.dare_linear import DARE_LINEAR
from anabranch.aggregation.methods.dare_ties import DARE_TIES
from anabranch.aggregation.methods.fedit import FEDIT
from anabranch.aggregation.methods.geometric_median import GEOMETRIC_MEDIAN
from anabranch.aggregation.methods.iso_c import ISO_C
from anabranch.aggregation.methods.iso_cts import ISO_CTS
from anabranch.aggregation.methods.knots_ties import KNOTS_TIES
from anabranch.aggregation.methods.lora_lego import LORA_LEGO
from anabranch.aggregation.methods.mean import MEAN
from anabranch.aggregation.methods.median import MEDIAN
from anabranch.aggregation.methods.multi_krum import MULTI_KRUM
from anabranch.aggregation.methods.opcm import OPCM
from anabranch.aggregation.methods.task_arithmetic import TASK_ARITHMETIC
from anabranch.aggregation.methods.ties import TIES
from anabranch.aggregation.methods.trimmed_mean import TRIMMED_MEAN
from anabranch.aggregation.methods.tsv_m import TSV_M

BUILT_IN: tuple[MergeMethod, ...] = (
    MEAN,
    TASK_ARITHMETIC,
    TIES,
    DARE_LINEAR,
    DARE_TIES,
    MEDIAN,
    TRIMMED_MEAN,
    MULTI_KRUM,
    GEOMETRIC_MEDIAN,
    FEDIT,
    TSV_M,
    ISO_C,
    ISO_CTS,
    KNOTS_TIES,
    LORA_LEGO,
    OPCM,
)
