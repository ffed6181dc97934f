"""What a run directory says about the saves into it, for people and for monitoring, while training goes on.

What is durable and what has been written is read from the directory, from any machine that mounts it. Stages, rates,
the use of staging memory and errors are in the status pages of the processes that save, on their own machine.
"""

from .durable import Durable
from .in_flight import RankProgress, SaveInFlight
from .processes import Processes, RunProcess, Trouble
from .watcher import Observation, Watcher

__all__ = [
    "Durable",
    "Observation",
    "Processes",
    "RankProgress",
    "RunProcess",
    "SaveInFlight",
    "Trouble",
    "Watcher",
]
