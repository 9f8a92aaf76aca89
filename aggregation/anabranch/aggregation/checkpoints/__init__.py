"""Merges whole models: checkpoints that stay on disk, read and written a stretch at a time."""

from anabranch.aggregation.checkpoints.merge import CheckpointReport as CheckpointReport
from anabranch.aggregation.checkpoints.merge import merge_checkpoints as merge_checkpoints
