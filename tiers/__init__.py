"""The storage engine: pools of devices, the log, the map, and the volumes on them. It knows nothing of NBD.

A name is imported when it is used first (PEP 562): the command line wants `tiers.units`, and not half a second of
numpy and all of the engine for that.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
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

_HOMES = {
    "CheckReport": "tiers.check",
    "Damage": "tiers.scrubstate",
    "DeviceScrub": "tiers.scrub",
    "DeviceSpec": "tiers.newdevices",
    "DeviceStatus": "tiers.pool",
    "EvacuationStatus": "tiers.evacuate",
    "HeatMap": "tiers.heatmap",
    "Loss": "tiers.losses",
    "Policy": "tiers.policy",
    "PolicyError": "tiers.policy",
    "Pool": "tiers.pool",
    "PoolSettings": "tiers.settings",
    "PoolStatus": "tiers.pool",
    "Rebuilt": "tiers.rebuild",
    "Result": "tiers.scrubstate",
    "ScrubStatus": "tiers.scrub",
    "Snapshot": "tiers.snapshot",
    "SnapshotStatus": "tiers.pool",
    "TierError": "tiers.errors",
    "Volume": "tiers.volume",
    "VolumeStatus": "tiers.pool",
    "rebuild_catalog": "tiers.rebuild",
    "validate_name": "tiers.names",
    "validate_volume_size": "tiers.names",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(_HOMES[name]), name)
    return value
