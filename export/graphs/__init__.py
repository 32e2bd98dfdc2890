"""From torch to ONNX: tracing, precision, recorded outputs, and graphs that others exported."""
