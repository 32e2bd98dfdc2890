"""ONNX Runtime, on CPUs and through CUDA."""
