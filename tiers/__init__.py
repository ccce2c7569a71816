"""The storage engine: pools of devices, the log, the map, and the volumes on them. It knows nothing of NBD."""

from tiers.check import CheckReport
from tiers.errors import TierError
from tiers.evacuate import EvacuationStatus
from tiers.heatmap import HeatMap
from tiers.losses import Loss
from tiers.names import validate_name, validate_volume_size
from tiers.newdevices import DeviceSpec
from tiers.policy import Policy, PolicyError
from tiers.pool import DeviceStatus, Pool, PoolStatus, SnapshotStatus, VolumeStatus
from tiers.rebuild import Rebuilt, rebuild_catalog
from tiers.scrub import DeviceScrub, ScrubStatus
from tiers.scrubstate import Damage, Result
from tiers.settings import PoolSettings
from tiers.snapshot import Snapshot
from tiers.volume import Volume

__all__ = [
    "CheckReport",
    "Damage",
    "DeviceScrub",
    "DeviceSpec",
    "DeviceStatus",
    "EvacuationStatus",
    "HeatMap",
    "Loss",
    "Policy",
    "PolicyError",
    "Pool",
    "PoolSettings",
    "PoolStatus",
    "Rebuilt",
    "Result",
    "ScrubStatus",
    "Snapshot",
    "SnapshotStatus",
    "TierError",
    "Volume",
    "VolumeStatus",
    "rebuild_catalog",
    "validate_name",
    "validate_volume_size",
]
