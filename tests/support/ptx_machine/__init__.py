"""A machine that runs the PTX of compiled kernels on CPU tensors, for tests without a GPU.

It shows what the compiler made of a kernel, up to ptxas: layouts, fragments of matrix instructions,
lookups by bytes, barriers and where one is missing (``ptx_machine.race``). Speed, registers and
anything that the ISA leaves open are out of its sight. ``run`` takes PTX,
``ptx_machine.device.launch`` a compiled kernel, and ``ptx_machine.device.emulated`` runs every
launch of host code.
"""

from ptx_machine.machine import run
from ptx_machine.memory import MemoryAccessError
from ptx_machine.race import RaceError
from ptx_machine.warp import MachineError

__all__ = ["MachineError", "MemoryAccessError", "RaceError", "run"]
