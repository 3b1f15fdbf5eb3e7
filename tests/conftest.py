"""What every test may rely on."""

import os

os.environ["HOCKET_CHAINS"] = "off"
"""No choice of an earlier run decides which solver a test sees; the tests of that memory switch it on."""
