"""The host half: turns a checkpoint into a package. Runs on a server; torch is allowed here."""
