# SPDX-License-Identifier: Apache-2.0
"""The method, usable without BIDS or nipype.

Needs numpy, scipy and torch; nibabel and SimpleITK are loaded only by the
functions that read, write, correct or register images.  World coordinates are
RAS+ in millimetres and float64 everywhere.
"""

import os

# A thread of OpenMP that has nothing to do is to sleep.  By default it spins for milliseconds, on
# the processor that the threads of operator_cpu want.  OpenMP reads this when torch loads it.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
