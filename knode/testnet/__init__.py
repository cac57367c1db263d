"""Real nodes as real processes on one machine, made and driven by the real command line.

    net = Testnet.up(folder, nodes=3)
    net.kill("node2")
    net.restart("node2")
    net.down()

This room must never reach into a node: what it does, a user could type. It must leave nothing running
and nothing on the disk that it made, whether it is told to go down, fails or is interrupted.
"""

from knode.testnet.testnet import Testnet, TestnetNode

__all__ = ["Testnet", "TestnetNode"]
