"""Published results, run again: a small file for each, `jaxalign reproduce NAME` for all (`runner`)."""
