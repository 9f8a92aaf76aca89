"""Takes mergekit's YAML over as a recipe. Loads no torch."""

from anabranch.aggregation.mergekit.configuration import MergekitJob as MergekitJob
from anabranch.aggregation.mergekit.configuration import from_mergekit as from_mergekit
from anabranch.aggregation.mergekit.configuration import is_mergekit as is_mergekit
