//! A slice in the hands of its update owner.

use std::ops::{Deref, DerefMut, Range};
use std::sync::Arc;

use hgct_core::model::TensorSpec;
use hgct_core::slice::Slice;

use crate::Result;
use crate::engine::Lease;

use super::{AdamW, UpdateStep, add_contribution, squared_norm_blocks};

/// Index of one copy of a slice's optimizer state.
///
/// An update reads the source slot and writes the target slot. Today both are the same; with a
/// spare one, a step that is not committed can be forgotten.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Slot(pub usize);

/// Values that snapshots may share. Writing copies them first while one does: a checkpoint that is
/// written out before the next update costs no memory, one that is slower only what it still needs.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Values(Arc<Vec<f32>>);

impl From<Vec<f32>> for Values {
    fn from(values: Vec<f32>) -> Self {
        Self(Arc::new(values))
    }
}

impl Deref for Values {
    type Target = [f32];

    fn deref(&self) -> &[f32] {
        &self.0
    }
}

impl DerefMut for Values {
    fn deref_mut(&mut self) -> &mut [f32] {
        let values: &mut Vec<f32> = Arc::make_mut(&mut self.0);
        values
    }
}

impl AsRef<[f32]> for Values {
    fn as_ref(&self) -> &[f32] {
        self
    }
}

/// Parameter and moments of a slice, row-major, equally long.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct SliceState {
    /// The parameter in the master dtype.
    pub parameter: Values,
    /// AdamW's first moment.
    pub m: Values,
    /// AdamW's second moment.
    pub v: Values,
}

impl SliceState {
    /// Zeros.
    pub fn zeros(num_elements: usize) -> Self {
        let zeros = || vec![0.0; num_elements].into();
        Self { parameter: zeros(), m: zeros(), v: zeros() }
    }

    pub(super) fn as_mut_slices(&mut self) -> (&mut [f32], &mut [f32], &mut [f32]) {
        (&mut self.parameter, &mut self.m, &mut self.v)
    }
}

/// A slice with its state and the sum of the gradients that have arrived for it.
pub struct OwnedSlice {
    slice: Slice,
    tensor: TensorSpec,
    num_parameters: u64,
    slots: Vec<SliceState>,
    gradient: Gradient,
    num_contributions: u32,
}

/// Where the gradients of a step are added up.
enum Gradient {
    /// In memory of its own, empty until it is needed: between the update and the next exchange the
    /// heap has it for activations.
    Sum(Vec<f32>),
    /// Not at all: there is one contribution, which the engine lends.
    Lent(Arc<Lease>, Range<usize>),
}

impl OwnedSlice {
    /// Rows `rows` of `tensor`, in a model of `num_parameters`, with all state zero.
    pub fn new(tensor: &TensorSpec, rows: Range<u64>, num_parameters: u64, num_slots: usize) -> Self {
        let slice = Slice::rows_of(tensor, rows);
        let num_elements = slice.num_elements() as usize;
        Self {
            slots: vec![SliceState::zeros(num_elements); num_slots.max(1)],
            gradient: Gradient::Sum(Vec::new()),
            num_contributions: 0,
            tensor: tensor.clone(),
            num_parameters,
            slice,
        }
    }

    /// Which slice it is.
    pub fn slice(&self) -> &Slice {
        &self.slice
    }

    /// The state in `slot`.
    pub fn state(&self, slot: Slot) -> &SliceState {
        &self.slots[slot.0]
    }

    /// The state in `slot`, to fill it from a checkpoint or the initial parameters.
    pub fn state_mut(&mut self, slot: Slot) -> &mut SliceState {
        &mut self.slots[slot.0]
    }

    /// Sum of the gradients of this step.
    pub fn gradient(&self) -> &[f32] {
        match &self.gradient {
            Gradient::Sum(values) => values,
            // Both were checked when it was lent.
            Gradient::Lent(lease, range) => {
                lease.as_f32().ok().and_then(|values| values.get(range.clone())).unwrap_or_default()
            }
        }
    }

    /// Contributions of this step so far.
    pub fn num_contributions(&self) -> u32 {
        self.num_contributions
    }

    /// Adds a contribution, as long as the slice. Call it in pipeline order.
    pub fn contribute(&mut self, contribution: &[f32]) -> Result<()> {
        self.expect_length(contribution.len())?;
        if let Gradient::Lent(..) = self.gradient {
            self.gradient = Gradient::Sum(self.gradient().to_vec());
        }
        let Gradient::Sum(sum) = &mut self.gradient else { return Ok(()) };
        if self.num_contributions == 0 {
            sum.clear();
            sum.extend_from_slice(contribution);
        } else {
            add_contribution(sum, contribution);
        }
        self.num_contributions += 1;
        Ok(())
    }

    /// The step's only contribution, a part of what the engine lends, read where it is.
    pub fn contribute_lent(&mut self, lease: &Arc<Lease>, range: Range<usize>) -> Result<()> {
        let contribution = lease.as_f32()?.get(range.clone()).unwrap_or_default();
        if self.num_contributions > 0 {
            return self.contribute(contribution);
        }
        self.expect_length(contribution.len())?;
        self.gradient = Gradient::Lent(Arc::clone(lease), range);
        self.num_contributions = 1;
        Ok(())
    }

    fn expect_length(&self, found: usize) -> Result<()> {
        if found as u64 == self.slice.num_elements() {
            return Ok(());
        }
        Err(hgct_core::Error::Plan {
            invariant: "a contribution is as long as its slice",
            found: format!("{found} elements for {}", self.slice),
        }
        .into())
    }

    /// Squared norms of the gradient sum, one an update block, in order.
    pub fn squared_norms(&self) -> Vec<f64> {
        squared_norm_blocks(&self.tensor, self.num_parameters, &self.slice.rows(), self.gradient())
    }

    /// Makes the new state in `target` from that in `source`, and begins the next step.
    pub fn update(&mut self, adamw: &AdamW, step: &UpdateStep, source: Slot, target: Slot) {
        let decays = self.tensor.decays();
        let mut state = std::mem::take(&mut self.slots[target.0]);
        if source != target {
            state.clone_from(&self.slots[source.0]);
        }
        adamw.update(step, decays, state.as_mut_slices(), self.gradient());
        self.slots[target.0] = state;
        self.forget_gradient();
    }

    /// Begins the next step without an update: the step was skipped or aborted.
    pub fn forget_gradient(&mut self) {
        self.num_contributions = 0;
        self.gradient = Gradient::Sum(Vec::new());
    }
}
