"""Imported once, by the server that a sweep's jobs are forked from. Nothing touches a device."""

from cogvx.libraries import load_libraries
from cogvx.progress import quiet_libraries

quiet_libraries()
load_libraries()

import cogvx.evaluation.evaluate  # noqa: E402
import cogvx.plan.clock  # noqa: E402
import cogvx.training.run  # noqa: E402, F401
