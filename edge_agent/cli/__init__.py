"""The `sortline-agent` command: `commands` has the parser and every subcommand."""
