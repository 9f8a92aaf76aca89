"""Built-in merge methods, one file each, listed here and nowhere else."""

from anabranch.aggregation.method import MergeMethod
from anabranch.aggregation.methods.dare_linear import DARE_LINEAR
from anabranch.aggregation.methods.dare_ties import DARE_TIES
from anabranch.aggregation.methods.fedit import FEDIT
from anabranch.aggregation.methods.geometric_median import GEOMETRIC_MEDIAN
from anabranch.aggregation.methods.mean import MEAN
from anabranch.aggregation.methods.median import MEDIAN
from anabranch.aggregation.methods.multi_krum import MULTI_KRUM
from anabranch.aggregation.methods.task_arithmetic import TASK_ARITHMETIC
from anabranch.aggregation.methods.ties import TIES
from anabranch.aggregation.methods.trimmed_mean import TRIMMED_MEAN

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
)
