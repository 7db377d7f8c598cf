//! A slice in the hands of its update owner.

use std::ops::Range;

use hgct_core::model::TensorSpec;
use hgct_core::slice::Slice;

use crate::Result;

use super::{AdamW, UpdateStep, add_contribution, squared_norm_blocks};

/// Index of one copy of a slice's optimizer state.
///
/// An update reads the source slot and writes the target slot. Today both are the same; with a
/// spare one, a step that is not committed can be forgotten.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Slot(pub usize);

/// Parameter and moments of a slice, row-major, equally long.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct SliceState {
    /// The parameter in the master dtype.
    pub parameter: Vec<f32>,
    /// AdamW's first moment.
    pub m: Vec<f32>,
    /// AdamW's second moment.
    pub v: Vec<f32>,
}

impl SliceState {
    /// Zeros.
    pub fn zeros(num_elements: usize) -> Self {
        let zeros = || vec![0.0; num_elements];
        Self { parameter: zeros(), m: zeros(), v: zeros() }
    }

    pub(super) fn as_mut_slices(&mut self) -> (&mut [f32], &mut [f32], &mut [f32]) {
        (&mut self.parameter, &mut self.m, &mut self.v)
    }
}

/// A slice with its state and the sum of the gradients that have arrived for it.
#[derive(Debug, Clone)]
pub struct OwnedSlice {
    slice: Slice,
    tensor: TensorSpec,
    num_parameters: u64,
    slots: Vec<SliceState>,
    gradient: Vec<f32>,
    num_contributions: u32,
}

impl OwnedSlice {
    /// Rows `rows` of `tensor`, in a model of `num_parameters`, with all state zero.
    pub fn new(tensor: &TensorSpec, rows: Range<u64>, num_parameters: u64, num_slots: usize) -> Self {
        let slice = Slice::rows_of(tensor, rows);
        let num_elements = slice.num_elements() as usize;
        Self {
            slots: vec![SliceState::zeros(num_elements); num_slots.max(1)],
            gradient: vec![0.0; num_elements],
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
        &self.gradient
    }

    /// Contributions of this step so far.
    pub fn num_contributions(&self) -> u32 {
        self.num_contributions
    }

    /// Adds a contribution, as long as the slice. Call it in pipeline order.
    pub fn contribute(&mut self, contribution: &[f32]) -> Result<()> {
        if contribution.len() != self.gradient.len() {
            return Err(hgct_core::Error::Plan {
                invariant: "a contribution is as long as its slice",
                found: format!("{} elements for {}", contribution.len(), self.slice),
            }
            .into());
        }
        if self.num_contributions == 0 {
            self.gradient.copy_from_slice(contribution);
        } else {
            add_contribution(&mut self.gradient, contribution);
        }
        self.num_contributions += 1;
        Ok(())
    }

    /// Squared norms of the gradient sum, one an update block, in order.
    pub fn squared_norms(&self) -> Vec<f64> {
        squared_norm_blocks(&self.tensor, self.num_parameters, &self.slice.rows(), &self.gradient)
    }

    /// Makes the new state in `target` from that in `source`, and begins the next step.
    pub fn update(&mut self, adamw: &AdamW, step: &UpdateStep, source: Slot, target: Slot) {
        let decays = self.tensor.decays();
        if source == target {
            adamw.update(step, decays, self.slots[target.0].as_mut_slices(), &self.gradient);
        } else {
            let mut state = std::mem::take(&mut self.slots[target.0]);
            state.clone_from(&self.slots[source.0]);
            adamw.update(step, decays, state.as_mut_slices(), &self.gradient);
            self.slots[target.0] = state;
        }
        self.forget_gradient();
    }

    /// Begins the next step without an update: the step was skipped or aborted.
    pub fn forget_gradient(&mut self) {
        self.num_contributions = 0;
    }
}
