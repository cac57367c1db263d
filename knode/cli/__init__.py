"""The command line: arguments in, calls to the daemon, documents or plain text out.

`main` is the program, `app` the tree of commands, `session` what every command is given, `render` how
documents read on a terminal, `daemon` how the daemon's process is started and stopped; each noun has
its module in `commands`. Everything is imported when it is needed: `knode --help` must cost little
more than a program that does nothing.

This room must never hold logic of the node, write anything but data to standard output, print a
remote text to a terminal unfiltered, or take a secret as an argument.
"""
