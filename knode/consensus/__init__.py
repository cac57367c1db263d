"""Consensus: how the voters of a cell agree on one log of commands, whoever crashes or is cut off.

The core (`raft` and what it is made of) is the Raft of Ongaro's dissertation (2014), a pure state machine:
messages, ticks and proposals go in; `Ready` values come out that say what must be made durable, what may be
sent when, and what is committed. `journal` keeps the log on disk, `driver` drives both and the state machine,
`replica` is the shell around them in the mesh.

Raft is safe against crashes and lost messages, not against lying members: it lives inside one owner's cell.

This room knows no task: what a command means is the state machine's. It must never let anyone acknowledge,
vote or count what is not durable, and never let a voter whose disk lost something it had promised vote
again.
"""
