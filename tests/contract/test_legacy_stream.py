"""What only the code for CUDA's libraries has to keep, tried with their streams simulated."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable

import pytest

from flowkv_engine.kv.blocks import Blocks
from flowkv_engine.kv.pool import KVPool
from flowkv_engine.kv.reservations import Reservations
from flowkv_engine.kv.segments import Copy
from flowkv_engine.transport.base import KVConnector
from flowkv_engine.transport.mapped import CudaIpcConnector
from flowkv_engine.transport.nccl import NcclConnector, NcclFailed
from tests.contract.cupy_on_host import busy_legacy_stream, cupy_on_host
from tests.contract.kv_nodes import LINK_TOKEN, SMALL

__all__ = ["cupy_on_host"]

NUM_PROMPTS = 4


def connector(kind: str, pool: KVPool, reservations: Reservations) -> KVConnector:
    """As a node on a GPU makes it."""
    from flowkv_engine.transport.cuda import CudaDevice, CupyNccl

    admits: Callable[[str], bool] = LINK_TOKEN.__eq__
    if kind == "cuda_ipc":
        return CudaIpcConnector(pool, reservations, admits, device=CudaDevice(), io_timeout_s=1.0)
    return NcclConnector(pool, reservations, admits, new_backend=CupyNccl, io_timeout_s=1.0)


@pytest.mark.usefixtures("cupy_on_host")
@pytest.mark.parametrize("cuda", ["12.8", "13.0"])
def test_a_missing_nccl_is_asked_for_as_this_torch_would_bring_it(
    cuda: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from flowkv_engine.transport.cuda import CupyNccl

    monkeypatch.setattr("cupy.cuda.nccl.available", False)
    monkeypatch.setattr("torch.version.cuda", cuda)
    with pytest.raises(NcclFailed, match=f"install nvidia-nccl-cu{cuda[:2]},"):
        CupyNccl()


@pytest.mark.usefixtures("cupy_on_host")
@pytest.mark.parametrize("kind", ["cuda_ipc", "nccl"])
async def test_all_prompts_of_a_step_are_handed_off_while_the_next_one_computes(kind: str) -> None:
    async with contextlib.AsyncExitStack() as stack:
        source, target = (stack.enter_context(KVPool(SMALL, 8)) for _ in range(2))
        source.tensor.normal_()
        reservations = Reservations(Blocks(8))
        sender = await stack.enter_async_context(connector(kind, source, reservations))
        receiver = await stack.enter_async_context(connector(kind, target, reservations))
        link = await sender.connect(await receiver.listen(), LINK_TOKEN, 8)

        async def hand_off(number: int) -> None:
            reserved = reservations.reserve(f"r{number}.0", 1, [], [], 60.0)
            await link.send_blocks(f"r{number}.0", reserved.token, [Copy(number, reserved.block_ids[0], 1)])
            assert source.tensor[number].equal(target.tensor[reserved.block_ids[0]])

        with busy_legacy_stream():
            async with asyncio.TaskGroup() as tasks:
                for number in range(NUM_PROMPTS):
                    tasks.create_task(hand_off(number))
