"""Tokenizers from the files models are published with, without running any of their code."""
