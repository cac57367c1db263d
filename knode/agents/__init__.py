"""What does the work: agents, their signed manifests, the registry, and the runs of their attempts.

Code that did not come with knode runs in a sandbox or not at all, and its manifest's signature and
code are verified before each run. This room knows attempts, not tasks: it must never decide who may
ask for one, nor keep a result.
"""

from knode.agents.effects import Effects, FollowUp
from knode.agents.limits import MAX_RESULT_BYTES, Limits
from knode.agents.manifest import Capability, Manifest, Runtime, parse_manifest, sign_manifest
from knode.agents.registry import AgentEntry, Registry, State
from knode.agents.runtime import AgentResult, Attempt, Progress, Runner
from knode.agents.sandbox import Choice, Sandbox, choose_sandbox

__all__ = [
    "MAX_RESULT_BYTES",
    "AgentEntry",
    "AgentResult",
    "Attempt",
    "Capability",
    "Choice",
    "Effects",
    "FollowUp",
    "Limits",
    "Manifest",
    "Progress",
    "Registry",
    "Runner",
    "Runtime",
    "Sandbox",
    "State",
    "choose_sandbox",
    "parse_manifest",
    "sign_manifest",
]
