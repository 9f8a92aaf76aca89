"""Built-in merge methods, one file each, listed here and nowhere else."""

from anabranch.aggregation.method import MergeMethod
from anabranch.aggregation.methods.breadcrumbs import BREADCRUMBS
from anabranch.aggregation.methods.breadcrumbs_ties import BREADCRUMBS_TIES
from anabranch.aggregation.methods.bulyan import BULYAN
from anabranch.aggregation.methods.caf import CAF
from anabranch.aggregation.methods.centred_clipping import CENTRED_CLIPPING
from anabranch.aggregation.methods.consensus import CONSENSUS
from anabranch.aggregation.methods.crfl import CRFL
from anabranch.aggregation.methods.dare_linear import DARE_LINEAR
from anabranch.aggregation.methods.dare_ties import DARE_TIES
from anabranch.aggregation.methods.della import DELLA
from anabranch.aggregation.methods.della_linear import DELLA_LINEAR
from anabranch.aggregation.methods.dnc import DNC
from anabranch.aggregation.methods.fedit import FEDIT
from anabranch.aggregation.methods.fisher import FISHER
from anabranch.aggregation.methods.flame import FLAME
from anabranch.aggregation.methods.fltrust import FLTRUST
from anabranch.aggregation.methods.foolsgold import FOOLSGOLD
from anabranch.aggregation.methods.geometric_median import GEOMETRIC_MEDIAN
from anabranch.aggregation.methods.hetlora import HETLORA
from anabranch.aggregation.methods.iso_c import ISO_C
from anabranch.aggregation.methods.iso_cts import ISO_CTS
from anabranch.aggregation.methods.karcher import KARCHER
from anabranch.aggregation.methods.knots_ties import KNOTS_TIES
from anabranch.aggregation.methods.lora_lego import LORA_LEGO
from anabranch.aggregation.methods.magmax import MAGMAX
from anabranch.aggregation.methods.mda import MDA
from anabranch.aggregation.methods.meamed import MEAMED
from anabranch.aggregation.methods.mean import MEAN
from anabranch.aggregation.methods.median import MEDIAN
from anabranch.aggregation.methods.model_stock import MODEL_STOCK
from anabranch.aggregation.methods.multi_krum import MULTI_KRUM
from anabranch.aggregation.methods.multi_slerp import MULTI_SLERP
from anabranch.aggregation.methods.opcm import OPCM
from anabranch.aggregation.methods.pcb import PCB
from anabranch.aggregation.methods.rank_vote import RANK_VOTE
from anabranch.aggregation.methods.robust_ties import ROBUST_TIES
from anabranch.aggregation.methods.sce import SCE
from anabranch.aggregation.methods.sign_vote import SIGN_VOTE
from anabranch.aggregation.methods.slerp import SLERP
from anabranch.aggregation.methods.smea import SMEA
from anabranch.aggregation.methods.supermask import SUPERMASK
from anabranch.aggregation.methods.task_arithmetic import TASK_ARITHMETIC
from anabranch.aggregation.methods.ties import TIES
from anabranch.aggregation.methods.trimmed_mean import TRIMMED_MEAN
from anabranch.aggregation.methods.tsv_m import TSV_M

BUILT_IN: tuple[MergeMethod, ...] = (
    MEAN,
    TASK_ARITHMETIC,
    FISHER,
    TIES,
    DARE_LINEAR,
    DARE_TIES,
    BREADCRUMBS,
    BREADCRUMBS_TIES,
    DELLA,
    DELLA_LINEAR,
    PCB,
    CONSENSUS,
    SCE,
    MAGMAX,
    SIGN_VOTE,
    MODEL_STOCK,
    SLERP,
    MULTI_SLERP,
    KARCHER,
    MEDIAN,
    TRIMMED_MEAN,
    MEAMED,
    MULTI_KRUM,
    GEOMETRIC_MEDIAN,
    CENTRED_CLIPPING,
    MDA,
    SMEA,
    CAF,
    BULYAN,
    DNC,
    FLAME,
    FOOLSGOLD,
    FLTRUST,
    CRFL,
    FEDIT,
    HETLORA,
    TSV_M,
    ISO_C,
    ISO_CTS,
    KNOTS_TIES,
    LORA_LEGO,
    OPCM,
    RANK_VOTE,
    ROBUST_TIES,
    SUPERMASK,
)
