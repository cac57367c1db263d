"""The composition root: builds the rooms of one node, supervises them, and nothing else.

It also makes a home (`setup`), because that is where all rooms leave their first files. What the node
does is in the rooms below; here must be no protocol, no rule and no format.
"""

from knode.node.node import Machine, Node
from knode.node.setup import initialise, prepare_home

__all__ = ["Machine", "Node", "initialise", "prepare_home"]
