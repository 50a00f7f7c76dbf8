"""What the jobs of a sweep share: imported once, by the server that they are forked from. Nothing here touches a device."""

from cogvx.progress import quiet_libraries

quiet_libraries()

import cogvx.evaluation.evaluate  # noqa: E402
import cogvx.plan.clock  # noqa: E402
import cogvx.training.trainer  # noqa: E402, F401
