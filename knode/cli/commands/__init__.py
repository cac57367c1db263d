"""One module a noun. A command checks its arguments, calls the daemon and shows the answer; no more."""
