"""TensorRT, its lean runtime, and TensorRT for RTX."""
