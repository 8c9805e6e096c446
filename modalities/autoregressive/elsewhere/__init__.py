"""Teachers that are not in this process: recorded before training, or served by others."""

from .cached import Cached
from .remote import Remote

__all__ = ["Cached", "Remote"]
