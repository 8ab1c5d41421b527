"""The `atoll` command. Modules are imported only when their command runs: most commands are done in a tenth of a second."""
