"""The command line's verbs, one file a noun; `millrace.cli` puts them together."""
