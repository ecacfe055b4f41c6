# SPDX-License-Identifier: Apache-2.0
"""irem-bids: isotropic MR images from thick-slice stacks, as a BIDS App."""

__version__ = "0.1.0"
