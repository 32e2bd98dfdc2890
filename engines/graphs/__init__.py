"""ONNX as it is edited before a backend compiles it."""
