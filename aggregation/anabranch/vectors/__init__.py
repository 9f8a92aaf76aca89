"""Task vectors, LoRA adapters, and their sparse and quantised forms.

Pure torch: files are the business of ``peft_folder`` and ``checkpoint`` alone.
"""

from anabranch.vectors.adapter import Adapter as Adapter
from anabranch.vectors.adapter import LoraFactors as LoraFactors
from anabranch.vectors.adapter import seeded_start as seeded_start
from anabranch.vectors.adapter import task_vector as task_vector
from anabranch.vectors.hashing import weights_hash as weights_hash
from anabranch.vectors.task_vector import Delta as Delta
from anabranch.vectors.task_vector import LowRank as LowRank
from anabranch.vectors.task_vector import Stored as Stored
from anabranch.vectors.task_vector import TaskVector as TaskVector
from anabranch.vectors.task_vector import scaled as scaled
from anabranch.vectors.task_vector import stack as stack
