"""One module per subcommand of ``mllama``: `add_arguments(parser)` and `run(options) -> exit code`."""
