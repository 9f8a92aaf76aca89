"""Says what a merge will do and take, from headers and configurations alone."""

from anabranch.aggregation.planning.merge_plan import MergePlan as MergePlan
from anabranch.aggregation.planning.planner import plan_merge as plan_merge
