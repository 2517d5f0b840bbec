"""Print the folder of the CUDA toolkit that NVIDIA's packages from PyPI form, or nothing where there is none.

CMake asks the Python it builds for. With CUDA 13 the packages nvidia-cuda-nvcc, -runtime, -crt, -cccl and nvidia-nvvm
lay their files into one folder, ``site-packages/nvidia/cu13``. Both the module path and the environment's own
site-packages are searched, because an isolated build hides the latter.
"""

from __future__ import annotations

import re
import sys
import sysconfig
from pathlib import Path


def find_toolkit(site_folders: list[str], program: str = "nvcc") -> Path | None:
    """The newest ``nvidia/cu<version>`` folder that holds the program, in the first site folder that has one."""
    for site_folder in dict.fromkeys(site_folders):
        programs = Path(site_folder).glob(f"nvidia/cu*/bin/{program}")
        folders = [path.parents[1] for path in programs if re.fullmatch(r"cu\d+", path.parents[1].name)]
        if folders:
            return max(folders, key=lambda folder: int(folder.name[2:]))
    return None


if __name__ == "__main__":
    toolkit = find_toolkit([*filter(None, sys.path), sysconfig.get_path("purelib"), sysconfig.get_path("platlib")])
    print(toolkit or "")
