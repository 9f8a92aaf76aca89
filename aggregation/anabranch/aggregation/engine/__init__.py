"""Runs merge methods on cohorts in bounded memory: two passes, then back to an adapter."""

from anabranch.aggregation.engine.adapters import MergeReport as MergeReport
from anabranch.aggregation.engine.adapters import MergeResult as MergeResult
from anabranch.aggregation.engine.adapters import merge_adapters as merge_adapters
from anabranch.aggregation.engine.gram import cosine_similarity as cosine_similarity
from anabranch.aggregation.engine.rows import DEFAULT_BUDGET_BYTES as DEFAULT_BUDGET_BYTES
from anabranch.aggregation.engine.stream import merge_task_vectors as merge_task_vectors
