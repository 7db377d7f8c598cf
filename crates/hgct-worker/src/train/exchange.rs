//! Gradients to their update owners, parameters back to their holders.

use std::collections::BTreeMap;
use std::sync::Arc;

use hgct_comm::{Communicator, Deadline, Received, Tag, TagKind};
use hgct_core::dtype::DType;
use hgct_core::ids::Rank;
use hgct_core::model::TensorSpec;
use hgct_core::plan::{Plan, StageId};
use hgct_core::slice::Slice;

use super::owned::{Group, Owned};
use crate::engine::{Engine, ImportRows, Lease};
use crate::{Error, Result};

/// What a rank sends and expects in a step.
pub(super) struct Exchange {
    rank: Rank,
    plan: Arc<Plan>,
    tensors: BTreeMap<String, TensorSpec>,
    /// Groups that become final with a layer's backward on a stage of this rank.
    by_layer: BTreeMap<(StageId, u32), Vec<usize>>,
    /// Own contributions to own groups of this step.
    local: BTreeMap<(usize, StageId), Vec<Arc<Lease>>>,
    /// Parameters that came for groups of this step.
    arrived: BTreeMap<usize, Arc<Received>>,
}

impl Exchange {
    pub(super) fn new(plan: &Arc<Plan>, rank: Rank) -> Self {
        let mut by_layer: BTreeMap<(StageId, u32), Vec<usize>> = BTreeMap::new();
        for (index, group) in plan.owners.iter().enumerate() {
            for holder in group.holders.iter().filter(|holder| plan.stage(holder.stage).rank() == rank) {
                by_layer.entry((holder.stage, holder.layer)).or_default().push(index);
            }
        }
        let tensors = plan.model.tensors().into_iter().map(|tensor| (tensor.name.clone(), tensor)).collect();
        Self {
            rank,
            plan: Arc::clone(plan),
            tensors,
            by_layer,
            local: BTreeMap::new(),
            arrived: BTreeMap::new(),
        }
    }

    /// A layer's gradients are final: sends them to their owners, keeps what is owned here.
    pub(super) fn offer(
        &mut self,
        stage: StageId,
        layer: u32,
        leases: Vec<Lease>,
        comm: Option<&Communicator>,
        step: u64,
        deadline: Deadline,
    ) -> Result<()> {
        let leases: BTreeMap<String, Arc<Lease>> =
            leases.into_iter().map(|lease| (lease.name.clone(), Arc::new(lease))).collect();
        for index in self.by_layer.get(&(stage, layer)).into_iter().flatten() {
            let group = &self.plan.owners[*index];
            let of = |slice: &Slice| leases.get(&slice.tensor).ok_or_else(|| self.missing(&slice.tensor));
            if group.owner == self.rank {
                let own: Result<Vec<_>> = group.slices.iter().map(|slice| of(slice).cloned()).collect();
                self.local.insert((*index, stage), own?);
                continue;
            }
            let mut values = Vec::with_capacity(group.num_elements() as usize);
            for slice in &group.slices {
                values.extend_from_slice(self.rows(of(slice)?, slice)?);
            }
            let tag = Tag::new(TagKind::Gradient, *index as u32, stage.0, step);
            self.comm(comm)?.send(group.owner, tag, values, deadline)?;
        }
        Ok(())
    }

    /// Adds the contributions to an owned group in the plan's order: pipeline after pipeline.
    pub(super) fn reduce(
        &mut self,
        group: &mut Group,
        comm: Option<&Communicator>,
        step: u64,
        deadline: Deadline,
    ) -> Result<()> {
        let plan = Arc::clone(&self.plan);
        let holders = &plan.owners[group.index].holders;
        for holder in holders {
            let from = plan.stage(holder.stage).rank();
            if from == self.rank {
                let leases = self.local.remove(&(group.index, holder.stage));
                let leases =
                    leases.ok_or_else(|| self.missing(&format!("gradients of group {}", group.index)))?;
                for (part, lease) in group.parts.iter_mut().zip(&leases) {
                    if holders.len() == 1 {
                        let range = self.element_range(part.owned.slice())?;
                        part.owned.contribute_lent(lease, range)?;
                    } else {
                        part.owned.contribute(self.rows(lease, part.owned.slice())?)?;
                    }
                }
                continue;
            }
            let tag = Tag::new(TagKind::Gradient, group.index as u32, holder.stage.0, step);
            let message = self.comm(comm)?.recv(from, tag, deadline)?;
            let mut values = self.floats(&message, group.num_elements())?;
            for part in &mut group.parts {
                let (own, rest) = values.split_at(part.parameters().len());
                part.owned.contribute(own)?;
                values = rest;
            }
        }
        Ok(())
    }

