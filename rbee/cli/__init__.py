"""The command line, `rbee`: one file a verb, imported when it is used."""
