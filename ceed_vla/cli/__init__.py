"""The command line: `ceed-vla <command>`, its table of commands, flags and help."""
