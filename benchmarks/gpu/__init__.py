"""What one GPU does with and without offload: floors, checks, speed by model size, and the largest model."""
