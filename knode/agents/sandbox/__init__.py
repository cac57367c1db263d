"""Running code that nobody trusts, inside what the operating system can wall off.

A sandbox is chosen once, at the node's start, by trying to break out of it; when none holds, such code
is refused. Nothing of the node may reach inside: no environment, no descriptor, no file but the
attempt's own folder and the agent's code. Nothing of an attempt may be left running after it.
"""

from knode.agents.sandbox.choice import SANDBOXES, Choice, choose_sandbox
from knode.agents.sandbox.sandbox import Command, Ended, OnProgress, Outcome, Sandbox

__all__ = ["SANDBOXES", "Choice", "Command", "Ended", "OnProgress", "Outcome", "Sandbox", "choose_sandbox"]
