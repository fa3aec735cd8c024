"""Decoders of Hugging Face Transformers, unchanged, on contiguous memory placed by a pool.

    model = AutoModelForCausalLM.from_pretrained(path)
    planes = Planes(model, capacity_tokens=4096)
    with EmbeddedPool(planes) as pool:        # or open_pool(Client(target), "gpu0", planes)
        engine = Engine(model, planes, pool)
        engine.submit(request := Request(tokens, most_tokens=100))
        while engine.busy:
            engine.step()

It needs the extra `transformers`. attention.py is what Transformers calls, planes.py the memory
and its copies, fitness.py which models are refused, memory.py the pool, engine.py the batches.
"""

from odma_service.engines.transformers.engine import Engine
from odma_service.engines.transformers.memory import EmbeddedPool, open_pool
from odma_service.engines.transformers.planes import Planes
from odma_service.engines.transformers.requests import Request, Sampling

__all__ = ["EmbeddedPool", "Engine", "Planes", "Request", "Sampling", "open_pool"]
