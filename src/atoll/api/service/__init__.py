"""What the API does, without HTTP: every rule about who may change what, over the store's port."""

from atoll.api.service.access import SYSTEM, Caller, Need, authorize
from atoll.api.service.context import KINDS, RequestKey
from atoll.api.service.control_plane import LocalControlPlane
from atoll.api.service.service import Service

__all__ = ["KINDS", "SYSTEM", "Caller", "LocalControlPlane", "Need", "RequestKey", "Service", "authorize"]
