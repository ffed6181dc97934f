"""SavePlanner: which rank writes what in a `dcp.save`, decided once for as long as nothing changes.

A save is planned in these steps; DCP gathers after the first and scatters after the second.

1. Each rank compares its state with those that it saved lately (`facts_of`). If it knows the state, it proposes the
   digest of its plan, else the plan itself, as columns.
2. The coordinator looks the digests up. If it has decided on exactly these, in this order, it decides the same again.
   If not, it plans anew: from the plans that it was sent, and those that it knows by their digest. If it lacks one, it
   calls all ranks to meet again in step 3. Each rank gets a bit per item that it holds.
3. Each rank takes the items whose bits are set, and remembers its plan: only now a digest will do for it.

Plans are known by their content, never by a name or a count of saves. So it does not matter which planner object, group
or coordinator decided before, or who forgot what: a digest that is not known costs a second round and nothing else.
"""

from __future__ import annotations

import dataclasses
import uuid
from typing import Any

import torch
from torch.distributed._shard.sharded_tensor.api import ShardedTensor
from torch.distributed.checkpoint._nested_dict import flatten_state_dict
from torch.distributed.checkpoint._sharded_tensor_utils import _flatten_sharded_tensors
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner, create_default_local_save_plan
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, StorageMeta
from torch.distributed.checkpoint.planner import SavePlan
from torch.distributed.tensor import DTensor

from .. import garbage
from .global_plan import GlobalPlan
from .local_plan import LocalPlan, facts_of
from .plan_columns import PlanColumns
from .plan_exchange import Decision, Meeting, Proposal, meet_again
from .planned_entries import PlannedMetadata
from .recent import Recent

__all__ = ["SavePlanner"]

PLANS_MAX = 8  # of models, optimizers and so on that one process saves in turns

_local_plans: Recent[LocalPlan] = Recent(PLANS_MAX)
_global_plans: Recent[GlobalPlan] = Recent(PLANS_MAX)

# Where a subclass has its own, it expects plans with items, as stock passes them.
_STEPS = ("create_local_plan", "create_global_plan", "finish_plan", "_dedup_save_plans")


