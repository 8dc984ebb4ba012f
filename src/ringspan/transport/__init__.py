"""Transports: how shards move. In one process, over a process group, through peer memory, and alone."""

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from ringspan.errors import RingspanError
from ringspan.transport.in_process import InProcessTransport, SingleRank, run_in_process
from ringspan.transport.launched import check_not_launched, is_launched
from ringspan.transport.peer_memory import SomePeers, peer_memory
from ringspan.transport.peers import PeerMemory
from ringspan.transport.process_group import ProcessGroupTransport, process_group_transport
from ringspan.transport.protocol import Parcel, Pending, Transport, WhenWaited, agree, agree_again, works
from ringspan.transport.start import start_ranks
from ringspan.transport.subgroup import Subgroup

__all__ = [
    "InProcessTransport",
    "Parcel",
    "PeerMemory",
    "Pending",
    "ProcessGroupTransport",
    "SingleRank",
    "SomePeers",
    "Subgroup",
    "Transport",
    "WhenWaited",
    "agree",
    "agree_again",
    "check_not_launched",
    "is_launched",
    "make_transport",
    "peer_memory",
    "run_in_process",
    "start_ranks",
    "works",
]


def make_transport(mesh_or_group: DeviceMesh | dist.ProcessGroup | InProcessTransport | None) -> Transport:
    """The transport over `mesh_or_group`: a 1-D mesh, a process group, an in-process group, or None for the default group or one rank.

    Raises:
        RingspanError: for anything else, and for None before a rank that was launched beside others has joined them.
    """
    if isinstance(mesh_or_group, InProcessTransport):
        return mesh_or_group
    if mesh_or_group is None:
        world = dist.group.WORLD if dist.is_available() and dist.is_initialized() else None
        if world is None:
            check_not_launched()
        return SingleRank() if world is None else process_group_transport(world)
    if isinstance(mesh_or_group, DeviceMesh):
        if mesh_or_group.ndim != 1:
            raise RingspanError(
                f"a mesh with axes {mesh_or_group.mesh_dim_names or mesh_or_group.shape}",
                f"it has {mesh_or_group.ndim} axes",
                "A sequence is split over one axis",
                "mesh['name of the context axis']",
            )
        return process_group_transport(mesh_or_group.get_group())
    if isinstance(mesh_or_group, dist.ProcessGroup):
        return process_group_transport(mesh_or_group)
    raise RingspanError(
        f"a group of type {type(mesh_or_group).__name__}",
        "it is no mesh and no group",
        "ContextParallel takes a DeviceMesh with one axis, a ProcessGroup, the group of run_in_process, or None",
        "None, for the default process group",
    )
