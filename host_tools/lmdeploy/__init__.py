"""What LMDeploy 0.1 to 0.5.3 want beside the weights, and which models they can run at all."""
