"""Services of the process: memory, files, devices and other processes. Must not import models or quantization."""
