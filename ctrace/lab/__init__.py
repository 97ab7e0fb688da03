"""Private network namespaces, for the demo, the self-test and the tests.

Nothing here outlives the process that made it, however that process ends: a
namespace has no name and no mount, only a holder process that the kernel kills
together with its parent.
"""

from ctrace.lab.namespaces import Lab, Node

__all__ = ["Lab", "Node"]
