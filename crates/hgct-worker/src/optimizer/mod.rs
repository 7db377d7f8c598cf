//! The optimizer of an update owner: AdamW over host slices, the same bits for every owner.
//!
//! All arithmetic is elementwise f32 without contraction of a multiply and an add, contributions
//! are added in the order in which they are given, and norms are f64 sums over a fixed tree. So
//! neither the owner, nor how rows are split among owners, nor the width of the processor's
//! vectors changes a bit.

mod environment;
mod kernel;
mod norm;
mod owned;

use hgct_core::job::Recipe;

use environment::DefaultEnvironment;
pub use norm::{clip_factor, squared_norm_blocks, sum_in_tree};
pub use owned::{OwnedSlice, SliceState, Slot, Values};

/// AdamW with decoupled weight decay (Loshchilov and Hutter 2019, arXiv 1711.05101).
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct AdamW {
    /// Decay of the first moment.
    pub beta1: f64,
    /// Decay of the second moment.
    pub beta2: f64,
    /// Added to the root of the second moment.
    pub eps: f64,
    /// Share of the parameter, times the learning rate, that is taken away each step.
    pub weight_decay: f64,
}

/// What is particular to one step.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct UpdateStep {
    /// Number of this update, from 1, for the bias corrections.
    pub number: u64,
    /// Learning rate.
    pub learning_rate: f64,
    /// One over the tokens of the step: gradients are sums over tokens.
    pub scale: f64,
    /// What clipping leaves of the gradient, see [`clip_factor`].
    pub clip_factor: f64,
}

impl From<&Recipe> for AdamW {
    fn from(recipe: &Recipe) -> Self {
        let Recipe { beta1, beta2, eps, weight_decay, .. } = *recipe;
        Self { beta1, beta2, eps, weight_decay }
    }
}

impl AdamW {
    /// Updates `parameter`, `m` and `v` in place from the sum of gradients; all are equally long.
    /// `decays` is false for norms and biases.
    pub fn update(
        &self,
        step: &UpdateStep,
        decays: bool,
        state: (&mut [f32], &mut [f32], &mut [f32]),
        gradient_sum: &[f32],
    ) {
        let _default = DefaultEnvironment::enter();
        kernel::update(&self.coefficients(step, decays), state, gradient_sum);
    }

    /// Everything that does not depend on the element, worked out in f64 and rounded once.
    fn coefficients(&self, step: &UpdateStep, decays: bool) -> kernel::Coefficients {
        let bias1 = 1.0 - power(self.beta1, step.number);
        let bias2 = 1.0 - power(self.beta2, step.number);
        let decay = if decays { step.learning_rate * self.weight_decay } else { 0.0 };
        kernel::Coefficients {
            gradient_scale: (step.scale * step.clip_factor) as f32,
            keep: (1.0 - decay) as f32,
            rate1: (1.0 - self.beta1) as f32,
            beta2: self.beta2 as f32,
            rate2: (1.0 - self.beta2) as f32,
            inverse_root_bias2: (1.0 / bias2.sqrt()) as f32,
            eps: self.eps as f32,
            step_size: (step.learning_rate / bias1) as f32,
        }
    }
}

/// Adds one contribution to the sum of gradients; both are equally long. Call it in pipeline order.
pub fn add_contribution(sum: &mut [f32], contribution: &[f32]) {
    let _default = DefaultEnvironment::enter();
    kernel::add(sum, contribution);
}

/// `base` to a whole power by squaring: plain multiplications, so the same bits on every machine,
/// which a platform's `pow` does not promise.
fn power(base: f64, exponent: u64) -> f64 {
    let (mut result, mut square, mut rest) = (1.0, base, exponent);
    while rest > 0 {
        if rest & 1 == 1 {
            result *= square;
        }
        square *= square;
        rest >>= 1;
    }
    result
}

#[cfg(test)]
mod tests;
