"""The CUDA driver behind one seam: devices, streams, memory."""
