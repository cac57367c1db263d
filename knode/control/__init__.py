"""The daemon's socket: JSON-RPC 2.0 between one node and the programs of the same user.

`protocol` says what a line is. On the daemon's side `server` listens, `connection` talks to one client,
`methods` is the table of what can be asked, `parameters` with what, and `daemon` the process around
them; on the command line's side `client` asks. The framing knows nothing of nodes.

This room must never listen on a network, serve another user than the owner of the home (or root),
show a fault's traceback to a client, or hold logic that is not the node's. Nothing is imported here:
the client must not pay for the server's trio.
"""
