"""Which setting to take: measured on this machine, and weighed with the routing law (FlashMoBA, arXiv 2511.11571).

``python -m topgather advise`` is the same from a shell.
"""

from ._attention import Advice, Measurement, advise
from ._law import Needle
from ._memory import MemoryAdvice, MemoryMeasurement, advise_memory
from ._shape import AttentionShape

__all__ = [
    "Advice",
    "AttentionShape",
    "Measurement",
    "MemoryAdvice",
    "MemoryMeasurement",
    "Needle",
    "advise",
    "advise_memory",
]
