# SPDX-License-Identifier: Apache-2.0
"""The method, usable without BIDS or nipype.

Needs numpy, scipy and torch; nibabel and SimpleITK are loaded only by the
functions that read, write, correct or register images.  World coordinates are
RAS+ in millimetres and float64 everywhere.
"""
