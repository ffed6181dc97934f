"""What a run directory says about the saves into it, for people and for monitoring, while training goes on.

Everything is read from the directory: nothing in the training process takes part, or notices. What is not on the disk
(stages within a save, the use of its memory) is in `SaveHandle.stats` and `SNAPSTONE_TRACE` of that process.
"""

from .durable import Durable
from .in_flight import RankProgress, SaveInFlight
from .watcher import Observation, Watcher

__all__ = ["Durable", "Observation", "RankProgress", "SaveInFlight", "Watcher"]
