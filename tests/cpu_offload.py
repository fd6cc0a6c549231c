"""vLLM's native CPU offload without a GPU: its scheduler, manager, eviction and events; only the copy is ours.

vLLM 0.29 refuses `CPUOffloadingSpec` where there is no GPU, because its worker copies by CUDA streams. This one copies
tensors. An engine is given it by `kv_connector_extra_config` (vLLM's own way for specs from elsewhere):

    {"spec_name": "OnCPU", "spec_module_path": "tests.cpu_offload", "cpu_bytes_to_use": ..., ...}
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch
from vllm.v1.kv_offload.base import (
    BlockIDsLoadStoreSpec,
    CanonicalKVCaches,
    GPULoadStoreSpec,
    LoadStoreSpec,
    OffloadingWorker,
    TransferResult,
)
from vllm.v1.kv_offload.cpu.spec import CPUOffloadingSpec


class OnCPU(CPUOffloadingSpec):  # type: ignore[misc]  # vLLM is not followed by mypy
    _worker: OffloadingWorker | None

    def get_worker(self, kv_caches: CanonicalKVCaches) -> OffloadingWorker:
        if self._worker is None:
            self._worker = Copier(kv_caches, self.num_blocks, self.blocks_per_chunk)
        return self._worker


class Copier(OffloadingWorker):  # type: ignore[misc]
    """Args:
    caches: the engine's tensors, a row for each block.
    chunks: how many can be offloaded.
    per_chunk: blocks in each.
    """

    def __init__(self, caches: CanonicalKVCaches, chunks: int, per_chunk: int) -> None:
        self._per_chunk = per_chunk
        self._cache = [each.tensor for each in caches.tensors]
        self._offloaded = [
            torch.zeros((chunks * per_chunk, *tensor.shape[1:]), dtype=tensor.dtype) for tensor in self._cache
        ]
        self._finished: list[TransferResult] = []

    def submit_store(self, job_id: int, src_spec: GPULoadStoreSpec, dst_spec: LoadStoreSpec) -> bool:
        for block, place in self._pairs(src_spec, dst_spec):
            for cache, offloaded in zip(self._cache, self._offloaded, strict=True):
                offloaded[place] = cache[block]
        self._finished.append(TransferResult(job_id, True, 0, 0.0))
        return True

    def submit_load(self, job_id: int, src_spec: LoadStoreSpec, dst_spec: GPULoadStoreSpec) -> bool:
        for block, place in self._pairs(dst_spec, src_spec):
            for cache, offloaded in zip(self._cache, self._offloaded, strict=True):
                cache[block] = offloaded[place]
        self._finished.append(TransferResult(job_id, True, 0, 0.0))
        return True

    def get_finished(self) -> list[TransferResult]:
        finished, self._finished = self._finished, []
        return finished

    def wait(self, job_ids: set[int]) -> None:
        pass  # a copy is done when it has been submitted

    def _pairs(self, gpu: GPULoadStoreSpec, other: LoadStoreSpec) -> Iterator[tuple[int, int]]:
        """(row of the cache, row of what is offloaded) of each block."""
        assert isinstance(other, BlockIDsLoadStoreSpec)
        blocks, chunks = iter(gpu.block_ids), iter(other.block_ids)
        for size, first in zip(gpu.group_sizes, gpu.block_indices, strict=True):
            skipped = first % self._per_chunk
            wanted = -(-(skipped + size) // self._per_chunk)
            rows = (
                int(chunk) * self._per_chunk + i
                for chunk in itertools.islice(chunks, wanted)
                for i in range(self._per_chunk)
            )
            places = list(rows)[skipped : skipped + size]
            yield from ((int(next(blocks)), place) for place in places)
