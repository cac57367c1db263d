"""Tasks: a request to an agent, on whichever node can and may run it.

A direct task is a request to one peer: at most once, never retried, the result only; a node that is
lost meanwhile leaves it `unknown`. This room must never run an agent for someone whose membership and
role were not checked, and never hide an agent's failure as the mesh's or the mesh's as the agent's.
"""