    /// Sends owned parameters to every other rank that holds them. `version` counts steps.
    pub(super) fn send_parameters(
        &self,
        owned: &Owned,
        comm: Option<&Communicator>,
        version: u64,
        deadline: Deadline,
    ) -> Result<()> {
        for group in &owned.groups {
            let others = self.other_holders(group.index);
            if others.is_empty() {
                continue;
            }
            // One copy for all receivers: the next update must not wait for the wire.
            let values = Arc::new(group.parameters());
            for rank in others {
                let tag = Tag::new(TagKind::Parameter, group.index as u32, 0, version);
                self.comm(comm)?.send(rank, tag, Arc::clone(&values), deadline)?;
            }
        }
        Ok(())
    }

    /// Waits for the parameters of a stage and imports them, all in one call.
    pub(super) fn gather(
        &mut self,
        stage: StageId,
        owned: &Owned,
        engine: &mut dyn Engine,
        comm: Option<&Communicator>,
        version: u64,
        deadline: Deadline,
    ) -> Result<()> {
        let plan = Arc::clone(&self.plan);
        let mut rows = Vec::new();
        for (index, group) in plan.owners.iter().enumerate() {
            if !group.holders.iter().any(|holder| holder.stage == stage) {
                continue;
            }
            if group.owner == self.rank {
                let Some(group) = owned.group(index) else { continue };
                for part in &group.parts {
                    let values = part.parameters();
                    rows.push(import_rows(
                        part.owned.slice(),
                        values.as_ptr().cast(),
                        values.len(),
                        Box::new(()),
                    ));
                }
                continue;
            }
            if !self.arrived.contains_key(&index) {
                let tag = Tag::new(TagKind::Parameter, index as u32, 0, version);
                let message = self.comm(comm)?.recv(group.owner, tag, deadline)?;
                self.floats(&message, group.num_elements() as usize)?;
                self.arrived.insert(index, Arc::new(message));
            }
            let message = &self.arrived[&index];
            let mut next = 0;
            for slice in &group.slices {
                let count = slice.num_elements() as usize;
                let address = message[next * 4..].as_ptr();
                rows.push(import_rows(slice, address, count, Box::new(Arc::clone(message))));
                next += count;
            }
        }
        engine.import(stage, &rows)
    }

    /// Forgets what belongs to one step.
    pub(super) fn end_step(&mut self) {
        self.local.clear();
        self.arrived.clear();
    }

    fn other_holders(&self, index: usize) -> Vec<Rank> {
        let holders = self.plan.owners[index].holders.iter();
        let mut ranks: Vec<Rank> = holders.map(|holder| self.plan.stage(holder.stage).rank()).collect();
        ranks.retain(|rank| *rank != self.rank);
        ranks.sort_unstable();
        ranks.dedup();
        ranks
    }

    /// The rows of a slice inside of a lease on its whole tensor.
    fn rows<'a>(&self, lease: &'a Lease, slice: &Slice) -> Result<&'a [f32]> {
        let range = self.element_range(slice)?;
        lease.as_f32()?.get(range).ok_or_else(|| self.missing(&slice.to_string()))
    }

    /// Where a slice's rows lie in its tensor.
    fn element_range(&self, slice: &Slice) -> Result<std::ops::Range<usize>> {
        let tensor = self.tensors.get(&slice.tensor).ok_or_else(|| self.missing(&slice.tensor))?;
        let range = slice.element_range(tensor).ok_or_else(|| self.missing(&slice.to_string()))?;
        Ok(range.start as usize..range.end as usize)
    }

    fn floats<'a>(&self, message: &'a Received, expected: usize) -> Result<&'a [f32]> {
        match message.as_f32() {
            Some(values) if values.len() == expected => Ok(values),
            _ => Err(Error::Protocol {
                rank: self.rank,
                message: format!(
                    "{} from {} has {} bytes where {} were expected",
                    message.tag(),
                    message.peer(),
                    message.len(),
                    expected * 4
                ),
            }),
        }
    }

    fn comm<'a>(&self, comm: Option<&'a Communicator>) -> Result<&'a Communicator> {
        comm.ok_or_else(|| Error::Protocol {
            rank: self.rank,
            message: "not connected to the other ranks".into(),
        })
    }

    fn missing(&self, what: &str) -> Error {
        Error::Protocol { rank: self.rank, message: format!("the engine did not hand out {what}") }
    }
}

fn import_rows(slice: &Slice, address: *const u8, count: usize, owner: Box<dyn Send + Sync>) -> ImportRows {
    // SAFETY: the address is that of `count` floats in a received message, which the owner keeps
    // alive, or in the owned master buffer, which outlives the import and is not written during it;
    // engines copy what they import.
    let lease = unsafe {
        Lease::from_raw(slice.tensor.clone(), DType::F32, slice.shape(), address, count * 4, owner)
    };
    ImportRows { lease, first_row: slice.begin[0] }
}
