"""Where a coordinator keeps its rounds: a database and artifacts, or a simulation's journal."""

from anabranch.coordinator.store.base import Contribution as Contribution
from anabranch.coordinator.store.base import FullError as FullError
from anabranch.coordinator.store.base import Happening as Happening
from anabranch.coordinator.store.base import LostError as LostError
from anabranch.coordinator.store.base import Publication as Publication
from anabranch.coordinator.store.base import Refusal as Refusal
from anabranch.coordinator.store.base import Store as Store
from anabranch.coordinator.store.base import StoreError as StoreError
from anabranch.coordinator.store.base import TakenError as TakenError
from anabranch.coordinator.store.config import StoreConfig as StoreConfig
from anabranch.coordinator.store.folder import FolderStore as FolderStore
from anabranch.coordinator.store.opening import open_store as open_store
