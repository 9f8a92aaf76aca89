"""Where a coordinator keeps its rounds. ``Store`` is the interface; ``FolderStore`` the default."""

from anabranch.coordinator.store.base import Contribution as Contribution
from anabranch.coordinator.store.base import Publication as Publication
from anabranch.coordinator.store.base import Refusal as Refusal
from anabranch.coordinator.store.base import Store as Store
from anabranch.coordinator.store.folder import FolderStore as FolderStore
