"""Store KV in one process and retrieve it in another."""

import multiprocessing

import numpy as np
from local_server import start_server

import kvcore

TOKENS = np.arange(1024, dtype=np.uint32)
SHAPE = (64, 16, 256)  # Blocks, tokens per block, bytes per token.
VIEW = kvcore.TensorView(0, 0, SHAPE, (4096, 256, 1))  # Handle, offset, shape, strides.
GROUP = kvcore.CacheGroup("NSD", "uint8", 16, (VIEW,))
KV = np.random.default_rng(0).integers(0, 256, SHAPE, dtype=np.uint8)


def run_engine(address: str, name: str) -> None:
    """Retrieve what the server has of the prompt, else compute and store it."""
    memory = kvcore.Segment.create(f"example-{name}", KV.nbytes, touch=True)
    with kvcore.KVClient(address) as client, memory:
        handles = (kvcore.PosixShm(memory.name, 0, KV.nbytes),)
        client.register_kv_cache(
            kvcore.RegisterKVCache(name, name, "model@1", 1, 0, handles, (GROUP,))
        )
        session, cache = kvcore.SessionKey(name, "1"), memory.array.reshape(SHAPE)
        hit = client.lookup(session, "model@1", 1, TOKENS).num_tokens
        if hit:
            client.retrieve(session, name, 0, hit, [range(64)])
            print(f"{name}: {hit} tokens retrieved, equal: {np.array_equal(cache, KV)}")
        else:
            cache[:] = KV  # The model computes.
            print(f"{name}:", client.store(session, name, 0, 1024, [range(64)]))


if __name__ == "__main__":
    with start_server() as server:
        for name in ("engine-a", "engine-b"):
            engine = multiprocessing.Process(target=run_engine, args=(server, name))
            engine.start()
            engine.join()
