"""llama.cpp's server, out of the wheel that brings it: ``python llama.py MODEL.gguf``. It prints its address."""

import sys
import threading

import xllamacpp

settings = xllamacpp.CommonParams()
settings.model.path = sys.argv[1]
settings.n_ctx, settings.n_parallel = 8192, 4
settings.cpuparams.n_threads = settings.cpuparams_batch.n_threads = 1
settings.hostnames, settings.port = ["127.0.0.1"], 0
settings.warmup = False
server = xllamacpp.Server(settings)
print(server.listening_address, flush=True)
threading.Event().wait()
