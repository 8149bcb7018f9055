"""The decoder in torch that every family shares, streamed layer by layer."""