class SavePlanner(DefaultSavePlanner):
    """Plans a `dcp.save`: what several ranks hold is written once, by the one of them that writes the fewest bytes.

    Shards count with their own bytes. Items of up to 1 KiB that the same ranks hold stay together. Of a Python value
    the lowest rank's is saved. Plans are kept from save to save, also between planner objects, and used again while
    names, paths, shapes, dtypes and placements are the same on all ranks; then the ranks exchange digests.

    Args:
        flatten_state_dict, flatten_sharded_tensors, dedup_save_to_lowest_rank: as in DefaultSavePlanner.
        dedup_replicated_tensors: accepted and ignored, as in DefaultSavePlanner.
        enable_plan_caching: False plans every save anew and passes plans with their items, as stock does; so does a
            subclass with planning steps of its own. The same on every rank.

    Raises:
        IncompatibleCheckpointError: from the save, inside DCP's CheckpointException: ranks have different dtypes or
            shapes under one name, or shards overlap or leave a hole.
    """

    def __init__(
        self,
        flatten_state_dict: bool = True,
        flatten_sharded_tensors: bool = True,
        dedup_replicated_tensors: bool | None = None,
        dedup_save_to_lowest_rank: bool = False,
        enable_plan_caching: bool = True,
    ) -> None:
        super().__init__(
            flatten_state_dict,
            flatten_sharded_tensors,
            dedup_replicated_tensors,
            dedup_save_to_lowest_rank,
            enable_plan_caching=False,  # stock's cache is one entry per class name, and does not look at dtypes
        )
        own_steps = [name for name in _STEPS if getattr(type(self), name) is not getattr(SavePlanner, name)]
        self._exchanges_digests = enable_plan_caching and not own_steps
        self._local: LocalPlan | None = None
        self._proposals: list[Proposal] = []
        self._columns: list[PlanColumns | None] = []  # of each proposal, None where only its digest is known

    def __getstate__(self) -> dict[str, Any]:
        """For the process executor: without the state that was saved last."""
        of_a_save = {"state_dict", "plan", "global_plan", "metadata"}
        kept = {name: value for name, value in self.__dict__.items() if name not in of_a_save}
        return kept | {"mappings": {}, "_local": None, "_proposals": [], "_columns": []}

    def set_up_planner(
        self, state_dict: dict[str, Any], storage_meta: StorageMeta | None = None, is_coordinator: bool = False
    ) -> None:
        with garbage.paused():
            if self.flatten_state_dict:
                state_dict, self.mappings = flatten_state_dict(state_dict)
            # Once flat, a state shows whether stock's pass over it, for nested ShardedTensors, finds anything.
            flat = self.flatten_state_dict and not any(isinstance(one, ShardedTensor) for one in state_dict.values())
            if self.flatten_sharded_tensors and not flat:
                state_dict = _flatten_sharded_tensors(state_dict)
        self.state_dict = state_dict
        self.is_coordinator = is_coordinator

    def create_local_plan(self) -> SavePlan:
        if not self._exchanges_digests:
            return super().create_local_plan()
        with garbage.paused():
            facts = facts_of(self.state_dict, self.mappings, self.flatten_state_dict)
            known = _local_plans.find(lambda plan: plan.facts == facts)
            local = self._local = known or self._describe(facts)
        self.plan = SavePlan(list(local.items), planner_data=self._paths())
        columns = None if known else local.columns
        return SavePlan([], planner_data=Proposal(local.columns.digest, columns, self.is_coordinator), usable=False)

    def _describe(self, facts: tuple[Any, ...]) -> LocalPlan:
        items = create_default_local_save_plan(self.state_dict, self.is_coordinator).items
        return LocalPlan(facts, items, PlanColumns.of(items, self._paths()))

    def _paths(self) -> dict[str, Any] | None:
        return self.mappings if self.flatten_state_dict else None

    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        proposals = [plan.planner_data for plan in all_plans if isinstance(plan.planner_data, Proposal)]
        if len(proposals) != (len(all_plans) if self._exchanges_digests else 0):
            raise ValueError("SavePlanner: ranks differ in enable_plan_caching, or in the planner's class")
        if not self._exchanges_digests:
            return super().create_global_plan(all_plans)
        self._proposals = proposals
        self._columns = self._known_columns()
        if None in self._columns:
            decisions = self._call_meeting()
            self.metadata = PlannedMetadata({})  # filled at the meeting
        else:
            decided = self._decide()
            decisions = [Decision(mask) for mask in decided.masks]
            self.metadata = decided.metadata()
        self.global_plan = [
            dataclasses.replace(plan, planner_data=decision)
            for plan, decision in zip(all_plans, decisions, strict=True)
        ]
        return self.global_plan, self.metadata

    def _known_columns(self) -> list[PlanColumns | None]:
        """Each rank's columns, as it sent them, as another sent them with the same digest, or as remembered."""
        assert self._local is not None
        known = {digest: columns for plan in _global_plans.all() for digest, columns in plan.columns.items()}
        sent = [self._local.columns, *(proposal.columns for proposal in self._proposals)]
        known |= {columns.digest: columns for columns in sent if columns is not None}
        return [known.get(proposal.digest) for proposal in self._proposals]

    def _decide(self) -> GlobalPlan:
        key = (tuple(proposal.digest for proposal in self._proposals), self.dedup_save_to_lowest_rank)
        decided = _global_plans.find(lambda plan: plan.key == key)
        if decided is None:
            with garbage.paused():
                columns = [one for one in self._columns if one is not None]
                assert len(columns) == len(self._proposals)
                decided = GlobalPlan.of(columns, lowest_rank=self.dedup_save_to_lowest_rank)
            _global_plans.put(decided)
        return decided

    def _call_meeting(self) -> list[Decision]:
        token, world_size, leader = uuid.uuid4().hex, len(self._columns), self._leader()
        return [
            Decision(None, Meeting(token, (index - leader) % world_size, world_size, must_bring=columns is None))
            for index, columns in enumerate(self._columns)
        ]

    def _leader(self) -> int:
        """The coordinator's place among the plans."""
        return next((index for index, proposal in enumerate(self._proposals) if proposal.is_coordinator), 0)

    def finish_plan(self, new_plan: SavePlan) -> SavePlan:
        decision = new_plan.planner_data
        if not isinstance(decision, Decision):
            return super().finish_plan(new_plan)
        local = self._local
        assert local is not None
        mask = decision.mask
        if decision.meeting is not None:
            mask = meet_again(decision.meeting, local.columns, self._decide_at_meeting)
        _local_plans.put(local)
        # Of this save: where its writer puts things, which is no part of what is remembered.
        self.plan = SavePlan(local.chosen(mask), new_plan.storage_data, self._paths())
        return self.plan

    def _decide_at_meeting(self, brought: list[PlanColumns | None]) -> list[bytes | None]:
        leader = self._leader()
        in_order = brought[len(brought) - leader :] + brought[: len(brought) - leader]
        self._columns = [late or early for late, early in zip(in_order, self._columns, strict=True)]
        decided = self._decide()
        metadata = decided.metadata()
        self.metadata.state_dict_metadata = metadata.state_dict_metadata
        self.metadata.planner_data = metadata.planner_data
        return decided.masks[leader:] + decided.masks[:leader]

    def lookup_object(self, index: MetadataIndex) -> Any:
        value = self.state_dict.get(index.fqn)
        # What stock asks of a DTensor on the way to its local tensor was asked when it was planned.
        if type(value) is DTensor and type(value._local_tensor) is torch.Tensor:
            return value._local_tensor
        return super().lookup_object(index)

    def _dedup_save_plans(self, all_plans: list[SavePlan]) -> list[SavePlan]:
        """For plans with their items: the same decision."""
        columns = [PlanColumns.of(plan.items, None) for plan in all_plans]
        decided = GlobalPlan.of(columns, lowest_rank=self.dedup_save_to_lowest_rank)
        return [
            dataclasses.replace(plan, items=LocalPlan((), plan.items, one).chosen(mask))
            for plan, one, mask in zip(all_plans, columns, decided.masks, strict=True)
        ]
