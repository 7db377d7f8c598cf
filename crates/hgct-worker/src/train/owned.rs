//! The slices that this rank updates: master parameters and AdamW's moments, in host memory.

use std::collections::BTreeMap;
use std::ops::Range;

use hgct_core::ids::Rank;
use hgct_core::init;
use hgct_core::model::{ModelSpec, TensorSpec};
use hgct_core::plan::{OwnedGroup, Plan};
use hgct_core::slice::{Role, Slice, blocks};

use crate::optimizer::{AdamW, OwnedSlice, Slot, UpdateStep, Values};

/// The one slot of today: source and target of every update.
const SLOT: Slot = Slot(0);

/// All groups that a rank owns.
pub(super) struct Owned {
    pub(super) groups: Vec<Group>,
    /// Number of each tensor's first update block in the model, and of all blocks.
    first_block: BTreeMap<String, usize>,
    num_blocks: usize,
}

/// One owned group.
pub(super) struct Group {
    /// Index in `Plan::owners`.
    pub(super) index: usize,
    /// Its slices, in the plan's order.
    pub(super) parts: Vec<Part>,
}

/// One slice of a group.
pub(super) struct Part {
    pub(super) tensor: TensorSpec,
    pub(super) owned: OwnedSlice,
    /// Number of its first update block among the tensor's.
    first_block: usize,
    /// Elements of parameter, m and v that were restored: all or none.
    restored: [u64; 3],
}

/// Owned state as it was after a step, for a checkpoint; shared with the owner until it changes.
pub struct Snapshot {
    /// Slice, role and values.
    pub entries: Vec<(Slice, Role, Values)>,
}

impl Owned {
    pub(super) fn new(plan: &Plan, rank: Rank) -> Self {
        let (tensors, num_parameters) = (plan.model.tensors(), plan.model.num_parameters());
        let mut first_block = BTreeMap::new();
        let mut num_blocks = 0;
        for tensor in &tensors {
            first_block.insert(tensor.name.clone(), num_blocks);
            num_blocks += blocks(tensor, num_parameters).len();
        }
        let mine = plan.owners.iter().enumerate().filter(|(_, group)| group.owner == rank);
        let groups = mine.map(|(index, group)| Group::new(index, group, &tensors, num_parameters)).collect();
        Self { groups, first_block, num_blocks }
    }

    pub(super) fn group(&self, index: usize) -> Option<&Group> {
        self.groups.iter().find(|group| group.index == index)
    }

    /// The squared norm of every update block of the model, zero where it is not owned here. Added
    /// over all ranks, each block has exactly one term: the sum is exact, whoever owns what.
    pub(super) fn block_norms(&self) -> Vec<f64> {
        let mut norms = vec![0.0; self.num_blocks];
        for part in self.groups.iter().flat_map(|group| &group.parts) {
            let first = self.first_block.get(&part.tensor.name).copied().unwrap_or(0) + part.first_block;
            let own = part.owned.squared_norms();
            norms[first..first + own.len()].copy_from_slice(&own);
        }
        norms
    }

    pub(super) fn update(&mut self, adamw: &AdamW, step: &UpdateStep) {
        for part in self.groups.iter_mut().flat_map(|group| &mut group.parts) {
            part.owned.update(adamw, step, SLOT, SLOT);
        }
    }

    /// The step was skipped.
    pub(super) fn forget_gradients(&mut self) {
        for part in self.groups.iter_mut().flat_map(|group| &mut group.parts) {
            part.owned.forget_gradient();
        }
    }

    /// Puts restored rows in place.
    pub(super) fn restore(&mut self, slice: &Slice, role: Role, values: &[f32]) -> Result<(), String> {
        let number = match role {
            // One and the same while the master dtype is the compute dtype.
            Role::Parameter | Role::Master => 0,
            Role::M => 1,
            Role::V => 2,
            Role::Gradient => return Err(format!("{slice} is not restored from {role:?}")),
        };
        let mut left = slice.num_elements();
        if values.len() as u64 != left {
            return Err(format!("{slice}: {} values came for {left} elements", values.len()));
        }
        for part in self.groups.iter_mut().flat_map(|group| &mut group.parts) {
            let own = part.owned.slice().clone();
            let Some(common) = own.intersection(slice) else { continue };
            let width = part.tensor.row_elements();
            let at = |base: &Slice| ((common.begin[0] - base.begin[0]) * width) as usize;
            let (to, from, count) = (at(&own), at(slice), common.num_elements() as usize);
            let state = part.owned.state_mut(SLOT);
            let buffer = &mut **[&mut state.parameter, &mut state.m, &mut state.v][number];
            buffer[to..to + count].copy_from_slice(&values[from..from + count]);
            part.restored[number] += count as u64;
            left -= count as u64;
        }
        if left == 0 { Ok(()) } else { Err(format!("{left} elements of {slice} are not owned here")) }
    }

    /// Makes initial parameters where nothing was restored; refuses state that is half there.
    pub(super) fn initialise(&mut self, model: &ModelSpec, seed: u64) -> Result<(), String> {
        for part in self.groups.iter_mut().flat_map(|group| &mut group.parts) {
            let elements = part.owned.slice().num_elements();
            if part.restored == [elements; 3] {
                continue;
            }
            if part.restored != [0; 3] {
                let [parameter, m, v] = part.restored;
                let slice = part.owned.slice();
                return Err(format!(
                    "{slice}: of {elements} elements {parameter} of the parameter, {m} m and {v} v were restored"
                ));
            }
            let first = part.owned.slice().begin[0] * part.tensor.row_elements();
            init::fill(model, seed, &part.tensor, first, &mut part.owned.state_mut(SLOT).parameter);
        }
        Ok(())
    }

    pub(super) fn snapshot(&self) -> Snapshot {
        let mut entries = Vec::new();
        for part in self.groups.iter().flat_map(|group| &group.parts) {
            let (slice, state) = (part.owned.slice(), part.owned.state(SLOT));
            for (role, values) in
                [(Role::Parameter, &state.parameter), (Role::M, &state.m), (Role::V, &state.v)]
            {
                entries.push((slice.clone(), role, values.clone()));
            }
        }
        Snapshot { entries }
    }
}

impl Group {
    fn new(index: usize, group: &OwnedGroup, tensors: &[TensorSpec], num_parameters: u64) -> Self {
        let part = |slice: &Slice| {
            let tensor = tensors.iter().find(|tensor| tensor.name == slice.tensor)?.clone();
            let before = |block: &&Range<u64>| block.start < slice.begin[0];
            let first_block = blocks(&tensor, num_parameters).iter().filter(before).count();
            let owned = OwnedSlice::new(&tensor, slice.rows(), num_parameters, 1);
            Some(Part { tensor, owned, first_block, restored: [0; 3] })
        };
        Self { index, parts: group.slices.iter().filter_map(part).collect() }
    }

    /// Master parameters of all parts, one after the other.
    pub(super) fn parameters(&self) -> Vec<f32> {
        let mut values = Vec::with_capacity(self.num_elements());
        for part in &self.parts {
            values.extend_from_slice(part.parameters());
        }
        values
    }

    pub(super) fn num_elements(&self) -> usize {
        self.parts.iter().map(|part| part.parameters().len()).sum()
    }
}

impl Part {
    pub(super) fn parameters(&self) -> &[f32] {
        &self.owned.state(SLOT).parameter
    }
}
