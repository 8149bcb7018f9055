"""The one definition of everything on disk: names, layouts, config, manifest and archive.

Imports only the standard library, numpy and the error tree. The host half imports it too.
"""
