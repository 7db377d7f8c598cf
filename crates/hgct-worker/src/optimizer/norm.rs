//! Squared norms over a fixed tree, in f64.

use std::ops::Range;

use hgct_core::model::TensorSpec;
use hgct_core::slice;

use super::environment::DefaultEnvironment;

/// Independent partial sums; a constant, never the vector width of the machine.
const LANES: usize = 16;

/// Squared norms of the update blocks of `tensor` that lie in `rows`, in order. `values` are the
/// elements of those rows; rows are cut where blocks are.
pub fn squared_norm_blocks(
    tensor: &TensorSpec,
    num_parameters: u64,
    rows: &Range<u64>,
    values: &[f32],
) -> Vec<f64> {
    let _default = DefaultEnvironment::enter();
    let width = tensor.row_elements();
    slice::blocks(tensor, num_parameters)
        .into_iter()
        .filter(|block| block.start >= rows.start && block.end <= rows.end)
        .map(|block| {
            let at = |row: u64| ((row - rows.start) * width) as usize;
            squared_norm(&values[at(block.start)..at(block.end)])
        })
        .collect()
}

/// Adds neighbours until one number is left: a tree that depends on the count alone. Give it the
/// squared norms of all blocks of the model, in the order of its tensors.
pub fn sum_in_tree(values: &[f64]) -> f64 {
    let _default = DefaultEnvironment::enter();
    let mut level = values.to_vec();
    while level.len() > 1 {
        level = level.chunks(2).map(|pair| pair.iter().sum()).collect();
    }
    level.first().copied().unwrap_or(0.0)
}

/// What clipping by the global norm leaves: `min(1, clip / (norm + 1e-6))`, as PyTorch's
/// `clip_grad_norm_` has it; 1 when `clip` is 0. A norm that is not finite is for the caller to
/// refuse.
pub fn clip_factor(norm: f64, clip: f64) -> f64 {
    if clip > 0.0 { (clip / (norm + 1e-6)).min(1.0) } else { 1.0 }
}

/// Sum of squares. Element `i` goes to lane `i % LANES`; lanes are added as a tree.
fn squared_norm(values: &[f32]) -> f64 {
    #[cfg(target_arch = "x86_64")]
    if std::arch::is_x86_feature_detected!("avx2") {
        // SAFETY: the processor has AVX2.
        return sum_in_tree(&unsafe { lanes_avx2(values) });
    }
    sum_in_tree(&lanes(values))
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2")]
fn lanes_avx2(values: &[f32]) -> [f64; LANES] {
    lanes(values)
}

#[inline(always)]
#[allow(clippy::inline_always, reason = "must take over the caller's target features")]
pub(super) fn lanes(values: &[f32]) -> [f64; LANES] {
    let mut sums = [0.0; LANES];
    let (whole, rest) = values.as_chunks::<LANES>();
    for chunk in whole {
        for (sum, x) in sums.iter_mut().zip(chunk) {
            *sum += f64::from(*x) * f64::from(*x);
        }
    }
    for (sum, x) in sums.iter_mut().zip(rest) {
        *sum += f64::from(*x) * f64::from(*x);
    }
    sums
}
