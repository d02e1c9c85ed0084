"""Compile the C++ (and CUDA) libraries beside the package; everything else is in pyproject.toml.

HYPERFORMER_FAST_BUILD   auto (default) | cpu | cuda | all | none, see build_tools/plan.py
CXX, CXXFLAGS, LDFLAGS   the C++ compiler ("ccache g++ -pthread" too), and flags to add; they cannot turn IEEE
                         arithmetic off, which the kernels need
CUDA_HOME                a CUDA toolkit; TORCH_CUDA_ARCH_LIST the architectures, default 8.0;8.6;9.0+PTX
                         (Blackwell runs what its driver makes of the last, or 10.0 or 12.0 of its own)
MAX_JOBS                 compilers run at once, default the number of processors

Through ninja, objects are kept in build/objects and only what an edit concerns is compiled anew.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent / "build_tools"))

from native_build import COMMANDS, EXTENSION
from setuptools import setup

setup(ext_modules=[EXTENSION], cmdclass=COMMANDS)
