"""What the kernels compute, in numpy and float64: the twins that tests compare them with."""
