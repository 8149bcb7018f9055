"""Python models of the Triton server, copied into a workspace and run there, never here."""
