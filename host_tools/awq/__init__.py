"""Activation-aware weight quantization, solved from Gram matrices of the linears' inputs."""
