"""The folder that a node lives in: its layout, its configuration, its log, its lock.

Creating a home and reading or mending its configuration need no daemon, because they mend a broken
one. This room must never take a half-made folder for a node, delete what knode did not make, or
write a secret to the log.
"""
